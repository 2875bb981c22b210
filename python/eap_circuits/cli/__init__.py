"""The `eap` command."""

from .entry import app, main

__all__ = ["app", "main"]
