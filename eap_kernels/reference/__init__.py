"""The specification: every operator in plain PyTorch, on any device, in any floating dtype."""
