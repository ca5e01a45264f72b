"""Model families, checkpoints and model references; importing this package imports no torch."""
