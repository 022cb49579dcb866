"""What one machine keeps and shows: files that are whole or not there, manifests, progress."""
