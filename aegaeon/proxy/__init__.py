"""The HTTP side: text in, text out."""
