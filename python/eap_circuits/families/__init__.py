"""What is known of architectures: tables, those that users and other packages add, and what discovery finds."""

from .around import Call
from .discovery import propose, whole_layers
from .encoder_decoders import ENCODER_DECODERS
from .family import Factor, Family, Mixer, Paths, Sums
from .registry import family_of, is_built_in, register_family
from .tables import FAMILIES
