"""The process that owns one device: its loop, its lanes and its entry point."""
