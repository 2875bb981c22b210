"""The only place that knows Hugging Face module names."""

from .architecture import Architecture, Layer
from .binding import bind
from .families import FAMILIES, Call, Family, family_of, propose, register_family
from .nonlinear import nonlinear_parts
from .norms import Kinds, Norm
from .offloading import as_given, is_offloaded, read
from .pretrained import DEMO_MODEL, load_model
from .projections import Projection, concatenate, group, linear_shape, linear_weight
from .sites import ReceiverSite, SenderSite, receiver_sites, sender_sites
