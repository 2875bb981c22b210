"""Where the tokens of a pair stand: without padding, and compared with each other."""
