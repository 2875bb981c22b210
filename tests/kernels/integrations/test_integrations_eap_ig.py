"""The drop-in scorer of EAP-IG's package, on a stand-in with the names and the order of calls that the adapter uses.

bench/integrations runs the package itself.
"""

import re
import sys
import types

import pytest
import torch

from eap_kernels import testing
from eap_kernels.integrations import eap_ig
from tests.kernels.integrations.stand_ins import DEVICES, install, named_einsum

UTILS = """
def make_hooks_and_matrices(model, graph, batch_size, n_pos, scores):
    shape = (batch_size, n_pos, graph.n_forward, model.cfg.d_model)
    activation_difference = torch.zeros(shape, dtype=model.cfg.dtype, device=scores.device)

    def gradient_hook(prev_index, bwd_index, gradients):
        grads = gradients if gradients.ndim == 4 else gradients.unsqueeze(2)
        s = einsum(activation_difference[:, :, :prev_index], grads,
                   'batch pos forward hidden, batch pos backward hidden -> forward backward')
        scores[:prev_index, bwd_index] += s.squeeze(1)

    return gradient_hook, activation_difference

def mean_activations(acts, mask):
    return einsum(acts, mask, 'batch pos head hidden, batch pos head hidden -> batch head hidden')
"""
EVALUATE = """
def evaluate_graph(activation_differences, in_graph_vector, activations):
    def input_construction_hook(activations):
        update = einsum(activation_differences[:, :, :len(in_graph_vector)], in_graph_vector,
                        'batch pos previous hidden, previous ... -> batch pos ... hidden')
        activations += update
        return activations
    return input_construction_hook(activations)
"""
# Where the receivers of a model of two layers of three heads stand: first the senders they see, then their columns.
RECEIVERS = [(1, slice(0, 3)), (1, slice(3, 6)), (1, slice(6, 9)), (4, 9)]
RECEIVERS += [(5, slice(10, 13)), (5, slice(13, 16)), (5, slice(16, 19)), (8, 19), (9, -1)]


@pytest.fixture
def eap(monkeypatch):
    install(monkeypatch, eap__utils=UTILS, eap__evaluate=EVALUATE)
    return types.SimpleNamespace(utils=sys.modules["eap.utils"], evaluate=sys.modules["eap.evaluate"])


def eap_scores(eap, dtype, device):
    """Scores of a model of two layers after two backward passes, and the operands of the contraction."""
    generator = torch.Generator().manual_seed(0)
    graph = types.SimpleNamespace(n_forward=9)
    model = types.SimpleNamespace(cfg=types.SimpleNamespace(d_model=7, dtype=dtype))
    scores = torch.zeros(9, 21, dtype=dtype, device=device)
    hook, difference = eap.utils.make_hooks_and_matrices(model, graph, 2, 5, scores)
    rows = testing.random_tensor((9, 10, 7), dtype, generator, "contiguous", device)
    grads = testing.random_tensor((21, 20, 7), dtype, generator, "contiguous", device)
    reach = torch.zeros(21, dtype=torch.int64)
    for step in range(2):
        for senders, columns in reversed(RECEIVERS):
            # A sender that the receiver does not see may hold anything.
            difference[:] = float("nan")
            difference[:, :, :senders] = rows[:senders].transpose(0, 1).unflatten(0, (2, 5))
            grad = grads[columns, 10 * step : 10 * step + 10].transpose(0, -2).unflatten(0, (2, 5))
            hook(senders, columns, grad)
            reach[columns] = senders
    return scores, rows.repeat(1, 2, 1), grads, reach


@pytest.mark.parametrize("where", DEVICES)
def test_eap_ig_scores(eap, dtype, where):
    published, *operands = eap_scores(eap, dtype, where)
    with eap_ig.patch():
        scores, *_ = eap_scores(eap, dtype, where)
    assert scores.dtype == dtype
    testing.assert_close(scores, published, testing.edge_scores_oracle(*operands))


@pytest.mark.parametrize("where", DEVICES)
@pytest.mark.parametrize("heads", [(), (3,)])
@pytest.mark.parametrize("density", [0.1, 1.0])
def test_eap_ig_circuit(eap, heads, density, where):
    generator = torch.Generator().manual_seed(0)
    difference = testing.random_tensor((10, 9, 7), torch.float32, generator, device=where).unflatten(0, (2, 5))
    mask = (torch.rand(5, *heads, generator=generator) < density).float().to(where)
    stream = testing.random_tensor((10, 7, 3), torch.float32, generator, device=where).mT.unflatten(0, (2, 5))
    stream = stream if heads else stream[:, :, 0]
    published = eap.evaluate.evaluate_graph(difference, mask, stream.clone())
    with eap_ig.patch(), torch.inference_mode():
        read = eap.evaluate.evaluate_graph(difference, mask, stream.clone())
    base = stream.reshape(10, -1, 7).transpose(0, 1)
    oracle = testing.masked_read_oracle(base, difference[:, :, :5].flatten(0, 1).transpose(0, 1), mask.reshape(5, -1))
    testing.assert_close(*(x.reshape(10, -1, 7).transpose(0, 1) for x in (read, published)), oracle)


def test_eap_ig_copy_in_another_package(monkeypatch, eap):
    """CircuitKIT's copy, whose `utils` has another name; the package itself is left alone."""
    install(monkeypatch, kit__eap__eap_utils=UTILS, kit__eap__evaluate=EVALUATE)
    copy = types.SimpleNamespace(utils=sys.modules["kit.eap.eap_utils"])
    published, *_ = eap_scores(copy, torch.float64, "cpu")
    with eap_ig.patch("kit.eap"):
        assert copy.utils.einsum is not named_einsum and eap.utils.einsum is named_einsum
        scores, *_ = eap_scores(copy, torch.float64, "cpu")
    torch.testing.assert_close(scores, published)
    assert copy.utils.einsum is named_einsum


def test_a_copy_that_is_not_there_is_named():
    message = "eap_ig.patch: expected kit.utils to be importable, got No module named 'kit'"
    with pytest.raises(ImportError, match=re.escape(message)):
        eap_ig.patch("kit")


def test_eap_ig_leaves_other_contractions_alone(eap, randn):
    acts, mask = randn(2, 5, 3, 7), randn(2, 5, 3, 7)
    published = eap.utils.mean_activations(acts, mask)
    with eap_ig.patch():
        assert torch.equal(eap.utils.mean_activations(acts, mask), published)


def test_a_patch_is_restored_also_after_an_error(eap):
    with pytest.raises(RuntimeError), eap_ig.patch():
        torch.ones(2) @ torch.ones(3)
    assert eap.utils.einsum is named_einsum and eap.evaluate.einsum is named_einsum


def test_a_patch_stays_until_restored_and_nested_ones_change_nothing(eap):
    patched = eap_ig.patch()
    inside = eap.utils.einsum
    with eap_ig.patch():
        assert eap.utils.einsum is inside
    assert eap.utils.einsum is inside
    patched.restore()
    patched.restore()
    assert eap.utils.einsum is named_einsum


def test_a_patch_is_restored_where_a_generator_is_abandoned(eap):
    def scoring():
        with eap_ig.patch():
            yield eap.utils.einsum

    batches = scoring()
    assert next(batches) is not named_einsum
    del batches
    assert eap.utils.einsum is named_einsum and eap.evaluate.einsum is named_einsum


def test_a_version_with_its_einsum_elsewhere_is_refused_before_anything_is_touched(monkeypatch, eap):
    monkeypatch.delattr(eap.evaluate, "einsum")  # such as in code that calls einops.einsum
    with pytest.raises(RuntimeError, match=r"^eap_ig.patch: expected eap.evaluate to have 'einsum', got another ver"):
        eap_ig.patch()
    assert eap.utils.einsum is named_einsum


def test_another_version_is_refused_before_anything_is_touched(monkeypatch):
    install(monkeypatch, eap__utils=UTILS, eap__evaluate=EVALUATE.replace("previous ...", "previous"))
    message = "eap_ig.patch: expected eap.evaluate.evaluate_graph to use 'batch pos previous hidden, "
    with pytest.raises(RuntimeError, match=re.escape(message)):
        eap_ig.patch()
    assert sys.modules["eap.utils"].einsum is named_einsum
