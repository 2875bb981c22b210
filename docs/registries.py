"""The tables of the registries, and the command line's choices; docs/documents.py says where each stands."""

from __future__ import annotations

from collections.abc import Iterable


def methods() -> str:
    from eap_circuits.methods import METHODS

    head = ("method", "what", "cost", "steps", "quadrature", "memory", "tier")
    return _table(
        head,
        (
            (f"`{m.name}`", m.description, m.passes, *map(_mark, (m.stepped, m.grids, m.planned)), m.tier)
            for m in METHODS.values()
        ),
    )


def quadratures() -> str:
    from eap_circuits.methods import QUADRATURES

    return _table(("`quadrature=`", "points"), ((f'`"{q.name}"`', q.description) for q in QUADRATURES.values()))


def baselines() -> str:
    from eap_circuits.evaluation import BASELINES

    return _table(("`baselines=`", "what it is"), ((f'`"{b.name}"`', b.description) for b in BASELINES.values()))


def gates() -> str:
    from eap_circuits.learning import GATES

    return _table(("`gates=`", "what they are"), ((f'`"{g.name}"`', g.description) for g in GATES.values()))


def metrics() -> str:
    from eap_circuits.metrics import METRICS

    rows = ((f"`{m.name}`", m.description, m.looks_at, _mark(m.differentiable)) for m in METRICS.values())
    return _table(("metric", "what it is", "looks at", "scores edges"), rows)


def ablations() -> str:
    from eap_circuits.recording import ABLATIONS

    rows = ((f'`"{a.name}"`', a.description, _mark(a.from_data)) for a in ABLATIONS.values())
    return _table(("`ablation=`", "c'_u(t)", "made from `ablation_data`"), rows)


def rules() -> str:
    from eap_circuits.recording import RULES

    return _table(("rules", "what it is"), ((f"`{r.name}`", r.description) for r in RULES.values()))


def choices() -> str:
    """What the help texts show."""
    from eap_circuits.cli.choices import content

    return content()


def _mark(value: bool) -> str:
    return "✓" if value else "–"


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [" | ".join(cell.replace("|", "\\|") for cell in row) for row in (head, *rows)]
    return "\n".join([f"| {lines[0]} |", "|" + "---|" * len(head), *(f"| {line} |" for line in lines[1:])]) + "\n"
