"""Where prompt pairs are scored: at given positions, or at the tokens of their answers."""
