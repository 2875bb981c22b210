"""Find the sites of a model by its family's table, and read its configuration."""

from .binder import bind
from .paths import configured
