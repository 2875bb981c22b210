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

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from eap_kernels import Nodes

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
    scale: Tensor | None = None  # w_k r_k of the latest pass, [m, n]


@dataclass
class _Held:
    """Of one site: ĝ, and c of the points held."""

    site: ReceiverSite
    reads: _Reads
    gradient: Tensor  # ĝ, [n, heads, K], or [n, 1, D]
    coefficients: Tensor  # c, [heads, p, n]
    constant: Tensor | None  # the part of a projection's output that does not depend on x̂, [heads, K]


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
        self._filled = slice(0, 0)
        self._weights: dict[torch.device, Tensor] = {}  # of the latest pass, [m]
        sites = [site for site in receiver_sites(arch, graph) if site.reach > since]
        shape = points, n, arch.d_model
        self._reads = {  # most of what is held
            norm: _Reads(norm, torch.zeros(shape, dtype=arch.contraction_dtype, device=norm.device))
            for norm in dict.fromkeys(site.norm for site in sites)
        }

        def hold(site: ReceiverSite) -> _Held:
            projection, norm = site.projection, site.norm
            width = projection.head_dim if projection else arch.d_model
            new = partial(torch.zeros, dtype=arch.accumulate, device=norm.device)
            constant = None if projection is None else _constant(norm, projection, site.repeat_kv, arch.accumulate)
            return _Held(site, self._reads[norm], new(n, site.count, width), new(site.count, points, n), constant)

        self._held = {(site.layer, site.name): hold(site) for site in sites}  # in the graph's order

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
        self._filled = slice(0, 0)
        for held in self._held.values():
            held.gradient.zero_()

    def nodes(self) -> Iterator[Nodes]:
        """Σ_k w_k ∂loss/∂x_v of what has been accumulated, in the graph's order, each made when it is asked for."""
        return map(self._node, self._held.values())

    def _node(self, held: _Held) -> Nodes:
        norm, projection, values, weight = held.site.norm, held.site.projection, held.gradient, None
        if projection is None:
            values = norm.backwards(values)
        else:
            weight = norm.backwards(projection.weight(values.dtype))  # [heads, K, D]
        if norm.kind is None or self._rules is not None:
            return Nodes(values, weight)
        filled = self._filled.stop
        return Nodes(values, weight, held.coefficients[:, :filled], held.reads.normalised[:filled])

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

    def _rows(self, x: Tensor) -> Tensor:
        """[m·E, T, X] -> [m, n, X] at the batch's rows, in the accumulation dtype."""
        return self._runner.batch.active(x).to(self._arch.accumulate)

    def _read(self, reads: _Reads, x: Tensor) -> None:
        normalised, scale = reads.norm.statistics(self._rows(x))
        reads.normalised[self._filled] = normalised
        reads.scale = scale * self._weights[scale.device][:, None]

    def _tap(self, held: _Held, x: Tensor) -> Tensor:
        """Take the gradient at x, the norm's output, that comes from this one of its readers."""
        x = x.view_as(x)
        normalised, scale = held.reads.normalised[self._filled], held.reads.scale
        assert scale is not None
        gain = held.site.norm.gain(scale)

        def take(gradient: Tensor | None) -> None:
            g = self._rows(_given(gradient)) * scale[..., None]  # [m, n, D]
            self._add(held, g[:, :, None], (g * normalised * gain).sum(-1, keepdim=True))

        x.register_hook(take)
        return x

    def _tap_projection(self, index: int, features: dict[str, slice], y: Tensor) -> None:
        """Take the gradient at a projection's output y, [m·E, T, features], with the features of each site."""
        sites = [(self._held[index, letter], which) for letter, which in features.items()]
        kept, scale = y.detach(), sites[0][0].reads.scale
        assert scale is not None

        def take(gradient: Tensor | None) -> None:
            both = _given(gradient), kept
            for held, which in sites:
                g, value = (self._rows(t[..., which]).unflatten(-1, (held.site.count, -1)) for t in both)
                value = value if held.constant is None else value - held.constant
                g = g * scale[..., None, None]  # [m, n, heads, K]
                self._add(held, g, (g * value).sum(-1))

        y.register_hook(take)

    def _add(self, held: _Held, gradient: Tensor, products: Tensor) -> None:
        """Add w_k r_k g, [m, n, heads, K], and w_k r_k ⟨x̂, γ ⊙ Wᵀ g⟩, [m, n, heads], of a pass."""
        held.gradient += gradient.sum(0)
        held.coefficients[:, self._filled] = products.permute(2, 0, 1) / self._arch.d_model


def _constant(norm: Norm, projection: Projection, repeat_kv: int, dtype: torch.dtype) -> Tensor | None:
    """The part of a projection's output that comes from its bias and the norm's, [heads, K]; None if it has neither."""
    constant, beta = projection.bias(dtype), norm.bias
    if beta is not None:
        seen = projection.weight(dtype) @ beta.detach().to(dtype)
        constant = seen if constant is None else constant + seen
    return constant if constant is None else constant.repeat_interleave(repeat_kv, 0)


def _given(gradient: Tensor | None) -> Tensor:
    """The gradient; raises where there is none: some quantised layers give their inputs none."""
    if gradient is None:
        raise expected("model", "layers that give gradients to activations", "one that gives none")
    return gradient
