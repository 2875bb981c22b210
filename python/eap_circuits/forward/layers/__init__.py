"""What a run changes inside layers: where the last MLP runs, what blocks give, how attention shares keys."""
