"""Tables of committed results in Markdown; docs/documents.py says where each stands."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

Results = Mapping[str, Mapping]  # name of the file -> result
NONE = "not yet measured"
# A result holds the other's figure over ours, so higher is better. README shows ours over the other's.
README_ROWS = (
    ("test_attribute_over_floor[prefix-reuse]", "speedup", "`attribute`, M = 5: time over the floor's"),
    ("test_attribute_over_floor[no-reuse]", "speedup", "the same without prefix reuse"),
    ("test_more_steps_over_floor", "speedup", "`attribute`, M = 30: time over a floor of 30"),
    (
        "test_few_shot_over_floor",
        "speedup",
        "`attribute`, 400 shared and 20 own tokens a prompt: time over the floor's",
    ),
    (
        "test_shape_over_floor[gpt2]",
        "speedup",
        "GPT-2-small's shape, random weights, no shared tokens: time over the floor's",
    ),
    (
        "test_memory_over_floor[prefix-reuse]",
        "memory",
        "`attribute`, one path point at a time: peak memory over the floor's",
    ),
    ("test_memory_over_floor[no-reuse]", "memory", "the same without prefix reuse"),
    ("test_memory_is_as_planned[no-reuse]", "planned", "memory needed over what `plan` says, path points side by side"),
    (
        "test_memory_is_as_planned[no-reuse]",
        "planned_of_resident",
        "the same with what the C library's allocator keeps for later",
    ),
    ("test_curve_over_forward", "speedup", "ten circuits evaluated: time over one plain forward's"),
    ("test_exact_over_forward", "speedup", "an edge patched exactly: time over one plain forward's"),
)


def committed(root: Path) -> dict[str, dict]:
    """Every committed result by its file's name."""
    files = sorted(root.glob("bench/results/*.json"))
    others = (root / f"docs/results/{name}.json" for name in ("performance", "fuzz"))
    return {file.stem: json.loads(file.read_text()) for file in (*files, *others)}


def machine(result: dict) -> str:
    facts = result["machine"]
    return facts.get("gpu") or f"{facts['processor']}, {facts['cores']} cores"


def provenance(result: dict) -> str:
    """Machine, versions, date and commit in one line."""
    facts, versions = result["machine"], result["versions"]
    about = f"driver {facts['driver']}, each row by its fastest backend" if "gpu" in facts else facts["instruction_set"]
    listed = ", ".join(f"{name} {version}" for name, version in versions.items() if name != "python")
    return f"{machine(result)}, {about}; {listed}; {commits(result)}."


def commits(result: dict) -> str:
    """Date and commit, or several of them if benches were measured separately."""
    found = {
        (info.get("date", result["date"]), info.get("commit", result["commit"])) for info in result["benches"].values()
    }
    return ", ".join(f"{date}, commit {commit[:7]}" for date, commit in sorted(found, reverse=True))


def markdown(columns: Sequence[str], rows: Iterable[Iterable[object]]) -> str:
    lines = [" | ".join(columns), *(" | ".join(map(str, row)) for row in rows)]
    lines = [f"| {line} |\n" for line in lines]
    return "".join([lines[0], "|" + "---|" * len(columns) + "\n", *lines[1:]])


def readme(results: Results) -> str:
    """A column for each processor on which the first row was measured."""
    found = [result for result in results.values() if README_ROWS[0][0] in result.get("benches", {})]
    of_cpus = [result for result in found if "gpu" not in result["machine"]]
    rows = [
        [words, *(f"{1 / result['benches'][name]['ratios'][key]:.2f}" for result in of_cpus)]
        for name, key, words in README_ROWS
    ]
    columns = ["what", *(f"{machine(result)}, {result['machine']['instruction_set']}" for result in of_cpus)]
    return "\n".join([markdown(columns, rows), *map(provenance, of_cpus)]) + "\n"


Row = Callable[[dict, dict[str, float]], list[str]]


def measured(results: Results, test: str, columns: list[str], row: Row) -> str:
    """One row for each case of a test on each machine, even if there are none, and then where they come from."""
    rows, sources = [], []
    for kind in ("CPU", "GPU"):
        of_kind = [result for result in results.values() if ("gpu" in result["machine"]) == (kind == "GPU")]
        before = len(rows)
        for result in of_kind:
            cases = [info for name, info in result.get("benches", {}).items() if name.startswith(f"{test}[")]
            rows += [[machine(result), *row(info, info["ratios"])] for info in cases]
            sources += [provenance(result)] if cases else []
        if len(rows) == before:
            rows.append([kind, NONE, *[""] * (len(columns) - 1)])
    return "\n".join([markdown(["machine", *columns], rows), *sources]).rstrip() + "\n"


def percent(ratios: dict[str, float], name: str) -> str:
    return f"{100 * ratios[name]:.0f} %" if name in ratios else ""


def times(ratios: dict[str, float], name: str) -> str:
    return f"{ratios[name]:.1f} ×" if name in ratios else ""


def case(info: dict, *more: str) -> list[str]:
    return [info["model"], info["dtype"], *(info[name] for name in more), str(info["tokens"])]


def work() -> str:
    """The shapes, and the least that one token costs: the staircase's operations, and each row read once."""
    from bench.kernels.shapes import MODELS

    rows = []
    for name, model in MODELS.items():
        rectangle = 2.0 * model.senders * model.receivers * model.width
        operations = model.flops(1)
        rows.append(
            [
                name,
                model.senders,
                model.receivers,
                model.width,
                f"{operations / rectangle:.2f}",
                f"{operations / 1e6:.0f}",
                f"{(model.senders + model.receivers) * model.width / 1e6:.2f}",
            ]
        )
    columns = ["shape", "S", "R", "D", "staircase / rectangle", "MFLOP a token", "million elements a token"]
    return markdown(columns, rows) + "\n"


def edge_scores(results: Results) -> str:
    columns = ["shape", "dtype", "layout", "tokens", "of the floor", "of the matrix rate"]
    columns += ["peers, a call", "peers, 5 steps", "dense product", "compiled"]

    def row(info: dict, ratios: dict[str, float]) -> list[str]:
        shares = [percent(ratios, name) for name in ("auto_of_floor", "auto_of_matrix_rate")]
        others = ("over_peers", "over_peers_five_steps", "over_dense", "over_compiled")
        return [*case(info, "layout"), *shares, *(times(ratios, name) for name in others)]

    return work() + measured(results, "test_edge_scores", columns, row)


def masked_read(results: Results) -> str:
    densities = {"0.01": "1 %", "0.1": "10 %", "0.5": "50 %", "1.0": "all"}
    columns = ["shape", "dtype", "receivers", "tokens"]
    columns += [f"of the floor, {words}" for words in densities.values()]
    columns += ["1 % against all", "1 % against einsum"]

    def row(info: dict, ratios: dict[str, float]) -> list[str]:
        shares = [percent(ratios, f"of_floor@{density}") for density in densities]
        others = ("sparse_over_dense", "over_einsum@0.01")
        return [*case(info, "receivers"), *shares, *(times(ratios, name) for name in others)]

    return measured(results, "test_masked_read", columns, row)


def head_space_scores(results: Results) -> str:
    def row(info: dict, ratios: dict[str, float]) -> list[str]:
        return [*case(info), *(times(ratios, name) for name in ("over_expanded", "of_edge_scores_alone"))]

    def memory(info: dict, ratios: dict[str, float]) -> list[str]:
        return [info["model"], str(info["tokens"]), times(ratios, "memory_saved")]

    columns = ["shape", "dtype", "tokens", "expand, then score", "score alone"]
    speed = measured(results, "test_head_space_scores", columns, row)
    return f"{speed}\n{measured(results, 'test_head_space_memory', ['shape', 'tokens', 'memory saved'], memory)}"


def integrations(results: Results) -> str:
    def change(published: float, patched: float, ratio: float) -> str:
        return f"{published:.2f} → {patched:.2f} ({ratio:.2f} ×)"

    def cost(info: dict, ratios: dict[str, float]) -> list[str]:
        published, patched = (info["seconds"][how] for how in ("published", "patched"))
        figures = {part: change(published[part], patched[part], ratios[part]) for part in published}
        memory = [info["bytes"][how] / 2**30 for how in ("published", "patched")]
        figures["memory"] = change(*memory, ratios["memory"])
        return [info["package"], info["run"], *(figures.get(part, "") for part in ("time", "replaced", "memory"))]

    def scores(info: dict, ratios: dict[str, float]) -> list[str]:
        found = info["differences"]
        return [info["package"], info["model"], f"{max(found.values()):.0e}", "; ".join(found)]

    columns = ["package", "run", "seconds", "of these in replaced functions", "GiB besides the model"]
    costs = measured(results, "integrations_cost", columns, cost)
    columns = ["package", "model", "largest difference", "runs"]
    return f"{costs}\n{measured(results, 'integrations_scores', columns, scores)}"


def model_shapes(results: Results) -> str:
    def row(info: dict, ratios: dict[str, float]) -> list[str]:
        memory = f"{1 / ratios['memory']:.2f}" if "memory" in ratios else ""
        call = info.get("call", "attribute, M = 5")
        times = [f"{1e3 * seconds:.0f} ms" for seconds in info["seconds"].values()]
        size = f"{info['examples']} × {info['tokens']}"
        return [info["model"], call, size, *times, f"{1 / ratios['speedup']:.2f}", memory]

    columns = [
        "shape",
        "call",
        "prompts × tokens",
        "time",
        "the floor's",
        "time over the floor's",
        "peak memory over 24 GB",
    ]
    return measured(results, "test_shape_over_floor", columns, row)


def shares(results: Results) -> str:
    """Shares of processor time, even if there is a GPU."""
    found = results["performance"]
    rows = [(kind, f"{100 * share:.0f} %") for kind, share in found["shares"].items()]
    return f"{markdown(('where the time of `attribute` goes, M = 5', 'share'), rows)}\n{_on_a_processor(found)}\n"


def fuzzing(results: Results) -> str:
    found = results["fuzz"]
    header = ("what is tried", "cases", "right", "refused in one sentence", "failed")
    rows = [
        (each["what"], *(f"{each[key]:,}" for key in ("cases", "right", "refused", "failed")))
        for each in found["fuzzers"].values()
    ]
    return f"{markdown(header, rows)}\nSeed {found['seed']}. {_on_a_processor(found)}\n"


def _on_a_processor(found: dict) -> str:
    facts, versions = found["machine"], found["versions"]
    source = f"{facts['processor']}, {facts['cores']} cores, {facts['instruction_set']}; torch {versions['torch']}, "
    return source + f"transformers {versions['transformers']}; commit {found['commit'][:7]}."
