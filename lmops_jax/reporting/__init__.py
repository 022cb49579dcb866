"""What a run leaves to read: `summary.json`, PNG plots and one self-contained HTML page.

`summary` and `html` need no plotting library; `plots` is matplotlib without a display.
"""
