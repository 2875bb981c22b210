"""Tables by architecture: the package's own, those that other packages announce, and those that a user registers."""

from __future__ import annotations

from functools import cache
from importlib.metadata import entry_points

from ..errors import expected, warn
from .encoder_decoders import ENCODER_DECODERS
from .family import Family
from .tables import FAMILIES

ENTRY_POINTS = "eap_circuits.families"
_OWN = frozenset(map(id, (*FAMILIES.values(), *ENCODER_DECODERS.values())))  # which are never freed


def register_family(family: Family) -> None:
    """Use a table for the architectures that it names, in place of any table that they had.

    A package can announce tables without being imported first: each entry point of the group `eap_circuits.families`
    names a `Family`. These are used only for architectures without a table, so that installing a package does not
    change how other models are read.

    Example:
        >>> family, checks = eap.discover(model)
        >>> eap.register_family(family)
    """
    _check(family)
    _tables(family.decoder is not None).update(dict.fromkeys(family.model_types, family))


def family_of(model_type: str, encoder_decoder: bool = False) -> Family | None:
    """The table of an architecture (`config.model_type`), or None; a type may have a decoder alone, and both."""
    if model_type not in _tables(encoder_decoder):
        _load_announced()
    return _tables(encoder_decoder).get(model_type)


def is_built_in(family: Family) -> bool:
    """Is a table the package's own, with which its tests run?"""
    return id(family) in _OWN


def _tables(encoder_decoder: bool) -> dict[str, Family]:
    return ENCODER_DECODERS if encoder_decoder else FAMILIES


@cache
def _load_announced() -> None:
    for announced in entry_points(group=ENTRY_POINTS):
        family = announced.load()
        _check(family)
        for model_type in family.model_types:
            if _tables(family.decoder is not None).setdefault(model_type, family) != family:
                message = f"{model_type}: the table of {announced.value} is not used, as there is one already"
                warn(f"{message}; eap_circuits.register_family puts it in its place.")


def _check(family: object) -> None:
    if not isinstance(family, Family):
        raise expected("family", "a Family", type(family).__name__)
