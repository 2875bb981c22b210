"""Passes of equal shape: captured once, then replayed."""
