"""Models of `transformers`, and our own in its world."""
