"""Models on a GPU: what runs there gives what it gives on the CPU."""

import copy
import os

import pytest
import torch

import eap_circuits as eap
from eap_circuits.selfcheck import StayDouble
from eap_kernels.testing import relative_error


@pytest.fixture
def gpu():
    if not torch.cuda.is_available() and "cuda" in os.environ.get("EAP_REQUIRE", "").split(","):
        pytest.fail("EAP_REQUIRE asks for cuda: torch sees no CUDA device")
    if not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")


@pytest.fixture
def both(gpu, make_model):
    """both(family): the same float64 model on the CPU and on the GPU."""

    def make(family):
        model = make_model(family)
        return model, copy.deepcopy(model).cuda()

    # Where a model computes in float32, devices differ by more than what is looked for here.
    with StayDouble():
        yield make


def agree(results, right):
    """To float64's rounding in sums of a few thousand terms; scores are given back in float32."""
    for found, expected in zip(results, right, strict=True):
        assert relative_error(found, expected) <= 1e-6


@pytest.mark.parametrize("heads", ["kv", "query"])
def test_scores_and_circuits(family, heads, both, make_pairs):
    data, models = make_pairs(), both(family)
    agree(*([eap.attribute(model, data, steps=2, heads=heads).values] for model in reversed(models)))
    scores = eap.attribute(models[0], data, method="eap", heads=heads)
    circuits = [scores.select(n) for n in (3, 40)]
    agree(*([result.values for result in eap.evaluate(model, circuits, data)] for model in reversed(models)))


@pytest.mark.parametrize(
    "method",
    ["eap", "clean-corrupted", "eap-ig-activations", "eap-conductance", "eap-gp", "information-flow-routes", "exact"],
)
def test_methods(kind, method, both, make_pairs):
    data, models = make_pairs(n=3), both(kind)
    given = {"edges": eap.attribute(models[0], data, method="eap").select(20)} if method == "exact" else {}
    agree(*([eap.attribute(model, data, method=method, steps=2, **given).values] for model in reversed(models)))


@pytest.mark.parametrize(
    "settings",
    [
        {"reuse_prefix": False},
        {"ablation": "zero"},
        {"ablation": "mean"},
        {"ablation": "mean-positional"},
        {"rules": "relp"},
        {"rules": "gim"},
        # On the clean prompts themselves its gradient is 0, and a score rounding noise.
        {"metric": "kl_divergence", "method": "eap-ig-inputs", "steps": 2},
        {"memory": "64MiB"},
    ],
    ids=lambda settings: "-".join(f"{name}-{value}" for name, value in settings.items()),
)
def test_settings(settings, both, make_pairs):
    data, models = make_pairs(), both("llama")
    agree(*([eap.attribute(model, data, **{"method": "eap", **settings}).values] for model in reversed(models)))


def test_statistics_curves_and_constants(both, make_pairs):
    data, models = make_pairs(n=4), both("gpt2")
    scores = [
        eap.attribute(model, data, method="eap", keep=("examples", "positions", "neurons"))
        for model in reversed(models)
    ]
    agree(*([x.values, x.variance, x.per_example, x.per_position, x.neurons] for x in scores))
    curves = [eap.faithfulness_curve(model, scores[1], data, (0.1, 0.5)) for model in reversed(models)]
    agree(*([torch.tensor(curve.faithfulness)] for curve in curves))
    learned = [eap.optimal_constants(model, scores[1].select(30), data, steps=2) for model in reversed(models)]
    agree(*(constants.tensors for constants in learned))


def alike():
    """Pairs of one shape, each behind a prefix of its own."""
    clean = torch.randint(3, 59, (9, 7), generator=torch.Generator().manual_seed(0))
    corrupted = clean.clone()
    corrupted[:, 2] = (clean[:, 2] + 1) % 59
    return eap.PairedDataset.from_tokens(clean, corrupted, torch.full((9,), 7), clean[:, :2])


@pytest.mark.parametrize("method", ["eap-ig-inputs", "eap-ig-activations", "eap-gp"])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_replayed_batches(kind, method, both):
    """The graph is compared with a batch that is not replayed, too."""
    models = both(kind)
    scores = [eap.attribute(model, alike(), method=method, steps=2, batch_size=1) for model in reversed(models)]
    agree([scores[0].values], [scores[1].values])
    assert scores[0].info["replayed"] == "6 of 9 batches"


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_replayed_batches_of_circuits(kind, both):
    models = both(kind)
    scores = eap.attribute(models[0], alike(), method="eap")
    circuits = [scores.select(n) for n in (3, 40)]
    found, right = (eap.evaluate(model, circuits, alike(), batch_size=1) for model in reversed(models))
    agree([result.values for result in found], [result.values for result in right])
    assert found[0].info["replayed"] == "6 of 9 batches"


def test_a_model_in_bfloat16_is_as_near_to_the_truth_as_on_the_cpu(gpu, make_model, make_pairs, relative):
    """The same values are rounded on both; on a GPU contributions and gradients meet in bfloat16, too."""
    data, model = make_pairs(), make_model("llama")
    with StayDouble():
        right = eap.attribute(model, data, method="eap").values
    cpu, cuda = (
        eap.attribute(copy.deepcopy(model).to(device, torch.bfloat16), data, method="eap").values
        for device in ("cpu", "cuda")
    )
    assert relative(cuda, right) <= 2 * (relative(cpu, right) + torch.finfo(torch.bfloat16).eps)
