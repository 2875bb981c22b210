"""Files that are almost right: each is refused in one sentence, or reads the same values."""

from __future__ import annotations

import io
import json
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from eap_circuits import Circuit, EdgeScores, Graph, InputError, NodeScores
from eap_circuits.report import load_curve
from eap_circuits.report.curves import saved_curve

GRAPH = Graph((2, 2), (2, 2), 4, heads="query")
KV = Graph((2, 2), (1, 1), 4)
SUFFIXES = [".safetensors", ".json", ".pt"]


def values_of(graph: Graph) -> torch.Tensor:
    return torch.randn(graph.edge_mask.shape, generator=torch.Generator().manual_seed(1)) * graph.edge_mask


def refused(path: Path, load: Callable[[Path], Any] = EdgeScores.load) -> str:
    start = time.monotonic()
    with pytest.raises(InputError) as caught:
        load(path)
    text = str(caught.value)
    assert text.startswith(str(path)) and "\n" not in text and text.endswith(".") and len(text) < 600
    assert time.monotonic() - start < 30  # none takes work in proportion to what it claims
    return text


def written(suffix: str, folder: Path, change: Callable[[dict[str, Any]], Any], keep_checksum: bool = False) -> Path:
    """A circuit's file after a change of its content; without a checksum unless it is to be kept."""
    path = folder / f"r{suffix}"
    EdgeScores(GRAPH, values_of(GRAPH), {"method": "eap"}).select(9).save(path)
    content = json.loads(path.read_text()) if suffix == ".json" else torch.load(path, weights_only=True)
    assert content.keys() >= {"sha256", "info"}
    if not keep_checksum:
        del content["sha256"]
    content = change(content) or content
    path.write_text(json.dumps(content)) if suffix == ".json" else torch.save(content, path)
    return path


# Numbers that are none, and values where no edge is.


def test_a_negative_variance_is_neither_written_nor_read(tmp_path: Path) -> None:
    variance = GRAPH.edge_mask.float()
    variance[0, 1] = -1
    with pytest.raises(
        InputError, match=r"variance: expected numbers of at least 0, found 1 below, the first at input"
    ):
        EdgeScores(GRAPH, values_of(GRAPH), variance=variance).save(tmp_path / "r.safetensors")


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_numbers_that_are_not_finite_are_neither_written_nor_read(suffix: str, wrong: float, tmp_path: Path) -> None:
    path, values = tmp_path / f"r{suffix}", values_of(GRAPH)
    values[0, 1] = wrong
    with pytest.raises(
        InputError, match=r"values: expected finite numbers, found 1 that .*, the first at input->a0.h1<q>"
    ):
        EdgeScores(GRAPH, values).save(path)
    assert not path.exists()

    def put(content: dict[str, Any]) -> None:
        if suffix == ".json":
            content["edges"]["input->a0.h1<q>"]["score"] = wrong
        else:
            content["edges_scores"][0, 1] = wrong

    if suffix == ".safetensors":
        plain = {"format": "eap-circuits/1", "info": "{}", "graph": json.dumps(GRAPH.to_dict())}
        save_file({"values": values}, path, metadata=plain)
    else:
        path = written(suffix, tmp_path, put)
    assert "the first at input->a0.h1<q>" in refused(path)


def test_every_tensor_is_finite_and_where_edges_are(tmp_path: Path) -> None:
    path, edges = tmp_path / "r.safetensors", (KV.n_senders, KV.n_receivers)
    plain = {"format": "eap-circuits/1", "info": "{}", "graph": json.dumps(KV.to_dict())}
    kept = {name: torch.zeros(3, *edges) for name in ("per_example", "per_position")}
    kept |= {"values": torch.zeros(edges), "variance": torch.zeros(edges), "neurons": torch.zeros(KV.n_senders, 4)}
    save_file({**kept, "mask": torch.zeros(edges, dtype=torch.bool)}, path, metadata=plain)
    assert EdgeScores.load(path).statistics().keys() == kept.keys() - {"values"}
    for name in kept:
        for wrong, at in ((float("nan"), 0), (1.0, -1)):
            if at and name != "values":
                continue
            changed = kept[name].clone()
            changed[..., at, 0] = wrong  # the last sender reaches only the logits
            save_file({**kept, name: changed}, path, metadata=plain)
            assert f"{name}: expected" in refused(path)
    for name, x, message in [
        ("extra", torch.zeros(3), "tensors: expected"),
        ("values", torch.zeros(edges, dtype=torch.int32), "expected floating-point numbers"),
        ("mask", torch.zeros(edges), "dtype torch.bool"),
        ("values", torch.zeros(3), f"shape {list(edges)}"),
        ("neurons", torch.zeros(KV.n_senders, 5), f"shape {[KV.n_senders, 4]}"),
    ]:
        save_file({**kept, name: x}, path, metadata=plain)
        assert message in refused(path)


def test_values_where_no_edge_is_are_not_saved_and_said(tmp_path: Path) -> None:
    noise = torch.ones(GRAPH.edge_mask.shape)
    for suffix in SUFFIXES:
        with pytest.warns(UserWarning, match="values: 59 where there is no edge are not saved"):
            EdgeScores(GRAPH, noise).save(tmp_path / f"r{suffix}")
        assert torch.equal(EdgeScores.load(tmp_path / f"r{suffix}").values, GRAPH.edge_mask.float())


def test_node_scores_are_finite_and_checked(tmp_path: Path) -> None:
    path, values = tmp_path / "n.safetensors", torch.arange(7.0)
    NodeScores(KV, values, torch.ones(7, 4)).save(path)
    assert torch.equal(NodeScores.load(path).values, values)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert "sha256: expected" in refused(path, NodeScores.load)
    values[2] = float("nan")
    with pytest.raises(InputError, match=r"values: expected finite numbers, found 1 that are not, the first at a0\.h1"):
        NodeScores(KV, values).save(path)
    with pytest.raises(InputError, match=r"a name ending in \.safetensors"):
        NodeScores.load(tmp_path / "n.json")


# JSON.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["edges"]["m0->m1"].update(in_graph="false"), "in_graph of m0->m1: expected true or false"),
        (lambda c: c["edges"]["m0->m1"].update(in_graph=1), "in_graph of m0->m1: expected true or false, found 1"),
        (lambda c: c["edges"]["m0->m1"].update(in_graph=None), "found None"),
        (lambda c: c["edges"]["m0->m1"].update(score="1"), "score of m0->m1: expected a number, found '1'"),
        (lambda c: c["edges"]["m0->m1"].update(score=True), "expected a number, found True"),
        (lambda c: c["edges"]["m0->m1"].update(score=None), "a score of each edge, or of none, found 1 without"),
        (lambda c: c["edges"]["m0->m1"].update(score=10**400), "something else"),
        (lambda c: c["edges"]["m0->m1"].update(score=1e200), "expected finite numbers"),
        (lambda c: c["edges"].pop("m0->m1"), "all 46 edges of the graph that cfg describes, found 45"),
        (lambda c: c["edges"].update({"m1->m0": c["edges"].pop("m0->m1")}), "found 'm1->m0'"),
        (lambda c: c["nodes"].pop("m1"), "found 2 layers of 2 heads, which are 7"),
        (lambda c: c["nodes"].update({"m7": c["nodes"].pop("m1")}), "such as 'm1'"),
        (lambda c: c["nodes"].update(m1={"in_graph": "no"}), "node m1: expected true or false"),
        (lambda c: c["cfg"].update(n_layers=10**6), "found 1,000,000 layers"),
        (lambda c: c["cfg"].update(n_layers=10**12), "n_layers: expected a whole number"),
        (lambda c: c["cfg"].update(n_layers=True), "n_layers: expected a whole number"),
        (lambda c: c["cfg"].update(n_heads="2"), "n_heads: expected a whole number"),
        (lambda c: c["cfg"].update(n_heads=-2), "n_heads: expected a whole number"),
        (lambda c: c["cfg"].update(d_model=4.5), "d_model: expected a whole number"),
        (lambda c: c["cfg"].update(parallel_attn_mlp="no"), "parallel_attn_mlp: expected true or false"),
        (lambda c: c["cfg"].update(heads=[["kv"]]), "heads: expected 'kv' or 'query', found a list"),
        (lambda c: c.update(edges=[]), "nodes and edges: expected a JSON object of each"),
        (lambda c: c.update(info=[1]), "info: expected a JSON object"),
        (lambda c: c.update(info={"n_examples": "4"}), "info, n_examples: expected a whole number from 1"),
        (lambda c: c.update(info={"selection": "top"}), "info, selection: expected a JSON object, found 'top'"),
        (lambda c: [c], "something else (a list in place of an object)"),
    ],
)
def test_json_that_is_almost_right(change: Callable[[dict[str, Any]], Any], message: str, tmp_path: Path) -> None:
    path = written(".json", tmp_path, lambda content: made if isinstance(made := change(content), list) else None)
    assert message in refused(path)


def test_json_in_which_a_name_comes_twice_or_that_is_nested_deeply(tmp_path: Path) -> None:
    path = written(".json", tmp_path, lambda content: None)
    text = path.read_text()
    path.write_text(text.replace('"m0->m1": {', '"m0->logits": {"score": 1, "in_graph": false}, "m0->m1": {'))
    assert "'m0->logits' comes twice" in refused(path)
    path.write_text(text.replace('"info": {', '"info": {"x": ' + "[" * 100_000 + "]" * 100_000 + ", "))
    assert "written by eap_circuits or EAP-IG" in refused(path)


def test_the_order_of_json_means_nothing_and_a_bom_is_no_harm(tmp_path: Path) -> None:
    path = written(".json", tmp_path, lambda content: None)
    right = Circuit.load(path)

    def backwards(content: Any) -> Any:
        return {k: backwards(v) for k, v in reversed(content.items())} if isinstance(content, dict) else content

    path = written(".json", tmp_path, backwards, keep_checksum=True)
    assert Circuit.load(path) == right
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    shouting = path.rename(tmp_path / "R.JSON")
    assert Circuit.load(shouting) == right


# .pt


def deflated(path: Path) -> None:
    data = path.read_bytes()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(src_nodes=c["src_nodes"][::-1]), "src_nodes: expected the nodes that cfg describes, in"),
        (lambda c: c.update(dst_nodes=c["dst_nodes"][1:]), "dst_nodes: expected"),
        (lambda c: c.update(src_nodes=torch.zeros(1).expand(10**12)), "expected lists of nodes"),
        (lambda c: c.update(edges_in_graph=c["edges_in_graph"].float()), "edges_in_graph: expected dtype torch.bool"),
        (lambda c: c.update(edges_in_graph=c["edges_in_graph"].int()), "edges_in_graph: expected dtype torch.bool"),
        (lambda c: c.update(edges_scores=c["edges_scores"].int()), "edges_scores: expected floating-point numbers"),
        (lambda c: c.update(edges_scores=torch.zeros(1).expand(7, 15)), "edges_scores: expected shape [7, 15]"),
        (lambda c: c.update(edges_scores=c["edges_scores"].to_sparse()), "edges_scores: expected a tensor"),
        (lambda c: c.update(edges_scores=c["edges_scores"].to("meta")), "edges_scores: expected a tensor"),
        (lambda c: c.update(edges_scores=c["edges_scores"].tolist()), "edges_scores: expected a tensor"),
        (lambda c: c.update(nodes_in_graph="false"), "nodes_in_graph: expected a tensor"),
        (lambda c: c.update(src_nodes=dict.fromkeys(c["src_nodes"], "false")), "node input: expected true or false"),
        (lambda c: c.update(more=print), "found something else (Weights only load failed)."),
        (lambda c: c["cfg"].update(n_layers=10**6), "found 1,000,000 layers"),
        (lambda c: c["cfg"].update(n_heads=torch.tensor(2)), "expected lists of nodes, and numbers and texts"),
        (lambda c: c.update(info="[" * 100_000), "written by eap_circuits or EAP-IG"),
        (lambda c: c.update(info="[1]"), "info: expected a JSON object"),
    ],
)
def test_pt_that_is_almost_right(change: Callable[[dict[str, Any]], Any], message: str, tmp_path: Path) -> None:
    assert message in refused(written(".pt", tmp_path, lambda content: change(content)))


def test_pt_whose_pickle_shares_what_it_holds_is_not_written_out(tmp_path: Path) -> None:
    laugh: list[Any] = ["ha"]
    for _ in range(40):
        laugh = [laugh] * 9
    assert "expected lists of nodes" in refused(written(".pt", tmp_path, lambda c: c["cfg"].update(note=laugh)))
    assert "src_nodes" in refused(written(".pt", tmp_path, lambda c: c.update(src_nodes=[*c["src_nodes"][:-1], laugh])))
    refused(written(".pt", tmp_path, lambda c: c.update(sha256=laugh)))


def test_pt_that_would_unpack_to_more_than_it_is(tmp_path: Path) -> None:
    path = written(".pt", tmp_path, lambda content: content.update(more=torch.zeros(10**6)))
    deflated(path)
    assert path.stat().st_size < 10**5
    assert "expected entries as torch.save writes them, found compressed ones" in refused(path)
    torch.save({}, path, _use_new_zipfile_serialization=False)
    refused(path)


# .safetensors


def header(path: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    content = json.loads(data[8 : 8 + size])
    change(content)
    text = json.dumps(content).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])
    return path


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("n_heads", [10**9, 2], "shape"),
        ("n_heads", [10**12, 2], "shape"),
        ("n_heads", [2.0, 2], "n_heads: expected a whole number"),
        ("n_kv_heads", [1], "n_heads and n_kv_heads for each layer"),
        ("d_model", "4", "d_model: expected"),
        ("parallel", "false", "parallel: expected True or False"),
        ("heads", "both", "heads: expected one of 'kv', 'query'"),
        ("spans", ["a", "rest"], "spans: expected a Spans"),
        ("moe", True, "'moe'"),  # of a newer version, in which it means another graph
    ],
)
def test_safetensors_of_an_impossible_graph(field: str, value: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "r.safetensors"
    EdgeScores(KV, values_of(KV)).save(path)

    def change(content: dict[str, Any]) -> None:
        del content["__metadata__"]["sha256"]
        content["__metadata__"]["graph"] = json.dumps({**KV.to_dict(), field: value})

    assert message in refused(header(path, change))


def test_safetensors_whose_header_lies(tmp_path: Path) -> None:
    path = tmp_path / "r.safetensors"

    def lie(shape: list[int], end: int) -> Callable[[dict[str, Any]], None]:
        return lambda content: content["values"].update(shape=shape, data_offsets=[0, end])

    for shape, end in (([10**9, 10**9], 4 * 10**18), ([2**63, 2], 4), ([7, 11], 7 * 11 * 4 + 4)):
        EdgeScores(KV, values_of(KV)).save(path)
        refused(header(path, lie(shape, end)))
    for data in (b"", b"\xff" * 8, (2**40).to_bytes(8, "little") + b"{}", (2).to_bytes(8, "little") + b"[]"):
        path.write_bytes(data)
        refused(path)


# EAP-IG's own files, of all versions.


def curve() -> dict[str, Any]:
    numbers = {"mean": [0.5, 2.0], "clean": 2.0, "corrupted": 0.0, "cpr": 0.7, "cmd": None}
    return {"fractions": [0.1, 1.0], "n_edges": [3, 30], "faithfulness": [0.4, 1.0], **numbers, "info": {"x": 1}}


@pytest.mark.parametrize(
    "change",
    [
        {"fractions": [1.0, 0.1]},
        {"fractions": [0.1, 0.1]},
        {"fractions": [0.0, 1.0]},
        {"fractions": [0.1, 1.5]},
        {"fractions": [0.1, None]},
        {"n_edges": [3.5, 30]},
        {"n_edges": [True, 30]},
        {"n_edges": ["3", 30]},
        {"n_edges": [-3, 30]},
        {"faithfulness": ["0.4", 1.0]},
        {"faithfulness": [True, 1.0]},
        {"faithfulness": [float("nan"), 1.0]},
        {"cpr": float("inf")},
        {"clean": [2.0]},
        {"info": "x"},
        {"baselines": [1]},
        {"sha256": "0"},
        {"sha256": None},
    ],
)
def test_curves_that_are_almost_right(change: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "curve.json"
    path.write_text(json.dumps(curve()))
    assert load_curve(path) is not None and saved_curve(curve()).info == {"x": 1}
    path.write_text(json.dumps({**curve(), **change}))
    refused(path, load_curve)
