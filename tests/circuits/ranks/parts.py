"""Checks of tensor parallel models, for `runs.py`."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

import eap_circuits as eap
from eap_circuits import ranks
from eap_circuits.adapters import bind, computes_in_parts, is_in_parts, pretrained
from eap_circuits.budget import PeakBytes
from eap_circuits.checkpoint import file as checkpoint_file
from eap_circuits.modules import projections
from eap_circuits.recording import contraction
from tests.circuits.checkpoint.calls import long_calls, numbers
from tests.circuits.conftest import random_pairs, tiny_model
from tests.circuits.models import CONFIGS
from tests.circuits.ranks.forked import on_ranks, trouble, typed

DATA = random_pairs(seed=3, n=5)
transformers_logging.disable_progress_bar()
TENSOR_PARALLEL = importlib.util.find_spec("transformers.distributed.tensor_parallel") is not None  # since 5.17
MAKES_COPIES = False  # since 5.23
if TENSOR_PARALLEL:
    from transformers.distributed import DistributedConfig

    MAKES_COPIES = hasattr(DistributedConfig, "dp_size")
STYLES = dict.fromkeys(["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"], "colwise")
STYLES |= dict.fromkeys(["o_proj", "down_proj"], "rowwise")
# Products of parts round otherwise than whole ones; scores are float32.
TOLERANCE = {torch.float64: 2e-7, torch.float32: 1e-5}


def saved(name: str, folder: str, dtype: torch.dtype = torch.float64, **more: Any) -> str:
    """A tiny model's folder. Its sizes can be divided evenly, as versions before transformers 5.24 want them."""
    path, (kind, fields) = os.path.join(folder, name), CONFIGS[name]
    even = {**fields, "vocab_size": 60, "intermediate_size": 48, **more}
    with mock.patch.dict(CONFIGS, {name: (kind, even)}):
        tiny_model(name, dtype).save_pretrained(path)
    return path


def load(path: str, ranks: int = 1) -> Any:
    pretrained.load_tokenizer = lambda *_, **__: None
    return pretrained.load_model(path, device="cpu" if ranks == 1 else None, tensor_parallel=ranks)[0]


def every_call(checkpoint: str, model: Any) -> dict[str, Callable[..., Any]]:
    calls = long_calls(model, DATA)
    # Rounding may decide which of two edges goes first, and that is a whole rank of the ranking.
    del calls["prune_gradually"]
    if is_in_parts(model):
        calls["eap"] = partial(calls["eap"], checkpoint=checkpoint)
    return calls


def calls_of(model: Any) -> dict[str, Callable[..., Any]]:
    attribute = partial(eap.attribute, model, DATA[:2], steps=1)
    graph = bind(model).graph("query")
    kept = torch.rand(graph.edge_mask.shape, generator=torch.Generator().manual_seed(0)) < 0.3
    circuit = eap.Circuit(graph, graph.edge_mask & kept)
    return {
        "query heads": partial(attribute, heads="query", rules="relp", keep="neurons"),
        "evaluate": partial(eap.evaluate, model, [circuit], DATA[:2]),
    }


@contextmanager
def never_whole(layers: Any, names: tuple[str, ...] = ("o_proj",)) -> Iterator[None]:
    """Projections of these names of which a rank computes a part are not put together."""
    every = [getattr(layer.self_attn, name) for layer in layers for name in names]
    divided = list(filter(computes_in_parts, every))

    def read(module: torch.nn.Module, name: str) -> torch.Tensor | None:
        assert module not in divided or name != "weight", "a projection is put together"
        return plain(module, name)

    plain = projections.read
    with mock.patch.object(projections, "read", read):
        yield


def wrong_numbers(
    path: str,
    ranks: int,
    calls: Callable[[Any], dict[str, Callable[..., Any]]],
    load: Callable[..., Any] = load,
    divided: str = "self_attn.q_proj.weight",
) -> list[str]:
    """What is not one process's result up to rounding, or not the same on all ranks."""
    plain = load(path)
    right = {name: numbers(call()) for name, call in calls(plain).items()}
    tolerance = TOLERANCE[plain.dtype]

    def run(rank: int) -> Any:
        model = load(path, ranks)
        weight = model.model.layers[0].get_parameter(divided)
        assert weight.to_local().numel() * ranks == weight.numel()
        with never_whole(model.model.layers):
            return {name: numbers(call()) for name, call in calls(model).items()}

    wrong, (first, *others) = [], on_ranks(ranks, run)
    for found in (first, *others):
        if isinstance(found, str):
            wrong.append(found)
            continue
        for name, values in found.items():
            errors = [
                float((a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1e-9))
                for a, b in zip(values, right[name], strict=True)
            ]
            if max(errors) > tolerance:
                wrong.append(f"{os.path.basename(path)} on {ranks} ranks, {name}: off by {max(errors):.1e}")
            if not all(map(torch.equal, values, first[name])):
                wrong.append(f"{os.path.basename(path)} on {ranks} ranks, {name}: ranks differ")
    return wrong


def tensor_parallel() -> list[str]:
    """One process's results from parts of models: of grouped heads, of norms of queries and keys, of experts, of a norm
    behind the heads."""
    with tempfile.TemporaryDirectory() as folder:
        return [
            *wrong_numbers(saved("llama", folder), 2, partial(every_call, os.path.join(folder, "run.safetensors"))),
            *wrong_numbers(saved("qwen3", folder), 2, calls_of),
            *wrong_numbers(saved("mixtral", folder, torch.float32), 2, calls_of),
            *wrong_numbers(saved("gemma2", folder, num_key_value_heads=3), 3, calls_of),
        ]


def sharded_further() -> list[str]:
    """Transformers' own `fully_shard`, and of parts by tensor parallelism: teams in step share batches alike."""

    def load(path: str, ranks: int = 1) -> Any:
        sizes = {"fsdp_size": 2, "tp_size": ranks // 2}
        parts = {"distributed_config": DistributedConfig(**sizes)} if ranks > 1 else {}
        return AutoModelForCausalLM.from_pretrained(path, dtype="auto", **parts).eval()

    def calls(model: Any) -> dict[str, Callable[..., Any]]:
        every = long_calls(model, DATA)
        return {**calls_of(model), **{name: every[name] for name in ("eap", "exact", "evaluate-mean")}}

    with tempfile.TemporaryDirectory() as folder:
        path = saved("llama", folder)
        return [*wrong_numbers(path, 2, calls_of, load), *wrong_numbers(path, 4, calls, load)]


def tensor_parallel_commands() -> list[str]:
    """Commands that two copies of a model share, each on two ranks, find what one process does."""
    with tempfile.TemporaryDirectory() as folder:
        path, (pairs, scores, circuit) = (
            saved("llama", folder),
            (os.path.join(folder, name) for name in ("pairs.safetensors", "scores.safetensors", "circuit.json")),
        )
        DATA.save(pairs)
        asked = ["--data", pairs, "--batch-size", "2", "--json", "--tensor-parallel"]
        made = ["--method", "eap", "--edges", "12", "--circuit", circuit, "-o", scores]
        commands = [
            ["attribute", path, *made, *asked, "2"],
            ["evaluate", path, circuit, *asked, "2"],
            ["curve", path, scores, "--fractions", "0.3", "--baselines", "none", *asked, "2"],
            ["evaluate", path, circuit, *asked, "3"],
        ]

        def run(rank: int) -> Any:
            pretrained.load_tokenizer = lambda *_, **__: None
            return [typed(words) for words in commands]

        first, *others = on_ranks(4, run)
        plain, said = load(path), [0, "", ""]
        if isinstance(first, str) or [code for code, *_ in first] != [0, 0, 0, 2]:
            return [f"commands: {first}"]
        found, kept = eap.EdgeScores.load(scores), eap.Circuit.load(circuit)
        right = [
            eap.attribute(plain, DATA, method="eap", batch_size=2).values,
            eap.evaluate(plain, kept, DATA).values,
            torch.tensor(eap.faithfulness_curve(plain, found, DATA, (0.3,), baselines=[]).faithfulness),
        ]
        shown = [json.loads(out) for _, out, _ in first[1:3]]
        own = [found.values, torch.tensor(shown[0]["values"]), torch.tensor(shown[1]["faithfulness"])]
    wrong = [
        f"{words[0]}: other numbers"
        for words, a, b in zip(commands, own, right, strict=False)
        if float((a.double() - b.double()).abs().max() / b.double().abs().max()) > TOLERANCE[torch.float64]
    ]
    if not first[3][2].startswith("eap: error: tensor_parallel: expected a divisor of 4"):
        wrong.append(f"another number of ranks: {first[3]}")
    if any(each != [said, said, said, [2, "", ""]] for each in others):
        wrong.append(f"other ranks: {others}")
    return wrong


def tensor_parallel_shares() -> list[str]:
    """Teams share the batches, and the ranks of a team the features in which senders meet receivers."""
    from torch.distributed.device_mesh import init_device_mesh
    from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES

    with tempfile.TemporaryDirectory() as folder:
        path = saved("llama", folder)
        right = eap.attribute(load(path), DATA, method="eap", batch_size=1)
        seen: list[int] = []

        def metric(logits: torch.Tensor, batch: Any) -> torch.Tensor:
            seen.extend(batch.index.tolist())
            good, bad = logits.gather(1, batch.answers[:, :2]).unbind(1)
            return good - bad

        def run(rank: int) -> Any:
            mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tp"))["tp"]
            for name, module in (model := load(path)).named_modules():
                if (kind := STYLES.get(name.rpartition(".")[2])) is not None:
                    ALL_PARALLEL_STYLES[kind].shard_param(module, "weight", mesh)
                    ALL_PARALLEL_STYLES[kind].install_forward(module, mesh)
            found = eap.attribute(model, DATA, metric, method="eap", batch_size=1)
            features = [contraction.feature_slices(bind(model))[0]]
            return [found.values, sorted(set(seen)), [features[0].start, features[0].stop]]

        found = on_ranks(4, run)
    if any(isinstance(own, str) for own in found):
        return [f"teams: {found}"]
    wrong = [] if all(torch.equal(own[0], found[0][0]) for own in found) else ["teams: ranks differ"]
    if float((found[0][0] - right.values).abs().max() / right.values.abs().max()) > TOLERANCE[torch.float64]:
        wrong.append("teams: other scores")
    first, second = found[0][1], found[2][1]
    if sorted(first + second) != list(range(5)) or found[1][1] != first or found[3][1] != second:
        wrong.append(f"teams: examples by rank {[own[1] for own in found]}")
    if [own[2] for own in found] != 2 * [[0, 12], [12, 24]]:
        wrong.append(f"teams: features by rank {[own[2] for own in found]}")
    return wrong


def tensor_parallel_ended() -> list[str]:
    """A rank that dies at any moment ends the others within seconds; from the checkpoint follow the same bits."""
    wrong = []
    with tempfile.TemporaryDirectory() as folder:
        path, file = saved("mistral-window", folder), os.path.join(folder, "run.safetensors")

        def calls() -> Callable[..., Any]:
            ranks.SECONDS_IN_TEAM, checkpoint_file.SECONDS_BETWEEN_SAVES = 0.5, 0.0
            return partial(eap.attribute, load(path, 3), DATA, steps=3, batch_size=1)

        def undisturbed(rank: int) -> Any:
            call, began = calls(), time.monotonic()
            return [call().values, time.monotonic() - began]

        def killed(victim: int, after: float, rank: int) -> Any:
            call, began = calls(), time.monotonic()
            if rank == victim:
                threading.Timer(after, os.kill, (os.getpid(), signal.SIGKILL)).start()
            while (said := trouble(lambda: call(checkpoint=file))) == "nothing":
                pass
            return [said, time.monotonic() - began - after]

        (right, seconds), *_ = on_ranks(3, undisturbed)
        victim, after = random.randrange(3), random.uniform(0, seconds)
        found = on_ranks(3, partial(killed, victim, after))
        others = [own for rank, own in enumerate(found) if rank != victim]
        if found[victim] != "ended" or any(
            isinstance(own, str) or not own[0].startswith("ConnectionError: rank ") or own[1] > 30 for own in others
        ):
            wrong.append(f"rank {victim} killed after {after:.2f} s: {found}")
        if not all(on_ranks(3, lambda _: torch.equal(calls()(checkpoint=file).values, right))):
            wrong.append("other bits from the checkpoint")
    return wrong


def tensor_parallel_faults() -> list[str]:
    """A rank that fails alone, in the middle of a pass of all, ends the others with its sentence once it has ended.
    Also what is refused, and that memory is as planned."""
    wrong = []

    def failing(logits: torch.Tensor, batch: Any) -> torch.Tensor:
        if dist.get_rank() == 1:
            raise ValueError("boom")
        return logits[:, 0]

    def refused_heads(path: str, rank: int) -> Any:
        model = load(path, 2)
        return [trouble(lambda: eap.attribute(model, DATA)), trouble(lambda: model(DATA.clean))]

    def run(path: str, rank: int) -> Any:
        ranks.SECONDS_IN_TEAM = 0.5
        model, alike = load(path, 2), DATA[[0] * 5]
        planned = eap.plan(model, alike, batch_size=5).bytes
        with PeakBytes() as count:
            eap.attribute(model, alike, batch_size=5)
        placed = partial(pretrained.load_model, path, device="cpu", tensor_parallel=2)
        return [
            "as planned" if abs(planned - count.peak) <= 0.1 * count.peak else f"{count.peak} bytes, not {planned}",
            trouble(partial(load, path, 3)),
            trouble(placed),
            trouble(lambda: eap.check_model(model)),
            trouble(lambda: eap.attribute(model, DATA, failing, steps=3)),
        ]

    with tempfile.TemporaryDirectory() as folder:
        path, uneven = saved("llama", folder), saved("mistral-window", folder)
        heads = on_ranks(2, partial(refused_heads, uneven))
        both = on_ranks(2, partial(run, path))
    sentence = "InputError: MistralDecoderLayer's heads: expected as many on each of 2 ranks"
    # Once transformers itself runs such a model there will be something to support.
    if not all(said[0].startswith(sentence) and said[1].startswith("RuntimeError: shape") for said in heads):
        wrong.append(f"uneven heads: {heads}")
    sentences = (
        "as planned",
        "InputError: tensor_parallel: expected a divisor of 2",
        "InputError: device: expected none",
        "InputError: model: expected whole weights",
        ("RuntimeError: rank 1: ValueError: boom", "ValueError: boom"),
    )
    for rank, found in enumerate(both):
        for said, expected in zip(found if isinstance(found, list) else [found] * 5, sentences, strict=True):
            expected = expected if isinstance(expected, str) else expected[rank]
            if not said.startswith(expected):
                wrong.append(f"rank {rank}: {said}, not {expected}")
    return wrong


def refused() -> list[str]:
    """By earlier versions of transformers."""
    with tempfile.TemporaryDirectory() as folder:
        path = saved("llama", folder)
        said = on_ranks(2, lambda _: trouble(partial(load, path, 2)))
    return [each for each in said if not each.startswith("InputError: tensor_parallel: expected transformers 5.17")]


def checks(*those: Callable[[], list[str]], later: bool = False) -> dict[str, Callable[[], list[str]]]:
    """By name; with a version of transformers that is too old the refusal is checked, or where those are of what came
    `later`, with several copies of a model in parts, nothing."""
    run = {check.__name__: check for check in those}
    if not TENSOR_PARALLEL:
        return dict.fromkeys(run, refused)
    return run if MAKES_COPIES or not later else dict.fromkeys(run, list)


CHECKS = {
    **checks(tensor_parallel, tensor_parallel_shares, tensor_parallel_faults, tensor_parallel_ended),
    **checks(tensor_parallel_commands, sharded_further, later=True),
}
