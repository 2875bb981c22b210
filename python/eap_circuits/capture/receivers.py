"""Gradients at every receiver, taken in head space and collapsed over the path (DESIGN (a), (b)).

Receiver v reads x_v, the residual stream before the norm, through its own q, k or v projection. With g_v the gradient
at the projection's output, x̂ and r the norm's normalised input and scale, γ its gain and W_v the projection's slice,

    ∂loss/∂x_v = r·P(γ ⊙ W_vᵀ g_v) − r·x̂·⟨x̂, γ ⊙ W_vᵀ g_v⟩ / D,

P = I for RMSNorm and I − 11ᵀ/D for LayerNorm. Summed over path points k with weights w_k, the first term needs only
ĝ_v = Σ_k w_k r_k g_{v,k}; the second needs x̂_k and the number c_{v,k} = w_k r_k ⟨x̂_k, γ ⊙ W_vᵀ g_{v,k}⟩ / D, whose
product is that of the projection's own output, less its constant part, with its gradient. MLP and logits receivers
are the same with W = I.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from ..adapters import Architecture, Norm, Projection
from ..graph import Graph
from .borrow import Hooks
from .runner import Runner


@dataclass
class _NormReads:
    """What one norm gives its receivers, path point by path point."""

    norm: Norm
    normalised: list[Tensor] = field(default_factory=list)  # x̂ of each pass, [m, n, D]
    scale: Tensor | None = None  # r of the latest pass, [m, n]


@dataclass
class _Site:
    """A group of receivers behind one norm: ĝ and c, summed or listed over the path."""

    receivers: slice
    reads: _NormReads
    projection: Projection | None = None  # None: the receiver reads the norm's output itself
    features: slice | None = None  # the group's features of the (spread) projection's output
    gradient: Tensor | None = None  # ĝ, [n, heads, K], or [n, 1, D]
    coefficients: list[Tensor] = field(default_factory=list)  # c of each pass, [m, n, heads]

    @property
    def n_heads(self) -> int:
        return self.receivers.stop - self.receivers.start

    @property
    def spread(self) -> int:
        """Receivers per head of the projection: query heads that share a key or value head."""
        return self.n_heads // self.projection.n_heads if self.projection else 1


class ReceiverGradients:
    """Gradients of the loss at every receiver, accumulated over passes along the path."""

    def __init__(self, runner: Runner, graph: Graph) -> None:
        self.graph = graph
        self._runner = runner
        self._arch: Architecture = runner.arch
        self._reads = {id(norm.module): _NormReads(norm) for norm in self._arch.norms}
        self._sites: list[_Site] = []
        self._weights = torch.empty(0)

    def run(self, embeddings: Tensor, weights: Tensor, loss: Callable[[Tensor], Tensor]) -> None:
        """One forward and backward over m path points.

        Args:
            embeddings: path points, [m·E, T, D].
            weights: their quadrature weights w_k, [m].
            loss: logits [m·E, V] -> scalar, summed over examples and path points.
        """
        self._weights = weights.to(self._arch.device, self._arch.accumulate)
        made = iter(self._sites)
        site = (lambda *_: next(made)) if self._sites else self._new_site
        register = partial(self._register, site)
        loss(self._runner.logits(embeddings.detach().requires_grad_(True), register)).backward()

    def held_bytes(self) -> int:
        """Bytes of the normalised inputs held, which grow with every pass until `clear`."""
        return sum(x.nbytes for reads in self._reads.values() for x in reads.normalised)

    def clear(self) -> None:
        for reads in self._reads.values():
            reads.normalised.clear()
        for site in self._sites:
            site.gradient = None
            site.coefficients.clear()

    def expand(self, rows: slice) -> Tensor:
        """Σ_k w_k ∂loss/∂x_v of some rows in the residual stream: [R, n, D]."""
        example = self._sites[0].gradient
        assert example is not None
        n = len(example[rows])
        out = example.new_empty(self.graph.n_receivers, n, self._arch.d_model)
        for site in self._sites:
            norm, gradient = site.reads.norm, site.gradient
            assert gradient is not None
            gain = norm.gain(gradient)
            g = gradient[rows].transpose(0, 1)  # [heads, n, K]
            target = out[site.receivers]
            if site.projection is None:
                torch.mul(g, gain, out=target)
                if norm.centred:
                    target -= target.mean(-1, keepdim=True)
            else:
                weight = site.projection.weight(gradient.dtype) * gain  # [heads, K, D]
                if norm.centred:
                    weight = weight - weight.mean(-1, keepdim=True)
                torch.bmm(g, weight.repeat_interleave(site.spread, 0), out=target)
            along = torch.cat(site.coefficients)[:, rows].permute(1, 2, 0)  # c, [n, heads, k]
            normalised = torch.cat([x[:, rows] for x in site.reads.normalised]).transpose(0, 1)  # [n, k, D]
            target.transpose(0, 1).sub_(along @ normalised)
        return out

    # Registration: sites are made at the first pass, in the order of the model's own run.

    def _new_site(self, *args: object) -> _Site:
        self._sites.append(_Site(*args))  # type: ignore[arg-type]
        return self._sites[-1]

    def _register(self, site: Callable[..., _Site], hooks: Hooks) -> None:
        arch, graph = self._arch, self.graph
        for reads in self._reads.values():
            hooks.on_input(reads.norm.module, partial(self._read, reads))
        for index, layer in enumerate(arch.layers):
            attention = self._reads[id(layer.attention_norm.module)]
            for module, columns in self._runner.projection_sites(index):
                sites = []
                for letter, features in columns.items():
                    receivers, projection = graph.receivers_at(index, letter), layer.projections[letter]
                    sites.append(site(receivers, attention, projection, features))
                hooks.on_output(module, partial(self._tap_projection, sites))
            mlp = site(graph.receivers_at(index, "mlp"), self._reads[id(layer.mlp_norm.module)])
            hooks.on_input(layer.mlp, partial(self._tap, mlp))
        logits = site(graph.logits_receiver, self._reads[id(arch.final_norm.module)])
        hooks.on_output(arch.final_norm.module, partial(self._tap, logits))

    def _rows(self, x: Tensor) -> Tensor:
        """[m·E, T, X] -> [m, n, X] at the batch's rows, in the accumulation dtype."""
        batch = self._runner.batch
        by_point = x.detach().reshape(-1, batch.n_examples * x.shape[1], x.shape[2])
        return by_point[:, batch.rows].to(self._arch.accumulate)

    def _read(self, reads: _NormReads, x: Tensor) -> None:
        normalised, reads.scale = reads.norm.statistics(self._rows(x))
        reads.normalised.append(normalised)

    def _tap(self, site: _Site, x: Tensor) -> Tensor:
        """Take the gradient at x, which is the norm's output, as far as this reader of it goes."""
        x = x.view_as(x)
        normalised, scale = site.reads.normalised[-1], self._scale(site)
        gain = site.reads.norm.gain(normalised)

        def take(gradient: Tensor) -> None:
            g = self._rows(gradient) * scale[..., None]  # [m, n, D]
            self._add(site, g[:, :, None], (g * normalised) @ gain[:, None] / self._arch.d_model)

        x.register_hook(take)
        return x

    def _tap_projection(self, sites: list[_Site], y: Tensor) -> None:
        """Take the gradient at a projection's output y, [m·E, T, features]."""
        kept = y.detach()
        scales = [self._scale(site) for site in sites]

        def take(gradient: Tensor) -> None:
            for site, scale in zip(sites, scales, strict=True):
                g, value = (
                    self._rows(t[..., site.features]).unflatten(-1, (site.n_heads, -1)) for t in (gradient, kept)
                )
                constant = self._constant(site)
                value = value if constant is None else value - constant
                g = g * scale[..., None, None]  # [m, n, heads, K]
                self._add(site, g, (g * value).sum(-1) / self._arch.d_model)

        y.register_hook(take)

    def _scale(self, site: _Site) -> Tensor:
        """w_k r_k of the latest pass, [m, n]."""
        assert site.reads.scale is not None
        return site.reads.scale * self._weights[:, None]

    def _constant(self, site: _Site) -> Tensor | None:
        """The part of the projection's output that does not depend on x̂: bias and the norm's bias, [heads, K]."""
        projection, beta = site.projection, site.reads.norm.bias
        assert projection is not None
        constant = projection.bias(self._arch.accumulate)
        if beta is not None:
            seen = projection.weight(self._arch.accumulate) @ beta.detach().to(self._arch.accumulate)
            constant = seen if constant is None else constant + seen
        return constant if constant is None else constant.repeat_interleave(site.spread, 0)

    def _add(self, site: _Site, gradient: Tensor, coefficients: Tensor) -> None:
        total = gradient.sum(0)
        site.gradient = total if site.gradient is None else site.gradient.add_(total)
        site.coefficients.append(coefficients)
