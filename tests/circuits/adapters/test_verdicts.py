"""Every causal or masked type of transformers has a verdict, in one sentence, and a sample of them is tried again."""

from __future__ import annotations

import re

import pytest
import transformers

from docs import verdicts

SAMPLE = ["bert", "biogpt", "ctrl", "deepseek_v3", "mamba", "qwen3_next", "mpnet:masked", "qwen3_vl:pictures"]


def test_every_type_has_a_verdict():
    known = {kind for version in verdicts.read().values() for kind in version}
    unknown = set(verdicts.types()) - known
    assert not unknown, f"python -m docs.verdicts {' '.join(sorted(unknown))}"


def test_verdicts_are_sentences_of_ours():
    for version, found in verdicts.read().items():
        for kind, one in found.items():
            text = one["says"]
            assert one["verdict"] in ("table", "discovered", "refused", "not tried"), (version, kind)
            assert "\n" not in text and "Traceback" not in text
            if one["verdict"] == "refused":
                assert re.fullmatch(r"[\w.]+: expected .+, found .+\.", text), (version, kind, text)


@pytest.mark.parametrize("kind", SAMPLE)
def test_verdicts_hold(kind):
    known = verdicts.read()
    committed = known.get(transformers.__version__, {}).get(kind)
    found = verdicts.verdict_of(kind)
    assert found == committed if committed else found["verdict"] in ("table", "discovered", "refused")
