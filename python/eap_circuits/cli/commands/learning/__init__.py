"""Commands that run circuits again and again."""
