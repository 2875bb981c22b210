"""What tells models and data apart, for runs that go on where another stopped and for results."""

from __future__ import annotations

import hashlib
import os
from typing import Any

from torch import Tensor

from .tasks import PairedDataset

_SAMPLED = 64  # numbers of each weight that tell models apart


def model_identity(model: Any) -> list[Any]:
    """What tells models apart: name, configuration, dtype and some of every weight; plain JSON values.

    The same whatever device and threads compute, so that a run can go on with others.
    """
    digest = hashlib.sha256()
    for name, weight in model.named_parameters():
        digest.update(name.encode())
        # Quantised and offloaded weights have no plain numbers.
        if type(weight.data) is Tensor and weight.is_floating_point() and not weight.is_meta:
            few = weight.detach().flatten()[:_SAMPLED]
            digest.update(few.float().cpu().numpy().tobytes())
    dtype = model.get_input_embeddings().weight.dtype
    return [model_name(model), model.config.to_json_string(), str(dtype), digest.hexdigest()]


def data_identity(data: PairedDataset) -> list[str]:
    """What tells prompt pairs apart: digests of their tokens, lengths, answers and alignment."""
    tensors = (data.clean, data.corrupted, data.lengths, data.answers, data.corrupted_lengths, data.alignment)
    return [tensor_digest(x) for x in tensors if x is not None]


def tensor_digest(x: Tensor) -> str:
    return hashlib.sha256(x.numpy(force=True).tobytes()).hexdigest()


def model_name(model: Any) -> str:
    """The hub name, or the folder's own name: results are passed on, and whole paths mean nothing elsewhere."""
    name = str(getattr(model.config, "name_or_path", "") or type(model).__name__)
    return os.path.basename(os.path.normpath(name)) if os.path.isdir(name) else name
