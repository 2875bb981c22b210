"""Load the model and the prompts that a command's options name."""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import expected, growing_shares, one_of
from ..files import check_file
from .console import note, working

if TYPE_CHECKING:
    from ..tasks import PairedDataset, PairsFile

PARTS: ContextVar[int] = ContextVar("parts", default=1)  # --tensor-parallel


@dataclass(frozen=True)
class Prompts:
    """Where the prompts come from: a task or a file."""

    task: str | None
    data: Path | None
    n: int = 64
    seed: int = 0
    align: bool = False
    ablation_data: Path | None = None
    ablation: str = "patching"

    def check(self, metric: str | None = None, gradient: bool = False) -> None:
        """Refuse wrong options, and read files, before a model is loaded; `gradient`: the metric will be
        differentiated."""
        if (self.task is None) == (self.data is None):
            found = "neither" if self.task is None else "both"
            raise expected("--task, --data", "one of them (eap tasks lists the tasks)", found)
        for option, path in (("--data", self.data), ("--ablation-data", self.ablation_data)):
            if path is not None:
                check_file(path, f"{option} {path}")
        if self.data is None:
            check_align(self.align, f"--task {self.task}")
        if metric is not None and gradient:
            from ..metrics import METRICS

            one_of("--metric", metric, [m.name for m in METRICS.values() if m.differentiable])
        if self.ablation_data is not None:
            from ..recording import ABLATIONS

            one_of("--ablation", self.ablation, [x.name for x in ABLATIONS.values() if x.from_data])
        _ = self._files

    @cached_property
    def _files(self) -> tuple[PairsFile | None, PairsFile | None]:
        """What --data and --ablation-data hold."""
        from ..tasks import read_file

        data, other = (None if path is None else read_file(path) for path in (self.data, self.ablation_data))
        return data, other

    def load(self, model: Any, tokenizer: Any) -> PairedDataset:
        from ..tasks import load_task

        file, _ = self._files
        if file is not None:
            pairs = _from_file(file, model, tokenizer, self.align)
        else:
            pairs = load_task(str(self.task), tokenizer, n=self.n, seed=self.seed)
        note(str(pairs.summary()))
        return pairs

    def load_ablation(self, model: Any, tokenizer: Any) -> PairedDataset | None:
        """The prompts of --ablation-data, or None for those of the run."""
        _, file = self._files
        return None if file is None else _from_file(file, model, tokenizer)


def _from_file(file: PairsFile, model: Any, tokenizer: Any, align: bool = False) -> PairedDataset:
    """The prompts of a file, whose pictures the model looks at."""
    from ..adapters import pretrained
    from ..request import image_pairs_from_file
    from ..tasks import PairedDataset

    if not file.names_pictures:
        return PairedDataset.from_file(file, tokenizer, align=align)
    with working("Looking at pictures …"):
        processor = pretrained.load_processor(tokenizer.name_or_path)
        return image_pairs_from_file(model, file, processor, align=align)


def check_align(align: bool, found: str) -> None:
    """Refuse --align for prompts that do not come from a file."""
    if align:
        raise expected("--align", "--data with it (the prompts of a task have equal lengths)", found)


def tasks_and_files(
    tasks: str | None, data: Sequence[Path] | None, align: bool
) -> tuple[list[str], dict[str, Prompts]]:
    """What --tasks and --data name, checked: tasks, of which all are meant if neither names any, and files by name."""
    from ..tasks import TASKS

    files = list(data or [])
    names = tasks.split(",") if tasks else [] if files else list(TASKS)
    for name in names:
        one_of("--tasks", name, TASKS)
    called = [*names, *(file.stem for file in files)]
    if len(set(called)) < len(called):
        raise expected("--tasks, --data", "tasks and files of different names", ", ".join([*names, *map(str, files)]))
    if not files:
        check_align(align, "no --data")
    named = {file.stem: Prompts(None, file, align=align) for file in files}
    for prompts in named.values():
        prompts.check()
    return names, named


def load_model(
    name: str,
    dtype: str | None = None,
    device: str | None = None,
    weights: bool = True,
    trust_remote_code: bool = False,
) -> tuple[Any, Any]:
    """The model and its tokenizer; other libraries' messages are kept off the terminal."""
    import torch

    parts = PARTS.get()
    if parts > 1 and not weights:
        raise expected("--tensor-parallel", "a model with weights", "--no-weights")
    if device is not None:
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            raise expected("--device", "a device of this machine", repr(device)) from error
    with working(f"Loading {name} …"):
        from transformers.utils import logging

        from ..adapters import pretrained

        logging.disable_progress_bar()
        number = getattr(torch, dtype) if dtype else None
        found = pretrained.load_model(
            name,
            dtype=number,
            device=device,
            weights=weights,
            trust_remote_code=trust_remote_code,
            tensor_parallel=parts,
        )
    note(f"Loaded {name}." if weights else f"Loaded the configuration of {name}, no weights.")
    if weights:
        _adopt(found[0])
    return found


def _adopt(model: Any) -> None:
    """Discover the sites of a model whose architecture has no table; the self-check must pass with them."""
    from ..adapters import family_of, register_family
    from ..selfcheck import discover

    if family_of(model.config.model_type, getattr(model.config, "is_encoder_decoder", False)) is None:
        with working(f"{type(model).__name__} is not known: looking for its parts …"):
            family, _ = discover(model)
        register_family(family)
        note(f"{type(model).__name__} is not known; its parts were found by what they compute. The self-check passed.")


def to_keep(keep: str | None, confidence: float | None, by_span: bool) -> list[str] | None:
    """What scores are kept: what --keep names, and what --confidence or --by-span needs."""
    found = [] if keep is None else keep.split(",")
    if by_span and (found or confidence is not None):
        raise expected("--by-span", "neither --keep nor --confidence beside it", "--keep" if found else "--confidence")
    if confidence is not None and not {"variance", "examples"} & set(found):
        found.append("variance")
    return [*found, "spans"] if by_span else found or None


def parse_fractions(text: str | None) -> Sequence[float]:
    """`0.001,0.01,0.1` -> numbers; by default MIB's."""
    if text is None:
        from ..evaluation import FRACTIONS

        return FRACTIONS
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise expected("--fractions", "growing numbers in (0, 1] with commas between", repr(text)) from error
    return growing_shares("--fractions", numbers)


def parse_baselines(text: str) -> tuple[str, ...]:
    """`random,complement` -> names; `none` -> no names."""
    return tuple(name for name in dict.fromkeys(text.split(",")) if name != "none")
