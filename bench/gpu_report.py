"""What `make gpu` prints: ten lines on what is right and what is fastest, a table of its stages, and the failures."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence

from bench.processes import ROOT, Result, commit, has_results, json_of

# Characters that are shown of failures; the log has all of them.
SHOWN = 8000
# Backends with kernels for GPUs, all backends that run there, and the operators.
KERNELS = ("cuda", "triton")
IMPLS = (*KERNELS, "reference")
OPERATORS = ("edge_scores", "masked_read", "head_space_scores")


def counted(output: str) -> str:
    """The last summary of pytest, such as "12 passed, 1 skipped"; empty if there is none."""
    found = re.findall(r"^=+ (.*\b(?:passed|failed|error|errors|skipped)\b.*) in [\d.]+s", output, re.MULTILINE)
    return found[-1] if found else ""


def failures(results: Sequence[Result], room: int = SHOWN) -> str:
    """For each command that failed: the messages of failing tests, and the end of its output."""
    failed = [result for result in results if result.problem]
    return "\n".join(failure(result, room // len(failed)) for result in failed)


def failure(result: Result, room: int) -> str:
    lines = re.findall(r"^(?:FAILED|ERROR) .*", result.output, re.MULTILINE)
    messages = list(dict.fromkeys(line[:400] for line in lines))
    shown = "\n".join(messages)[: room * 2 // 3]
    end = result.output[len(shown) - room :]
    return f"\n--- {result.stage}: {result.label}: {len(messages)} failures\n{shown}\n--- its end\n{end}"


def table(results: Sequence[Result]) -> str:
    rows = [("stage", "command", "seconds", "result")]
    for r in results:
        words = "; ".join(filter(None, [r.problem or "ok", counted(r.output)]))
        rows.append((r.stage, r.label, f"{r.seconds:.0f}", words))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n" + "\n".join("  ".join([*map(str.ljust, row[:3], widths), row[3]]) for row in rows)


def first_lines(results: Sequence[Result]) -> str:
    """Which backends are right, which is fastest for each operator, and models against their own passes."""
    lines = [f"commit {commit()[:10]}"]
    for impl in IMPLS:
        of_impl = [r for r in results if r.stage == "kernels" and r.label.startswith(impl)]
        if of_impl:
            lines.append(f"{impl}: {verdict(of_impl)}")
    for stage, label, words in (("kernels", "models", "models"), ("sanitize", "", "sanitizer")):
        found = [r for r in results if r.stage == stage and r.label.startswith(label)]
        if found:
            lines.append(f"{words}: {verdict(found)}")
    lines += fastest(results)
    lines += over_floor(results)
    return "\nIn short\n" + "\n".join(lines[:10])


def verdict(results: Sequence[Result]) -> str:
    wrong = [f"{r.label} {r.problem}" for r in results if r.problem]
    passed = sum(int(n) for r in results for n in re.findall(r"(\d+) passed", counted(r.output)))
    tests = f", {passed} tests passed" if passed else ""
    return ("right" if not wrong else "; ".join(wrong)) + tests


def measured(results: Sequence[Result]) -> Iterator[tuple[str, dict]]:
    """(name, figures) of every bench that these commands finished."""
    for path in (ROOT / json_of(result.stage, result.label) for result in results):
        if has_results(path):
            yield from ((b["name"], b["extra_info"]) for b in json.loads(path.read_text())["benchmarks"])


def fastest(results: Sequence[Result]) -> list[str]:
    """A line for each operator: the backends' times on the 8B shape in bfloat16, the fastest first."""
    found: dict[str, str] = {}
    for name, info in measured(results):
        operator = re.match(rf"test_({'|'.join(OPERATORS)})\[llama-3.1-8b-bfloat16", name)
        if operator and operator[1] not in found and "seconds" in info:
            # For a masked read, take the sparsest mask.
            runs = {run: time for run, time in info["seconds"].items() if "@" not in run or run.endswith("@0.01")}
            seconds = {run.partition("@")[0]: time for run, time in runs.items()}
            times = sorted((seconds[impl], impl) for impl in IMPLS if impl in seconds)
            words = ", ".join(f"{impl} {time * 1e3:.2f} ms" for time, impl in times)
            found[operator[1]] = f"{operator[1]}, llama-3.1-8b bf16: {words}"
    return list(found.values())


def over_floor(results: Sequence[Result]) -> list[str]:
    words = [
        f"{info['call']} {info['model']} {1 / info['ratios']['speedup']:.2f}"
        for name, info in measured(results)
        if name.startswith("test_shape_over_floor") and "[llama" in name and "ratios" in info
    ]
    return [f"over the model's own passes: {', '.join(words)}"] if words else []
