"""Stand-ins for the codebases that are patched: modules made of source text."""

import re
import sys
import types

import torch

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def named_einsum(*operands_and_expression):
    """einsum over axes with names, as einops has it."""
    *operands, expression = operands_and_expression
    names = sorted(set(re.findall(r"\w+", expression)))
    letters = re.sub(r"\w+", lambda name: chr(97 + names.index(name[0])), expression)
    return torch.einsum(letters.replace(" ", ""), *operands)


def install(monkeypatch, **sources):
    """Modules made of source text, importable until the test ends; their functions see `einsum` as a global."""
    for name, source in sources.items():
        name = name.replace("__", ".")
        module = types.ModuleType(name)
        module.__dict__.update(einsum=named_einsum, torch=torch)
        exec(source, module.__dict__)
        monkeypatch.setitem(sys.modules, name, module)
        for parent in (name.rsplit(".", i)[0] for i in range(1, name.count(".") + 1)):
            monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
