"""Token batches as Hugging Face users hold them: padded on either side, with an attention mask or without."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...errors import expected, refuse_default_device, warn


def integers(name: str, values: Any, flags: bool = False) -> Tensor:
    """An int64 copy on the CPU; `flags` may also be bool."""
    refuse_default_device()
    try:
        tensor = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise expected(name, "a tensor of integers", type(values).__name__) from error
    if tensor.is_floating_point() or tensor.is_complex() or (tensor.dtype == torch.bool and not flags):
        raise expected(name, "an integer dtype", tensor.dtype)
    return tensor.detach().to("cpu", torch.int64, copy=True)


def real_numbers(name: str, values: Any) -> Tensor:
    """A float64 copy on the CPU."""
    refuse_default_device()
    try:
        tensor = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise expected(name, "a tensor of numbers", type(values).__name__) from error
    if tensor.is_complex() or tensor.dtype == torch.bool:
        raise expected(name, "real numbers", tensor.dtype)
    # Read anew, as torch has rounded a list's numbers to its default dtype.
    return torch.as_tensor(values, dtype=torch.float64).detach().to("cpu", copy=True)


def unpadded(name: str, ids: Any, lengths: Any, mask: Any) -> tuple[Tensor, Tensor]:
    """(ids with any padding on the right, the number of real tokens of each row).

    Args:
        name: what errors call the ids, "clean" or "corrupted".
        ids: int [E, T].
        lengths: int [E], or None if there is a mask.
        mask: [E, T], 1 or True for real tokens, which stand side by side; None for padding on the right.

    Raises:
        InputError: no positions, neither lengths nor mask, lengths that the mask contradicts, a mask of another shape
            or with gaps, or, without a mask, rows that are visibly padded on the left.
    """
    ids = integers(name, ids)
    if ids.dim() == 2 and not ids.shape[1]:
        raise expected(name, "shape [examples, positions] with at least one position", list(ids.shape))
    label = "" if name == "clean" else f"{name}_"
    if mask is None:
        if lengths is None:
            raise expected(f"{label}lengths", f"each prompt's number of tokens, or {label}attention_mask", "neither")
        lengths = integers(f"{label}lengths", lengths)
        if ids.dim() == 2 and lengths.shape == ids.shape[:1] and (found := _left_padded(ids, lengths)).any():
            row = int(found.nonzero()[0])
            wanted = f"padding on the right, or {label}attention_mask"
            raise expected(f"{name}[{row}]", wanted, f"padding on the left ({ids[row].tolist()})")
        return ids, lengths
    real = integers(f"{label}attention_mask", mask, flags=True)
    if real.shape != ids.shape or ids.dim() != 2:
        raise expected(f"{label}attention_mask", f"shape {list(ids.shape)}, the shape of {name}", list(real.shape))
    if not ((real == 0) | (real == 1)).all():
        raise expected(f"{label}attention_mask", "0 and 1", f"other numbers ({real.unique().tolist()[:5]})")
    real = real.bool()
    count, first = real.sum(1), real.int().argmax(1)
    position = torch.arange(ids.shape[1])
    gaps = real != ((position >= first[:, None]) & (position < (first + count)[:, None]))
    if gaps.any():
        row = int(gaps.any(1).nonzero()[0])
        raise expected(f"{label}attention_mask[{row}]", "real tokens side by side", real[row].int().tolist())
    if lengths is not None and not torch.equal(integers(f"{label}lengths", lengths), count):
        raise expected(f"{label}lengths", f"those of the mask, {count.tolist()[:8]}", lengths)
    return ids.gather(1, (position + first[:, None]) % ids.shape[1]), count


def check_shared_mask(clean: Tensor, corrupted: Tensor, lengths: Tensor) -> None:
    """Refuse corrupted prompts [E, T] that are visibly not padded like the clean ones, whose mask they share.

    Raises:
        InputError: the mask would cut off tokens that are not padding; the clean prompts tell what padding is.

    Warns if a corrupted prompt begins or ends with padding and no clean one does.
    """
    behind = torch.arange(clean.shape[1]) >= lengths[:, None]
    padding = clean[behind].unique()
    if clean.shape != corrupted.shape or len(padding) != 1:
        return
    cut = (behind & (corrupted != padding)).any(1)
    if cut.any():
        row = int(cut.nonzero()[0])
        wanted = "padding where the clean prompt has it, or corrupted_attention_mask"
        raise expected(f"corrupted[{row}]", wanted, f"tokens there ({corrupted[row][behind[row]].tolist()})")
    last = (lengths[:, None] - 1).clamp(min=0)
    ends = [(ids[:, :1] == padding) | (ids.gather(1, last) == padding) for ids in (clean, corrupted)]
    if ends[1].any() and not ends[0].any():
        row = int(ends[1][:, 0].nonzero()[0])
        warn(
            f"corrupted[{row}] begins or ends with the padding, {int(padding)}, as the mask is the clean prompt's; "
            "corrupted_attention_mask gives it its own."
        )


def _left_padded(ids: Tensor, lengths: Tensor) -> Tensor:
    """Rows whose padding is visibly on the left: bool [E].

    Such a row begins with as many equal tokens as it has padding. Besides, either its last tokens differ, or it ends
    like a row without padding and begins like none. If some row has equal tokens on neither side, padding can be any
    tokens, and nothing is visible.
    """
    position, padding = torch.arange(ids.shape[1]), (ids.shape[1] - lengths)[:, None]
    in_front = ((ids == ids[:, :1]) | (position >= padding)).all(1)
    behind = ((ids == ids[:, -1:]) | (position < lengths[:, None])).all(1)
    whole = ids[padding[:, 0] == 0]
    as_whole = ~torch.isin(ids[:, 0], whole[:, 0]) & torch.isin(ids[:, -1], whole[:, -1])
    return (padding[:, 0] > 0) & in_front & (~behind | as_whole) & (in_front | behind).all()
