"""Ctrl-C at any line of a run: the state is as before, and the same call gives the right result."""

from __future__ import annotations

import random
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import eap_circuits as eap

from .common import Tally, circuit, difference, model, pairs, scores, state

PACKAGE = str(Path(eap.__file__).parent)


class Interrupt:
    """Counts the lines that run of eap_circuits; at the n-th one the process gets SIGINT, as from Ctrl-C."""

    def __init__(self, at: int | None = None) -> None:
        self.lines, self._at = 0, at

    def __call__(self, frame: FrameType, event: str, arg: Any) -> Any:
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        if event == "line":
            self.lines += 1
            if self.lines == self._at:
                signal.raise_signal(signal.SIGINT)
        return self

    def during(self, call: Callable[[], Any]) -> Any:
        sys.settrace(self)
        try:
            return call()
        finally:
            sys.settrace(None)


def calls(folder: Path) -> dict[str, Callable[[], Any]]:
    exact = {"method": "exact", "edges": circuit(), "checkpoint": folder / "going-on.safetensors"}
    return {
        "attribute": lambda: eap.attribute(model(), pairs(), steps=2, batch_size=2),
        "attribute, gim": lambda: eap.attribute(model(), pairs(), method="eap", rules="gim"),
        "attribute, activations": lambda: eap.attribute(model(), pairs(), method="eap-ig-activations", steps=1),
        "attribute, exact": lambda: eap.attribute(model(), pairs(), **exact),
        "evaluate": lambda: eap.evaluate(model(), [circuit(), circuit().complement()], pairs(), batch_size=2),
        "evaluate, mean": lambda: eap.evaluate(model(), circuit(), pairs(), ablation="mean"),
        "faithfulness_curve": lambda: eap.faithfulness_curve(model(), scores(), pairs(), (0.1, 0.5)),
    }


def fuzz(tally: Tally, rng: random.Random, count: int) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        known = calls(folder)
        right, lines = {}, {}
        for label, call in known.items():
            right[label] = call()
            trace = Interrupt()
            trace.during(call)
            lines[label] = trace.lines
        for number in range(count):
            label = rng.choice(list(known))
            # As many near the ends, where state is taken and given back, as anywhere.
            most = lines[label]
            at = rng.choice([rng.randint(1, most), rng.randint(1, min(150, most)), max(1, most - rng.randint(0, 150))])
            call = known[label]

            def interrupted_and_again(call: Any = call, at: int = at, label: str = label) -> Any:
                before = state()
                try:
                    Interrupt(at).during(call)
                except KeyboardInterrupt:
                    after = state()
                    changed = [key for key in before if before[key] != after.get(key)]
                    assert not changed, f"left changed: {', '.join(changed[:3])}"
                left = [path.name for path in folder.iterdir() if path.name != "going-on.safetensors"]
                assert not left, f"left behind: {', '.join(left)}"
                return difference(call(), right[label])

            tally.run(f"{number} {label}, line {at} of {most}", interrupted_and_again, lambda problem: problem)
