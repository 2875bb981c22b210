"""What calls change comes back, wherever they are interrupted, and no two threads change the same."""

from __future__ import annotations

import os
import signal
import sys
import threading

import pytest
import torch

import eap_circuits as eap
from eap_circuits.forward import Hooks, borrowed
from eap_circuits.forward.layers.grouped_attention import SHARED_KEYS
from eap_circuits.modules import loans
from eap_circuits.modules.loans import Changes, SharedChange, gives_back
from tests.circuits.untouched import differences, process_state, snapshot


def interrupted(call, event, nth, files):
    """Run it, and raise KeyboardInterrupt at the nth event in these files; (whether it came, events until then)."""
    count = 0

    def local(frame, what, _):
        nonlocal count
        if what == event:
            count += 1
            if count == nth:
                sys.settrace(None)
                raise KeyboardInterrupt
        return local

    def trace(frame, *_):
        if not frame.f_code.co_filename.endswith(files):
            return None
        frame.f_trace_opcodes = event == "opcode"
        return local

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt as error:
        return error, count  # kept, as a debugger keeps it
    finally:
        sys.settrace(before)
    return None, count


@pytest.fixture
def model(make_model):
    model = make_model("llama").train()
    list(model.parameters())[3].requires_grad_(False)
    model.model.layers[0].register_forward_hook(lambda *_: None)
    return model


@pytest.mark.parametrize(("event", "step"), [("line", 3), ("opcode", 19)])
@pytest.mark.parametrize("inference", [False, True])
def test_an_interruption_of_changing_and_changing_back_loses_nothing(event, step, inference, model):
    @gives_back
    def changes():
        with borrowed(model), Hooks(3) as hooks, torch.no_grad():
            hooks.on_input(model.lm_head, lambda x: x)
            hooks.on_output(model.lm_head, lambda x: x)
            hooks.set_attribute(model.model.layers[0].self_attn, "num_key_value_groups", 1)
            hooks.replace_forward(model.model.norm, lambda x: x)

    files = ("loans.py", "hooks.py", "grouped_attention.py", "grad_mode.py")
    with torch.inference_mode(inference):
        before, process = snapshot(model), process_state()
        nth, came = 1, True
        while came:
            came, _ = interrupted(changes, event, nth, files)
            assert snapshot(model) == before, nth
            assert process_state() == process, nth
            nth += step
    assert nth > 100


@pytest.mark.parametrize("rules", [None, "gim"])
def test_an_interruption_of_a_run_loses_nothing(rules, model, make_pairs):
    data = make_pairs(n=2)

    def run():
        eap.attribute(model, data, method="eap", heads="query", rules=rules, reuse_prefix=False)

    files = ("loans.py", "hooks.py", "grad_mode.py", "contextlib.py", "runner.py", "backward_rules.py", "gradients.py")
    run()  # what only a first run does would be counted, but not come again
    before, process = snapshot(model), process_state()
    _, events = interrupted(run, "line", 0, files)
    for nth in range(1, events, events // 25):
        error, _ = interrupted(run, "line", nth, files)
        assert error is not None
        assert snapshot(model) == before, nth
        assert process_state() == process, nth


@pytest.mark.parametrize("after", range(1, 8))
def test_gradients_stay_on_while_the_error_is_kept(after, model, make_pairs):
    data = make_pairs(n=6)
    scores = eap.attribute(model, data, method="eap")
    circuits = [scores.select(20), scores.select(40)]
    calls = []

    def metric(logits, batch):
        calls.append(1)
        if len(calls) == after:
            raise ValueError("mine")
        return logits[:, 0]

    for call in (
        lambda: eap.evaluate(model, circuits, data, metric, batch_size=3),
        lambda: eap.faithfulness_curve(model, scores, data, (0.2, 0.4), metric=metric, batch_size=3),
    ):
        calls.clear()
        with pytest.raises(ValueError, match="mine") as kept:
            call()
        assert torch.is_grad_enabled(), kept


def in_thread(call):
    found = []

    def run():
        try:
            found.append(call())
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(30)
    assert found, "it still waits"
    return found[0]


def test_a_second_thread_is_refused_and_another_model_is_not(model, make_model, make_pairs, relative):
    data, other = make_pairs(n=3), make_model("llama")
    right = eap.attribute(other, data, method="eap").values
    twin = make_model("llama")
    twin.model = model.model  # another model with the same layers
    found = {}

    def metric(logits, batch):
        if not found:
            found["model"] = in_thread(lambda: eap.attribute(model, data))
            found["twin"] = in_thread(lambda: eap.attribute(twin, data))
            found["other"] = in_thread(lambda: eap.attribute(other, data, method="eap").values)
            found["nested"] = eap.attribute(model, data, method="eap").values
        return logits[:, 0]

    scores = eap.attribute(model, data, metric)
    for name in ("model", "twin"):
        assert isinstance(found[name], eap.InputError)
        assert "expected one call at a time, or a copy of the model for each thread, found a call of another" in str(
            found[name]
        )
    for values in (found["other"], found["nested"]):
        assert relative(values, right) < 1e-6
    assert relative(scores.values, eap.attribute(model, data, metric=lambda logits, _: logits[:, 0]).values) < 1e-6


def assert_refused(found, words):
    """In each of several runs by a hook."""
    assert len(found) > 2
    for each in found:
        assert isinstance(each, eap.InputError)
        assert words in str(each)


def test_a_run_of_another_thread_in_the_middle_of_one_is_refused(model, make_pairs, relative):
    data, found, within = make_pairs(n=3), [], []
    prompt = data.clean[:1, : data.lengths[0]]
    right = eap.attribute(model, data, method="eap").values

    def hook(*_):
        if not within:
            within.append(None)
            found.append(in_thread(lambda: model(prompt)))
            within.clear()

    model.model.layers[1].register_forward_hook(hook)
    scores = eap.attribute(model, data, method="eap").values
    assert relative(scores, right) < 1e-6
    assert_refused(found, "or a copy of the model for each thread, found a run in another thread, of a")


@pytest.mark.parametrize("call", ["attribute", "evaluate", "plan", "circuit_model", "summarise"])
def test_a_call_in_the_middle_of_a_run_is_refused(call, make_model, make_pairs, relative):
    """From a hook of the user's own on a model whose run has our hooks, which would be taken for the call's."""
    model, data, found = make_model("llama"), make_pairs(n=3), []
    circuit = eap.attribute(model, data, method="eap").select(20)
    calls = {
        "attribute": lambda: eap.attribute(model, data, method="eap"),
        "evaluate": lambda: eap.evaluate(model, circuit, data),
        "plan": lambda: eap.plan(model, data),
        "circuit_model": lambda: eap.circuit_model(model, circuit, "zero")(data.clean[:, :3]),
        "summarise": lambda: eap.summarise(model, data),
    }

    def hook(*_):
        try:
            found.append(calls[call]())
        except Exception as error:
            found.append(error)

    model.model.layers[1].register_forward_hook(lambda *_: None)
    right = eap.attribute(model, data, method="eap").values
    model.model.layers[1].register_forward_hook(hook)
    scores = eap.attribute(model, data, method="eap").values
    assert relative(scores, right) < 1e-6
    assert_refused(found, "expected calls one after another, or a copy of the model for each, found one in the")


def test_autocast_is_refused(model, make_pairs):
    data = make_pairs(n=2)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(eap.InputError, match=r"torch.autocast: expected off"):
        eap.attribute(model, data)


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
@pytest.mark.parametrize("inference", [False, True])
def test_a_process_forked_amid_another_threads_call_has_the_model_back(inference, model, make_pairs, monkeypatch):
    """What that thread has changed is undone in the new process, in which it is no more."""
    data, inside, ended = make_pairs(n=2), threading.Event(), threading.Event()
    before, process = snapshot(model), process_state()
    right = eap.attribute(model, data, method="eap").values

    def hook(*_):
        inside.set()
        ended.wait(30)

    handle = model.model.layers[1].register_forward_hook(hook)
    thread = threading.Thread(target=lambda: eap.attribute(model, data, method="eap"))
    thread.start()
    assert inside.wait(30)
    with torch.inference_mode(inference):
        own = {name: value for name, value in process_state().items() if name not in ("attention", "compiler", "open")}
        # As where that thread is exchanging what all share.
        monkeypatch.setitem(SHARED_KEYS._held, None, loans._open[0])
        child = os.fork()
        if not child:
            same = False
            try:
                signal.alarm(30)
                torch.set_num_threads(1)  # others do not exist here
                handle.remove()
                same = process_state() == {**process, **own} and snapshot(model) == before
                same &= torch.equal(eap.attribute(model, data, method="eap").values, right)
            finally:
                os._exit(not same)
    monkeypatch.undo()
    _, status = os.waitpid(child, 0)
    ended.set()
    thread.join(30)
    assert os.waitstatus_to_exitcode(status) == 0


def test_a_shared_change_lasts_until_its_last_user_has_left():
    state = []
    shared = SharedChange(lambda: (lambda: state.append(1), state.clear))
    first, second = Changes(), Changes()
    with first:
        shared.make(first)
        with second:
            shared.make(second)
            first.close()
            assert state == [1]
        assert not state
        assert not shared.used_here()


@pytest.mark.parametrize("error", [None, ValueError("mine")])
def test_what_was_changed_comes_back_though_the_model_is_another_by_then(error, model, make_pairs):
    """A metric takes a weight out, as parametrisations do, and puts another one where it can have no gradient."""
    layer, head, data = model.model.layers[0].mlp, model.lm_head, make_pairs(n=2)
    codes = torch.nn.Parameter(head.weight.data.to(torch.int8), requires_grad=False)

    def metric(logits, batch):
        if "weight" in layer.up_proj._parameters:
            layer.up_proj.weight = layer.up_proj._parameters.pop("weight").data
            head._parameters["weight"] = codes
        if error is not None:
            raise error
        return logits[:, 0]

    before, process = snapshot(model), process_state()
    with pytest.raises((ValueError, RuntimeError)):
        eap.attribute(model, data, metric, method="eap")
    assert process_state() == process
    changed = {"model.layers.0.mlp.up_proj", "weight model.layers.0.mlp.up_proj.weight", "weight lm_head.weight"}
    assert differences(before, snapshot(model)).keys() == changed
