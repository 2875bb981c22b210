"""Turn a pytest-benchmark JSON into a committed result and the table in README.md.

python bench/record.py RESULT.json     # bench/results/<name>.json, then README.md
python bench/record.py                 # README.md from the committed results alone
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"
BEGIN, END = "<!-- measured: written by bench/record.py -->\n", "<!-- end -->"
ROWS = {
    "test_attribute_over_floor[prefix-reuse]": ("`attribute`, M = 5: time over the floor's", "speedup"),
    "test_attribute_over_floor[no-reuse]": ("the same without prefix reuse", "speedup"),
    "test_more_steps_over_floor": ("`attribute`, M = 15: time over a floor of 15", "speedup"),
    "test_memory_over_floor[prefix-reuse]": ("`attribute`, M = 5: peak memory over the floor's", "memory_ratio"),
    "test_memory_over_floor[no-reuse]": ("the same without prefix reuse", "memory_ratio"),
    "test_curve_over_forward": ("ten circuits evaluated: time over one plain forward's", "speedup"),
}


def condense(measured: dict) -> dict:
    """What is worth keeping of a run: machine, versions, commit, and each bench's own figures."""
    import torch
    import transformers

    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()
    return {
        "machine": {
            "processor": measured["machine_info"]["cpu"].get("brand_raw", platform.processor()),
            "cores": os.cpu_count(),
            "instruction_set": torch.backends.cpu.get_cpu_capability(),
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "date": measured["datetime"][:10],
        "commit": commit,
        "benches": {bench["name"]: bench["extra_info"] for bench in measured["benchmarks"]},
    }


def table(result: dict) -> str:
    """The README's table of one result."""
    lines = ["| what | ratio |", "|---|---|"]
    for name, (words, key) in ROWS.items():
        value = result["benches"][name][key]
        lines.append(f"| {words} | {1 / value if key == 'speedup' else value:.2f} |")
    machine, versions = result["machine"], result["versions"]
    lines.append("")
    lines.append(
        f"{machine['processor']}, {machine['cores']} cores, {machine['instruction_set']}; torch {versions['torch']}, "
        f"transformers {versions['transformers']}; {result['date']}, commit {result['commit'][:7]}."
    )
    return "\n".join(lines) + "\n"


def readme(text: str, result: dict) -> str:
    """README's text with the table of a result."""
    head, rest = text.split(BEGIN)
    return head + BEGIN + table(result) + END + rest.split(END, 1)[1]


def main() -> None:
    target = RESULTS / "cpu.json"
    if len(sys.argv) > 1:
        result = condense(json.loads(Path(sys.argv[1]).read_text()))
        target.write_text(json.dumps(result, indent=1, sort_keys=True) + "\n")
    page = ROOT / "README.md"
    page.write_text(readme(page.read_text(), json.loads(target.read_text())))


if __name__ == "__main__":
    main()
