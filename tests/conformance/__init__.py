"""Real clients against a real server: what of the interface works with each, as a table."""
