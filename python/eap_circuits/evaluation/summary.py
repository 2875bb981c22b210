"""What a model makes of a dataset before anything is scored."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..budget import dealt_in_memory
from ..errors import instance, known_arguments, warn
from ..forward import TOKENS_PER_BATCH, Batch, Runner, borrowed, one_want_of_memory
from ..metrics import answer_logprobs
from ..modules.loans import gives_back
from ..ranks import together
from ..request import Measurement, Progress, fetch, prepare, watched
from ..tasks import MANY, PairedDataset, Summary

_ALIKE = math.log(1.1)  # odds that differ by less than a tenth


@together
@gives_back
@one_want_of_memory
@known_arguments
def summarise(
    model: nn.Module,
    data: PairedDataset,
    *,
    batch_size: int | None = None,
    memory: int | str | None = None,
    progress: Progress | bool | None = None,
) -> Summary:
    """`data.summary()` with the probabilities that the model gives to the answers; both prompts of each pair run once.

    Warns if on a quarter of the pairs or more the corrupted prompt is the clean one or hardly changes the odds, and if
    the model expects the answers with, or without, a leading space.

    Args:
        model: a Hugging Face language model (causal, masked, encoder-decoder) or a classifier of prompts.
        data: clean and corrupted prompts; without answers nothing runs.
        batch_size, memory, progress: as of `evaluate`.

    Raises:
        InputError: anything that `evaluate` refuses.

    Example:
        >>> line = str(eap.summarise(model, data))
    """
    if not instance("data", data, PairedDataset).answers.numel():
        return data.summary()
    metric = "sequence_logprob_diff" if data.answers.dim() == 4 else "prob_diff"
    request = prepare(model, data, metric, "zero" if data.alone else "patching", batch_size, memory=memory)
    graph, done, progress = request.arch.graph("kv"), 0, watched(progress)

    def run(batch: Batch, tokens: int) -> Tensor:
        runner = Runner(request.arch, graph, batch)
        sides = [runner.logits(runner.embed(batch.clean)), runner.logits(runner.embed(batch.corrupted), corrupted=1)]
        measured = Measurement(request, batch, *sides)
        for logits in sides:
            measured.values(logits)
        found = torch.stack([answer_logprobs(logits, measured.given).logsumexp(2) for logits in sides])
        # Refuses what is not finite, and looks at the answers' spelling.
        return fetch([measured], found.double())[1][0]

    with borrowed(request.arch.model), torch.no_grad():
        request = request.verified("kv")
        found = torch.empty(2, len(data), 2, dtype=torch.float64)
        batches, team = request.batches(TOKENS_PER_BATCH), request.arch.team
        for batch, logs in dealt_in_memory(data, batches, TOKENS_PER_BATCH, run, team):
            found[:, batch.index] = logs
            done += batch.n_examples
            if progress is not None:
                progress(done, len(data))
    clean, corrupted = (found[..., 0] - found[..., 1]).unbind()
    probabilities = found.exp().mean(1).flatten().tolist()
    names = ("good", "bad", "corrupted_good", "corrupted_bad")
    alike = 0 if data.alone else int(((clean - corrupted).abs() < _ALIKE).sum())
    if alike >= MANY * len(data):
        warn(
            f"{data.name}: on {alike} of {len(data)} pairs the corrupted prompt changes the odds of good against bad "
            "answers by less than a tenth; there is hardly an effect to find."
        )
    shown: dict[str, Any] = dict(zip(names, probabilities, strict=True))
    return replace(data.summary(), prefers_bad=int((clean < 0).sum()), alike=alike, **shown)
