"""What every fuzzer shares: a tiny model, the state that a call must leave as it was, a watch, and a count."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import os
import random
import signal
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import tqdm
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import eap_circuits as eap

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 5.0
tqdm.tqdm.monitor_interval = 0  # its own thread would count as a change of the process
WORDS = ["<unk>", "<s>", "Ann", "Bob", "Cy", "met", "and", "gave", "it", "[", "5"]


class Hang(BaseException):
    """A call took longer than `SECONDS`."""


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", unk_token="<unk>")


@cache
def model() -> LlamaForCausalLM:
    """In training mode and partly frozen, so that a state that was not put back shows."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, vocab_size=32, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.3, bos_token_id=1, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    made = LlamaForCausalLM(config).train()
    made.model.layers[0].mlp.requires_grad_(False)
    made.model.norm.eval()
    return made


@cache
def pairs() -> eap.PairedDataset:
    generator = torch.Generator().manual_seed(0)
    clean = torch.randint(2, 11, (4, 7), generator=generator)
    corrupted = clean.clone()
    corrupted[:, 2] = (clean[:, 2] + 1) % 9 + 2
    return eap.PairedDataset.from_tokens(clean, corrupted, [7, 6, 7, 5], [[5, 6], [7, 8], [2, 3], [4, 9]])


@cache
def scores() -> eap.EdgeScores:
    return eap.attribute(model(), pairs(), steps=2, keep=("examples", "neurons"))


@cache
def circuit() -> eap.Circuit:
    return scores().select(n_edges=30)


@cache
def circuits() -> list[eap.Circuit]:
    """Made before what fails: a caller's own tensors are the caller's to care for."""
    return [circuit(), circuit().complement()]


def state() -> dict[str, Any]:
    """All of the model and of the process that a call must leave as it was."""
    found: dict[str, Any] = {}
    for name, module in model().named_modules():
        found[f"training of {name}"] = module.training
        found[f"attributes of {name}"] = sorted(vars(module))
        hooks = [value for key, value in vars(module).items() if "hooks" in key and isinstance(value, dict)]
        found[f"hooks of {name}"] = sum(map(len, hooks))
    for name, x in [*model().named_parameters(), *model().named_buffers()]:
        found[name] = id(x), x.requires_grad, x.grad is None, float(x.detach().double().sum())
    found["config"] = str(model().config.to_dict()), model().config._attn_implementation
    found["grad mode"] = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    found["modes"] = torch._C._len_torch_dispatch_stack(), torch._C._len_torch_function_stack()
    found["defaults"] = torch.get_default_dtype(), str(torch.get_default_device()), torch.get_num_threads()
    found["random state of torch"] = hashlib.sha256(torch.get_rng_state().numpy().tobytes()).hexdigest()
    found["random state of Python"] = hash(random.getstate())
    found["attention functions"] = {name: id(ALL_ATTENTION_FUNCTIONS[name]) for name in ALL_ATTENTION_FUNCTIONS}
    found["functions of torch"] = id(functional.softmax), id(functional.scaled_dot_product_attention), id(torch.softmax)
    found["autocast"] = torch.is_autocast_enabled("cpu")
    found["warnings"] = len(warnings.filters)
    found["process"] = os.getcwd(), threading.active_count(), signal.getsignal(signal.SIGINT), dict(os.environ)
    return found


@contextlib.contextmanager
def watch() -> Iterator[None]:
    """Raises Hang in what takes longer than `SECONDS`."""

    def ring(*_: object) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def place(error: BaseException) -> str:
    """The last line of our own package that an error passed."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "eap_" in frame.filename]
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "outside"


@dataclass
class Tally:
    """The count of what happened, and each failure in one line."""

    name: str
    right: int = 0
    refused: int = 0
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def cases(self) -> int:
        return self.right + self.refused + len(self.failures)

    def run(
        self,
        label: str,
        call: Callable[[], Any],
        judge: Callable[[Any], str | None] = lambda _: None,
        ours: Callable[[BaseException], bool] = lambda error: isinstance(error, eap.InputError),
    ) -> None:
        """Make a call; what it gives is judged, what it raises must be ours, and the state must be as before.

        Args:
            judge: what is wrong with a result, in a few words; None where it is right.
            ours: whether an error is a refusal of our own.
        """
        before, problem, refused = state(), None, False
        try:
            with watch(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                problem = judge(call())
        except Hang:
            problem = f"took more than {SECONDS:.0f} s"
        except BaseException as error:
            refused = ours(error)
            if not refused:
                first = (str(error).splitlines() or [""])[0]
                problem = f"{type(error).__name__} at {place(error)}: {first[:120]}"
        after = state()
        changed = [key for key in {**before, **after} if before.get(key) != after.get(key)]
        if changed:
            problem = f"{problem or 'returned'}; left changed: {', '.join(changed[:3])}"
            restore()
        if problem is not None:
            self.failures.append(f"{label}: {problem}")
        elif refused:
            self.refused += 1
        else:
            self.right += 1


def restore() -> None:
    """Put the state back by force, so that one failure is counted once."""
    for module in model().modules():
        vars(module).pop("forward", None)
        for key, value in vars(module).items():
            if "hooks" in key and isinstance(value, dict):
                value.clear()
    model().train().requires_grad_(True)
    model().zero_grad(set_to_none=True)
    model().model.layers[0].mlp.requires_grad_(False)
    model().model.norm.eval()
    torch.set_grad_enabled(True)
    while torch._C._len_torch_dispatch_stack():
        torch._C._pop_torch_dispatch_stack(None)
    while torch._C._len_torch_function_stack():
        torch._C._pop_torch_function_stack()


def difference(found: Any, right: Any) -> str | None:
    """What differs between two results of the same call, in a few words; None where nothing does."""
    if type(found) is not type(right):
        return f"{type(found).__name__} instead of {type(right).__name__}"
    if isinstance(found, torch.Tensor):
        same = found.shape == right.shape and torch.allclose(found.double(), right.double(), 1e-4, 1e-5, True)
        return None if same else "other values"
    if isinstance(found, (list, tuple)):
        if len(found) != len(right):
            return "another length"
        return next(filter(None, map(difference, found, right)), None)
    for names in (("mask",), ("values", "clean_values"), ("values",), ("results",), ("clean", "corrupted", "answers")):
        if all(hasattr(found, name) for name in names) and not isinstance(found, dict):
            return next(filter(None, (difference(getattr(found, n), getattr(right, n)) for n in names)), None)
    if isinstance(found, float):
        return None if found == right or abs(found - right) < 1e-6 or found != found else "another number"
    return None if found == right else "another value"


def run(name: str, seed: int, count: int) -> Tally:
    """Run the fuzzer of this module's name with this many cases."""
    torch.set_num_threads(1)
    tally, begin = Tally(name), time.process_time()
    fuzzer = import_module(f".{name}", __package__)
    gc.freeze()  # a want of memory collects garbage, over and over: not among what is imported
    fuzzer.fuzz(tally, random.Random(f"{name} {seed}"), count)
    tally.seconds = time.process_time() - begin
    return tally
