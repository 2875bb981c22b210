"""SmolLM2 on IOI, and the floor: the model's own passes that attribution needs in any case."""

import gc
from pathlib import Path

import torch

import eap_circuits as eap
from bench.measure import resident


def model_and_data():
    from eap_circuits.adapters import load_model

    model, tokenizer = load_model("smollm2", device="cpu")
    return model.requires_grad_(False), eap.load_task("ioi", tokenizer, n=16, seed=0)


def random_pairs(model, examples, tokens, shared=0):
    """Random prompts whose first `shared` tokens are the same; clean and corrupted differ in the next one alone."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.vocab_size
    clean = torch.randint(vocabulary, (examples, tokens), generator=generator)
    clean[:, :shared] = clean[0, :shared].clone()
    corrupted = clean.clone()
    corrupted[:, shared] = (clean[:, shared] + 1) % vocabulary
    answers = torch.tensor([[0, 1]]).expand(examples, -1)
    return eap.PairedDataset.from_tokens(clean, corrupted, torch.full((examples,), tokens), answers)


def scored_logits(model, data, **inputs):
    """Logits at each prompt's last token, [E, V], computed at only those positions that the batch needs."""
    positions, which = (data.lengths.to(model.device) - 1).unique(return_inverse=True)
    logits = model(**inputs, logits_to_keep=positions, use_cache=False).logits
    return logits[torch.arange(len(data), device=model.device), which]


def forward(model, data):
    """One plain forward of the clean prompts, right padded, logits only where scored."""
    with torch.no_grad():
        scored_logits(model, data, input_ids=data.clean.to(model.device))


def floor(model, data, steps):
    """2 forwards and `steps` forwards and backwards to the input embeddings, weights frozen, logits where scored."""
    embed = model.get_input_embeddings()
    with torch.no_grad():
        scored_logits(model, data, input_ids=data.clean.to(model.device))
        scored_logits(model, data, input_ids=data.corrupted.to(model.device))
    for _ in range(steps):
        point = embed(data.clean.to(model.device)).requires_grad_(True)
        good, bad = scored_logits(model, data, inputs_embeds=point).gather(1, data.answers.to(model.device)).unbind(1)
        (bad - good).sum().backward()


def peak(what, steps):
    """Peak resident bytes while `what` runs, less those before the model was loaded."""
    import transformers  # noqa: F401 - part of what is there before the model

    before = resident("VmRSS")
    model, data = model_and_data()
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak of loading
    given = {"steps": steps, "reuse_prefix": "without reuse" not in what}
    if what == "floor":
        floor(model, data, steps)
    elif what.startswith("attribute at once"):
        for weight in model.parameters():
            weight.sum()  # a file's pages are resident once they are read
        before = resident("VmRSS")
        eap.attribute(model, data, **given)
    else:
        # With such a small budget a pass has as few tokens as possible: one path point of the batch.
        eap.attribute(model, data, batch_size=len(data), memory=1, **given)
    return resident("VmHWM") - before
