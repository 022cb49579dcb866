"""Captions with boxes in the manner of GrIT, the data of Kosmos-2 (arXiv:2306.14824): rows, pairs
to train on, and the pipeline that makes them."""
