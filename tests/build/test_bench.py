"""The benches' own logic, on synthetic figures: regressions, results, tables, stages, and what is compared."""

import json
import math

import pytest
import torch

import eap_kernels as ek
from bench import choices, measure, record, regressions, tables
from bench.kernels import bench_edge_scores, head_space, shapes
from docs import documents
from eap_circuits.graph import Graph
from eap_kernels.testing import timing

ROOT = record.ROOT
STORED = {"test_a[x]": {"speedup": 4.0, "of_floor": 0.5}, "test_b": {"memory": 2.0}}
GPU_FACTS = {"processor": "Some(R) CPU", "cores": 16, "instruction_set": "AVX2", "gpu": "NVIDIA H200"}
GPU_FACTS |= {"capability": "9.0", "driver": "580"}
SMALL = shapes.Model(3, 4, 2, 12, 5)


def run_json(ratios):
    """What pytest-benchmark writes, as far as it is read."""
    benches = [
        {"name": name, "stats": {"min": 1.0}, "extra_info": {"ratios": values}} for name, values in ratios.items()
    ]
    return {"datetime": "2026-01-02T03:04:05", "machine_info": {}, "benchmarks": benches}


def changed(bench, **values):
    return {**STORED, bench: {**STORED[bench], **values}}


def test_a_ratio_within_the_tolerance_is_no_regression():
    assert regressions.of_run(changed("test_a[x]", speedup=4.0 * regressions.TOLERANCE, of_floor=0.9), STORED) == []
    assert regressions.of_run({**STORED, "test_new": {"speedup": 0.1}}, STORED) == []


@pytest.mark.parametrize("value", [2.0, 0.0, math.nan])
def test_a_halved_ratio_is_a_regression(value):
    (problem,) = regressions.of_run(changed("test_a[x]", speedup=value), STORED)
    assert problem == f"test_a[x]: speedup {value:.3g} is below 3.2, 0.8 of the stored 4"


def test_a_bench_or_a_ratio_that_is_gone_is_reported():
    gone = {"test_a[x]": {"speedup": 4.0}}
    assert regressions.of_run(gone, STORED) == [
        "test_a[x]: of_floor was not measured",
        "test_b: has a stored ratio and did not run",
    ]


@pytest.mark.parametrize(("figures", "calls"), [([1.0, 5.0, 9.0], 2), ([1.0, 1.0, 1.0, 9.0], 3), ([4.0], 1)])
def test_a_bench_is_tried_again_until_it_holds(figures, calls):
    made = []

    def measured():
        made.append(figures[len(made)])
        return {"speedup": made[-1]}, {}

    ratios, _, problems = regressions.held(measured, {"speedup": 2.0}, {"speedup": 5.0}, tries=3)
    assert len(made) == calls
    assert ratios == {"speedup": made[-1]}
    assert bool(problems) == (made[-1] < 4.0)


def test_turns_go_back_and_forth_and_keep_the_least(monkeypatch):
    called = []

    def seconds(run, count, device):
        called.append(run())
        return 1.0 + len(called) % 3 if called[-1] == "a" else 7.0 - 0.1 * len(called)

    monkeypatch.setattr(timing, "seconds", seconds)
    found = measure.in_turns({"a": lambda: "a", "b": lambda: "b"}, rounds=2, device="cpu")
    assert "".join(called) == "ab" + "abba" * 2
    assert found == {"a": 1.0, "b": pytest.approx(7.0 - 0.1 * 9)}


@pytest.fixture
def elsewhere(monkeypatch, tmp_path):
    """Results and pages in a folder of their own, on a made-up GPU."""
    of_cpus = [file.relative_to(ROOT) for file in ROOT.glob("bench/results/*-cores.json")]
    for name in (*documents.OF_BENCHES, *of_cpus, "docs/results/performance.json", documents.FUZZ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text((ROOT / name).read_text())
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(record, "ROOT", tmp_path)
    monkeypatch.setattr(record, "CHOICES", tmp_path / "measured.json")
    monkeypatch.setattr(regressions, "FOLDER", tmp_path / "bench/results")
    monkeypatch.setattr(measure, "machine", lambda: GPU_FACTS)
    monkeypatch.setattr(measure, "versions", lambda: {"python": "3.12.3", "torch": "2.11.0"})
    monkeypatch.setenv("EAP_COMMIT", "0123456789")
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    return tmp_path


def test_record_writes_result_and_tables(elsewhere):
    facts = {"model": "gpt2", "dtype": "bfloat16", "layout": "contiguous", "receivers": 445, "tokens": 64}
    facts["seconds"] = {"reference": 3.0, "triton": 2.0, "cuda": 1.0, "matmul": 0.1}
    ratios = {"auto_of_floor": 0.42, "auto_of_matrix_rate": 0.31, "over_dense": 1.7}
    run = run_json({"test_edge_scores[gpt2-bfloat16-contiguous]": ratios})
    run["benchmarks"][0]["extra_info"].update(facts)
    run["benchmarks"].append({"name": "test_edge_scores[interrupted]", "stats": {}, "extra_info": {}})
    record.record(run)
    result = json.loads((elsewhere / "bench/results/nvidia-h200.json").read_text())
    assert result["machine"] == GPU_FACTS
    assert (result["date"], result["commit"]) == ("2026-01-02", "0123456789")
    assert list(result["benches"].values()) == [{"ratios": ratios, **facts}]
    assert regressions.load("nvidia-h200") == {"test_edge_scores[gpt2-bfloat16-contiguous]": ratios}
    page = (elsewhere / "docs/ops/edge_scores.md").read_text()
    assert "| NVIDIA H200 | gpt2 | bfloat16 | contiguous | 64 | 42 % | 31 % |  |  | 1.7 × |  |" in page
    assert "NVIDIA H200, driver 580, each row by its fastest backend; torch 2.11.0; 2026-01-02, commit 0123456." in page
    assert "| GPU | not yet measured |" not in page
    assert "| GPU | not yet measured |" in (elsewhere / "docs/ops/masked_read.md").read_text()
    assert (elsewhere / "README.md").read_text() == (ROOT / "README.md").read_text()
    ranking = ["cuda", "triton", "reference"]
    chosen = json.loads((elsewhere / "measured.json").read_text())
    operators = {"edge_scores": {"bfloat16, flat": ranking}}
    assert chosen == {"NVIDIA H200": {"capability": "9.0", "operators": operators}}
    brought_back = sorted(path.name for path in (elsewhere / "out").iterdir())
    assert brought_back == ["measured.json", "nvidia-h200.json"]


def test_parts_of_a_gpu_s_benches_are_merged(elsewhere, monkeypatch):
    """Those of another commit say so; those of another driver or of other versions do not stay."""
    path = elsewhere / "bench/results/nvidia-h200.json"
    record.record(
        run_json({"test_a[x]": {"speedup": 1.0}, "test_b": {"speedup": 2.0}}) | {"gpu_state": {"before": "35 C"}}
    )
    monkeypatch.setenv("EAP_COMMIT", "abcdef9876")
    later = {**run_json({"test_b": {"speedup": 3.0}, "test_c": {"speedup": 4.0}}), "datetime": "2026-01-03T00:00:00"}
    record.record(later | {"gpu_state": {"before": "60 C"}})
    result = json.loads(path.read_text())
    assert {name: info["ratios"]["speedup"] for name, info in result["benches"].items()} == {
        "test_a[x]": 1.0,
        "test_b": 3.0,
        "test_c": 4.0,
    }
    assert result["benches"]["test_a[x]"]["commit"] == "0123456789" and "commit" not in result["benches"]["test_b"]
    assert tables.commits(result) == "2026-01-03, commit abcdef9, 2026-01-02, commit 0123456"
    assert [state["before"] for state in result["states"]] == ["35 C", "60 C"]
    assert set(regressions.load("nvidia-h200")) == {"test_a[x]", "test_b", "test_c"}
    # A result of another machine comes in the same way.
    record.record({**result, "benches": {"test_d": {"ratios": {"speedup": 5.0}}}, "states": []})
    assert len(json.loads(path.read_text())["benches"]) == 4
    monkeypatch.setattr(measure, "machine", lambda: GPU_FACTS | {"driver": "590"})
    record.record(later)
    assert set(json.loads(path.read_text())["benches"]) == {"test_b", "test_c"}


def test_a_comparison_fails_on_a_regression_and_writes_nothing(elsewhere):
    record.fail_on_regressions(run_json(STORED))
    stored = regressions.path("nvidia-h200")
    assert not stored.exists(), "a comparison stores nothing"
    stored.write_text(json.dumps(record.condense(run_json(STORED))))
    record.fail_on_regressions(run_json(STORED))
    before = sorted(elsewhere.rglob("*"))
    with pytest.raises(SystemExit, match=r"test_b: memory 1 is below 1.6"):
        record.fail_on_regressions(run_json(changed("test_b", memory=1.0)))
    assert sorted(elsewhere.rglob("*")) == before


def test_a_cpu_s_result_is_named_after_what_sets_its_speed():
    facts = {"processor": "Intel(R) Xeon(R) Processor", "cores": 2, "instruction_set": "x86-64-v4"}
    assert measure.slug(facts) == "intel-r-xeon-r-processor-x86-64-v4-2-cores"


def test_every_table_has_rows_for_every_case():
    share = {f"of_floor@{density}": 0.5 for density in ("0.01", "0.1", "0.5", "1.0")}
    cases = {
        "test_masked_read[a]": (share | {"sparse_over_dense": 12.0, "over_einsum@0.01": 30.0}, {"receivers": "layer"}),
        "test_head_space_scores[a]": ({"over_expanded": 1.5, "of_edge_scores_alone": 0.7}, {}),
        "test_head_space_memory[a]": ({"memory_saved": 11.0}, {}),
    }
    common = {"model": "gpt2", "dtype": "float32", "tokens": 8}
    benches = {name: {"ratios": ratios, **facts, **common} for name, (ratios, facts) in cases.items()}
    machine = {"processor": "P", "cores": 2, "instruction_set": "AVX2"}
    result = {"machine": machine, "versions": {}, "date": "", "commit": "", "benches": benches}
    read = tables.masked_read({"cpu": result})
    assert "| P, 2 cores | gpt2 | float32 | layer | 8 | 50 % | 50 % | 50 % | 50 % | 12.0 × | 30.0 × |" in read
    space = tables.head_space_scores({"cpu": result})
    assert "| P, 2 cores | gpt2 | float32 | 8 | 1.5 × | 0.7 × |" in space
    assert "| P, 2 cores | gpt2 | 8 | 11.0 × |" in space
    assert space.count("| GPU | not yet measured |") == 2


def test_what_auto_takes_on_a_gpu_is_written_from_the_committed_results():
    assert record.CHOICES.read_text() == choices.text(tables.committed(ROOT))


def test_the_fastest_backend_of_a_case_is_that_of_all_its_shapes():
    def bench(dtype, **seconds):
        return {"dtype": dtype, "seconds": seconds, "kept": {"0.01": 0.004, "0.5": 0.25, "1.0": 0.5}}

    reads = {"reference@0.01": 9.0, "cuda@0.01": 1.0, "reference@0.5": 2.0, "cuda@0.5": 3.0, "reference@1.0": 2.0}
    benches = {
        "test_head_space_scores[a]": bench("float32", reference=1.0, cuda=3.0, triton=1.0, auto=0.1),
        "test_head_space_scores[b]": bench("float32", reference=8.0, cuda=1.0),
        "test_head_space_scores[c]": bench("bfloat16", cuda=3.0, reference=2.0),
        "test_masked_read[a]": bench("float32", **reads),
        "test_head_space_memory[a]": {"ratios": {}},
    }
    results = {"h200": {"machine": GPU_FACTS, "benches": benches}, "cpu": {"machine": {}, "benches": benches}}
    assert choices.table(results) == {
        "NVIDIA H200": {
            "capability": "9.0",
            "operators": {
                "head_space_scores": {"float32": ["cuda", "reference"], "bfloat16": ["reference", "cuda"]},
                "masked_read": {
                    "float32, up to 3% kept": ["cuda", "reference"],
                    "float32, up to 30% kept": ["reference", "cuda"],
                    "float32, up to 100% kept": ["reference"],
                },
            },
        }
    }


@pytest.mark.parametrize("name", shapes.MODELS)
def test_the_shapes_are_those_of_the_graph(name):
    model = shapes.MODELS[name]
    heads, kv_heads = ((count,) * model.layers for count in (model.heads, model.kv_heads))
    graph = Graph(heads, kv_heads, model.width, model.parallel)
    assert (model.senders, model.receivers) == (graph.n_senders, graph.n_receivers)
    assert torch.equal(model.reach, graph.reach)
    assert model.flops(7) == 2 * graph.n_edges * 7 * model.width


def test_what_edge_scores_is_compared_with_computes_the_same():
    sizes = [(rows, 16, SMALL.width) for rows in (SMALL.senders, SMALL.receivers)]
    delta, grad = (torch.randn(size, dtype=torch.float64) for size in sizes)
    right = ek.edge_scores(delta, grad, SMALL.reach)
    out = torch.zeros_like(right)
    bench_edge_scores.peers(delta, grad, SMALL, out)()
    torch.testing.assert_close(out, right)
    staircase = torch.arange(SMALL.senders)[:, None] < SMALL.reach
    torch.testing.assert_close(bench_edge_scores.dense(delta, grad)() * staircase, right)


@pytest.mark.parametrize("error", [0.1, math.nan])
def test_a_wrong_kernel_is_not_timed(monkeypatch, error):
    """One score of all is off by a little, or was not written."""
    delta, grad = (torch.randn(rows, 4, SMALL.width) for rows in (SMALL.senders, SMALL.receivers))
    bench_edge_scores.check(delta, grad, SMALL.reach, ["auto"])
    right = ek.edge_scores

    def wrong(delta, grad, reach, out=None, impl="auto"):
        found = right(delta, grad, reach, out, impl=impl)
        if impl == "auto":
            found[0, -1] += error
        return found

    monkeypatch.setattr(ek, "edge_scores", wrong)
    with pytest.raises(AssertionError):
        bench_edge_scores.check(delta, grad, SMALL.reach, ["auto"])


def test_what_head_space_scores_is_compared_with_computes_the_same():
    senders, receivers, reach = head_space.inputs(SMALL, 6, torch.float64)
    assert torch.equal(reach, SMALL.reach)
    right = ek.head_space_scores(senders, receivers, reach)
    torch.testing.assert_close(head_space.expanded_scores(senders, receivers, reach), right)
