"""Kernels launched, and moments in which the host waits for a device: counted on a pretended one, without values.

A wait for each circuit or layer, or a launch for each circuit and layer, shows in the differences between two runs.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any
from unittest import mock

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import eap_circuits as eap
from bench.pretended import Counts, counting, pretending
from eap_circuits.adapters import bind
from eap_circuits.budget import replays
from eap_circuits.checkpoint import weights, weights_digest
from eap_circuits.errors import InputWarning
from eap_circuits.evaluation import circuit_values
from eap_circuits.intervention import circuit_run
from eap_circuits.methods.gradient import method

EXAMPLES, TOKENS, POINTS, VOCABULARY = 8, 6, 3, 59
SMALL = {"vocab_size": VOCABULARY, "bos_token_id": None, "eos_token_id": None}
LLAMA = {
    **SMALL,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 48,
}
GPT2 = {**SMALL, "n_embd": 24, "n_head": 3, "n_positions": 48}
MAKE: dict[str, Callable[[int], Any]] = {
    "llama": lambda layers: LlamaForCausalLM(LlamaConfig(**LLAMA, num_hidden_layers=layers)),
    "gpt2": lambda layers: GPT2LMHeadModel(GPT2Config(**GPT2, n_layer=layers)),
}
# Launches of a call, and a wait, to see whether weights have changed; matrices of many numbers are one more each.
FOR_WEIGHTS, A_WAIT = 9, 1
# Those beyond these and the model's own passes: of a layer, which a kernel for each RMSNorm saves, and of the rest of a
# batch.
OF_ATTRIBUTE = {"llama": (-25, 83), "gpt2": (17, 106)}
OF_EVALUATE = {"llama": (8, 106), "gpt2": (33, 105)}
OF_A_METRIC = 7  # at one circuit's logits
OF_A_REPLAY = 5  # of circuits: the batch is sent and put in its place, and what was measured joined and brought back


def pairs(shared: int = 0, n: int = EXAMPLES) -> eap.PairedDataset:
    generator = torch.Generator().manual_seed(0)
    clean = torch.randint(3, VOCABULARY, (n, TOKENS), generator=generator)
    clean[:, :shared] = clean[:1, :shared]
    corrupted = clean.clone()
    corrupted[:, shared] = (clean[:, shared] + 1) % VOCABULARY
    answers = torch.tensor([[5, 6]] * n)
    return eap.PairedDataset.from_tokens(clean, corrupted, torch.full((n,), TOKENS), answers)


def on_device(name: str, layers: int, dtype: torch.dtype = torch.float32) -> Any:
    with torch.device("meta"):
        model = MAKE[name](layers).to(dtype)
    return model.eval().requires_grad_(False).to("cuda")


def counted(call: Callable[[], object]) -> Counts:
    """Of a call that finds the weights' digests made."""
    known = mock.patch.object(weights, "_from_cache", return_value={})
    with warnings.catch_warnings(), known, counting() as found:
        warnings.simplefilter("ignore", InputWarning)  # without values there is no faithfulness
        call()
    return found


@cache
def attributed(
    name: str, layers: int, n: int = EXAMPLES, native: bool = False, points: int = POINTS, **settings: Any
) -> Counts:
    with pretending(shapes=True, native=native):
        model, data = on_device(name, layers), pairs(n=n)
        return counted(lambda: eap.attribute(model, data, steps=points, memory="1TB", **settings))


@cache
def evaluated(name: str, layers: int, copies: int = 1, n: int = EXAMPLES, **settings: Any) -> Counts:
    """Of three circuits, so many times."""
    with pretending(shapes=True):
        model, data = on_device(name, layers), pairs(n=n)
        graph = bind(model).graph("kv")
        values = torch.randn(graph.edge_mask.shape, generator=torch.Generator().manual_seed(1)) * graph.edge_mask
        scores = eap.EdgeScores(graph, values, {})
        circuits = [scores.select(int(share * graph.n_edges)) for share in (0.3, 0.5, 0.9)]
        return counted(lambda: eap.evaluate(model, circuits * copies, data, memory="1TB", **settings))


@cache
def own_passes(name: str, layers: int, backward: bool) -> int:
    """Launches of two passes of the model itself, one of them with a gradient if asked for."""

    def run() -> None:
        ids = torch.zeros(EXAMPLES, TOKENS, dtype=torch.int64, device="cuda")
        for gradient in (False, backward):
            embeddings = model.get_input_embeddings()(ids).requires_grad_(gradient)
            logits = model(inputs_embeds=embeddings, use_cache=False, logits_to_keep=1).logits
            if gradient:
                logits.backward(torch.empty_like(logits))

    with pretending(shapes=True):
        model = on_device(name, layers)
        return counted(run).launches.total()


def beyond(name: str, few: Counts, more: Counts, backward: bool) -> tuple[int, int]:
    """Launches beyond the model's own passes, of a layer and of the rest of a batch, from runs of two and three."""
    two, three = (
        counts.launches.total() - own_passes(name, layers, backward) for layers, counts in ((2, few), (3, more))
    )
    return three - two, 3 * two - 2 * three


@pytest.mark.parametrize("name", MAKE)
def test_attribution_waits_once_a_batch(name: str) -> None:
    for layers in (2, 3):
        assert attributed(name, layers).own_waits == A_WAIT + 1
    assert attributed(name, 2, batch_size=EXAMPLES // 2).own_waits == A_WAIT + 2


@pytest.mark.parametrize("name", MAKE)
def test_evaluation_waits_once_a_batch(name: str) -> None:
    for layers, copies in ((2, 1), (3, 1), (2, 2)):
        assert evaluated(name, layers, copies).own_waits == A_WAIT + 1
    assert evaluated(name, 2, batch_size=EXAMPLES // 2).own_waits == A_WAIT + 2


@pytest.mark.parametrize("settings", [{"method": "eap-ig-activations"}, {"method": "information-flow-routes"}])
def test_other_methods_wait_once_a_batch(settings: dict[str, str]) -> None:
    assert attributed("gpt2", 2, **settings).own_waits == A_WAIT + 1


@pytest.mark.parametrize("keep", ["examples", "positions-from-end", "neurons"])
def test_what_is_kept_waits_once_more_at_most(keep: str) -> None:
    assert attributed("gpt2", 2, method="eap", keep=keep).own_waits == A_WAIT + 1 + (keep != "neurons")


def test_a_matrix_is_one_launch_to_see_a_change_and_a_vector_none() -> None:
    def found(matrices: int, vectors: int) -> tuple[int, int]:
        shapes = [(300, 333)] * matrices + [(8192,)] * vectors
        with pretending(shapes=True):
            held = (torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in shapes)
            module = torch.nn.ParameterList(torch.nn.Parameter(x, False) for x in held).to("cuda")
            counts = counted(lambda: weights_digest(module))
        return counts.launches.total(), counts.waits.total()

    assert found(0, 1) == found(0, 9) == (FOR_WEIGHTS, A_WAIT)
    assert found(5, 9) == (FOR_WEIGHTS + 5, A_WAIT)


@pytest.mark.parametrize("name", MAKE)
def test_launches_of_attribution(name: str) -> None:
    layer, batch = beyond(name, attributed(name, 2), attributed(name, 3), True)
    assert layer <= OF_ATTRIBUTE[name][0]
    assert batch <= OF_ATTRIBUTE[name][1] + FOR_WEIGHTS


REPLAYED: list[tuple[str, Callable[..., Counts], dict[str, Any]]] = [
    ("llama", attributed, {"layers": 4, "native": True}),
    ("gpt2", attributed, {"layers": 4, "native": True}),
    ("gpt2", attributed, {"layers": 2, "native": True, "method": "eap-ig-activations", "points": 2}),
    ("gpt2", attributed, {"layers": 2, "native": True, "method": "eap-gp", "points": 2}),
    ("llama", evaluated, {"layers": 2}),
    ("gpt2", evaluated, {"layers": 2}),
]


@pytest.mark.parametrize(("name", "call", "settings"), REPLAYED)
def test_a_replayed_batch_is_a_tenth_of_the_launches(
    name: str, call: Callable[..., Counts], settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And less of deeper models. Of batches of one pair the fourth and later ones are replayed."""

    def last(n: int) -> tuple[int, int]:
        """Launches and waits of the last of so many."""
        seen: list[tuple[int, int]] = []
        with counting() as found:
            progress = lambda *_: seen.append((found.launches.total(), found.own_waits))  # noqa: E731
            call(name, n=n, batch_size=1, progress=progress, **settings)
        return seen[-1][0] - seen[-2][0], seen[-1][1] - seen[-2][1]

    plain, waits = last(2)  # too few to be captured
    monkeypatch.setattr(replays, "FEWEST", 1)
    again, waits_then = last(5)
    assert again <= (OF_A_REPLAY if call is evaluated else plain / 10)
    assert waits == waits_then == 1


@pytest.mark.parametrize("name", MAKE)
def test_a_layer_is_as_many_launches_as_the_choice_to_replay_assumes(name: str) -> None:
    for call, least in ((attributed, method.LAUNCHES), (evaluated, circuit_values.LAUNCHES)):
        assert call(name, 3).launches.total() - call(name, 2).launches.total() >= least


@pytest.mark.parametrize("name", MAKE)
def test_launches_of_evaluation(name: str) -> None:
    layer, batch = beyond(name, evaluated(name, 2), evaluated(name, 3), False)
    assert layer <= OF_EVALUATE[name][0]
    assert batch <= OF_EVALUATE[name][1] + FOR_WEIGHTS


@pytest.mark.parametrize("name", MAKE)
def test_reads_begun_together_move_less_in_as_many_launches(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a deep model in bfloat16."""

    def run() -> Counts:
        with pretending(shapes=True):
            model, data = on_device(name, 12, torch.bfloat16), pairs()
            graph = bind(model).graph("kv")
            values = torch.randn(graph.edge_mask.shape, generator=torch.Generator().manual_seed(1)) * graph.edge_mask
            circuit = eap.EdgeScores(graph, values, {}).select(graph.n_edges // 2)
            return counted(lambda: eap.evaluate(model, [circuit], data, memory="1TB"))

    together = run()
    monkeypatch.setattr(circuit_run, "begun_together", lambda arch, graph: False)
    apart = run()
    assert together.bytes < apart.bytes
    assert together.launches.total() == apart.launches.total()
    assert together.own_waits == apart.own_waits == A_WAIT + 1


@pytest.mark.parametrize("name", MAKE)
def test_circuits_are_launched_together(name: str) -> None:
    """What further circuits like the others add is the same at any depth: their metric."""
    two, three = (evaluated(name, n, 3).launches.total() - evaluated(name, n, 2).launches.total() for n in (2, 3))
    assert two == three <= 3 * OF_A_METRIC
