"""What a long call has done so far, in a file from which the same call goes on."""

from .file import Checkpoint, Where, opened, remaining
from .identity import data_identity, model_identity, model_name, settings_of
from .weights import weights_digest
