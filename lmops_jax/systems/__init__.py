"""One package a research system; a system never imports another."""
