"""What the user's functions and objects compute is told apart by their code and settings."""

from __future__ import annotations

import copy
import functools
import importlib
import sys

import pytest
import torch

import eap_circuits as eap
from eap_circuits.checkpoint.fingerprint import Reader

TIMES = 1.0


def closure(power, inner=None):
    def metric(logits, batch):
        return logits[:, 5] * power if inner is None else inner(logits)

    return metric


class Metric:
    def __init__(self, token, more=()):
        self.token, self.more = token, more

    def __call__(self, logits, batch):
        return logits[:, self.token]

    def method(self, logits, batch):
        return -logits[:, self.token]


class Forgetful(Metric):
    def __getstate__(self):
        return {"more": self.more}


class Slotted:
    __slots__ = ("token",)

    def __init__(self, token):
        self.token = token

    def __call__(self, logits, batch):
        return logits[:, self.token]


class Learned(torch.nn.Module):
    def __init__(self, start):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.full((1,), start))

    def forward(self, logits, batch):
        return logits[:, 5] * self.scale.detach()


def plain(logits, batch, token=5, *, sign=1.0):
    return sign * logits[:, token]


def by_global(logits, batch):
    return logits[:, 5] * TIMES


def by_helper(logits, batch):
    return by_global(logits, batch)


METRICS = {
    "lambda": [lambda x, _: x[:, 5], lambda x, _: x[:, 6], lambda x, _: -x[:, 5], lambda x, _: x[:, 5].exp()],
    "closure": [closure(1.0), closure(2.0), closure(torch.ones(1)), closure(1.0, lambda x: x[:, 5])],
    "order": [closure({"a": 1, "b": 2}), closure({"b": 2, "a": 1})],
    "inner": [closure(1.0, lambda x: x[:, 1]), closure(1.0, lambda x: x[:, 2])],
    "partial": [functools.partial(plain, token=5), functools.partial(plain, token=6), functools.partial(plain, sign=2)],
    "object": [Metric(5), Metric(6), Metric(5, more={"a": [1]}), Metric(5, more={"a": [2]}), Slotted(5), Slotted(6)],
    "forgetful": [Forgetful(5), Forgetful(6)],
    "cached": [functools.lru_cache(closure(1.0)), functools.lru_cache(closure(2.0)), functools.cache(plain)],
    "method": [Metric(5).method, Metric(6).method],
    "module": [Learned(1.0), Learned(2.0)],
    "compiled": [functools.wraps(plain)(closure(1.0)), functools.wraps(plain)(closure(3.0)), plain],
}


@pytest.mark.parametrize("kind", METRICS)
def test_callables_are_told_apart_by_code_and_settings(kind):
    digests = [Reader("metric").digest(metric) for metric in METRICS[kind]]
    assert len(set(digests)) == len(digests)
    assert digests == [Reader("metric").digest(metric) for metric in METRICS[kind]]
    if kind in ("object", "partial", "module"):
        assert digests == [Reader("metric").digest(copy.deepcopy(metric)) for metric in METRICS[kind]]


@pytest.mark.parametrize("metric", [by_global, by_helper, closure(1.0, by_helper)])
def test_what_a_function_looks_up_counts(metric, monkeypatch):
    before = Reader("metric").digest(metric)
    monkeypatch.setitem(globals(), "TIMES", 2.0)
    assert Reader("metric").digest(metric) != before
    monkeypatch.undo()
    assert Reader("metric").digest(metric) == before


users = None  # a package of the user's


def through_package(logits, batch):
    return users.inner.metric(logits)


def through_import(logits, batch):
    import users.inner

    return users.inner.metric(logits)


def through_names(logits, batch):
    from users.inner import metric as found

    return found(logits)


def through_closure(module):
    return lambda logits, batch: module.metric(logits)


@pytest.mark.parametrize("kind", ["package", "import", "names", "closure"])
def test_what_a_function_takes_from_modules_counts(kind, tmp_path, monkeypatch):
    (tmp_path / "users").mkdir()
    (tmp_path / "users" / "__init__.py").write_text("from . import inner")
    text = "import users\nTIMES = 1.0\ndef metric(x):\n    return users.inner.TIMES * x[:, 5]\n"
    (tmp_path / "users" / "inner.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("users", "users.inner"):
        monkeypatch.setitem(sys.modules, name, None)
        del sys.modules[name]
    users = importlib.import_module("users")
    monkeypatch.setitem(globals(), "users", users)
    metric = through_closure(users.inner) if kind == "closure" else globals()[f"through_{kind}"]
    before = Reader("metric").digest(metric)
    assert Reader("metric").digest(metric) == before
    users.inner.TIMES = 2.0
    assert Reader("metric").digest(metric) != before
    with pytest.raises(eap.InputError, match=r"metric: expected only values whose code .* found the module users"):
        Reader("metric").digest(functools.partial(metric, [users]))


BY_NAME = {
    "sys.modules": lambda x, _: sys.modules["users"].metric(x),
    "import_module": lambda x, _: importlib.import_module("users").metric(x),
    "__import__": lambda x, _: __import__("users").metric(x),
    "eval": lambda x, _: eval("users.metric")(x),
    "globals": lambda x, _: globals().get("users").metric(x),
}


@pytest.mark.parametrize("how", BY_NAME)
def test_code_that_is_found_by_name_is_refused(how):
    with pytest.raises(eap.InputError, match=rf"found <lambda>, which finds code by {how}\."):
        Reader("metric").digest(BY_NAME[how])
    assert Reader("metric").digest(lambda x, _: [part.eval() for part in x.modules()])
