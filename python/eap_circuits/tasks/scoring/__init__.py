"""Tokens that matter: the scored ones, at given positions or of answers, and those of named spans."""
