"""aegaeon serves many language models on few devices; a device changes model between tokens."""

__version__ = "0.1.0"
