"""Files of every format that is read, damaged in their bytes or their structure: read whole, or refused by name."""

from __future__ import annotations

import contextlib
import copy
import csv
import io
import json
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

import eap_circuits as eap
from eap_circuits.report import load_curve

from .command_lines import RECORDS
from .common import Tally, circuit, difference, model, pairs, scores, tokenizer

ODD = (None, True, -1, 0, 3, 2**70, 0.5, float("nan"), "", "x", "é\n", [], [1], {}, {"a": 1}, [[]], "0.5", "[5, 6]")
EXACT = {"method": "exact", "edges": None, "batch_size": 2}


class Kind(NamedTuple):
    """A file that is right, what reads it, and what is wrong with what was read."""

    path: Path
    read: Callable[[Path], Any]
    wrong: Callable[[Any], str | None]


def wrong_pairs(data: eap.PairedDataset) -> str | None:
    if not (data.lengths > 0).all() or (data.clean < 0).any() or (data.answers < -1).any():
        return "lengths or tokens out of range"
    return None


def wrong_scores(found: eap.EdgeScores) -> str | None:
    if not torch.isfinite(found.values).all():
        return "scores that are not finite"
    return "scores where there is no edge" if found.values[~found.graph.edge_mask].any() else None


def wrong_circuit(found: eap.Circuit) -> str | None:
    return "edges that do not exist" if (found.mask & ~found.graph.edge_mask).any() else None


def wrong_curve(found: Any) -> str | None:
    return None if all(0 <= f <= 1 for f in found.fractions) else "fractions outside [0, 1]"


def wrong_nodes(found: Any) -> str | None:
    return None if torch.isfinite(found.values).all() else "scores that are not finite"


def exact(path: Path) -> Any:
    """A run that goes on from this checkpoint."""
    return eap.attribute(model(), pairs()[:2], method="exact", edges=circuit(), checkpoint=path)


def kinds(folder: Path) -> dict[str, Kind]:
    """A file of each kind and format in the folder."""
    rows = [
        {"clean": r["clean"], "corrupted": r["corrupted"], "good": r["answers"][0], "bad": r["answers"][1]}
        for r in RECORDS
    ]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    (folder / "pairs.csv").write_text(text.getvalue())
    (folder / "pairs.json").write_text(json.dumps(RECORDS))
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pairs().save(folder / "pairs.safetensors")
    torch.save({n: getattr(pairs(), n) for n in ("clean", "corrupted", "lengths", "answers")}, folder / "pairs.pt")
    names = ["pairs.csv", "pairs.json", "pairs.jsonl", "pairs.safetensors", "pairs.pt"]
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "pairs.parquet")
    found = {
        name: Kind(folder / name, lambda path: eap.PairedDataset.from_file(path, tokenizer()), wrong_pairs)
        for name in [*names, "pairs.parquet"]
    }
    for suffix in (".safetensors", ".json", ".pt"):
        scores().save(folder / f"scores{suffix}")
        circuit().save(folder / f"circuit{suffix}")
        found[f"scores{suffix}"] = Kind(folder / f"scores{suffix}", eap.EdgeScores.load, wrong_scores)
        found[f"circuit{suffix}"] = Kind(folder / f"circuit{suffix}", eap.Circuit.load, wrong_circuit)
    scores().node_scores().save(folder / "nodes.safetensors")
    found["nodes.safetensors"] = Kind(folder / "nodes.safetensors", eap.NodeScores.load, wrong_nodes)
    curve = eap.faithfulness_curve(model(), scores(), pairs(), (0.1, 0.5), baselines=("complement",))
    (folder / "curve.json").write_text(json.dumps(curve.to_dict()))
    found["curve.json"] = Kind(folder / "curve.json", load_curve, wrong_curve)
    right = exact(folder / "checkpoint.safetensors")

    def wrong_exact(again: Any) -> str | None:
        return difference(again, right)

    found["checkpoint.safetensors"] = Kind(folder / "checkpoint.safetensors", exact, wrong_exact)
    return found


def other_bytes(rng: random.Random, content: bytes) -> bytes:
    """Bytes flipped, cut out, repeated, put in, or the end missing."""
    changed = bytearray(content)
    for _ in range(rng.randint(1, 3)):
        # The beginning of a file says how the rest is read.
        at = rng.randrange(min(len(changed), rng.choice((16, 400, 10**9))) or 1)
        length = rng.choice((1, 1, 4, 60))
        kind = rng.randrange(6)
        if kind == 0 and changed:
            changed[at % len(changed)] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del changed[at : at + length]
        elif kind == 2:
            changed[at:at] = changed[at : at + length]
        elif kind == 3:
            changed[at:at] = rng.choice((b"\0", b"\xff\xfe", b'"', b"{", b",", b"\n", b"NaN", b"9" * 400, b"[" * 3000))
        elif kind == 4:
            changed[at : at + length] = rng.randbytes(length)
        else:
            del changed[at:]
    return bytes(changed)


def other_tree(rng: random.Random, tree: Any) -> Any:
    """A tree of dictionaries and lists with one or two entries replaced, removed, renamed or moved."""
    tree = copy.deepcopy(tree)
    for _ in range(rng.randint(1, 2)):
        node, depth = tree, 0
        while isinstance(node, (dict, list)) and node and depth < 6:
            keys = list(node) if isinstance(node, dict) else range(len(node))
            key = rng.choice(keys)
            if not isinstance(node[key], (dict, list)) or not node[key] or rng.random() < 0.3:
                kind = rng.randrange(4)
                if kind == 0:
                    del node[key]
                elif kind == 1 and isinstance(node, dict):
                    node[rng.choice(("x", "", "é"))] = node.pop(key)
                elif kind == 2:
                    node[key] = copy.deepcopy(tree)
                else:
                    node[key] = rng.choice(ODD)
                break
            node, depth = node[key], depth + 1
    return tree


def other_tensor(rng: random.Random, x: torch.Tensor) -> torch.Tensor:
    """The same values in another dtype or shape, or other values."""
    kind = rng.randrange(6)
    if kind == 0:
        return x.to(rng.choice((torch.float64, torch.int32, torch.bool, torch.float16, torch.uint8)))
    if kind == 1:
        return x[..., :-1].contiguous() if x.dim() else x.repeat(2)
    if kind == 2:
        return x[None].contiguous()
    if kind == 3:
        return x.flatten()
    if kind == 4:
        return torch.full_like(x, rng.choice((-1, 2**30, 0))) if not x.is_floating_point() else x * float("nan")
    return x.new_zeros((0, *x.shape[1:]))


def other_structure(rng: random.Random, path: Path, new: Path) -> None:
    """A file of the same format that can be parsed, but whose content is another."""
    suffix = path.suffix
    if suffix == ".json":
        new.write_text(json.dumps(other_tree(rng, json.loads(path.read_text()))))
    elif suffix == ".jsonl":
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        new.write_text("\n".join(json.dumps(line) for line in other_tree(rng, lines)))
    elif suffix == ".csv":
        cells = other_tree(rng, list(csv.reader(io.StringIO(path.read_text()))))
        text = io.StringIO()
        csv.writer(text).writerows(row if isinstance(row, list) else [row] for row in cells)
        new.write_text(text.getvalue(), encoding="utf-8")
    elif suffix == ".parquet":
        import pyarrow
        from pyarrow import parquet

        rows = other_tree(rng, parquet.read_table(path).to_pylist())
        rows = [row for row in rows if isinstance(row, dict)]
        columns = {name: [row.get(name) for row in rows] for row in rows[:1] for name in row}
        column = rng.choice([*columns, "x"])
        columns[column] = [rng.choice((1, 2.5, None, b"x", ["x"], {"a": 1}))] * len(rows)
        parquet.write_table(pyarrow.table(columns), new)
    elif suffix == ".pt":
        torch.save(other_tensors(rng, torch.load(path, weights_only=True)), new)
    else:
        with safe_open(path, "pt") as file:
            metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if rng.random() < 0.5:
            tensors = other_tensors(rng, tensors)
        else:
            parsed = {key: json.loads(text) if text[:1] in "{[" else text for key, text in metadata.items()}
            parsed = other_tree(rng, parsed)
            metadata = {key: x if isinstance(x, str) else json.dumps(x) for key, x in parsed.items()}
        kept = {name: x.contiguous() for name, x in tensors.items() if isinstance(x, torch.Tensor)}
        save_file(kept, new, metadata={key: str(text) for key, text in metadata.items()} if metadata else None)


def other_tensors(rng: random.Random, content: dict[str, Any]) -> dict[str, Any]:
    found = dict(content)
    name = rng.choice(list(found))
    kind = rng.randrange(3)
    if kind == 0:
        found[rng.choice(("x", "values", "mask"))] = found.pop(name)
    elif isinstance(found[name], torch.Tensor) and kind == 1:
        found[name] = other_tensor(rng, found[name])
    else:
        found[name] = rng.choice(ODD)
    return found


def fuzz(tally: Tally, rng: random.Random, count: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        known = kinds(folder)
        for label, kind in known.items():
            tally.run(label, lambda kind=kind: kind.read(kind.path), kind.wrong)
        for number in range(count - len(known)):
            label = rng.choice(list(known))
            kind = known[label]
            path = folder / f"damaged{kind.path.suffix}"
            in_bytes = rng.random() < 0.5
            if in_bytes:
                path.write_bytes(other_bytes(rng, kind.path.read_bytes()))
            else:
                written = False
                while not written:
                    # Not every tree can be written in every format.
                    with contextlib.suppress(ValueError, TypeError, OverflowError, SafetensorError, UnicodeError):
                        other_structure(rng, kind.path, path)
                        written = True
            content = path.read_bytes()

            def read(kind: Kind = kind, path: Path = path) -> Any:
                try:
                    return kind.read(path)
                except eap.InputError as error:
                    sentence = str(error)
                    assert str(path) in sentence or "data" in sentence, f"does not name the file: {sentence[:100]}"
                    assert len(sentence.splitlines()) == 1, f"several lines: {sentence[:100]!r}"
                    assert len(sentence) < 2000, f"a sentence of {len(sentence)} characters"
                    raise

            tally.run(f"{number} {label}, {'bytes' if in_bytes else 'structure'}", read, kind.wrong)
            if label != "checkpoint.safetensors" and path.read_bytes() != content:
                tally.failures.append(f"{number} {label}: the file was changed by reading it")
            left = [path.name for path in folder.iterdir() if path.name.startswith(".")]
            if left:
                tally.failures.append(f"{number} {label}: left {left}")
            path.unlink()
