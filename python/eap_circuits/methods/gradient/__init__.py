"""Methods that integrate gradients along a path; each module says what a point of its path is."""

from .activations import ActivationsMethod
from .adaptive import AdaptiveMethod
from .conductance import ConductanceMethod
from .inputs import InputsMethod
from .method import GradientMethod
from .plans import Plan, check_divisible
