"""The comparison of methods in the EAP-IG paper, on any model: measured, drawn and written down."""

from .experiment import Experiment, Settings, reproduce
from .page import write_page

__all__ = ["Experiment", "Settings", "reproduce", "write_page"]
