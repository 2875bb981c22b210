"""The only place that knows Hugging Face module names."""

from ..families import (
    ENCODER_DECODERS,
    FAMILIES,
    Call,
    Family,
    Mixer,
    family_of,
    propose,
    register_family,
    whole_layers,
)
from ..modules.norms import Kinds, Norm, side_by_side
from ..modules.offloading import as_given, device_of, is_offloaded, read
from ..modules.parts import Shares, computes_in_parts, is_fully_sharded, is_in_parts, is_shard
from ..modules.projections import (
    Place,
    Projection,
    Together,
    concatenate,
    is_plain,
    joined,
    linear_bias,
    linear_shape,
    linear_weight,
    nonlinearity,
    restore,
)
from .architecture import Architecture, Layer
from .binding import bind, configured
from .classes import TESTED
from .hooks_of_others import KINDS, foreign_hooks
from .nonlinear import nonlinear_parts
from .pretrained import DEMO_MODEL, load_model
from .sites import ReceiverSite, SenderSite, receiver_sites, sender_sites
from .wrappers import unwrapped
