"""Find the sites of a model by its family's table."""

from .binder import bind
