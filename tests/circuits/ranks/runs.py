"""Calls on two and three ranks, faults among them; prints {check: what is wrong} as JSON. Imports and forks once."""

from __future__ import annotations

import copy
import json
import os
import signal
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

here = Path(__file__).resolve()
sys.path[:0] = [str(here.parents[3] / "python"), str(here.parents[3])]

import eap_circuits as eap  # noqa: E402
from eap_circuits import ranks  # noqa: E402
from eap_circuits.budget import memory as budget_memory  # noqa: E402
from eap_circuits.checkpoint import file as checkpoint_file  # noqa: E402
from eap_circuits.cli import session  # noqa: E402
from eap_circuits.forward import runner as forward_runner  # noqa: E402
from tests.circuits.checkpoint.calls import long_calls, numbers  # noqa: E402
from tests.circuits.conftest import random_pairs, tiny_model  # noqa: E402
from tests.circuits.ranks import circuits, experts, kills, parts, reproduced  # noqa: E402
from tests.circuits.ranks.forked import on_ranks, trouble, typed  # noqa: E402

MODEL, DATA = tiny_model("gpt2", torch.float32), random_pairs(seed=3, n=5)
CALLS = long_calls(MODEL, DATA)
IN_PARTS = ("eap", "clean-corrupted", "eap-ig-activations", "exact", "evaluate-mean")  # of fully_shard
SCORE = partial(eap.attribute, MODEL, DATA, method="eap", batch_size=1)


def same(found: Any, right: Any) -> bool:
    pairs = zip(numbers(found), numbers(right), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def alone() -> tuple[dict[str, list[tuple[int, int]]], dict[str, Any]]:
    """The progress and the results of one process."""
    steps: dict[str, list[tuple[int, int]]] = {name: [] for name in CALLS}
    return steps, {name: call(progress=lambda *step, own=steps[name]: own.append(step)) for name, call in CALLS.items()}


def near(found: torch.Tensor, right: torch.Tensor) -> bool:
    return bool((found - right).abs().max() <= 1e-5 * right.abs().max())


def bits(count: int) -> list[str]:
    """All calls, of which 5 examples make 3 batches: two for one of two ranks, then one for each of three."""

    def run(rank: int) -> list[str]:
        wrong = []
        for name, call in CALLS.items():
            steps: list[tuple[int, int]] = []
            if not same(call(progress=lambda *step: steps.append(step)), RIGHT[name]):  # noqa: B023
                wrong.append(f"{name}: other bits on rank {rank}")
            if steps != (STEPS[name] if rank == 0 else []):
                wrong.append(f"{name}: progress {steps} on rank {rank}")
        return wrong

    return [each for own in on_ranks(count, run) for each in own]


def order_of_sums() -> list[str]:
    """Sums of which the order matters in float64, too: scores of a double model that differ by many magnitudes."""
    model, data = tiny_model("llama", torch.float64), random_pairs(seed=4, n=9)

    def metric(logits: torch.Tensor, batch: Any) -> torch.Tensor:
        return logits[:, 0] * 10.0 ** (3 * batch.index.to(logits.device).to(logits.dtype) - 12)

    call = partial(eap.attribute, model, data, metric, method="eap", batch_size=1, keep="variance")
    right = call()
    return [f"{count} ranks" for count in (2, 3) if not all(on_ranks(count, lambda _: same(call(), right)))]


def shares() -> list[str]:
    """Each rank runs its own batches only."""
    seen: list[int] = []

    def metric(logits: torch.Tensor, batch: Any) -> torch.Tensor:
        seen.extend(batch.index.tolist())
        return logits[:, 0]

    def run(rank: int) -> list[int]:
        SCORE(metric)
        return sorted(set(seen))

    found = on_ranks(3, run)
    every = sorted(example for own in found for example in own)
    return [] if every == list(range(5)) and all(found) else [f"examples by rank {found}"]


def memory() -> list[str]:
    """The least memory counts for all; what a machine has is shared by its ranks."""
    one = eap.plan(MODEL, DATA).budget

    def run(rank: int) -> list[int]:
        plans = [eap.plan(MODEL, DATA, memory=size) for size in (("64MiB", "100KiB")[rank], None)]
        return [plan.budget for plan in plans]

    found = on_ranks(2, run)
    right = found[0] == found[1] and found[0][0] == 100 * 1024 and 0.3 * one < found[0][1] < 0.6 * one
    return [] if right else [f"budgets {found}, of one process {one}"]


def faults() -> list[str]:
    """An error of one rank is an error of all, at once, and they go on with the next call."""
    right, wrong = SCORE(), []

    def failing(error: BaseException | None, logits: torch.Tensor, batch: Any) -> torch.Tensor:
        if dist.get_rank() == 1 and error is not None:
            raise error
        return logits[:, 0] * (float("nan") if dist.get_rank() == 1 else 1.0)

    def run(rank: int) -> list[str]:
        errors = (ValueError("boom"), KeyboardInterrupt(), None)
        found = [trouble(partial(SCORE, partial(failing, error))) for error in errors]
        found.append(trouble(lambda: SCORE(progress=stopped)))
        found.append(trouble(lambda: eap.attribute(MODEL, DATA[rank:], method="eap")))
        found.append(trouble(lambda: eap.attribute(MODEL, DATA, method="none")))
        return [*found, "right" if same(SCORE(), right) else "other bits"]

    def stopped(done: int, total: int) -> None:
        raise OSError("the bar broke")

    first, second = on_ranks(2, run)
    expected = [
        (0, 0, "RuntimeError: rank 1: ValueError: boom"),
        (1, 0, "ValueError: boom"),
        (0, 1, "KeyboardInterrupt: rank 1: interrupted"),
        (1, 1, "KeyboardInterrupt: "),
        (0, 2, "InputError: rank 1: metric"),
        (1, 2, "InputError: metric"),
        (0, 3, "OSError: the bar broke"),
        (1, 3, "RuntimeError: rank 0: OSError: the bar broke"),
        (0, 4, "InputError: ranks: expected the same call on all, found another data."),
        (1, 4, "InputError: ranks: expected the same call on all, found another data."),
        (0, 5, "InputError: method"),
        (1, 5, "InputError: method"),
        (0, 6, "right"),
        (1, 6, "right"),
    ]
    for rank, case, said in expected:
        found = (first, second)[rank]
        if not isinstance(found, list) or not found[case].startswith(said):
            wrong.append(f"case {case} on rank {rank}: {found[case] if isinstance(found, list) else found}, not {said}")
    return wrong


def want_of_memory() -> list[str]:
    """A rank whose memory runs out goes on with smaller passes; of exact patching, which shares a batch, all do."""
    plain, wrong = forward_runner.Runner.logits, []
    calls = {
        "eap": partial(eap.attribute, MODEL, DATA, method="eap", batch_size=5),
        "exact": partial(CALLS["exact"], batch_size=3),
    }
    right = {name: numbers(call()) for name, call in calls.items()}

    def run(name: str, full: int, rank: int) -> Any:
        raised = torch.tensor(0)

        def logits(runner: Any, embeddings: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            if rank == full and len(embeddings) > 4:  # the trial of prefixes has four rows, and is not halved
                raised.add_(1)
                raise torch.OutOfMemoryError("the card is full")
            return plain(runner, embeddings, *args, **kwargs)

        forward_runner.Runner.logits, budget_memory.give_back_memory = logits, lambda: None  # which takes long
        return [raised, *numbers(calls[name]())]

    for name, full in (("eap", 0), ("exact", 0), ("exact", 1)):
        found = on_ranks(2, partial(run, name, full))
        if any(isinstance(own, str) or not all(map(near, own[1:], right[name])) for own in found):
            wrong.append(f"{name}, rank {full}: {[own if isinstance(own, str) else 'scores' for own in found]}")
        elif not found[full][0]:
            wrong.append(f"{name}, rank {full}: memory did not run out")
    return wrong


def ended() -> list[str]:
    """A rank that dies, even before its first call or while the ranks connect, ends the others within seconds."""

    def absent(rank: int) -> str:
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return trouble(SCORE)

    def connecting(rank: int) -> str:
        ranks.SECONDS_TO_CONNECT = 0.5
        if rank == 1:
            dist.new_group = lambda **_: os.kill(os.getpid(), signal.SIGKILL)
        return trouble(SCORE)

    def late(rank: int) -> str:
        ranks.SECONDS_TO_CONNECT = 0.5
        SCORE()
        time.sleep(0.7 * rank)
        return trouble(SCORE)

    def run(rank: int) -> list[Any]:
        began = time.monotonic()
        if rank == 1:
            threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGKILL)).start()
        while (said := trouble(SCORE)) == "nothing":
            pass
        return [said, trouble(SCORE), time.monotonic() - began]

    (first, again, seconds), other = on_ranks(2, run)
    for dies in (absent, connecting):
        alone = on_ranks(2, dies)[0]
        if not alone.startswith("ConnectionError"):
            return [f"{dies.__name__}: {alone}"]
    if (both := on_ranks(2, late)) != ["nothing", "nothing"]:
        return [f"late: {both}"]
    fine = first.startswith("ConnectionError") and again.startswith("ConnectionError") and seconds < 10
    return [] if fine and other == "ended" else [f"{first}; {again}; after {seconds:.0f} s; {other}"]


def going_on() -> list[str]:
    """Killed on three ranks, then on two, and ended by one process: the same bits, for calls of every kind."""
    checkpoint_file.SECONDS_BETWEEN_SAVES = 0.0
    wrong = []
    with tempfile.TemporaryDirectory() as folder:
        for name in ("eap-ig-inputs", "exact", "optimal_constants"):
            file, begun = Path(folder) / f"{name}.safetensors", []

            def killed(done: int, total: int) -> None:
                begun.append(done)  # noqa: B023
                if len(begun) == 2:  # noqa: B023
                    os.kill(os.getpid(), signal.SIGKILL)

            def run(rank: int) -> str:
                return trouble(lambda: CALLS[name](checkpoint=file, progress=killed))  # noqa: B023

            for count in (3, 2):
                if file.exists() and count == 3:
                    wrong.append(f"{name}: a file before anything was done")
                found = on_ranks(count, run)
                if found[0] != "ended" and count == 3:
                    wrong.append(f"{name}: not killed, {found}")
            if not file.exists():
                wrong.append(f"{name}: nothing was kept")
            if not same(CALLS[name](checkpoint=file), RIGHT[name]):
                wrong.append(f"{name}: other bits")
            # What one process has done, ranks do not do again.
            if any(on_ranks(2, lambda _: not same(CALLS[name](checkpoint=file), RIGHT[name]))):  # noqa: B023
                wrong.append(f"{name}: other bits from a whole file")
    return wrong


def commands() -> list[str]:
    """A command shows and writes on rank 0 only, to one process's bits; an error of another rank is one line there."""
    wrong = []
    with tempfile.TemporaryDirectory() as folder:
        DATA.save(pairs := Path(folder) / "pairs.safetensors")

        def run(words: list[str], rank: int) -> list[Any]:
            os.makedirs(os.path.join(folder, str(rank)), exist_ok=True)
            os.chdir(os.path.join(folder, str(rank)))
            session.load_model = load
            return [*typed(words), sorted(os.listdir("."))]

        def load(*_: Any) -> Any:
            if dist.get_rank() == 1 and "rank-1-fails" in sys.argv:
                raise eap.InputError("model: expected a model, found none.")
            return MODEL, None

        words = ["attribute", "tiny", "--data", str(pairs), "--method", "eap", "-o", "scores.safetensors", "--json"]
        for size in (2, 9):  # three batches, of which the last is smaller; one, so that rank 1 has no work
            first, second = on_ranks(2, partial(run, [*words, "--batch-size", str(size)]))
            if first[0] or '"edges"' not in first[1] or first[3] != ["scores.safetensors"]:
                wrong.append(f"rank 0: {first}")
            if second[0] or second[1] or second[2] or second[3]:
                wrong.append(f"rank 1: {second}")
            found = eap.EdgeScores.load(Path(folder) / "0" / "scores.safetensors")
            if not same(found, eap.attribute(MODEL, DATA, method="eap", batch_size=size)):
                wrong.append(f"other bits in batches of {size}")
        first, second = on_ranks(2, partial(run, [*words[:1], "rank-1-fails", *words[2:]]))
        if first[:1] != [2] or "eap: error: rank 1: model: expected a model, found none." not in first[2]:
            wrong.append(f"rank 0 of an error: {first}")
        if second[:3] != [2, "", ""]:
            wrong.append(f"rank 1 of an error: {second}")
    return wrong


def in_parts(model: Any, mesh: Any) -> Any:
    """A copy of a GPT-2 of which `fully_shard` keeps a part on each rank."""
    from torch.distributed.fsdp import fully_shard

    for layer in (parts := copy.deepcopy(model)).transformer.h:
        fully_shard(layer, mesh=mesh)
    return fully_shard(parts, mesh=mesh)


def in_step(count: int) -> list[str]:
    """With fully_shard ranks share batches that take the same passes; one without a batch repeats another's."""
    clean = torch.randint(59, (5, 8), generator=torch.Generator().manual_seed(5))
    corrupted = torch.cat([clean[:, :3], (clean[:, 3:4] + 1) % 59, clean[:, 4:]], 1)
    answers = torch.stack([clean[:, 0], (clean[:, 0] + 1) % 59], 1)
    data = eap.PairedDataset.from_tokens(clean, corrupted, torch.full((5,), 8), answers)
    right = {name: long_calls(MODEL, data)[name]() for name in IN_PARTS}
    seen: list[int] = []

    def metric(logits: torch.Tensor, batch: Any) -> torch.Tensor:
        seen.extend(batch.index.tolist())
        return logits[:, 0]

    def run(rank: int) -> Any:
        from torch.distributed.device_mesh import init_device_mesh

        calls = long_calls(parts := in_parts(MODEL, init_device_mesh("cpu", (count,))), data)
        wrong = [name for name in IN_PARTS if not same(calls[name](), right[name])]
        eap.attribute(parts, data, metric, method="eap", batch_size=1)
        return [wrong, sorted(set(seen))]

    found = on_ranks(count, run)
    wrong, shares = zip(*found, strict=True) if not any(isinstance(own, str) for own in found) else (found, ())
    if shares != (([0, 2, 4], [1, 3, 4]) if count == 2 else ([0, 3], [1, 4], [2, 3])):
        return [f"{wrong}, examples by rank {shares}"]
    return [f"other bits on rank {rank}: {own}" for rank, own in enumerate(wrong) if own]


def wrapped() -> list[str]:
    """Copies by DistributedDataParallel, parts by fully_shard, and those that are refused."""

    def run(rank: int) -> list[str]:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import distribute_tensor

        mesh, wrong = init_device_mesh("cpu", (2,)), []
        copied = torch.nn.parallel.DistributedDataParallel(copy.deepcopy(MODEL))
        if not same(eap.attribute(copied, DATA, method="eap", batch_size=1), SCORE()):
            wrong.append("DistributedDataParallel")
        own = long_calls(parts := in_parts(MODEL, mesh), DATA)
        wrong += [f"fully_shard, {name}" for name in IN_PARTS if not same(own[name](), RIGHT[name])]
        held = [
            weight
            for weight in parts.transformer.h.parameters()
            if not isinstance(weight, torch.distributed.tensor.DTensor)
        ]
        if held:
            wrong.append(f"fully_shard: {len(held)} weights are whole afterwards")
        wrong.append(trouble(lambda: own["optimal_constants"]()))
        split = copy.deepcopy(MODEL)
        weight = split.transformer.h[0].mlp.c_fc.weight
        split.transformer.h[0].mlp.c_fc.weight = torch.nn.Parameter(distribute_tensor(weight.detach(), mesh))
        return [*wrong, trouble(lambda: eap.attribute(split, DATA))]

    wrong = []
    for found in on_ranks(2, run):
        *others, learned, split = found if isinstance(found, list) else ["", "", found]
        wrong += others
        if not learned.startswith("InputError: model: expected whole weights, to learn with"):
            wrong.append(learned)
        if not split.startswith("InputError: GPT2LMHeadModel: expected weights that are whole"):
            wrong.append(split)
    return wrong


CHECKS: dict[str, Callable[[], list[str]]] = {
    "bits on two ranks": partial(bits, 2),
    "bits on three ranks": partial(bits, 3),
    "in step on two ranks": partial(in_step, 2),
    "in step on three ranks": partial(in_step, 3),
    **{
        check.__name__: check
        for check in (order_of_sums, shares, memory, faults, want_of_memory, ended, going_on, commands, wrapped)
    },
    **parts.CHECKS,
    **circuits.CHECKS,
    **experts.CHECKS,
    **kills.CHECKS,
    **reproduced.CHECKS,
}

if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)  # a process with more must not fork
    STEPS, RIGHT = alone()
    found = {}
    for name in sys.argv[1:] or CHECKS:
        began = time.monotonic()
        found[name] = CHECKS[name]()
        sys.stderr.write(f"{name}: {time.monotonic() - began:.1f} s\n")
    sys.stdout.write(json.dumps(found))
