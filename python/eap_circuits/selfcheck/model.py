"""The self-check: does the mathematics hold on this very model?

It runs random prompts through a float64 copy of the model. There all identities hold up to rounding, so a wrong site, a
missing term or a hook that changes the run shows at once.
"""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass, replace
from functools import partial
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters import (
    Architecture,
    Family,
    bind,
    device_of,
    is_in_parts,
    is_offloaded,
    is_plain,
    linear_bias,
    linear_weight,
    sender_sites,
    unwrapped,
)
from ..errors import InputError, expected, known_arguments
from ..errors import whole as whole_number
from ..forward import Batch, Hooks, Runner, borrowed, make_batches, why_not_reused
from ..graph import Graph, Heads
from ..intervention import run_circuits
from ..modules.loans import FunctionMode, gives_back
from ..ranks import together
from ..recording import ReceiverGradients, compare_sums, contract, record_both_sides, record_run
from ..request import as_input_errors
from ..tasks import PairedDataset, different_throughout

EXACT = 1e-8  # relative error; rounding in a deep float64 model stays far below this
ONLY_STREAM = "blocks read nothing but the residual stream"
_STEP = 1e-5  # change of a mask entry for finite differences; their error is of this order
_SMALL = 1e-2  # what heads read where they are moved: so little that no model clips it
_RECORDS = "output_capturing"  # transformers' own hooks, which a first run may leave, to return what layers give


@dataclass(frozen=True)
class Check:
    """One statement about a model, and whether it held."""

    name: str
    passed: bool
    detail: str


class StayDouble(FunctionMode):
    """Inside, float64 stays float64, although many models cast to float32 in norms, softmaxes and rotations."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.full and "dtype" not in kwargs and isinstance(args[-1], float):
            kwargs["dtype"] = torch.float64  # the least number of that dtype, say
        if args and isinstance(args[0], Tensor) and args[0].dtype in (torch.float64, torch.int64):
            if func is Tensor.float:
                return args[0].double()
            args = tuple(torch.float64 if arg is torch.float32 else arg for arg in args)
            if kwargs.get("dtype") is torch.float32:
                kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


@together
@gives_back
@known_arguments
def check_model(model: nn.Module, *, n_edges: int = 8, seed: int = 0, family: Family | None = None) -> list[Check]:
    """Check a model against first principles; the model itself is only read and comes back as it was.

    It needs memory for a float64 copy of the weights and a few short passes.

    Args:
        model: a Hugging Face language model, causal, masked or an encoder-decoder, or a classifier.
        n_edges: how many random edges at least to compare with finite differences, for each head graph; one into each
            kind of receiver is among them.
        seed: for the random prompts and edges.
        family: the model's table; by default the one registered for its architecture.

    Returns:
        The checks, in order. For an unsupported architecture there is only one check, which failed.

    Raises:
        InputError: each rank has only a part of the model's weights.

    Example:
        >>> [check.name for check in eap.check_model(model) if not check.passed]
        []
    """
    n_edges, seed = whole_number("n_edges", n_edges, 1), whole_number("seed", seed)
    try:
        arch = bind(model, family)
    except InputError as error:
        return [Check("architecture", False, str(error))]
    layers, graph = len({layer.module for layer in arch.layers}), arch.graph("kv")
    checks = [Check("architecture", True, f"{arch.family.name}: {layers} layers, {graph.n_edges} edges")]
    model = unwrapped(model)
    before = _state(model)
    exact = exact_copy(model).eval()
    arch = bind(exact, family)
    data = _random_pairs(arch, seed)
    with borrowed(arch.model), StayDouble():
        (batch,) = make_batches(data, len(data), True, arch.device)
        (whole,) = make_batches(data, len(data), False, arch.device)
        try:
            with as_input_errors(arch):
                why = why_not_reused(arch, "kv", data)
        except InputError as error:
            return [*checks, Check("a causal language model", False, str(error))]
        if not arch.causal:
            checks.append(Check("prefix reuse", True, "left out, as tokens see those that follow"))
        elif why is not None:
            checks.append(Check("prefix reuse", True, f"left out, as the model's cache cannot serve: {why}"))
        if why is not None or not arch.causal:
            batch = whole
        kinds: list[Heads] = ["kv", "query"] if any(layer.groups > 1 for layer in arch.layers) else ["kv"]
        checks += [_contributions(arch, batch), _heads(arch, data)]
        for heads in kinds:
            checks += _runs(arch, heads, batch, whole, data, exact)
            checks.append(_finite_differences(arch, heads, batch, n_edges, seed))
        checks += [_group_sums(arch, batch)] if len(kinds) > 1 else []
    with borrowed(model):
        arch = bind(model, family)
        for heads in kinds:
            _scores(arch, heads, batch)
    checks.append(_same("model untouched", float(_state(model) != before), "hooks, modes, gradients, attributes"))
    return checks


def exact_copy(model: nn.Module) -> Any:
    """The model in float64, with plain linear layers of the same weights instead of quantised ones.

    Raises:
        InputError: each rank has only a part of its weights, or a module's forward was replaced by a function.
    """
    if is_in_parts(model):
        raise expected("model", "whole weights, of which a copy in float64 is checked", "parts of them on every rank")
    for name, module in model.named_modules():
        if isinstance(vars(module).get("forward"), FunctionType):  # which a copy would share
            wanted = "forward methods of the modules' own, as a copy of the model is checked"
            raise expected(f"{type(model).__name__}{name and '.'}{name}", wanted, "a function put in the place of one")
    plain: dict[int, Any] = {}
    with borrowed(model):
        for module in model.modules():
            # A state that a run has left, with its graph, which cannot be copied.
            left = (x for x in vars(module).values() if isinstance(x, Tensor) and not x.is_leaf)
            plain |= {id(x): x.detach().clone() for x in left}
            if hasattr(module, "in_features") and not is_plain(getattr(module, "weight", torch.empty(0))):
                weight = linear_weight(module)
                bias = None if getattr(module, "bias", None) is None else linear_bias(module)
                # On no device, where it draws no random numbers.
                layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, torch.device("meta"))
                layer.weight = nn.Parameter(weight.double().clone())
                if bias is not None:
                    layer.bias = nn.Parameter(bias.double().clone())
                if (hook := vars(module).get("_hf_hook")) is not None and not is_offloaded(module):
                    from accelerate.hooks import add_hook_to_module

                    add_hook_to_module(layer, copy.copy(hook))  # which moves inputs to its device
                plain[id(module)] = layer
        exact: Any = copy.deepcopy(model, plain)  # deepcopy takes these for copies already made
        exact.double()
        for hook in (vars(module).get("_hf_hook") for module in exact.modules()):
            for each in (hook, *getattr(hook, "hooks", ())):
                if hasattr(each, "compute_dtype"):  # in which accelerate's layerwise casting puts weights for a run
                    each.storage_dtype = each.compute_dtype = torch.float64
        if getattr(exact.config, "_experts_implementation", None) is not None:
            exact.set_experts_implementation("eager")  # grouped products of experts do not support float64
        if "flash" in str(getattr(exact.config, "_attn_implementation", None)):  # nor does flash attention
            exact.set_attn_implementation("eager")
    return exact


def _random_pairs(arch: Architecture, seed: int) -> PairedDataset:
    generator = torch.Generator().manual_seed(seed)
    model: Any = arch.model
    vocabulary = arch.vocabulary() if arch.classifies else min(arch.vocabulary(), arch.predicted)
    padding = getattr(model.config, "pad_token_id", None)  # which some do not count as a position
    known = torch.tensor([token for token in range(vocabulary) if token != padding])
    examples, tokens, shared = 3, 9, 4
    drawn = torch.randint(len(known), (examples, tokens), generator=generator)
    clean, drawn[:, shared] = known[drawn], (drawn[:, shared] + 1) % len(known)
    corrupted = known[drawn]
    predicted = model.config.num_labels if arch.classifies else vocabulary
    answers = torch.stack([clean[:, 0], clean[:, 0] + 1], 1) % predicted
    data = PairedDataset.from_tokens(clean, corrupted, torch.tensor([tokens, tokens, tokens - 2]), answers)
    if arch.encoder:
        last = torch.arange(shared) < torch.tensor([shared, shared, shared - 1])[:, None]
        data = replace(data, decoder=clean[:, :shared].where(last, -1))
    return data if arch.causal else different_throughout(data)


def _state(model: nn.Module) -> list[object]:
    """Everything about a model that a run could leave changed, except the weights' values."""
    state: list[object] = []
    for module in model.modules():
        kinds = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
        hooks = [
            [key for key, f in kind.items() if _RECORDS not in str(getattr(f, "__module__", ""))] for kind in kinds
        ]
        plain = {k: v for k, v in vars(module).items() if isinstance(v, (bool, int, float, str)) and _RECORDS not in k}
        state.append((module.training, hooks, plain))
    # What accelerate fetches or casts is elsewhere after each run.
    fetched = {p for module in model.modules() if "_hf_hook" in vars(module) for p in module._parameters.values()}
    state += [(p.requires_grad, p.grad is None, p in fetched or _place(p)) for p in model.parameters()]
    return [*state, getattr(model.config, "_attn_implementation", None)]


def _place(x: Tensor) -> int:
    """Where a tensor's numbers are; of a sparse one, which tensor it is."""
    return x.data_ptr() if x.layout == torch.strided else id(x)


def _same(name: str, error: float, what: str, bound: float = EXACT) -> Check:
    return Check(name, error <= bound, f"{what}: error {error:.1e}, at most {bound:.0e}")


def _relative(found: Tensor, right: Tensor) -> float:
    return float((found - right).norm() / right.norm().clamp(min=1e-300))


def _contributions(arch: Architecture, batch: Batch) -> Check:
    """At every norm the residual stream's difference is the sum of the differences of the senders before it."""
    sums, _ = compare_sums(Runner(arch, arch.graph("kv"), batch, every_mlp=True))
    worst = max(each.missing / max(each.difference, 1e-300) for each in sums)
    return _same("contributions sum to the residual", worst, f"{len(sums)} norms")


def _heads(arch: Architecture, data: PairedDataset) -> Check:
    """Another query moves only its own head at its own token; a key and a value move their group from their token on.

    The effect of a value is also linear, which is all that tells a value from a key. A gate is like a query. What other
    mixers read moves nothing before its token.
    """
    graph = arch.graph("kv")
    (batch,) = make_batches(data[[0]], 1, False, arch.device)
    runner = Runner(arch, graph, batch)
    moves = [
        (index, name, size)
        for index, layer in enumerate(arch.layers)
        for name in layer.projections
        for size in ((0, 1, 2) if name == "v" and not (layer.inner_norm or layer.v_norm) else (0,))
    ]
    seen: dict[int, Tensor] = {}  # the heads' values in each layer, [1 + moves, T, H·K]

    def see(index: int, z: Tensor) -> None:
        seen[index] = z.detach()

    def add(index: int, columns: dict[str, slice], y: Tensor) -> Tensor:
        y, at = y.clone(), _moved_at(y)
        for row, (layer, letter, size) in enumerate(moves, 1):
            if layer == index and letter in columns:
                head = y[row, at, columns[letter]][-arch.layers[index].projections[letter].head_dim :]
                head[:] = _SMALL * (1 + size * torch.linspace(-0.5, 0.5, len(head), dtype=y.dtype, device=y.device))
        return y

    def register(hooks: Hooks) -> None:
        for index in range(len(arch.layers)):
            for module, columns in runner.projection_sites(index):
                hooks.on_output(module, partial(add, index, columns))
        for site in sender_sites(arch):
            if site.heads:
                hooks.on_senders(site, partial(see, site.layer))

    with torch.no_grad():
        runner.logits(runner.embed(batch.clean).repeat(1 + len(moves), 1, 1), register)
    wrong = []
    for row, (index, letter, size) in enumerate(moves, 1):
        layer, z = arch.layers[index], seen[index]
        moved, at = (z[row] - z[0]).unflatten(-1, (layer.n_heads, -1)), _moved_at(z)
        elsewhere, of_query = moved.clone(), "v" in layer.projections and letter not in ("k", "v")
        every = "v" not in layer.projections or layer.inner_norm or (layer.mixes_heads and letter in ("q", "k"))
        heads = slice(0 if every else -1 if of_query else -layer.groups, None)
        elsewhere[at if arch.causal or of_query else 0 : at + 1 if of_query else None, heads] = 0
        linear = size < 2 or (z[row] - 2 * z[row - 1] + z[row - 2]).norm() <= EXACT * (z[row] - z[row - 1]).norm()
        if not (linear and elsewhere.abs().max() < 1e-6 * moved.abs().max()):
            wrong.append(f"{letter} of layer {index}")
    found = f"not {', '.join(dict.fromkeys(wrong))}" if wrong else f"{len(seen)} layers"
    return Check("projections are the heads' queries, keys and values", not wrong, found)


def _moved_at(x: Tensor) -> int:
    """The token of [rows, T, X] that is changed: about the middle, but not the first one of a chunk of 2, 3, 4 or 6."""
    return x.shape[1] // 2 + 1


def _runs(
    arch: Architecture, heads: Heads, batch: Batch, whole: Batch, data: PairedDataset, model: nn.Module
) -> list[Check]:
    graph = arch.graph(heads)
    runner = Runner(arch, graph, batch)
    with torch.no_grad():
        plain, corrupted = (_plain(model, data[batch.index], side) for side in ("clean", "corrupted"))
        record = record_run(runner, corrupted=True)
        # Receivers with all edges or none take short cuts; with a mask just off 1 or 0 they do not.
        nearly = graph.edge_mask.double() * (1 - 1e-12)
        hardly = graph.edge_mask.double() * 1e-12
        # Blocks compute what they write from what they read in the corrupted run, and only the logits read it. What the
        # clean prompt reaches by itself is left out.
        blocks = torch.where(torch.arange(graph.n_receivers) < graph.n_receivers - 1, hardly, nearly)
        blocks[graph.sources] = 0
        full, empty, written = run_circuits(runner, graph, record, [nearly, hardly, blocks])
    first, second = _scores(arch, heads, batch), _scores(arch, heads, whole)
    what, between = f"logits, heads={heads!r}", f"scores with and without, heads={heads!r}"
    return [
        _same("captured run equals the plain model's", _relative(record.logits, corrupted), what),
        _same("all edges kept is the model on clean prompts", _relative(full, plain), what),
        _same("no edge kept is the model on corrupted prompts", _relative(empty, corrupted), what),
        _same(ONLY_STREAM, _relative(written, corrupted), what),
        *([] if batch is whole else [_same("prefix reuse is exact", _relative(first, second), between)]),
    ]


def _plain(model: Any, data: PairedDataset, side: str) -> Tensor:
    """The model's own logits of the last tokens, or of whole prompts, [E, V]: each by itself, without padding."""
    device = device_of(model.get_input_embeddings())
    own = [{"input_ids": ids[None, :n]} for ids, n in zip(getattr(data, side), data.lengths, strict=True)]
    for given, ids in zip(own, data.decoder if data.decoder is not None else (), strict=False):
        given["decoder_input_ids"] = ids[None, ids >= 0]
    every = ({name: ids.to(device) for name, ids in given.items()} for given in own)
    found = (model(**given, use_cache=False).logits[0] for given in every)
    return torch.stack([logits[-1] if logits.dim() > 1 else logits for logits in found])


def _loss(logits: Tensor, batch: Batch) -> Tensor:
    good, bad = batch.answers.T
    rows = torch.arange(len(logits), device=logits.device)
    return (logits[rows, bad] - logits[rows, good]).sum()


def _scores(arch: Architecture, heads: Heads, batch: Batch) -> Tensor:
    """EAP scores, summed over the batch."""
    graph = arch.graph(heads)
    runner = Runner(arch, graph, batch)
    sides, receivers = record_both_sides(runner), ReceiverGradients(runner, graph, 1)
    receivers.run(sides.clean_embeddings, torch.ones(1), lambda logits: _loss(logits, batch))
    scores = torch.zeros(graph.n_senders, graph.n_receivers, dtype=arch.accumulate, device=arch.device)
    for number, (*edges, reach) in enumerate(graph.streams):
        delta, grad = (side.lowered(arch.accumulate, number)(slice(None)) for side in (sides.senders, receivers))
        scores[tuple(edges)] = contract(arch, delta, grad, reach)
    return scores


def _finite_differences(arch: Architecture, heads: Heads, batch: Batch, n_edges: int, seed: int) -> Check:
    """The score of an edge is the derivative of the loss as the edge is corrupted."""
    graph: Graph = arch.graph(heads)
    scores = _scores(arch, heads, batch).cpu()
    runner = Runner(arch, graph, batch)
    record = record_run(runner, corrupted=True)
    edges = graph.edge_mask.nonzero()
    drawn = edges[torch.randperm(len(edges), generator=torch.Generator().manual_seed(seed))]
    # One into each kind of receiver, whatever layer it is in, comes first.
    kinds = {re.sub(r"\d+", "", graph.receivers[v]): place for place, v in reversed([*enumerate(drawn[:, 1].tolist())])}
    order = dict.fromkeys([*kinds.values(), *range(len(drawn))])
    chosen = drawn[[*order][: max(n_edges, len(kinds))]]
    masks = []
    for u, v in chosen.tolist():
        for step in (-_STEP, _STEP):
            mask = graph.edge_mask.double()
            mask[u, v] -= step
            masks.append(mask)
    losses = torch.stack([_loss(logits, batch) for logits in run_circuits(runner, graph, record, masks)])
    right = ((losses[1::2] - losses[::2]) / (2 * _STEP)).cpu()
    error = float((scores[chosen[:, 0], chosen[:, 1]] - right).abs().max() / scores.abs().max())
    return _same("scores equal finite differences", error, f"{len(chosen)} random edges, heads={heads!r}", 1e-6)


def _group_sums(arch: Architecture, batch: Batch) -> Check:
    query, columns = _scores(arch, "query", batch), arch.graph("kv").kv_receiver.to(arch.device)
    kv = _scores(arch, "kv", batch)
    return _same(
        "key/value head scores are their group's sums",
        _relative(torch.zeros_like(kv).index_add(1, columns, query), kv),
        "scores",
    )
