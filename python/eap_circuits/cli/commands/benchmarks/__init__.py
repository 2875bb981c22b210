"""Commands that compare with others, or for them."""
