"""Gradients at every receiver, taken in head space and collapsed over the path.

Receiver v reads x_v, the residual stream before the norm, through its own q, k or v projection. With g_v the gradient
at the projection's output, x̂ and r the norm's normalised input and scale, γ its gain and W_v the projection's slice,

    ∂loss/∂x_v = r·P(γ ⊙ W_vᵀ g_v) − r·x̂·⟨x̂, γ ⊙ W_vᵀ g_v⟩ / D,

P = I for RMSNorm and I − 11ᵀ/D for LayerNorm. Summed over path points k with weights w_k, the first term needs only
ĝ_v = Σ_k w_k r_k g_{v,k}; the second needs x̂_k and the number c_{v,k} = w_k r_k ⟨x̂_k, γ ⊙ W_vᵀ g_{v,k}⟩ / D. This inner
product is that of g_{v,k} with the projection's output less its constant part, so W_vᵀ g_{v,k} is never formed. MLP and
logits receivers are the same with W = I. Under backward rules (`rules/`) r is a constant, and there is no
second term. tests/circuits/plain_runs.py specifies a receiver's gradient by plain autograd.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import groupby

import torch
from torch import Tensor

from eap_kernels import Nodes, collapse

from ..adapters import Norm, Place, Projection, ReceiverSite, joined, read, receiver_sites, side_by_side
from ..errors import expected, reason
from ..forward import Batch, Hooks, Runner, skip_inactive
from ..graph import Graph
from .rules import BackwardRules, Rules

_GRADIENTS = "layers that give gradients to activations"


@dataclass
class _Reads:
    """What one norm gives its receivers."""

    norm: Norm
    batch: Batch  # whose tokens it reads
    normalised: Tensor  # x̂ of the points held, [p, n, D]
    scale: Tensor | None = None  # r_k of the latest pass, [m, n]


@dataclass
class _Part:
    """Those of some heads that one module projects to."""

    projection: Projection
    names: list[str]
    heads: slice
    constant: Tensor | None  # the part of the projection's output that does not depend on x̂, [heads, K]


@dataclass(eq=False)
class _Held:
    """Of neighbouring receivers that read one norm alike: ĝ, and c of the points held."""

    sites: list[ReceiverSite]
    reads: _Reads
    gradient: Tensor  # ĝ, [n, heads, K], or [n, 1, D]
    coefficients: Tensor  # c, [heads, p, n]
    parts: list[_Part] = field(default_factory=list)  # of heads
    gain: Tensor | None = None  # γ, [D], where no heads read

    @cached_property
    def mean(self) -> Tensor | None:
        """What a centred norm subtracts from each row of the weights times its gain, [heads, K, 1]."""
        norm, dtype = self.reads.norm, self.gradient.dtype
        if not norm.centred:
            return None
        return norm.mean_backwards(*(part.projection.weight(dtype) for part in self.parts))


class ReceiverGradients:
    """Gradients of the loss at every receiver, accumulated over passes along the path.

    Everything held is allocated at once, before the passes: allocating between passes would fragment memory.

    Args:
        runner: the model on one batch.
        graph: its edge graph.
        points: how many path points can be held until `clear`.
        since: only the receivers that can see this sender; None: all.
        rules: backward rules, if any.
    """

    def __init__(
        self, runner: Runner, graph: Graph, points: int, rules: Rules | None = None, since: int | None = None
    ) -> None:
        self.graph = graph
        self._runner = runner
        self._arch = arch = runner.arch
        self._rules = None if rules is None else BackwardRules(rules, arch)
        self._filled, self._cleared = slice(0, 0), False
        self._weights: dict[torch.device, Tensor] = {}  # of the latest pass, [m]
        sites = [site for site in receiver_sites(arch, graph) if since is None or site.begin <= since < site.reach]
        batches = {site.norm: runner.batch.at(site.stream) for site in sites}
        n = {norm: len(batch.rows) for norm, batch in batches.items()}
        # Most of what is held.
        normalised, _ = _zeros([(norm, (points, n[norm], arch.d_model)) for norm in batches], arch.contraction_dtype)
        self._reads = {norm: _Reads(norm, batches[norm], x) for norm, x in zip(batches, normalised, strict=True)}
        # Neighbours that read alike are one group, and groups whose gradients are treated alike lie side by side.
        stacks: dict[object, list[list[ReceiverSite]]] = {}
        for _, alike in groupby(sites, _alike):
            group = list(alike)
            stacks.setdefault(_kind(group[0]), []).append(group)
        shapes = [(len(stack), sum(site.count for site in stack[0]), stack[0][0]) for stack in stacks.values()]
        widths = [site.projection.head_dim if site.projection else arch.d_model for *_, site in shapes]
        gradients, self._sums = _zeros(
            [
                (site.norm, (k, n[site.norm], count, width))
                for (k, count, site), width in zip(shapes, widths, strict=True)
            ],
            arch.accumulate,
        )
        coefficients, self._coefficients = _zeros(
            [(site.norm, (k, count, points, n[site.norm])) for k, count, site in shapes], arch.accumulate
        )
        held: list[_Held] = []
        self._stacks: list[tuple[Norm, Tensor, list[_Held]]] = []
        for stack, g, c in zip(stacks.values(), gradients, coefficients, strict=True):
            together = [self._hold(*each) for each in zip(stack, g, c, strict=True)]
            held += together
            if not together[0].parts:
                self._stacks.append((side_by_side([each.reads.norm for each in together]), g, together))
        # In the graph's order.
        self._held = sorted(held, key=lambda each: each.sites[0].receivers.start)

    def _hold(self, sites: list[ReceiverSite], gradient: Tensor, coefficients: Tensor) -> _Held:
        norm, dtype = sites[0].norm, self._arch.accumulate
        found, start = _Held(sites, self._reads[norm], gradient, coefficients), 0
        if sites[0].projection is None:
            gain = norm.gain(gradient)
            found.gain = gain.detach() if isinstance(gain, Tensor) else None
            return found
        for _, ones in groupby(sites, lambda site: site.projection and site.projection.module):
            some = list(ones)
            projection = joined([site.projection for site in some if site.projection])
            heads = slice(start, start := start + sum(site.count for site in some))
            constant = _constant(norm, projection, some[0].repeat_kv, dtype)
            found.parts.append(_Part(projection, [site.name for site in some], heads, constant))
        return found

    def run(
        self,
        embeddings: Tensor,
        weights: Tensor,
        loss: Callable[[Tensor], Tensor],
        watch: Callable[[Hooks], None] | None = None,
        alphas: Sequence[float] | None = None,
        after: Callable[[Hooks], None] | None = None,
    ) -> None:
        """One forward and backward over m path points.

        Args:
            embeddings: path points, [m·E, T, D].
            weights: their quadrature weights w_k, [m].
            loss: logits [m·E, V] -> scalar, summed over examples and path points.
            watch: adds hooks of others to this pass.
            alphas: see `Runner.logits`.
            after: adds hooks that are called after all others.
        """
        if self._cleared:
            for piece in self._sums.values():
                piece.zero_()
        self._cleared = False
        self._filled = slice(self._filled.stop, self._filled.stop + len(weights))
        self._weights = {device: weights.to(device, self._arch.accumulate) for device in self._arch.devices}

        def register(hooks: Hooks) -> None:
            # Before `watch`, which may let layers pass through: they then have nothing for rules to find.
            if self._rules is not None:
                self._rules.register(hooks)
            if watch is not None:
                watch(hooks)
            skip_inactive(self._arch, self._runner.batch, len(weights), hooks)
            self._register(hooks)
            if after is not None:
                after(hooks)

        points = embeddings.detach().requires_grad_(True)
        try:
            loss(self._runner.logits(points, register, alphas=alphas)).backward()
        except RuntimeError as error:
            # Of flex attention on a CPU or a kernel of quantised weights; of buffers made in inference mode.
            if isinstance(error, NotImplementedError) or "Inference tensors" in str(error):
                raise expected("model", _GRADIENTS, reason(error)) from error
            raise

    def clear(self) -> None:
        """Forget what has been accumulated."""
        self._filled, self._cleared = slice(0, 0), True

    def nodes(self, features: slice = slice(None)) -> Iterator[Nodes]:
        """Σ_k w_k ∂loss/∂x_v of what has been accumulated, or some features of it, in the graph's order.

        Each group's are made when they are asked for: their weights are a copy.
        """
        return self.lowered(self._arch.accumulate)(features)

    def lowered(self, dtype: torch.dtype, stream: int | None = None) -> Callable[[slice], Iterator[Nodes]]:
        """`nodes`, or one stream's, in the accumulation dtype or a low one: sums are rounded together, and no weight is
        widened."""
        low = None if dtype == self._arch.accumulate else dtype
        sums, coefficients = (
            {device: piece.to(dtype) if low else piece for device, piece in pieces.items()}
            for pieces in (self._sums, self._coefficients)
        )

        def nodes(features: slice) -> Iterator[Nodes]:
            values: dict[_Held, Tensor] = {}
            chosen = [held for held in self._held if stream in (None, held.sites[0].stream)]
            for norm, rows, together in (stack for stack in self._stacks if stack[2][0] in chosen):
                mean = None if features == slice(None) else norm.mean_backwards(rows)
                through = norm.backwards(rows[..., features], features=features, mean=mean, low=low)
                values |= zip(together, through, strict=True)
            for held in chosen:
                norm, weight = held.reads.norm, None
                if held.parts:
                    values[held] = _like(held.gradient, sums[norm.device])
                    weight = self._weight(held, features, low)
                along = _like(held.coefficients, coefficients[norm.device])
                yield self._node(held, values.pop(held), weight, along, features)

        return nodes

    def _weight(self, held: _Held, features: slice, low: torch.dtype | None) -> Tensor:
        """Of heads, through the norm: [heads, K, features]."""
        dtype = self._arch.dtype if low else self._arch.accumulate
        rows = (part.projection.weight(dtype, features) for part in held.parts)
        mean = None if features == slice(None) else held.mean
        return held.reads.norm.backwards(*rows, features=features, mean=mean, low=low)

    def _node(self, held: _Held, values: Tensor, weight: Tensor | None, along: Tensor, features: slice) -> Nodes:
        if held.reads.norm.kind is None or self._rules is not None:
            return Nodes(values, weight)
        filled = self._filled.stop
        return Nodes(values, weight, along[:, :filled], held.reads.normalised[:filled, :, features])

    def _register(self, hooks: Hooks) -> None:
        for reads in self._reads.values():
            hooks.on_input(reads.norm.module, partial(self._read, reads))
        for held in self._held:
            index, name = held.sites[0].layer, held.sites[0].name
            for part in held.parts:
                columns = dict(self._runner.projection_sites(index))[part.projection.module]
                features = slice(columns[part.names[0]].start, columns[part.names[-1]].stop)
                hooks.on_output(part.projection.module, partial(self._tap_projection, held, part, features))
            if name == "mlp":
                hooks.on_input(self._arch.layers[index].mlp_in, partial(self._tap, held))
            elif name == "logits":
                hooks.on_output(held.reads.norm.module, partial(self._tap, held))

    def _read(self, reads: _Reads, x: Tensor) -> None:
        reads.scale = reads.norm.capture(*reads.batch.copies(x), reads.normalised[self._filled])

    def _tap(self, held: _Held, x: Tensor) -> Tensor:
        """Take the gradient at x, the norm's output, that comes from this one of its readers."""
        x = x.view_as(x)
        values = held.reads.normalised[self._filled, :, None]
        x.register_hook(partial(self._add, held, None, values))
        return x

    def _tap_projection(self, held: _Held, part: _Part, features: slice, y: Tensor) -> Tensor:
        """Take the gradient at some features of a projection's output y, [m·E, T, features].

        Where a mixer is taken as a whole, y is what it reads, which others read, too: a view has its part alone. A
        projection's own output may be changed in place, which a view's hook would not see.
        """
        if not y.requires_grad:
            raise expected("model", _GRADIENTS, f"a {type(part.projection.module).__name__} that gives none")
        y = y.view_as(y) if isinstance(part.projection.module, Place) else y
        kept = y.detach()

        def take(gradient: Tensor | None) -> None:
            values, _ = held.reads.batch.copies(kept[..., features])
            values = values.unflatten(-1, (-1, part.projection.head_dim))
            self._add(held, part, values, _given(gradient)[..., features])

        y.register_hook(take)
        return y

    def _add(self, held: _Held, part: _Part | None, values: Tensor, gradient: Tensor | None) -> None:
        """Add to ĝ and c of some heads, or of what reads the norm's own output, from their gradient in a pass.

        That is [m·E, T, X]; `values` are what the projection gives, or x̂ at the batch's rows.
        """
        heads, constant = (part.heads, part.constant) if part else (slice(None), None)
        g, rows = held.reads.batch.copies(_given(gradient))
        assert held.reads.scale is not None
        collapse(
            g.unflatten(-1, (-1, held.gradient.shape[2])),
            values,
            held.reads.scale,
            self._weights[g.device],
            held.gradient[:, heads],
            held.coefficients[heads, self._filled],
            self._arch.d_model,
            part is None,
            rows,
            constant,
            held.gain,
        )


def _alike(site: ReceiverSite) -> object:
    """The same for neighbours of a layer that read one norm through heads of one width and as many to a weight."""
    if site.projection is None:
        return site
    return site.norm, site.layer, site.projection.head_dim, site.repeat_kv


def _kind(site: ReceiverSite) -> object:
    """The same where no heads read, for norms on one device that compute the same but for their weights."""
    if site.projection is not None:
        return site.layer, site.name
    norm = site.norm
    return norm.device, site.stream, norm.kind, norm.kind is not None and read(norm.module, "weight") is None


def _zeros(
    shapes: Sequence[tuple[Norm, tuple[int, ...]]], dtype: torch.dtype
) -> tuple[list[Tensor], dict[torch.device, Tensor]]:
    """Tensors of these shapes where their norms compute, and the memory that they lie in, one piece for each device:
    what is zeroed or converted at once is one launch."""
    sizes: dict[torch.device, int] = {}
    starts = []
    for norm, shape in shapes:
        starts.append(sizes.get(norm.device, 0))
        # Each starts at a multiple of 128 bytes or more, as kernels want it.
        sizes[norm.device] = starts[-1] + -(-math.prod(shape) // 64) * 64
    pieces = {device: torch.zeros(size, dtype=dtype, device=device) for device, size in sizes.items()}
    parts = [
        pieces[norm.device][start : start + math.prod(shape)].view(shape)
        for (norm, shape), start in zip(shapes, starts, strict=True)
    ]
    return parts, pieces


def _like(part: Tensor, piece: Tensor) -> Tensor:
    """What a copy of the piece that a part lies in has in its place."""
    return piece.as_strided(part.shape, part.stride(), part.storage_offset())


def _constant(norm: Norm, projection: Projection, repeat_kv: int, dtype: torch.dtype) -> Tensor | None:
    """The part of a projection's output that comes from its bias and the norm's, [heads, K]; None if it has neither."""
    constant, beta = projection.bias(dtype), norm.bias
    if beta is not None:
        seen = projection.weight(dtype) @ beta.detach().to(dtype)
        constant = seen if constant is None else constant + seen
    return constant if constant is None or repeat_kv == 1 else constant.repeat_interleave(repeat_kv, 0)


def _given(gradient: Tensor | None) -> Tensor:
    """The gradient; raises where there is none: some quantised layers give their inputs none."""
    if gradient is None:
        raise expected("model", _GRADIENTS, "one that gives none")
    return gradient
