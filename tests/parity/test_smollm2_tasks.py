"""The tasks on the demo's model and its tokenizer: whole pairs, and a model that does what they ask for."""

from __future__ import annotations

import pytest
import torch

import eap_circuits as eap
from eap_circuits.tasks import TASKS


@pytest.fixture(scope="module")
def smollm2():
    from eap_circuits.adapters import load_model

    return load_model("smollm2", device="cpu")


@pytest.mark.parametrize("name", TASKS)
def test_pairs_are_aligned_and_answers_are_what_follows(smollm2, name):
    _, tokenizer = smollm2
    data = eap.load_task(name, tokenizer, n=40)
    assert len(set(data.prompts)) == 40
    for row, (clean, corrupted) in enumerate(data.prompts):
        length = int(data.lengths[row])
        ids = [tokenizer.bos_token_id, *tokenizer(clean, add_special_tokens=False)["input_ids"]]
        assert data.clean[row, :length].tolist() == ids
        assert len(tokenizer(corrupted, add_special_tokens=False)["input_ids"]) == length - 1
        for token in data.answers[row].flatten().tolist():
            if token >= 0:
                # The text that the token adds is tokenised as that very token.
                text = tokenizer.decode([token])
                assert tokenizer(clean + text, add_special_tokens=False)["input_ids"] == [*ids[1:], token]


@pytest.mark.parametrize("name", TASKS)
def test_the_model_prefers_the_good_answers_to_clean_prompts_only(smollm2, name):
    model, tokenizer = smollm2
    data = eap.load_task(name, tokenizer, n=16)
    sets, found = data.answers.reshape(len(data), 2, -1), []
    with torch.no_grad():
        for tokens in (data.clean, data.corrupted):
            # Padding is at the right, where a causal model's scored position does not see it.
            logits = model(input_ids=tokens).logits[torch.arange(len(data)), data.lengths - 1]
            picked = logits.gather(1, sets.clamp(min=0).flatten(1)).view(sets.shape).masked_fill(sets < 0, -torch.inf)
            good, bad = picked.logsumexp(2).unbind(1)
            found.append(good - bad)
    clean, corrupted = found
    # Chance is one half; a fair coin gives 13 of 16 or more one time in a hundred.
    assert int((clean > 0).sum()) >= 13
    assert float(clean.mean() - corrupted.mean()) > 1
