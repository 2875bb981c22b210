"""What becomes of every type of transformers that is causal, masked or an encoder-decoder, and of vision-language types
with their pictures: has it a table, is it discovered, or why is it refused?

python -m docs.verdicts [TYPE ...]     # all by default; writes docs/results/verdicts.json, says what changed

Each type is tried on a tiny random model (docs/tiny.py), in a process of its own. The results of one version of
transformers stand beside those of others.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import warnings
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "verdicts.json"
SECONDS = 120
MASKED, SEQ2SEQ, PICTURES = ":masked", ":seq2seq", ":pictures"
Verdict = dict[str, str]  # "verdict": "table", "discovered", "refused" or "not tried"; "model": its class; "says"


def types() -> list[str]:
    """The types of `AutoModelForCausalLM`, behind ":masked" of `AutoModelForMaskedLM`, behind ":seq2seq" the
    encoder-decoders of `AutoModelForSeq2SeqLM`, and behind ":pictures" those that `docs.seen` makes pictures for."""
    from transformers import CONFIG_MAPPING
    from transformers.models.auto import modeling_auto

    from docs.seen import OWN

    masked = (f"{kind}{MASKED}" for kind in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES)
    both = modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
    both = [f"{kind}{SEQ2SEQ}" for kind in both if getattr(CONFIG_MAPPING[kind], "is_encoder_decoder", False)]
    pictured = (f"{kind}{PICTURES}" for kind in OWN if kind in CONFIG_MAPPING)
    return sorted([*modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *masked, *both, *pictured])


def verdict_of(kind: str) -> Verdict:
    """Try one type."""
    import eap_circuits as eap
    from docs.tiny import tiny
    from eap_circuits.adapters import family_of

    if kind.endswith(PICTURES):
        return _seen(kind.removesuffix(PICTURES))
    try:
        model = tiny(kind)
    except Exception as error:
        return {"verdict": "not tried", "model": "", "says": f"no model of it can be made offline: {_line(error)}"}
    found = {"model": type(model).__name__}
    try:
        asked = model.config.model_type, getattr(model.config, "is_encoder_decoder", False)
        family = family_of(*asked)
        if family is not None:
            checks = eap.check_model(model, n_edges=3)
            failed = [check for check in checks if not check.passed]
            if failed and failed[0].name == "architecture":
                return {**found, "verdict": "refused", "says": failed[0].detail}
            if failed:
                what = "; ".join(f"{check.name} ({check.detail})" for check in failed)
                says = f"{found['model']}: expected a model that its table is right for, found failures: {what}."
                return {**found, "verdict": "refused", "says": says}
        else:
            family, checks = eap.discover(model)
    except eap.InputError as error:
        return {**found, "verdict": "refused", "says": str(error)}
    except Exception as error:  # a model's own
        wanted = "a model whose passes run on a CPU"
        says = f"{found['model']}: expected {wanted}, found one that raises {type(error).__name__}."
        return {**found, "verdict": "refused", "says": says}
    whole = any(check.detail.startswith("left out") for check in checks)
    nodes = ""
    if not family.out and not family.mixers:
        nodes = "a node is a whole layer" if family.mlp == ("", "") else "a node is a layer's only block"
    says = "; ".join(filter(None, (nodes, "prompts run whole" if whole else "")))
    known = family_of(*asked)
    return {**found, "verdict": "discovered" if known is None else "table", "says": says}


def _seen(kind: str) -> Verdict:
    """Try one type on pairs that differ in the picture."""
    import eap_circuits as eap
    from docs.seen import check, model_of
    from eap_circuits.adapters import family_of

    try:
        model = model_of(kind)
    except Exception as error:
        return {"verdict": "not tried", "model": "", "says": f"no model of it can be made offline: {_line(error)}"}
    found, known = {"model": type(model).__name__}, family_of(kind)
    try:
        if known is None:
            eap.register_family(eap.discover(model)[0])
        check(model)
    except eap.InputError as error:
        return {**found, "verdict": "refused", "says": str(error)}
    except Exception as error:
        return {**found, "verdict": "not tried", "says": f"no run on a picture can be made here: {_line(error)}"}
    return {**found, "verdict": "discovered" if known is None else "table", "says": ""}


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:120]


def _tried(kind: str, found: Any) -> None:
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    found.put(verdict_of(kind))


def run(kinds: list[str]) -> None:
    import transformers

    import docs.tiny  # noqa: F401 - here, so that the processes of all types share them
    import eap_circuits.selfcheck  # noqa: F401

    version, known = transformers.__version__, read()
    against = version if version in known else newest(known)
    before, changed = known.get(against, {}), list[str]()
    now: dict[str, Verdict] = {}
    context = multiprocessing.get_context("fork")
    for kind in kinds:
        queue = context.Queue()
        process = context.Process(target=_tried, args=(kind, queue))
        process.start()
        try:
            now[kind] = queue.get(timeout=SECONDS)
        except Exception:
            process.kill()
            now[kind] = {"verdict": "not tried", "model": "", "says": f"no verdict within {SECONDS} s"}
        process.join()
        old, new = (f"{x['verdict']}: {x['says']}" if x else "unknown" for x in (before.get(kind), now[kind]))
        print(f"{kind}: {new}", flush=True)
        changed += [] if old == new else [f"{kind}: {new}\n    was {old}"]
    gone = sorted(set(before) - set(types()))
    print(f"\n{len(changed)} of {len(kinds)} changed against transformers {against}; gone: {', '.join(gone) or 'none'}")
    print("\n".join(changed))
    known = read()  # another run may have ended in the meantime
    now = {**known.get(version, {}), **now}
    known[version] = {kind: now[kind] for kind in sorted(now)}
    RESULTS.write_text(json.dumps(known, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read() -> dict[str, dict[str, Verdict]]:
    """The committed verdicts, by version of transformers and type."""
    found: dict[str, dict[str, Verdict]] = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    return found


def newest(known: dict[str, Any]) -> str:
    return max(known, key=lambda version: [int(part) for part in version.split(".")], default="")


def table(head: str = "") -> str:
    """All causal types, or those behind another head, and their verdicts by version of transformers."""
    known: dict[str, dict[str, Verdict]] = {}
    for version, found in read().items():
        every = {kind.partition(":"): one for kind, one in found.items()}
        known[version] = {kind: one for (kind, mark, behind), one in every.items() if mark + behind == head}
    known = {version: found for version, found in known.items() if found}
    versions = sorted(known, key=lambda version: [int(part) for part in version.split(".")], reverse=True)
    lines = []
    for version in versions:
        verdicts = [one["verdict"] for one in known[version].values()]
        counts = ", ".join(f"{verdicts.count(name)} {name}" for name in ("table", "discovered", "refused", "not tried"))
        lines.append(f"- transformers {version}: {len(verdicts)} types: {counts}.")
    lines += ["", "| type | model | " + " | ".join(versions) + " | |", "|---" * (len(versions) + 3) + "|"]
    for kind in sorted({kind for verdicts in known.values() for kind in verdicts}):
        found = [known[version].get(kind) for version in versions]
        newest_found = next(one for one in found if one is not None)
        says = newest_found["says"].replace("|", "\\|").replace("<", "&lt;")
        cells = ["–" if one is None else one["verdict"] for one in found]
        lines.append("| " + " | ".join([kind, newest_found["model"] or "–", *cells, says]) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    run(sys.argv[1:] or types())
    from docs import documents

    documents.write(RESULTS.parents[2], ["docs/models.md"])
