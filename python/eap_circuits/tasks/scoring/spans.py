"""Named spans of the clean prompts of a dataset."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...edges import REST, Spans
from ...errors import expected, listed

if TYPE_CHECKING:
    from ..dataset import PairedDataset


def checked_spans(data: PairedDataset) -> tuple[Tensor | None, tuple[str, ...]]:
    """A dataset's spans, as wide as its prompts and -1 in padding, and their names: if none are given span0, span1 …

    Raises:
        InputError: another shape, a number without a name, names that are no texts, come twice or are "rest".
    """
    spans, names = data.spans, listed("span_names", data.span_names, "a list of names")
    if spans is None:
        if names:
            raise expected("span_names", "none without spans", names)
        return None, ()
    n, width = data.clean.shape  # which may have grown with a longer corrupted prompt's
    if spans.dim() != 2 or len(spans) != n or not int(data.lengths.max()) <= spans.shape[1] <= width:
        raise expected("spans", f"shape {[n, width]}, the shape of clean", list(spans.shape))
    spans = pad(spans, (0, width - spans.shape[1]), value=-1).clamp(min=-1)
    spans = spans.masked_fill(torch.arange(width) >= data.lengths[:, None], -1)
    names = names or [f"span{i}" for i in range(int(spans.max()) + 1)]
    for name in names:
        if not isinstance(name, str) or not name:
            raise expected("span_names", "texts", repr(name))
        if name == REST:
            raise expected("span_names", f"other names than {REST!r}, the span of all other tokens", repr(name))
    if len(set(names)) < len(names):
        raise expected("span_names", "each name once", names)
    if (spans >= len(names)).any():
        row, column = (spans >= len(names)).nonzero()[0].tolist()
        wanted = f"a number below {len(names)}, the named spans there are, or -1"
        raise expected(f"spans[{row}, {column}]", wanted, int(spans[row, column]))
    return spans, tuple(names)


def spans_in(data: PairedDataset) -> Spans:
    """The spans of a dataset that has some: which come before which, and where prompts are scored."""
    rows, size = data.rows.data, len(data.span_names) + 1
    assert rows.spans is not None
    position = torch.arange(rows.clean.shape[1])
    last = rows.lengths - 1 if rows.scored is None else rows.scored.amax(1)
    there = position <= last[:, None]  # what comes after the last scored token does not run
    scored = position == last[:, None]
    if rows.scored is not None:
        scored = (position == rows.scored[..., None]).any(1)
    by_span = (rows.spans[..., None] % size == torch.arange(size)) & there[..., None]  # [R, T, P]
    first = torch.where(by_span, position[:, None], len(position)).amin(1)
    end = torch.where(by_span, position[:, None], -1).amax(1)
    sees = (end[:, :, None] >= first[:, None, :]).any(0)
    flags = tuple(tuple(row) for row in sees.tolist())
    return Spans((*data.span_names, REST), flags, tuple((by_span & scored[..., None]).any((0, 1)).tolist()))


def check_spans(data: PairedDataset, spans: Spans | None) -> None:
    """Refuse data in which a circuit of these spans would not know what to keep where.

    Raises:
        InputError: other names, a scored token in a span where none was, or another order of spans.
    """
    if spans is None:
        return
    wanted = f"spans {', '.join(spans.names)}, as the circuit has"
    if data.spans is None:
        raise expected("data", wanted, "none")
    found = spans_in(data)
    if found.names != spans.names:
        raise expected("data", wanted, ", ".join(found.names))
    for name, here, there in zip(spans.names, found.scored, spans.scored, strict=True):
        if here and not there:
            raise expected("data", f"no scored token in span {name!r}, as in the data of the circuit's scores", "some")
    for name, row, known in zip(spans.names, found.sees, spans.sees, strict=True):
        for other, here, there in zip(spans.names, row, known, strict=True):
            if here and not there:
                wanted = f"no token of span {name!r} behind one of {other!r}, as in the data of the circuit's scores"
                raise expected("data", wanted, "some")
