"""Run one batch: hooks, batches, the prefix cache, the runner; nothing here knows what is read or changed."""

from .batches import TOKENS_PER_BATCH, Batch, batch_of, halves, make_batches, some_of
from .constants import Constants, at_tokens, zeros
from .hooks import Hooks, borrowed, unhook
from .layers.active_tokens import skip_inactive
from .layers.resume import LayerInputs, record_layer_inputs
from .layers.two_sides import two_sides
from .prefixes.prefix import parameters, passes_of
from .prefixes.remembered import once
from .prefixes.reuse import logit_distance, logit_tolerance, of_rounding, why_not_reused
from .replays.captured import Captured, signature
from .replays.uploading import Indices, download, upload
from .runner import EVERYWHERE, Register, Runner, each
from .want_of_memory import give_back_memory, one_want_of_memory, tried_twice
