"""Run the self-check and the tests on a tiny random model of every family, and write the tables of docs/models.md.

python -m docs.models
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pytest
    from torch import nn

    from eap_circuits.adapters import Architecture

DOCS = Path(__file__).parent
RESULTS = DOCS / "results" / "models.json"
# Column of the first table: the checks that it sums up.
CHECKS = {
    "sums": ("contributions sum to the residual",),
    "heads": ("projections are the heads' queries, keys and values",),
    "runs": (
        "captured run equals the plain model's",
        "all edges kept is the model on clean prompts",
        "no edge kept is the model on corrupted prompts",
        "blocks read nothing but the residual stream",
    ),
    "derivatives": ("scores equal finite differences",),
    "prefix": ("prefix reuse is exact",),
    "groups": ("key/value head scores are their group's sums",),
    "untouched": ("model untouched",),
}
# Column of the second table: the tests that it sums up.
TESTS = {
    "layout": ("test_weights_in_canonical_layout", "test_norm_statistics_are_the_norms"),
    "EAP, EAP-IG": (
        "test_score_is_derivative_of_loss_by_edge",
        "test_eap_is_the_path_of_one_point_and_clean_corrupted_of_two_ends",
        "test_kv_scores_are_group_sums_of_query_scores",
    ),
    "activations": ("test_activation_paths_give_derivatives_at_points_of_the_senders_own_path",),
    "conductance": (
        "test_conductance_of_the_input_is_integrated_gradients",
        "test_conductance_of_one_segment_is_clean_corrupted",
    ),
    "flow": ("test_what_flow_takes_for_contributions_adds_up", "test_flow_is_shares_of_the_clean_prompts_inputs"),
    "exact": ("test_an_edge_alone_corrupted_is_the_circuit_without_it",),
    "nodes": ("test_dimensions_sum_to_nodes_and_nodes_do_not_depend_on_the_head_graph",),
    "rules": ("test_values_stay_as_they_are",),
    "evaluation": (
        "test_all_edges_are_the_model_and_none_the_corrupted_run",
        "test_only_the_answers_logits_are_computed_for_what_looks_at_no_others",
        "test_prompts_ablated_to_their_own_contributions_stay_what_they_are",
    ),
    "untouched": ("test_after_success", "test_after_backward_rules"),
}


def features(arch: Architecture) -> list[str]:
    """The last column: what is particular about a model, from its table, its modules and its configuration."""
    layer = next((layer for layer in arch.layers if layer.reads is None), arch.layers[0])
    others = dict.fromkeys(", ".join(each.projections) for each in arch.layers if each.reads is not None)
    modules, config = list(layer.projection_modules), arch.model.config
    gated = {str(kind) for kind in getattr(config, "layer_types", None) or ()}
    named: dict[str, Any] = {
        f"transformers {arch.family.since} or later": arch.family.since != "5",
        "q, k, v in one projection, grouped by head": layer.order == "grouped",
        "q, k, v in one projection, in four parts": layer.order == "sharded",
        "q, k, v in one projection": len(layer.projection_modules) == 1 < len(layer.projections)
        and layer.order == "concatenated",
        **{f"mixers that read {names}": True for names in others},
        f"{layer.groups} query heads per key": layer.groups > 1,
        "biases": getattr(modules[0], "bias", None) is not None or layer.out.bias is not None,
        "LayerNorm": arch.final_norm.kind is not None and arch.final_norm.kind.centred,
        "γ = 1 + weight": arch.final_norm.kind is not None and arch.final_norm.kind.offset,
        "parallel blocks": arch.parallel,
        "shared norm": layer.attention_norm.module is layer.mlp_norm.module,
        "no norm before blocks": layer.attention_norm.kind is None,
        "an expert beside the MLP": arch.family.beside is not None,
        "norm before the output projection": layer.inner_norm,
        "norms after blocks": layer.post_norm is not None,
        "norm of all keys": layer.mixes_heads,
        "norms of queries and keys": not layer.mixes_heads and _has(layer.attention, "k_norm", "k_layernorm"),
        "norm of embeddings": arch.embedding_norm is not None,
        "embedding factor": arch.embedding_scale != 1 or _has(arch.model.get_input_embeddings(), "embed_scale"),
        "residual factor": layer.scale != 1,
        "sliding window": getattr(config, "sliding_window", None)
        or "local" in str(getattr(config, "attention_layers", "")),
        "window in some layers": len(gated) > 1,
        "soft caps": getattr(config, "attn_logit_softcapping", None)
        or getattr(config, "final_logit_softcapping", None),
        "attention sinks": _has(layer.attention, "sinks"),
        "some layers without positions": 0 in (getattr(config, "no_rope_layers", None) or ()),
        "partial rotation": getattr(config, "rotary_dim", None)
        or (getattr(config, "rope_parameters", None) or {}).get("partial_rotary_factor", 1) not in (1, None),
        "ALiBi": getattr(config, "alibi", False) or config.model_type == "bloom",
        "experts": any("experts" in name for name, _ in arch.model.named_modules()),
        "tied weights": arch.model.get_output_embeddings().weight is arch.model.get_input_embeddings().weight,
    }
    return [name for name, there in named.items() if there]


def _has(module: nn.Module, *names: str) -> bool:
    return any(hasattr(module, name) for name in names)


class Outcomes:
    """A pytest plugin that runs only the tests named in TESTS and keeps the outcome of each for each family."""

    def __init__(self) -> None:
        self.cases: dict[str, tuple[str, str]] = {}
        self.passed: dict[str, dict[str, bool]] = {}

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        wanted = {test for tests in TESTS.values() for test in tests}
        items[:] = [item for item in items if item.originalname in wanted and "family" in item.fixturenames]
        self.cases = {item.nodeid: (item.callspec.params["family"], item.originalname) for item in items}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        family, test = self.cases[report.nodeid]
        found = self.passed.setdefault(family, {})
        found[test] = found.get(test, True) and report.passed


def run() -> None:
    import pytest
    import torch
    import transformers

    from eap_circuits.adapters import bind
    from eap_circuits.selfcheck import check_model
    from tests.circuits.conftest import CONFIGS, tiny_model

    outcomes = Outcomes()
    pytest.main(["-q", "-p", "no:cacheprovider", str(DOCS.parent / "tests" / "circuits")], plugins=[outcomes])
    rows = {}
    for name in CONFIGS:
        model = tiny_model(name)
        rows[name] = {
            "class": type(model).__name__,
            "features": features(bind(model)),
            "checks": [[check.name, check.passed, check.detail] for check in check_model(model)],
            "tests": outcomes.passed[name],
        }
    facts = {"transformers": transformers.__version__, "torch": torch.__version__.split("+")[0], "models": rows}
    RESULTS.write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n")


def table(columns: dict[str, tuple[str, ...]], found: dict[str, dict[str, bool]], last: dict[str, str]) -> str:
    """A row for each name in `found`; a cell says whether everything its column sums up passed, – if nothing ran."""
    heads = ["model", *columns, *(["what is particular"] if last else [])]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for name, passed in found.items():
        cells = []
        for summed in columns.values():
            its = [passed[one] for one in summed if one in passed]
            cells.append("–" if not its else "✓" if all(its) else "✗")
        lines.append("| " + " | ".join([name, *cells, *([last[name]] if last else [])]) + " |")
    return "\n".join(lines) + "\n"


def checks() -> str:
    """The table of the self-check's results, and the versions that it ran with."""
    facts, rows = _results()
    passed = {name: {check: passed for check, passed, _ in row["checks"]} for name, row in rows.items()}
    features = {name: "; ".join(row["features"]) for name, row in rows.items()}
    versions = f"With transformers {facts['transformers']} and torch {facts['torch']}.\n"
    return f"{table(CHECKS, passed, features)}\n{versions}"


def tests() -> str:
    """The table of the tests' results."""
    return table(TESTS, {name: row["tests"] for name, row in _results()[1].items()}, {})


def _results() -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The results, and those of each family by what its row is called."""
    facts = json.loads(RESULTS.read_text(encoding="utf-8"))
    return facts, {f"{row['class']} ({name})": row for name, row in sorted(facts["models"].items())}


if __name__ == "__main__":
    from docs import documents

    run()
    documents.write(DOCS.parent, ["docs/models.md"])
