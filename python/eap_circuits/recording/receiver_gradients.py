"""Gradients at every receiver, taken in head space and collapsed over the path (DESIGN (a), (b)).

Receiver v reads x_v, the residual stream before the norm, through its own q, k or v projection. With g_v the gradient
at the projection's output, x̂ and r the norm's normalised input and scale, γ its gain and W_v the projection's slice,

    ∂loss/∂x_v = r·P(γ ⊙ W_vᵀ g_v) − r·x̂·⟨x̂, γ ⊙ W_vᵀ g_v⟩ / D,

P = I for RMSNorm and I − 11ᵀ/D for LayerNorm. Summed over path points k with weights w_k, the first term needs only
ĝ_v = Σ_k w_k r_k g_{v,k}; the second needs x̂_k and the number c_{v,k} = w_k r_k ⟨x̂_k, γ ⊙ W_vᵀ g_{v,k}⟩ / D, whose
product is that of the projection's own output, less its constant part, with its gradient. MLP and logits receivers
are the same with W = I. Under backward rules (`rules.py`) r is a constant, and there is no second term.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from eap_kernels import Nodes

from ..adapters import Architecture, Norm, Projection
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
class _Site:
    """A group of receivers behind one norm: ĝ, and c of the points held."""

    receivers: slice
    reads: _Reads
    gradient: Tensor  # ĝ, [n, heads, K], or [n, 1, D]
    coefficients: Tensor  # c, [heads, p, n]
    projection: Projection | None = None  # None: the receiver reads the norm's output itself
    features: slice | None = None  # the group's features of the (spread) projection's output
    constant: Tensor | None = None  # the part of that output that does not depend on x̂, [heads, K]

    @property
    def spread(self) -> int:
        """Receivers per head of the projection: query heads that share a key or value head."""
        return self.gradient.shape[1] // self.projection.n_heads if self.projection else 1


class ReceiverGradients:
    """Gradients of the loss at every receiver, accumulated over passes along the path.

    Everything held is allocated at once, before the passes: kept pieces between the passes' own memory would keep
    that from being given back.

    Args:
        runner: the model on one batch.
        graph: its edge graph.
        points: how many path points can be held until `clear`.
        since: take the gradients of the receivers that see this sender alone: the last ones of the graph.
        rules: what takes the gradients' place, if anything.
    """

    def __init__(self, runner: Runner, graph: Graph, points: int, rules: Rules | None = None, since: int = 0) -> None:
        self.graph = graph
        self._runner = runner
        self._arch = arch = runner.arch
        self._rules = None if rules is None else BackwardRules(rules, arch)
        n = len(runner.batch.rows)
        self._filled = slice(0, 0)
        self._weights: dict[torch.device, Tensor] = {}  # of the latest pass, [m]
        norms = [norm for norm, reach in _reaches(arch, graph) if reach > since]
        shape = points, n, arch.d_model
        self._reads = {  # the most of what is held
            norm: _Reads(norm, torch.zeros(shape, dtype=arch.contracted, device=norm.device)) for norm in norms
        }

        def site(
            receivers: slice, norm: Norm, projection: Projection | None = None, features: slice | None = None
        ) -> _Site:
            heads = receivers.stop - receivers.start
            width = projection.head_dim if projection else arch.d_model
            reads = self._reads[norm]
            new = partial(torch.zeros, dtype=arch.accumulate, device=norm.device)
            found = _Site(receivers, reads, new(n, heads, width), new(heads, points, n), projection, features)
            if projection is not None:
                found.constant = _constant(norm, projection, found.spread, arch.accumulate)
            return found

        self._projected: list[tuple[torch.nn.Module, list[_Site]]] = []
        self._mlps: list[tuple[torch.nn.Module, _Site]] = []
        for index, layer in enumerate(arch.layers):
            for module, columns in runner.projection_sites(index) if graph.attention_reach(index) > since else ():
                sites = [
                    site(graph.receivers_at(index, letter), layer.attention_norm, layer.projections[letter], features)
                    for letter, features in columns.items()
                ]
                self._projected.append((module, sites))
            if graph.mlp_reach(index) > since:
                self._mlps.append((layer.mlp_in, site(graph.receivers_at(index, "mlp"), layer.mlp_norm)))
        self._logits = site(graph.logits_receiver, arch.final_norm)

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
        for site in self._sites():
            site.gradient.zero_()

    def nodes(self) -> Iterator[Nodes]:
        """Σ_k w_k ∂loss/∂x_v of what has been accumulated, in the graph's order, each made when it is asked for."""
        return map(self._node, sorted(self._sites(), key=lambda site: site.receivers.start))

    def _node(self, site: _Site) -> Nodes:
        norm, values, weight = site.reads.norm, site.gradient, None
        if site.projection is None:
            values = norm.backwards(values)
        else:
            weight = norm.backwards(site.projection.weight(values.dtype))  # [heads, K, D]
        if norm.kind is None or self._rules is not None:
            return Nodes(values, weight)
        filled = self._filled.stop
        return Nodes(values, weight, site.coefficients[:, :filled], site.reads.normalised[:filled])

    def _sites(self) -> list[_Site]:
        return [
            *(site for _, sites in self._projected for site in sites),
            *(site for _, site in self._mlps),
            self._logits,
        ]

    def _register(self, hooks: Hooks) -> None:
        for reads in self._reads.values():
            hooks.on_input(reads.norm.module, partial(self._read, reads))
        for module, sites in self._projected:
            hooks.on_output(module, partial(self._tap_projection, sites))
        for module, site in self._mlps:
            hooks.on_input(module, partial(self._tap, site))
        hooks.on_output(self._arch.final_norm.module, partial(self._tap, self._logits))

    def _rows(self, x: Tensor) -> Tensor:
        """[m·E, T, X] -> [m, n, X] at the batch's rows, in the accumulation dtype."""
        return self._runner.batch.active(x).to(self._arch.accumulate)

    def _read(self, reads: _Reads, x: Tensor) -> None:
        normalised, scale = reads.norm.statistics(self._rows(x))
        reads.normalised[self._filled] = normalised
        reads.scale = scale * self._weights[scale.device][:, None]

    def _tap(self, site: _Site, x: Tensor) -> Tensor:
        """Take the gradient at x, which is the norm's output, as far as this reader of it goes."""
        x = x.view_as(x)
        normalised, scale = site.reads.normalised[self._filled], site.reads.scale
        assert scale is not None
        gain = site.reads.norm.gain(scale)

        def take(gradient: Tensor | None) -> None:
            g = self._rows(_given(gradient)) * scale[..., None]  # [m, n, D]
            self._add(site, g[:, :, None], (g * normalised * gain).sum(-1, keepdim=True))

        x.register_hook(take)
        return x

    def _tap_projection(self, sites: list[_Site], y: Tensor) -> None:
        """Take the gradient at a projection's output y, [m·E, T, features]."""
        kept, scale = y.detach(), sites[0].reads.scale
        assert scale is not None

        def take(gradient: Tensor | None) -> None:
            both = _given(gradient), kept
            for site in sites:
                heads = site.gradient.shape[1]
                g, value = (self._rows(t[..., site.features]).unflatten(-1, (heads, -1)) for t in both)
                value = value if site.constant is None else value - site.constant
                g = g * scale[..., None, None]  # [m, n, heads, K]
                self._add(site, g, (g * value).sum(-1))

        y.register_hook(take)

    def _add(self, site: _Site, gradient: Tensor, products: Tensor) -> None:
        """Add w_k r_k g, [m, n, heads, K], and w_k r_k ⟨x̂, γ ⊙ Wᵀ g⟩, [m, n, heads], of a pass."""
        site.gradient += gradient.sum(0)
        site.coefficients[:, self._filled] = products.permute(2, 0, 1) / self._arch.d_model


def _constant(norm: Norm, projection: Projection, spread: int, dtype: torch.dtype) -> Tensor | None:
    """What bias and the norm's bias give of the projection's output, [heads, K]; None: nothing."""
    constant, beta = projection.bias(dtype), norm.bias
    if beta is not None:
        seen = projection.weight(dtype) @ beta.detach().to(dtype)
        constant = seen if constant is None else constant + seen
    return constant if constant is None else constant.repeat_interleave(spread, 0)


def _reaches(arch: Architecture, graph: Graph) -> list[tuple[Norm, int]]:
    """Each norm in front of receivers, once, and how many senders they see."""
    reaches = [(arch.final_norm, graph.n_senders)]
    for index, layer in enumerate(arch.layers):
        reaches += [(layer.attention_norm, graph.attention_reach(index)), (layer.mlp_norm, graph.mlp_reach(index))]
    return list(dict(reaches).items())


def _given(gradient: Tensor | None) -> Tensor:
    """Some quantised layers have no gradient with respect to their inputs."""
    if gradient is None:
        raise expected("model", "layers that give gradients to activations", "one that gives none")
    return gradient
