"""Tokens that prompts share before they differ run once, where a model's own cache serves it."""
