"""Ratios of runs timed in alternation, the only figures that hold on a shared machine."""

import contextlib

import pytest
import torch

from bench import measure, regressions
from eap_kernels.testing import odd_shapes


def pytest_configure(config):
    config.gpu_state = measure.state() if measure.DEVICE == "cuda" else None


def pytest_benchmark_update_json(config, output_json):
    if config.gpu_state is not None:
        output_json["gpu_state"] = {"before": config.gpu_state, "after": measure.state()}


def pytest_addoption(parser):
    parser.addoption(
        "--without-compiled", action="store_true", help="leave out torch.compile, which compiles for minutes"
    )
    parser.addoption(
        "--record", action="store_true", help="measure ratios to be stored: hold only to the bars in the code"
    )


def stored_ratios(config):
    """The machine's stored ratios of every bench; None if it has none."""
    return {} if config.getoption("--record") else regressions.load(measure.slug(measure.machine()))


def pytest_terminal_summary(terminalreporter, config):
    if stored_ratios(config) is None:
        machine = measure.slug(measure.machine())
        terminalreporter.write_line(f"no ratios are stored for {machine}: only the bars in the code were held")


@pytest.fixture(scope="session")
def stored(pytestconfig):
    return stored_ratios(pytestconfig) or {}


@pytest.fixture(autouse=True)
def precision(request):
    """A bench with a dtype runs with torch's switch for fp32 products on a GPU as the dtype's name says."""
    callspec = getattr(request.node, "callspec", None)
    names = [value for value in callspec.params.values() if value in odd_shapes.ARITHMETICS] if callspec else []
    with odd_shapes.arithmetic(names[0]) if names else contextlib.nullcontext():
        yield


@pytest.fixture
def hold(benchmark, request, stored):
    """hold(measured, bars, **facts): fails if a ratio is below its bar or below its share of the stored one.

    `measured()` gives (ratios, other facts); while a ratio is too low, it is tried again, up to `tries` times.
    """

    def run(measured, bars, tries=measure.TRIES, **facts):
        ratios, more, problems = regressions.held(measured, bars, stored.get(request.node.name, {}), tries)
        benchmark.extra_info.update(ratios=ratios, bars=bars, **more, **facts)
        print("\n" + "  ".join(f"{name} {value:.3g}" for name, value in ratios.items()))
        # Times on the pretended device mean nothing.
        assert not problems or measure.PRETENDED, problems
        return ratios

    return run


@pytest.fixture
def in_turns(benchmark, hold):
    """in_turns(runs, ratios, bars, threads, device, ...): times the runs, and holds ratios(seconds).

    The first run is the candidate: its own time goes to the benchmark's report.
    """

    def run(runs, ratios, bars, threads=None, device=measure.DEVICE, timing=None, **facts):
        before = torch.get_num_threads()
        threads = threads or before
        torch.set_num_threads(threads)

        best = {}

        def measured():
            # Another try only adds rounds, because noise only adds time.
            for name, value in measure.in_turns(runs, device=device, **(timing or {})).items():
                best[name] = min(value, best.get(name, value))
            print("\n" + "  ".join(f"{name} {value * 1e3:.3g} ms" for name, value in best.items()), end="")
            return ratios(best), {"seconds": best}

        def candidate():
            next(iter(runs.values()))()
            if device == "cuda":
                torch.cuda.synchronize()

        try:
            benchmark.pedantic(candidate)
            return hold(measured, bars, threads=threads, device=device, **facts)
        finally:
            torch.set_num_threads(before)

    return run


@pytest.fixture
def speedup(in_turns):
    """speedup(candidate, reference, at_least, threads, rounds): one ratio of two runs, on the CPU."""

    def run(candidate, reference, at_least, threads=1, rounds=None):
        return in_turns(
            {"candidate": candidate, "reference": reference},
            lambda seconds: {"speedup": seconds["reference"] / seconds["candidate"]},
            {"speedup": at_least},
            threads=threads,
            device="cpu",
            timing={"rounds": rounds},
        )["speedup"]

    return run
