"""Tiny random models of the supported families, and random prompt pairs; everything offline."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import wraps
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
)

from eap_circuits.forward import borrowed
from eap_circuits.graph import Circuit, Graph
from eap_circuits.tasks import PairedDataset
from eap_kernels.testing import relative_error
from tests.circuits.hybrids import HYBRIDS, PICTURES
from tests.circuits.models import (
    CONFIGS,
    ENCODER_DECODERS,
    ENCODERS,
    FAMILIES,
    KINDS,
    MIXERS,
    NEWER,
    SINCE,
    VOCABULARY,
)
from tests.circuits.untouched import differences, process_state, snapshot


def need_transformers(name: str) -> None:
    """Skip where the transformers that is there cannot do what a test needs of a family."""
    since, reason = SINCE.get(name, ("0", ""))
    if Version(transformers.__version__) < Version(since):
        pytest.skip(f"{name}: only since transformers {since} {reason}")


def tiny_model(name: str, dtype: torch.dtype = torch.float64, **settings: Any) -> Any:
    """A random model whose every weight matters: gains and biases too are away from 1 and 0."""
    need_transformers(name)
    every = {**CONFIGS, **MIXERS, **ENCODERS, **NEWER, **ENCODER_DECODERS, **HYBRIDS}
    torch.manual_seed(list(every).index(name))
    kind, fields = every[name]
    if any("experts" in name for name in fields):  # grouped products of experts know no float64
        settings = {"experts_implementation": "eager", **settings}
    if "attn_logit_softcapping" in fields:  # which transformers 5.17 forgets in the attention that it takes by itself
        settings = {"attn_implementation": "eager", **settings}
    auto: Any = AutoModelForMaskedLM if name in ENCODERS else AutoModelForCausalLM
    if name.endswith("-classes"):
        auto = AutoModelForSequenceClassification
    elif name in ENCODER_DECODERS:
        auto = AutoModelForSeq2SeqLM
    model = auto.from_config(AutoConfig.for_model(kind, **copy.deepcopy(fields)), **settings)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1 or not parameter.any():
                parameter.add_(0.3 * torch.randn_like(parameter))
        for path, buffer in model.named_buffers():
            if path.endswith("layer_scalar"):  # a weight of Gemma 4's
                buffer.uniform_(0.5, 1.5)
    return model.to(dtype).eval()


def random_model(kind: str, fields: dict[str, Any]) -> Any:
    """A random model of a type that is none of the tiny ones, or with other settings."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **fields))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    if getattr(model.config, "_experts_implementation", None) is not None:
        model.set_experts_implementation("eager")
    return model.double().eval()


def random_pairs(seed: int = 0, n: int = 7, longest: int = 11) -> PairedDataset:
    """Pairs of several lengths whose first difference lies anywhere, one pair without any."""
    generator = torch.Generator().manual_seed(seed)

    def integers(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=generator)

    clean = integers(0, VOCABULARY, n, longest)
    lengths = integers(4, longest + 1, n)
    corrupted = clean.clone()
    for row in range(n - 1):
        first = int(integers(0, int(lengths[row]), 1))
        corrupted[row, first] = (clean[row, first] + 1) % VOCABULARY
        if row % 2:
            corrupted[row, -1] = (clean[row, -1] + 5) % VOCABULARY
    good = integers(0, VOCABULARY, n)
    return PairedDataset.from_tokens(clean, corrupted, lengths, torch.stack([good, (good + 3) % VOCABULARY], 1))


def pairs_for(name: str, n: int = 3) -> PairedDataset:
    """Random pairs that suit a tiny model: of classes, or scored at a token in the middle, behind what a decoder has
    read, or at the last one."""
    data = random_pairs(n=n)
    if name in ENCODER_DECODERS:
        read = torch.arange(3) < torch.arange(n)[:, None] % 4
        return replace(data, decoder=data.clean[:, :3].where(read, -1))
    if name.endswith("-classes"):
        return replace(data, answers=torch.tensor([[0, 2], [2, 1], [1, 0]]).repeat(n // 3 + 1, 1)[:n])
    return replace(data, scored=data.lengths[:, None] // 2) if name in ENCODERS else data


def watch(module: torch.nn.Module, see: Callable[..., object]) -> None:
    """Call `see(output, *args, **kwargs)` after a module's runs, without a hook, which would change how it runs."""
    theirs = module.forward

    @wraps(theirs)
    def forward(*args: Any, **kwargs: Any) -> Any:
        output = theirs(*args, **kwargs)
        see(output, *args, **kwargs)
        return output

    module.forward = forward


def prompts(data: PairedDataset, e: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One pair's clean and corrupted prompt without padding, [T] each."""
    lengths = data.lengths if data.corrupted_lengths is None else data.corrupted_lengths
    return data.clean[e, : int(data.lengths[e])], data.corrupted[e, : int(lengths[e])]


def logit_difference(logits: torch.Tensor, data: PairedDataset, e: int) -> torch.Tensor:
    """Of logits [V]."""
    return logits[data.answers[e, 0]] - logits[data.answers[e, 1]]


def loss_of(data: PairedDataset, e: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """Logits [V] -> minus the logit difference."""
    return lambda logits: -logit_difference(logits, data, e)


def random_circuit(graph: Graph, seed: int, share: float) -> Circuit:
    """About this share of the edges, except for those on no path from `input` to `logits`."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(graph.n_senders, graph.n_receivers, generator=generator) < share
    return Circuit(graph, mask & graph.edge_mask).pruned()


def random_edges(graph: Graph, n: int, seed: int = 1) -> list[tuple[int, int]]:
    """Some (u, v), each once."""
    edges = graph.edge_mask.nonzero()
    chosen = torch.randperm(len(edges), generator=torch.Generator().manual_seed(seed))[:n]
    return [(u, v) for u, v in edges[chosen].tolist()]


def groups_of(graph: Graph) -> list[list[int]]:
    """The senders that move together: the input, and each layer's heads and MLP, found by their names."""
    groups: dict[str, list[int]] = {}
    for u, name in enumerate(graph.senders):
        groups.setdefault(name.split(".h")[0], []).append(u)
    return list(groups.values())


def circuit_of(graph: Graph, edges: list[tuple[int, int]]) -> Circuit:
    mask = torch.zeros_like(graph.edge_mask)
    mask[tuple(zip(*edges))] = True
    return Circuit(graph, mask)


@pytest.fixture(autouse=True)
def all_comes_back() -> Iterator[None]:
    """Whatever a test does: what it has borrowed is afterwards as it was, and so is the process."""
    enter, leave, before = borrowed.__enter__, borrowed.__exit__, {}

    def entered(loan: Any) -> Any:
        before[loan] = snapshot(loan._model), process_state()
        return enter(loan)

    def left(loan: Any, *error: object) -> None:
        leave(loan, *error)
        model, process = before.pop(loan)
        if isinstance(error[1], KeyboardInterrupt):  # which `gives_back` clears up after
            return
        assert not differences(model, snapshot(loan._model))
        assert not differences(process, process_state())

    process = process_state()
    # Its own, which is undone after the test's.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(borrowed, "__enter__", entered)
        patch.setattr(borrowed, "__exit__", left)
        yield
    assert not differences(process, process_state())


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


# Every family, but in `make test` one of each kind: for methods that build on what other tests check of all families.
fast_by_kind = pytest.mark.parametrize(
    "family", [pytest.param(name, marks=() if name in KINDS else pytest.mark.slow) for name in FAMILIES]
)

# Both head graphs of every family, but in `make test` the second one of each kind.
both_heads = pytest.mark.parametrize(
    ("family", "heads"),
    [
        pytest.param(name, heads, marks=() if heads == "kv" or name in KINDS else pytest.mark.slow)
        for name in FAMILIES
        for heads in ("kv", "query")
    ],
)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def model_types() -> list[str]:
    every = (CONFIGS, MIXERS, ENCODERS, NEWER, HYBRIDS, PICTURES)
    return [model_type for kind in every for model_type, _ in kind.values()]


@pytest.fixture
def make_model() -> Any:
    return tiny_model


@pytest.fixture
def make_pairs() -> Any:
    return random_pairs


@pytest.fixture
def relative() -> Any:
    return relative_error
