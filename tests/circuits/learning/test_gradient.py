"""The gradient of masks, against finite differences of the metric of circuits that keep edges in part."""

import pytest
import torch

from eap_circuits.forward import borrowed, make_batches
from eap_circuits.intervention import circuit_runs, run_circuits
from eap_circuits.learning.lessons import prepare_lesson
from eap_circuits.recording import record_run
from eap_circuits.request import Measurement, prepare
from eap_circuits.selfcheck import StayDouble


@pytest.mark.parametrize(("heads", "reuse", "ablation"), [("kv", True, "patching"), ("query", False, "mean")])
def test_it_is_the_slope_of_the_metric_of_soft_circuits(
    kind, heads, reuse, ablation, make_model, make_pairs, monkeypatch
):
    if not reuse:  # as off the CPU
        monkeypatch.setattr(circuit_runs, "shared", lambda device: True)
    model, data = make_model(kind), make_pairs(seed=3, n=3)
    with StayDouble(), borrowed(model):
        run = prepare(model, data, "logit_diff", ablation, None, reuse_prefix=reuse).with_constants()
        graph = run.arch.graph(heads)
        generator = torch.Generator().manual_seed(5)
        masks = torch.rand(2, *graph.edge_mask.shape, generator=generator, dtype=torch.float64)
        # Most edges are cut, and some receivers keep none.
        masks = masks * graph.edge_mask * (torch.rand(masks.shape, generator=generator) < 0.3)
        moves = torch.randn(masks.shape, generator=generator, dtype=torch.float64) * (masks > 0)

        def values(batch, masks):
            runner = run.runner(graph, batch)
            ablated = record_run(runner, True, run.constants)
            logits = list(run_circuits(runner, graph, ablated, list(masks)))
            measured = Measurement(run, batch, logits[0], logits[0])
            own = measured.values(runner.logits(runner.embed(batch.clean)))
            return (torch.stack([measured.values(each) for each in logits]) - own).abs()

        for batch in make_batches(run.data, 2, reuse, run.arch.device):
            lesson = prepare_lesson(run, graph, batch)
            found, slope = lesson.gradient(run, graph, masks, 10**6)
            assert torch.allclose(found, values(batch, masks), rtol=1e-10)
            step = 1e-5
            high, low = (values(batch, masks + sign * step * moves).sum((1,)) for sign in (1, -1))
            right = (high - low) / (2 * step)
            # Terms of a sum may nearly cancel.
            assert ((slope * moves).sum((1, 2)) - right).abs().max() < 1e-6 * (slope * moves).abs().sum()
            # Cut into passes of one circuit each, it is the same where edges are kept: only there have gates a slope.
            _, apart = lesson.gradient(run, graph, masks, 1)
            assert torch.allclose(apart[masks > 0], slope[masks > 0], rtol=1e-10, atol=1e-12)
