"""Every public function's docstring has an example, and it runs as it stands."""

from __future__ import annotations

import doctest
import inspect
from pathlib import Path
from typing import Any

import pytest

import eap_circuits as eap
from eap_circuits.families import registry
from tests.circuits.adapters.pictured import MARK, draw, processor, write
from tests.circuits.adapters.test_pictures import build, seen
from tests.circuits.generated.generated_tasks import TOKENIZERS

FUNCTIONS = [name for name in eap.__all__ if inspect.isfunction(getattr(eap, name))]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_public_function_has_an_example_that_runs(
    name: str, make_model: Any, make_pairs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    examples = doctest.DocTestParser().get_examples(inspect.getdoc(getattr(eap, name)) or "")
    assert examples
    monkeypatch.chdir(tmp_path)
    for attribute, table in vars(registry).items():  # what register_family changes
        if isinstance(table, dict) and not attribute.startswith("__"):
            monkeypatch.setattr(registry, attribute, dict(table))
    model, data, other_data = make_model("llama"), make_pairs(), make_pairs(1)
    scores, other_scores = (eap.attribute(model, pairs, method="eap") for pairs in (data, other_data))
    given: dict[str, Any] = {
        **{"eap": eap, "model": model, "base": model, "tuned": model, "data": data, "other_data": other_data},
        **{"scores": scores, "other_scores": other_scores, "first": scores, "second": other_scores},
        **{"circuit": scores.select(20), "other_circuit": other_scores.select(20)},
        "tokenizer": TOKENIZERS["single digits"](),
        **{"vision_model": build("llava"), "processor": processor()},
    }
    draw(tmp_path, "cat.png", "dog.png")
    shown = {"clean_image": "cat.png", "corrupted_image": "dog.png"}
    write(tmp_path / "pairs.jsonl", {"clean": f"{MARK} this is a", **shown, "answers": ["cat", "dog"]})
    given |= {f"{side}_inputs": seen(given["vision_model"], n) for n, side in enumerate(("clean", "corrupted"))}
    for example in examples:
        if example.want:
            assert repr(eval(example.source, given)) == example.want.strip()
        else:
            exec(example.source, given)
