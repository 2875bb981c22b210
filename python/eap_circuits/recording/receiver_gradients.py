"""Gradients at every receiver, taken in head space and collapsed over the path.

Receiver v reads x_v, the residual stream before the norm, through its own q, k or v projection. With g_v the gradient
at the projection's output, x̂ and r the norm's normalised input and scale, γ its gain and W_v the projection's slice,

    ∂loss/∂x_v = r·P(γ ⊙ W_vᵀ g_v) − r·x̂·⟨x̂, γ ⊙ W_vᵀ g_v⟩ / D,

P = I for RMSNorm and I − 11ᵀ/D for LayerNorm. Summed over path points k with weights w_k, the first term needs only
ĝ_v = Σ_k w_k r_k g_{v,k}; the second needs x̂_k and the number c_{v,k} = w_k r_k ⟨x̂_k, γ ⊙ W_vᵀ g_{v,k}⟩ / D. This inner
product is that of g_{v,k} with the projection's output less its constant part, so W_vᵀ g_{v,k} is never formed. MLP and
logits receivers are the same with W = I. Under backward rules (`backward_rules.py`) r is a constant, and there is no
second term. tests/circuits/plain_runs.py specifies a receiver's gradient by plain autograd.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor

from eap_kernels import Nodes, collapse

from ..adapters import Norm, Projection, ReceiverSite, receiver_sites
from ..errors import expected
from ..forward import Hooks, Runner
from ..graph import Graph
from .active_tokens import skip_inactive
from .backward_rules import BackwardRules, Rules


@dataclass
class _Reads:
    """What one norm gives its receivers."""

    norm: Norm
    normalised: Tensor  # x̂ of the points held, [p, n, D]
    scale: Tensor | None = None  # r_k of the latest pass, [m, n]


@dataclass
class _Held:
    """Of one site: ĝ, and c of the points held."""

    site: ReceiverSite
    reads: _Reads
    gradient: Tensor  # ĝ, [n, heads, K], or [n, 1, D]
    coefficients: Tensor  # c, [heads, p, n]
    constant: Tensor | None  # the part of a projection's output that does not depend on x̂, [heads, K]
    gain: Tensor | None  # γ of a site that reads the norm's own output, [D]

    @cached_property
    def mean(self) -> Tensor | None:
        """What a centred norm subtracts from each row of a projection's weight times its gain, [heads, K, 1]."""
        assert self.site.projection is not None
        norm, projection = self.site.norm, self.site.projection
        return norm.mean_backwards(projection.weight(self.gradient.dtype)) if norm.centred else None


class ReceiverGradients:
    """Gradients of the loss at every receiver, accumulated over passes along the path.

    Everything held is allocated at once, before the passes: allocating between passes would fragment memory.

    Args:
        runner: the model on one batch.
        graph: its edge graph.
        points: how many path points can be held until `clear`.
        since: only the receivers that can see this sender, which are the last ones of the graph.
        rules: backward rules, if any.
    """

    def __init__(self, runner: Runner, graph: Graph, points: int, rules: Rules | None = None, since: int = 0) -> None:
        self.graph = graph
        self._runner = runner
        self._arch = arch = runner.arch
        self._rules = None if rules is None else BackwardRules(rules, arch)
        n = len(runner.batch.rows)
        self._filled, self._cleared = slice(0, 0), False
        self._weights: dict[torch.device, Tensor] = {}  # of the latest pass, [m]
        sites = [site for site in receiver_sites(arch, graph) if site.reach > since]
        norms = list(dict.fromkeys(site.norm for site in sites))
        # Most of what is held.
        normalised, _ = _zeros([(norm, (points, n, arch.d_model)) for norm in norms], arch.contraction_dtype)
        self._reads = {norm: _Reads(norm, x) for norm, x in zip(norms, normalised, strict=True)}
        widths = [site.projection.head_dim if site.projection else arch.d_model for site in sites]
        shapes = [(site.norm, (n, site.count, width)) for site, width in zip(sites, widths, strict=True)]
        gradients, self._sums = _zeros(shapes, arch.accumulate)
        shapes = [(site.norm, (site.count, points, n)) for site in sites]
        coefficients, self._coefficients = _zeros(shapes, arch.accumulate)

        def hold(site: ReceiverSite, gradient: Tensor, coefficients: Tensor) -> _Held:
            projection, norm = site.projection, site.norm
            constant = gain = None
            if projection is not None:
                constant = _constant(norm, projection, site.repeat_kv, arch.accumulate)
            elif isinstance(found := norm.gain(gradient), Tensor):
                gain = found.detach()
            return _Held(site, self._reads[norm], gradient, coefficients, constant, gain)

        # In the graph's order.
        self._held = {
            (each[0].layer, each[0].name): hold(*each) for each in zip(sites, gradients, coefficients, strict=True)
        }

    def run(
        self,
        embeddings: Tensor,
        weights: Tensor,
        loss: Callable[[Tensor], Tensor],
        watch: Callable[[Hooks], None] | None = None,
    ) -> None:
        """One forward and backward over m path points.

        Args:
            embeddings: path points, [m·E, T, D].
            weights: their quadrature weights w_k, [m].
            loss: logits [m·E, V] -> scalar, summed over examples and path points.
            watch: adds hooks of others to this pass.
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

        loss(self._runner.logits(embeddings.detach().requires_grad_(True), register)).backward()

    def clear(self) -> None:
        """Forget what has been accumulated."""
        self._filled, self._cleared = slice(0, 0), True

    def nodes(self, features: slice = slice(None)) -> Iterator[Nodes]:
        """Σ_k w_k ∂loss/∂x_v of what has been accumulated, or some features of it, in the graph's order.

        Each site's are made when they are asked for: their weights are a copy.
        """
        return self.lowered(self._arch.accumulate)(features)

    def lowered(self, dtype: torch.dtype) -> Callable[[slice], Iterator[Nodes]]:
        """`nodes` in the accumulation dtype, or in a low one: sums are rounded together, and no weight is widened."""
        low = dtype != self._arch.accumulate
        sums, coefficients = (
            {device: piece.to(dtype) if low else piece for device, piece in pieces.items()}
            for pieces in (self._sums, self._coefficients)
        )

        def nodes(features: slice) -> Iterator[Nodes]:
            for held in self._held.values():
                device = held.site.norm.device
                gradient, along = _like(held.gradient, sums[device]), _like(held.coefficients, coefficients[device])
                yield self._node(held, gradient, along, features)

        return nodes

    def _node(self, held: _Held, gradient: Tensor, coefficients: Tensor, features: slice) -> Nodes:
        """Some features of a site's receivers, given ĝ and c in the dtype that is wanted."""
        norm, projection, values, weight, dtype = held.site.norm, held.site.projection, gradient, None, gradient.dtype
        low, some = dtype != held.gradient.dtype, features != slice(None)
        if projection is None:
            rows, mean = held.gradient, norm.mean_backwards(held.gradient) if some else None
            values = norm.backwards(rows[..., features], features, mean, dtype if low else None)
        else:
            rows = projection.weight(self._arch.dtype if low else dtype, features)  # [heads, K, features]
            weight = norm.backwards(rows, features, held.mean if some else None, dtype if low else None)
        if norm.kind is None or self._rules is not None:
            return Nodes(values, weight)
        filled = self._filled.stop
        return Nodes(values, weight, coefficients[:, :filled], held.reads.normalised[:filled, :, features])

    def _register(self, hooks: Hooks) -> None:
        for reads in self._reads.values():
            hooks.on_input(reads.norm.module, partial(self._read, reads))
        for index, layer in enumerate(self._arch.layers):
            for module, columns in self._runner.projection_sites(index):
                features = {letter: which for letter, which in columns.items() if (index, letter) in self._held}
                if features:
                    hooks.on_output(module, partial(self._tap_projection, index, features))
            if (index, "mlp") in self._held:
                hooks.on_input(layer.mlp_in, partial(self._tap, self._held[index, "mlp"]))
        logits = self._held[len(self._arch.layers), "logits"]
        hooks.on_output(self._arch.final_norm.module, partial(self._tap, logits))

    def _read(self, reads: _Reads, x: Tensor) -> None:
        reads.scale = reads.norm.capture(*self._runner.batch.copies(x), reads.normalised[self._filled])

    def _tap(self, held: _Held, x: Tensor) -> Tensor:
        """Take the gradient at x, the norm's output, that comes from this one of its readers."""
        x = x.view_as(x)
        values = held.reads.normalised[self._filled, :, None]
        x.register_hook(partial(self._add, held, values=values, gathered=True))
        return x

    def _tap_projection(self, index: int, features: dict[str, slice], y: Tensor) -> None:
        """Take the gradient at a projection's output y, [m·E, T, features], with the features of each site."""
        kept = y.detach()

        def take(gradient: Tensor | None) -> None:
            for letter, which in features.items():
                held = self._held[index, letter]
                value, _ = self._runner.batch.copies(kept[..., which])
                self._add(held, _given(gradient)[..., which], value.unflatten(-1, (held.site.count, -1)))

        y.register_hook(take)

    def _add(self, held: _Held, gradient: Tensor | None, values: Tensor, gathered: bool = False) -> None:
        """Add to ĝ and c of a site from its gradient in a pass, [m·E, T, heads·K], and what it reads or gives there."""
        g, rows = self._runner.batch.copies(_given(gradient))
        assert held.reads.scale is not None
        collapse(
            g.unflatten(-1, (held.site.count, -1)),
            values,
            held.reads.scale,
            self._weights[g.device],
            held.gradient,
            held.coefficients[:, self._filled],
            self._arch.d_model,
            gathered,
            rows,
            held.constant,
            held.gain,
        )


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
        raise expected("model", "layers that give gradients to activations", "one that gives none")
    return gradient
