"""Arguments that all functions share: the metric, whole numbers, progress, and spellings of other packages."""

from __future__ import annotations

import inspect
import io
import json
from contextlib import redirect_stderr
from dataclasses import asdict, replace
from functools import partial

import numpy
import pytest
import torch

import eap_circuits as eap
from eap_circuits import leaderboard
from eap_circuits.errors import expected, flag, function, listed, number, one_of, whole
from eap_circuits.methods import METHODS
from eap_circuits.reproduction import Settings


@pytest.fixture
def model(make_model):
    return make_model("llama", torch.float32)


@pytest.fixture
def data(make_pairs):
    return make_pairs()


def of_metric(data, metric):
    return eap.PairedDataset.from_tokens(data.clean, data.corrupted, data.lengths, data.answers, metric=metric)


def test_results_do_not_share_their_info(model, data):
    scores = eap.attribute(model, data, method="eap")
    circuit = scores.select(20)
    info = {"metric": "logit_diff"}
    curve = eap.faithfulness_curve(model, scores, data, (0.5, 1))
    card = eap.faithfulness_card(model, circuit, data, most_edges=0)
    for result in (scores, circuit, scores.node_scores(), curve.results[0], curve, card):
        mine = replace(result, info=info)
        mine.info["metric"] = "mine"
        assert info == {"metric": "logit_diff"} and mine == result
        with pytest.raises(eap.InputError, match=r"^info: expected a dictionary, found list"):
            replace(result, info=[])


@pytest.mark.parametrize("kind", [Settings, leaderboard.Settings])
@pytest.mark.parametrize("fractions", [(0.5, 0.1), (0.5, 0.5), (0, 1), (0.5, 2), (), "0.5"])
def test_fractions_of_a_comparison_are_refused_before_any_work(kind, fractions):
    with pytest.raises(eap.InputError, match=r"^fractions: expected growing numbers in \(0, 1\], found"):
        kind(fractions=fractions)


# The metric.


def test_no_function_has_a_metric_of_its_own():
    with_metric = {name for name in eap.__all__ if inspect.isfunction(found := getattr(eap, name))
                   and "metric" in inspect.signature(found).parameters}  # fmt: skip
    assert with_metric >= {"attribute", "plan", "evaluate", "faithfulness_curve", "compare", "optimal_constants"}
    assert {inspect.signature(getattr(eap, name)).parameters["metric"].default for name in with_metric} == {None}


def test_the_data_s_own_metric_is_what_is_measured(model, data):
    own = of_metric(data, "prob_diff")
    scores, asked = eap.attribute(model, own), eap.attribute(model, data, "prob_diff")
    assert scores.info["metric"] == "prob_diff" and torch.equal(scores.values, asked.values)
    assert eap.attribute(model, data).info["metric"] == "logit_diff"
    assert scores.node_scores().info["metric"] == "prob_diff"
    circuit = scores.select(40)
    for ablation in ("patching", "mean"):
        found = eap.evaluate(model, circuit, own, ablation=ablation).values
        assert torch.equal(found, eap.evaluate(model, circuit, data, "prob_diff", ablation=ablation).values)
    curve = eap.faithfulness_curve(model, scores, own, (0.5,))
    assert (
        curve.results[0].mean == eap.faithfulness_curve(model, scores, data, (0.5,), metric="prob_diff").results[0].mean
    )
    both = eap.compare(model, circuit, circuit, own, data).results[0]
    assert [r.clean for r in both] == [eap.evaluate(model, circuit, each).clean for each in (own, data)]
    assert both[0].clean != both[1].clean
    assert eap.plan(model, own, memory="1GB") == eap.plan(model, data, "prob_diff", memory="1GB")
    learned = [
        eap.optimal_constants(model, circuit, x, metric, steps=2) for x, metric in ((own, None), (data, "prob_diff"))
    ]
    assert all(torch.equal(a, b) for a, b in zip(*(each.tensors for each in learned), strict=True))


def published_logit_diff(logits, clean_logits, input_length, labels, mean=True, loss=False):
    """As in the published package: logits [E, T, V], by default a mean."""
    at = logits[torch.arange(len(logits)), input_length - 1]
    good_bad = at.gather(-1, labels)
    results = good_bad[:, 0] - good_bad[:, 1]
    results = -results if loss else results
    return results.mean() if mean else results


def test_a_published_metric_is_refused_with_the_line_that_adapts_it(model, data):
    loss = partial(published_logit_diff, loss=True)
    with pytest.raises(eap.InputError, match=r"^metric: expected a callable of \(logits \[E, V\], batch\)") as refused:
        eap.attribute(model, data, loss)
    line = str(refused.value).split("is called by ")[1].split(", without the minus")[0]
    adapted = eval(line, {"metric": loss, "torch": torch})
    scores = eap.attribute(model, data, adapted)
    torch.testing.assert_close(scores.values, eap.attribute(model, data).values)
    with pytest.raises(
        eap.InputError, match=r"one value per example, found torch.float32 of shape \[\], such as a mean"
    ):
        eap.attribute(model, data, lambda logits, batch: adapted(logits, batch).mean())
    with pytest.raises(eap.InputError, match=r"^metric: expected a callable of .* found one of \(logits\)\.$"):
        eap.evaluate(model, scores.select(40), data, lambda logits: logits)


# Spellings.


@pytest.mark.parametrize("spelling", ["n_steps", "ig_steps", "num_steps", "step", "Steps"])
def test_other_names_of_arguments(model, data, spelling):
    for call in (eap.attribute, eap.plan):
        said = rf"^{call.__name__}\(\), argument: .* found '{spelling}' \(did you mean 'steps'\?\)\.$"
        with pytest.raises(eap.InputError, match=said):
            call(model, data, **{spelling: 5})


def test_every_function_names_its_arguments(model, data):
    scores = eap.attribute(model, data, method="eap")
    circuit = scores.select(40)
    calls = {
        "evaluate": (partial(eap.evaluate, model, circuit, data), "metrics", "metric"),
        "faithfulness_curve": (partial(eap.faithfulness_curve, model, scores, data), "fraction", "fractions"),
        "compare": (partial(eap.compare, model, circuit, circuit, data, data), "batchsize", "batch_size"),
        "optimal_constants": (partial(eap.optimal_constants, model, circuit, data), "lr_rate", "rate"),
        "acdc": (partial(eap.acdc, model, data), "tau_threshold", "threshold"),
        "ibcircuit": (partial(eap.ibcircuit, model, data), "n_steps", "steps"),
        "faithfulness_card": (partial(eap.faithfulness_card, model, circuit, data), "resample", "resamples"),
        "learn_mask": (partial(eap.learn_mask, model, data, start=scores), "n_steps", "steps"),
        "attribute_circuit": (partial(eap.attribute_circuit, model, circuit, data), "metrics", "metric"),
        "prune_gradually": (partial(eap.prune_gradually, model, data, start=scores), "keeps", "keep"),
        "refine": (partial(eap.refine, model, circuit, data), "n_rounds", "rounds"),
        "select": (scores.select, "num_edges", "n_edges"),
        "summarise": (partial(eap.summarise, model, data), "batchsize", "batch_size"),
        "check_model": (partial(eap.check_model, model), "edges", "n_edges"),
        "discover": (partial(eap.discover), "modle", "model"),
        "load_task": (partial(eap.load_task, "ioi", None), "prepend_BOS", "prepend_bos"),
    }
    for name, (call, given, meant) in calls.items():
        with pytest.raises(eap.InputError, match=rf"^{name}\(\), argument: .* \(did you mean '{meant}'\?\)\.$"):
            call(**{given: 1})
    with pytest.raises(eap.InputError, match=r"found 'zzz'\.$"):
        eap.evaluate(model, circuit, data, zzz=1)
    said = r"^attribute\(\): expected at most model, data, metric by position, and the others by name, found 4 by"
    with pytest.raises(eap.InputError, match=said):
        eap.attribute(model, data, "logit_diff", "eap")
    scores = eap.attribute(model, data, method="eap")
    with pytest.raises(eap.InputError, match=r"expected at most n_edges, .*, found 10 by position\.$"):
        scores.select(*range(10))
    with pytest.raises(eap.InputError, match=r"expected one of 'among', .*'seconds', 'signed', 'thresh"):
        scores.select(5, zzz=1)


def test_other_names_of_methods(model, data):
    spellings = {
        "EAP": "'eap'",
        "EAP-IG-inputs": "'eap-ig-inputs'",
        "eap_ig_inputs": "'eap-ig-inputs'",
        "EAP-IG-activations": "'eap-ig-activations'",
        "EAP-IG": "'eap-ig-activations' or 'eap-ig-inputs'",
        "ifr": "'information-flow-routes'",
        "Clean-Corrupted": "'clean-corrupted'",
        "exakt": "'exact'",
    }
    for spelling, meant in spellings.items():
        with pytest.raises(eap.InputError, match=rf"^method: expected one of 'clean-corrupted', .*mean {meant}\?\)\.$"):
            eap.attribute(model, data, method=spelling)
    with pytest.raises(eap.InputError, match=r"\(did you mean 'kl_divergence'\?\)"):
        eap.evaluate(model, eap.attribute(model, data, method="eap").select(40), data, "kl_div")
    with pytest.raises(eap.InputError, match=r"found None\.$"):
        eap.attribute(model, data, method=None)


# Whole numbers.


def test_whole_numbers_are_those_of_python_numpy_and_torch():
    for value in (5, numpy.int64(5), numpy.uint8(5), numpy.array(5), torch.tensor(5)):
        assert type(whole("n", value, 1, 9)) is int and whole("n", value, 1, 9) == 5
    for value in (True, numpy.bool_(True), torch.tensor(True), 5.0, numpy.float64(5), "5", None, [5], 0, 10):
        with pytest.raises(eap.InputError, match=r"^n: expected a whole number from 1 to 9, or not, found"):
            whole("n", value, 1, 9, ", or not")


def test_numpy_numbers_wherever_a_number_is_taken(model, data):
    number = numpy.int64
    scores = eap.attribute(
        model, data, steps=number(2), batch_size=numpy.int32(2), memory=number(10**9), keep="neurons"
    )
    assert torch.allclose(scores.values, eap.attribute(model, data, steps=2).values, rtol=1e-4, atol=1e-7)
    circuit = scores.select(number(40))
    assert scores.top_edges(number(3)) == scores.top_edges(3)
    nodes = scores.node_scores()
    assert nodes.select(number(3)) == nodes.select(3)
    assert nodes.top_nodes(number(3)) == nodes.top_nodes(3) and nodes.top_neurons(number(3)) == nodes.top_neurons(3)
    assert len(data[number(1)]) == 1
    for many in (numpy.array([2, 0]), [number(2), number(0)], numpy.arange(len(data)) == 2):
        assert torch.equal(data[many].clean[0], data.clean[2])
    eap.optimal_constants(model, circuit, data, steps=number(1), rate=numpy.float32(0.1))
    eap.faithfulness_curve(model, scores, data, (0.5,), baselines=("random",), seeds=numpy.arange(2))
    kept = torch.rand(3, 4, 5)
    assert torch.equal(
        eap.bootstrap_confidence(kept, draws=number(9), seed=number(1)), eap.bootstrap_confidence(kept, draws=9, seed=1)
    )
    assert all(check.passed for check in eap.check_model(model, n_edges=number(2), seed=number(1)))
    assert json.dumps(asdict(Settings(scored=number(2), seed=number(1), grid=(number(1),)))) == json.dumps(
        asdict(Settings(scored=2, seed=1, grid=(1,)))
    )
    assert eap.Graph((number(2),), (number(1),), number(8)) == eap.Graph((2,), (1,), 8)
    for wrong in (
        {"steps": True},
        {"steps": 5.0},
        {"batch_size": numpy.bool_(True)},
        {"memory": True},
        {"memory": 1e9},
    ):
        with pytest.raises(eap.InputError, match=f"^{next(iter(wrong))}: expected"):
            eap.attribute(model, data, **wrong)


# Progress, and scores in place of a circuit.


def test_progress_true_shows_a_bar(model, data):
    scores = eap.attribute(model, data, method="eap")
    circuit = scores.select(40)
    for call in (
        partial(eap.attribute, model, data, method="eap"),
        partial(eap.evaluate, model, circuit, data),
        partial(eap.faithfulness_curve, model, scores, data, (0.5,)),
        partial(eap.optimal_constants, model, circuit, data, steps=2),
        partial(eap.learn_mask, model, data, start=scores, steps=2),
        partial(eap.attribute_circuit, model, circuit, data),
        partial(eap.prune_gradually, model, data, start=scores),
        partial(eap.refine, model, circuit, data, rounds=1),
        partial(eap.acdc, model, data, 1e3),
        partial(eap.ibcircuit, model, data, steps=2),
        partial(eap.faithfulness_card, model, circuit, data, most_edges=1),
        partial(eap.summarise, model, data),
    ):
        with redirect_stderr(io.StringIO()) as shown:
            call(progress=True)
        assert "100%" in shown.getvalue() and "it/s" in shown.getvalue()
        with redirect_stderr(io.StringIO()) as shown:
            call(progress=False)
        assert shown.getvalue() == ""
        with pytest.raises(eap.InputError, match=r"^progress: expected True, or a function"):
            call(progress="yes")


def test_what_is_no_circuit_is_refused_with_what_to_do(model, data):
    scores = eap.attribute(model, data, method="eap")
    for wrong, cure in (
        (scores, r"EdgeScores \(scores.select\(n_edges=200\) gives a circuit\)"),
        (scores.node_scores(), r"NodeScores \(scores.select\(n_nodes=200\) gives a circuit\)"),
        (scores.values > 0, r"Tensor \(Circuit.from_mask\(graph, mask\) gives a circuit\)"),
        ("circuit.json", r"str \(Circuit.load\(path\) gives a circuit\)"),
        (None, "NoneType"),
    ):
        match = f"^circuit: expected a Circuit or a list of them, found {cure}"
        calls = [lambda c: eap.evaluate(model, c, data), lambda c: eap.optimal_constants(model, c, data)]
        calls.append(lambda c: eap.compare(model, c, scores.select(40), data, data))
        calls += [] if wrong is None else [lambda c: eap.evaluate(model, [c], data)]
        for call in calls:
            with pytest.raises(eap.InputError, match=match):
                call(wrong)
    with pytest.raises(eap.InputError, match=r"^scores: expected EdgeScores, such as attribute returns, found Circuit"):
        eap.faithfulness_curve(model, scores.select(40), data)


# Scores that are not finite.


@pytest.mark.parametrize(
    ("method", "keep"), [(m.name, keep) for m in METHODS.values() if m.name != "exact" for keep in (None, *m.keeps)]
)
def test_scores_that_overflow_are_refused_with_the_cure(model, data, method, keep):
    model, data = model.half(), replace(data, spans=torch.zeros_like(data.clean))
    with torch.no_grad():
        if method == "information-flow-routes":
            model.model.embed_tokens.weight.mul_(6e4 / model.model.embed_tokens.weight.abs().max())
            model.model.layers[0].mlp.down_proj.weight.fill_(6e4)
        else:
            model.model.embed_tokens.weight.mul_(1e-6)
            model.lm_head.weight.mul_(1e4)
    with pytest.raises(
        eap.InputError,
        match=r"^scores: expected finite .* of the float16 model are not; load the model in bfloat16 or float32",
    ):
        eap.attribute(model, data, method=method, keep=keep)


# What every function checks.


@pytest.mark.parametrize("value", [True, False, numpy.bool_(True), numpy.array(False), torch.tensor(True)])
def test_a_flag_of_any_library_is_one_of_python(value):
    assert flag("signed", value) is bool(value)


@pytest.mark.parametrize(
    "value", [None, 0, 1, 1.0, "no", "", [], [True], torch.tensor([True]), torch.ones(2), object()]
)
def test_what_is_no_flag_is_refused(value):
    with pytest.raises(eap.InputError, match=r"^signed: expected True or False, found .*\.$"):
        flag("signed", value)


@pytest.mark.parametrize("value", [2, 2.0, numpy.float32(2), numpy.int64(2), torch.tensor(2.0), numpy.array(2)])
def test_a_number_of_any_library_is_one_of_python(value):
    assert type(number("rate", value, "a number")) is float and number("rate", value, "a number") == 2


@pytest.mark.parametrize("value", [True, "2", None, float("nan"), 2 + 0j, [2], torch.ones(2), 10**400, 1.5, -0.1])
def test_what_is_no_such_number_is_refused(value):
    with pytest.raises(eap.InputError, match=r"^rate: expected a share, found .*\.$"):
        number("rate", value, "a share", 0, 1)


def test_members_are_those_of_one_dimension():
    for value in ([1, 2], (1, 2), range(1, 3), iter([1, 2]), numpy.array([1, 2]), torch.tensor([1, 2])):
        assert [int(x) for x in listed("seeds", value, "a list")] == [1, 2]
    for value in (None, 1, "12", b"12", {1: 2}, numpy.array(1), torch.ones(2, 2), torch.tensor(1)):
        with pytest.raises(eap.InputError, match=r"^seeds: expected a list, found "):
            listed("seeds", value, "a list")


def test_functions_take_two_arguments(model):
    function("progress", lambda done, total: None, "a function")
    for value in (None, 1, "x", int, lambda done: None, model):
        with pytest.raises(eap.InputError, match=r"^progress: expected a function, found "):
            function("progress", value, "a function")


class Unspeakable:
    def __repr__(self):
        raise RuntimeError("no")


LONG = {"text": "x" * 20000, "lines": "x\ny" * 5000, "digits": 10**5000, "list": list(range(9000)),
        "tensor": torch.zeros(90, 90), "unspeakable": Unspeakable()}  # fmt: skip


@pytest.mark.parametrize("value", LONG.values(), ids=LONG)
def test_what_was_found_is_shown_in_a_short_line(value):
    for call in (
        partial(one_of, "how", value, ("top", "greedy")),
        partial(whole, "n", value, 1, 5),
        partial(flag, "n", value),
    ):
        with pytest.raises(eap.InputError) as error:
            call()
        assert len(str(error.value)) < 300 and "\n" not in str(error.value)
    assert len(str(expected("file", "JSON", "y\n" * 9000))) < 300


@pytest.mark.parametrize("wrong", [None, 3, "x", [1], torch.zeros(2)])
def test_what_is_no_result_or_no_graph_is_refused(model, data, wrong):
    scores = eap.attribute(model, data, method="eap")
    circuit, graph = scores.select(20), scores.graph
    calls = [
        lambda: eap.random_circuit(wrong, 3), lambda: eap.Circuit(wrong, circuit.mask),
        lambda: eap.Circuit(graph, wrong),
        lambda: eap.Circuit.from_mask(graph, wrong), lambda: eap.EdgeScores(wrong, scores.values),
        lambda: eap.EdgeScores(graph, wrong), lambda: eap.NodeScores(graph, wrong),
        lambda: eap.edge_overlap(circuit, wrong), lambda: eap.node_overlap(wrong, circuit),
        lambda: eap.edge_auroc(wrong, circuit), lambda: eap.edge_auroc(scores, wrong),
        lambda: eap.score_agreement(scores, wrong), lambda: eap.bootstrap_confidence(wrong),
        lambda: eap.normal_confidence(wrong, scores.values, 3), lambda: scores.select(20, signed=wrong),
        lambda: scores.select(20, positive_ratio="x"), lambda: scores.select(20, among=circuit.values),
        lambda: eap.faithfulness_curve(model, scores, data, [wrong]), lambda: eap.evaluate(model, wrong, data),
        lambda: eap.attribute(model, data, reuse_prefix=wrong), lambda: scores.node_scores().select(2, signed=wrong),
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(eap.InputError, match=r": expected .*, found "):
            call()
