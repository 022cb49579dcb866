"""Published models: import, tokenizers, export."""
