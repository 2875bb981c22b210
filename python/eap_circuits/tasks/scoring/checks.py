"""What is wrong with the tensors of a dataset, in one sentence."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from ...errors import expected

if TYPE_CHECKING:
    from ..dataset import PairedDataset


def check_shapes(data: PairedDataset) -> None:
    if data.clean.dim() != 2:
        raise expected("clean", "shape [examples, positions]", list(data.clean.shape))
    n, positions = data.clean.shape
    if n == 0:
        raise expected("dataset", "at least one example", "none")
    if data.corrupted_lengths is None and data.corrupted.shape != data.clean.shape:
        raise expected("corrupted", f"shape {[n, positions]}, the shape of clean", list(data.corrupted.shape))
    if data.corrupted.dim() != 2 or len(data.corrupted) != n:
        raise expected("corrupted", f"shape [{n}, positions]", list(data.corrupted.shape))
    _check_lengths("lengths", data.lengths, n, positions)
    if data.corrupted_lengths is not None:
        _check_lengths("corrupted_lengths", data.corrupted_lengths, n, data.corrupted.shape[1])
    shape = list(data.answers.shape)
    if len(shape) not in (2, 3, 4) or shape[:2] != [n, 2] or (0 in shape and shape != [n, 2, 0]):
        wanted = f"shape {[n, 2]} (good, bad), [{n}, 2, A] (sets) or [{n}, 2, A, L] (answers of several tokens)"
        raise expected("answers", wanted, shape)
    if data.variants is not None and data.variants.shape != data.answers.shape:
        raise expected("variants", f"shape {shape}, the shape of answers", list(data.variants.shape))
    if data.decoder is not None:
        _check_decoder(data.decoder, n)


def _check_decoder(decoder: Tensor, n: int) -> None:
    if decoder.dim() != 2 or len(decoder) != n:
        raise expected("decoder", f"shape [{n}, positions], padded with -1", list(decoder.shape))
    wrong = (decoder < -1).any(1) | ((decoder[:, 1:] >= 0) & (decoder[:, :-1] < 0)).any(1)
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise expected(f"decoder[{row}]", "token ids of 0 or more, then padding with -1", decoder[row].tolist())


def _check_lengths(name: str, lengths: Tensor, n: int, positions: int) -> None:
    if list(lengths.shape) != [n]:
        raise expected(name, f"shape {[n]}, one per example", list(lengths.shape))
    outside = (lengths < 1) | (lengths > positions)
    if outside.any():
        row = int(outside.nonzero()[0])
        raise expected(f"{name}[{row}]", f"1 to {positions}, the positions there are", lengths[row].item())


def check_answers(answers: Tensor) -> None:
    if not answers.numel():
        return
    least = 0 if answers.dim() == 2 else -1
    flat = answers.flatten(1)
    if (flat < least).any():
        row = int((flat < least).any(1).nonzero()[0])
        padded = ", padded with -1" if least else ""
        raise expected(f"answers[{row}]", f"token ids of 0 or more{padded}", int(flat[row].min()))
    # [E, 2, A], -1 where there is none.
    sets = answers.reshape(len(answers), 2, -1) if answers.dim() < 4 else _numbered(answers)
    empty = (sets < 0).all(2)
    if empty.any():
        row, side = empty.nonzero()[0].tolist()
        raise expected(f"answers[{row}]", f"at least one {('good', 'bad')[side]} id", "padding only")
    places = sets.flatten(1)
    together, order = places.sort(1)
    twice = (together[:, 1:] == together[:, :-1]) & (together[:, 1:] >= 0)
    if twice.any():
        row, column = twice.nonzero()[0].tolist()
        ids = answers.flatten(1, 2)[row, order[row, column]] if answers.dim() > 2 else together[row, column]
        raise expected(f"answers[{row}]", "each id once, good or bad", f"id {ids.tolist()} twice")


def _numbered(answers: Tensor) -> Tensor:
    """A number for each answer of several tokens [E, 2, A, L], the same for those that are the same; -1 for none."""
    gaps = (answers[..., 1:] >= 0) & (answers[..., :-1] < 0)
    if gaps.any():
        row = int(gaps.flatten(1).any(1).nonzero()[0])
        raise expected(f"answers[{row}]", "padding behind an answer's tokens only", "some before a token")
    _, numbers = answers.flatten(0, 2).unique(dim=0, return_inverse=True)
    return numbers.view(answers.shape[:3]).masked_fill(answers[..., 0] < 0, -1)


def check_scored(data: PairedDataset) -> None:
    """Of positions that are scored, their weights and what should follow them."""
    scored, n = data.scored, len(data.clean)
    if scored is None:
        for name in ("scored_weights", "targets"):
            if getattr(data, name) is not None:
                raise expected(name, "none without scored positions", "some")
        return
    if data.answers.dim() == 4:
        raise expected("scored", "none beside answers of several tokens, which say where they are scored", "some")
    if scored.dim() != 2 or len(scored) != n or not scored.shape[1]:
        raise expected("scored", f"shape [{n}, P], padded with -1", list(scored.shape))
    there = scored >= 0
    wrong = (scored < -1) | (scored >= data.lengths[:, None])
    if wrong.any():
        row, column = wrong.nonzero()[0].tolist()
        wanted = f"positions from 0 to {int(data.lengths[row]) - 1}, the prompt's last, padded with -1"
        raise expected(f"scored[{row}]", wanted, int(scored[row, column]))
    falls = there[:, 1:] & ((scored[:, 1:] <= scored[:, :-1]) | ~there[:, :-1])
    if falls.any() or not there[:, 0].all():
        row = int((falls.any(1) | ~there[:, 0]).nonzero()[0])
        raise expected(f"scored[{row}]", "at least one position, in growing order", scored[row].tolist())
    if data.targets is not None and data.targets.shape != scored.shape:
        raise expected("targets", f"shape {list(scored.shape)}, the shape of scored", list(data.targets.shape))
    weights = data.scored_weights
    if weights is None:
        return
    if weights.shape != scored.shape:
        raise expected("scored_weights", f"shape {list(scored.shape)}, the shape of scored", list(weights.shape))
    given = weights.masked_fill(~there, 0)
    _check_weights("scored_weights", given)
    if (given.sum(1) <= 0).any():
        row = int((given.sum(1) <= 0).nonzero()[0])
        raise expected(f"scored_weights[{row}]", "at least one above 0", given[row].tolist())


def check_pair_weights(weights: Tensor, n: int) -> None:
    if list(weights.shape) != [n]:
        raise expected("weights", f"shape {[n]}, one per example", list(weights.shape))
    _check_weights("weights", weights, 5e-324)


def _check_weights(name: str, weights: Tensor, least: float = 0) -> None:
    wrong = ~(weights.isfinite() & (weights >= least))
    if wrong.any():
        place = wrong.nonzero()[0].tolist()
        raise expected(
            f"{name}{place}", "a number above 0" if least else "a number of 0 or more", weights[(*place,)].item()
        )
