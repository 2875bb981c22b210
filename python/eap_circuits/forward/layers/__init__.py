"""What a run changes in layers: where the last MLP and gradients run, what blocks give, how attention shares keys."""
