"""Make eap_kernels/measured.json of the results: the backends by speed, for each GPU, operator and case."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping

from eap_kernels import _auto
from eap_kernels._registry import BACKENDS

Times = Mapping[str, float]  # backend -> seconds


def cases(name: str, info: Mapping) -> Iterator[tuple[str, str, Times]]:
    """(operator, case, seconds) of one bench; nothing if it does not compare backends."""
    test, seconds = name.partition("[")[0], info.get("seconds", {})
    if test in ("test_edge_scores", "test_edge_scores_of_few_receivers"):
        flat = info["layout"] == "contiguous"
        yield "edge_scores", _auto.edge_scores_case(info["dtype"], flat, info["receivers"]), seconds
    elif test == "test_masked_read":
        for density, share in info["kept"].items():
            times = {run.partition("@")[0]: value for run, value in seconds.items() if run.endswith(f"@{density}")}
            yield "masked_read", _auto.masked_read_case(info["dtype"], share), times
    elif test == "test_head_space_scores":
        yield "head_space_scores", _auto.head_space_scores_case(info["dtype"]), seconds


def table(results: Mapping[str, Mapping]) -> dict[str, _auto.Card]:
    """What was measured on each GPU, by its name.

    A backend's figure is the mean, over a case's benches, of the logarithm of its time. A backend that did not run in
    all of them is left out.
    """
    found: dict = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    capability = {}
    for result in results.values():
        if "gpu" in result["machine"]:
            capability[result["machine"]["gpu"]] = result["machine"]["capability"]
            for name, info in result.get("benches", {}).items():
                for op, case, seconds in cases(name, info):
                    times = {impl: seconds[impl] for impl in BACKENDS if impl in seconds}
                    found[result["machine"]["gpu"]][op][case].append(times)
    return {
        gpu: {
            "capability": capability[gpu],
            "operators": {op: {case: ranked(runs) for case, runs in of.items()} for op, of in ops.items()},
        }
        for gpu, ops in found.items()
    }


def ranked(runs: list[Times]) -> list[str]:
    everywhere = [impl for impl in runs[0] if all(impl in times for times in runs)]
    return sorted(everywhere, key=lambda impl: sum(math.log(times[impl]) for times in runs))


def text(results: Mapping[str, Mapping]) -> str:
    return json.dumps(table(results), indent=1, sort_keys=True) + "\n"
