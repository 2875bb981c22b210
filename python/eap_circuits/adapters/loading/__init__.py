"""Models without weights: only the shapes are known."""
