"""What is known of architectures: tables, those that users and other packages add, and what discovery finds."""

from .discovery import Call, propose, whole_layers
from .encoder_decoders import ENCODER_DECODERS
from .family import Factor, Family, Mixer, Paths
from .registry import family_of, register_family
from .tables import FAMILIES
