"""Models of which only the shapes are there."""
