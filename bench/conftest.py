"""Speed as a ratio of two candidates timed in turns: the only figure that holds on a shared machine."""

import time

import pytest
import torch


def paired(candidate, reference, rounds=7, min_seconds=0.02):
    """A B B A timing in one process; noise only ever adds time, so minima are compared."""

    def seconds(run, count):
        start = time.perf_counter()
        for _ in range(count):
            run()
        return (time.perf_counter() - start) / count

    candidate()
    reference()
    counts = [max(1, int(min_seconds / max(seconds(run, 1), 1e-7))) for run in (candidate, reference)]
    best = [float("inf"), float("inf")]
    for _ in range(rounds):
        for which in (0, 1, 1, 0):
            best[which] = min(best[which], seconds((candidate, reference)[which], counts[which]))
    return {"speedup": best[1] / best[0], "candidate_s": best[0], "reference_s": best[1]}


@pytest.fixture
def speedup(benchmark):
    """speedup(candidate, reference, at_least): fails below the ratio; absolute times only go to the JSON."""

    def run(candidate, reference, at_least, tries=3, threads=1, **kwargs):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            for _ in range(tries):
                result = paired(candidate, reference, **kwargs)
                if result["speedup"] >= at_least:
                    break
            benchmark.pedantic(candidate, rounds=3, warmup_rounds=1)
        finally:
            torch.set_num_threads(before)
        benchmark.extra_info.update(result, at_least=at_least, threads=threads)
        print(
            f"\n{result['speedup']:.2f}x (bar {at_least}): {result['candidate_s'] * 1e3:.2f} ms "
            f"against {result['reference_s'] * 1e3:.2f} ms"
        )
        assert result["speedup"] >= at_least, result
        return result["speedup"]

    return run
