"""`lmops demo`: pages in a browser on which a person tries a published model."""
