"""What the generated tasks share."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from eap_circuits import InputError, load_task
from eap_circuits.generated.sampling import sample_combinations
from eap_circuits.tasks import TASKS
from tests.circuits.generated.generated_tasks import TOKENIZERS


@pytest.mark.parametrize("name", sorted(TASKS))
def test_the_seed_decides(name: str) -> None:
    tokenizer = TOKENIZERS["single digits"]()
    first, again, other = (load_task(name, tokenizer, n=20, seed=seed) for seed in (3, 3, 4))
    assert first.prompts == again.prompts
    assert first.prompts != other.prompts


@pytest.mark.parametrize("name", sorted(TASKS))
def test_one_pair_and_no_bos(name: str) -> None:
    tokenizer = TOKENIZERS["single digits"]()
    data = load_task(name, tokenizer, n=1, prepend_bos=False)
    assert len(data) == 1
    assert data.clean[0, 0] != tokenizer.bos_token_id


SHOW = """
import sys
from transformers import PreTrainedTokenizerFast
from eap_circuits import load_task
tokenizer = PreTrainedTokenizerFast.from_pretrained(sys.argv[1])
for name in sys.argv[2:]:
    data = load_task(name, tokenizer, n=12, seed=7)
    print(data.prompts, data.clean.tolist(), data.answers.tolist())
"""


def test_pairs_are_the_same_in_every_process(tmp_path: Path) -> None:
    tokenizer = TOKENIZERS["single digits"]()
    tokenizer.save_pretrained(tmp_path)
    shown = subprocess.run(
        [sys.executable, "-c", SHOW, str(tmp_path), *TASKS],
        env={**os.environ, "PYTHONHASHSEED": "1"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    for name, line in zip(TASKS, shown.splitlines(), strict=True):
        data = load_task(name, tokenizer, n=12, seed=7)
        assert line == f"{data.prompts} {data.clean.tolist()} {data.answers.tolist()}"


def test_specs_say_what_they_are() -> None:
    for name, task in TASKS.items():
        assert task.name == name
        assert task.description.endswith(").")


@pytest.mark.parametrize("n", [0, -1, 1.0, True, "64", None])
def test_n_is_a_positive_whole_number(n: object) -> None:
    with pytest.raises(InputError, match=r"^n: expected a whole number of at least 1, found .*\.$"):
        load_task("ioi", TOKENIZERS["words"](), n=n)  # type: ignore[arg-type]


def test_a_task_that_is_not_there_and_a_seed_that_is_none() -> None:
    with pytest.raises(
        InputError, match=r"^task: expected one of .*'ioi'.*, found 'greater_than' \(did you mean 'greater-than'\?\)\.$"
    ):
        load_task("greater_than", TOKENIZERS["words"]())
    with pytest.raises(InputError, match=r"^seed: expected a whole number .*, found None\.$"):
        load_task("ioi", TOKENIZERS["words"](), seed=None)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"^tokenizer: expected a Hugging Face tokenizer, found str"):
        load_task("ioi", "gpt2")


@pytest.mark.parametrize("n", [1, 11, 12, 13, 40])
def test_combinations_repeat_only_when_all_have_come(n: int) -> None:
    chosen = sample_combinations(("ab", (1, 2, 3), ("x", "y")), n, random.Random(0))
    assert len(chosen) == n
    counts = [chosen.count(one) for one in set(chosen)]
    assert max(counts) - (min(counts) if len(counts) == 12 else 0) <= 1
    assert len(counts) == min(n, 12)


SLOTS = {
    "ioi": ("first", "second", "place", "giver", "thing"),
    "greater-than": ("noun", "year"),
    "gender-bias": ("person",),
    "subject-verb-agreement": ("noun", "phrase"),
    "capital-country": ("capital",),
    "hypernymy": ("things",),
}


@pytest.mark.parametrize("name", sorted(TASKS))
def test_the_slots_of_templates_are_spans(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = TOKENIZERS["single digits"]()
    data = load_task(name, tokenizer, n=8)
    records = TASKS[name].generator(tokenizer, 8, random.Random(0))
    assert set(data.span_names) == set(SLOTS[name])
    assert data.spans is not None
    for record, ids, spans in zip(records, data.clean, data.spans, strict=True):
        for number, slot in enumerate(data.span_names):
            start, end = record["spans"][slot]
            own = "".join(tokenizer.convert_ids_to_tokens(ids[spans == number]))
            assert own.replace("Ġ", " ").strip() == record["clean"][start:end]
    # Prompts differ only there.
    differ = data.clean != data.corrupted
    assert (data.spans[differ] >= 0).all()
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    assert load_task(name, tokenizer, n=8).spans is None
