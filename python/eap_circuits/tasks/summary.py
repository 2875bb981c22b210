"""What a dataset holds, in numbers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..errors import warn

if TYPE_CHECKING:
    from .dataset import PairedDataset


MANY = 0.25  # if this share of the pairs can show no effect, a warning says so


@dataclass(frozen=True)
class Summary:
    """What a dataset holds; the fields from `good` on need a model (`eap.summarise`) and answers, or are None.

    Args:
        name: the data's name.
        pairs: how many pairs there are.
        different: how many different ones; the others repeat these.
        equal: pairs whose corrupted prompt is the clean one.
        tokens: the fewest and the most tokens of a clean prompt.
        corrupted_tokens: the same of the corrupted prompts.
        good, bad: mean probability of the good and of the bad answers after the clean prompts.
        corrupted_good, corrupted_bad: the same after the corrupted prompts.
        prefers_bad: pairs after whose clean prompt the model finds the bad answers likelier than the good ones.
        alike: pairs whose corrupted prompt changes the odds of good against bad by less than a tenth.
    """

    name: str
    pairs: int
    different: int
    equal: int
    tokens: tuple[int, int]
    corrupted_tokens: tuple[int, int]
    good: float | None = None
    bad: float | None = None
    corrupted_good: float | None = None
    corrupted_bad: float | None = None
    prefers_bad: int | None = None
    alike: int | None = None

    def __str__(self) -> str:
        few, many = self.tokens
        line = f"{self.name}: {self.pairs} pairs of {few if few == many else f'{few} to {many}'} tokens"
        if self.different < self.pairs:
            line += f", {self.different} different ones"
        if self.equal:
            line += f", {self.equal} with the clean prompt as the corrupted one"
        if self.good is not None:
            line += (
                f"; P(good) {self.good:.3g}, P(bad) {self.bad:.3g}; after corrupted prompts {self.corrupted_good:.3g} "
                f"and {self.corrupted_bad:.3g}; the model prefers the bad answer on {self.prefers_bad}"
            )
        return f"{line}."


def summary_of(data: PairedDataset) -> Summary:
    """What `PairedDataset.summary` returns."""
    corrupted_lengths = data.lengths if data.corrupted_lengths is None else data.corrupted_lengths
    lengths = torch.stack([data.lengths, corrupted_lengths], 1)
    others = [each for each in (data.scored, data.decoder) if each is not None]
    rows = torch.cat([data.clean, data.corrupted, lengths, data.answers.flatten(1), *others], 1)
    same = (data.clean == data.corrupted).all(1) & (data.lengths == corrupted_lengths)
    same &= not data.alone
    if same.sum() >= MANY * len(data):
        warn(
            f"{data.name}: on {int(same.sum())} of {len(data)} pairs the corrupted prompt is the clean one; there is "
            "no effect to find."
        )
    fewest, most = lengths.amin(0).tolist(), lengths.amax(0).tolist()
    return Summary(
        name=data.name,
        pairs=len(data),
        different=len(rows.unique(dim=0)),
        equal=int(same.sum()),
        tokens=(fewest[0], most[0]),
        corrupted_tokens=(fewest[1], most[1]),
    )


def columns_of(data: PairedDataset) -> dict[str, list[Any]]:
    """What `PairedDataset.to_dict` returns."""
    own = data.lengths if data.corrupted_lengths is None else data.corrupted_lengths
    clean: Iterable[Any] = (ids[:n].tolist() for ids, n in zip(data.clean, data.lengths, strict=True))
    corrupted: Iterable[Any] = (ids[:n].tolist() for ids, n in zip(data.corrupted, own, strict=True))
    if data.prompts is not None:
        clean, corrupted = zip(*data.prompts, strict=True)
    good, bad = ([_ids(ids) for ids in side] for side in data.answers.transpose(0, 1).tolist())
    return {
        "clean": list(clean),
        "corrupted": list(corrupted),
        **({} if data.decoder is None else {"decoder": [ids[ids >= 0].tolist() for ids in data.decoder]}),
        "good": good,
        "bad": bad,
        "tokens": data.lengths.tolist(),
    }


def _ids(answer: Any) -> Any:
    """An answer's token, or the tokens of a set, or of a set's answers, without padding."""
    if not isinstance(answer, list):
        return answer
    return [own for each in answer if (own := _ids(each)) not in ([], -1)]
