"""JSON in which one object is large: its members are read some at a time, as all of them would take gigabytes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import partial
from typing import Any

from ..files import each_once, json_object, parse_json

_CHARACTERS = 2**20
_SPACE = re.compile(r"[ \t\n\r]*")
_VALUES = json.JSONDecoder(object_pairs_hook=each_once)  # one after another, as `parse_json` reads them


def read_members(text: str, large: str, take: Callable[[dict[str, Any], dict[str, Any]], None]) -> dict[str, Any]:
    """A JSON object's members, but of the one called `large`, if it is an object, every part is given to `take`, with
    what has been read before; in its place stands None.

    Raises:
        ValueError, RecursionError, TypeError: anything but an object in which no name comes twice.
    """
    found: dict[str, Any] = {}
    if text[_SPACE.match(text).end() :][:1] != "{":  # type: ignore[union-attr]
        return json_object(parse_json(text))  # which says what it is
    end = _after(text, 0, "{")
    if text[end : end + 1] == "}":
        return found
    while True:
        name, end = _VALUES.raw_decode(text, end)
        if not isinstance(name, str) or name in found:
            raise ValueError(f"{name!r} comes twice" if name in found else f"a name that is no text, {name!r}")
        end = _after(text, end, ":")
        if name == large and text[end : end + 1] == "{":
            end, found[name] = _parts(text, end, partial(take, found)), None
        else:
            found[name], end = _VALUES.raw_decode(text, end)
        end = _SPACE.match(text, end).end()  # type: ignore[union-attr]
        if text[end : end + 1] != ",":
            if text[end : end + 1] != "}" or text[end + 1 :].strip(" \t\n\r"):
                raise ValueError(f"no end of the object at {end}")
            return found
        end = _after(text, end, ",")


def _after(text: str, start: int, sign: str) -> int:
    """Where what follows this sign begins."""
    at = _SPACE.match(text, start).end()  # type: ignore[union-attr]
    if text[at : at + 1] != sign:
        raise ValueError(f"{text[at : at + 10]!r} in place of {sign!r} at {at}")
    return _SPACE.match(text, at + 1).end()  # type: ignore[union-attr]


def _parts(text: str, start: int, take: Callable[[dict[str, Any]], None]) -> int:
    """Give the members of the object that begins here to `take`, part after part; where it ends."""
    start, size, first = start + 1, _CHARACTERS, True
    while True:
        stop = start + size
        last = text.rfind("},", start, stop) + 1
        part = _members(text[start:last]) if last else None
        if part is not None:
            take(part)
            start, size, first = last + 1, _CHARACTERS, False
            continue
        # Either the object ends here, or a member is longer than what was looked at.
        try:
            part, end = _VALUES.raw_decode("{" + text[start:stop], 0)
        except ValueError:
            if stop >= len(text):
                raise
            size *= 4
            continue
        if not part and not first:
            raise ValueError(f"nothing after the comma at {start}")
        take(part)
        return start - 1 + end


def _members(text: str) -> dict[str, Any] | None:
    """The members of an object, without its braces; None if these are not whole members."""
    try:
        found: dict[str, Any] = json.loads("{" + text + "}")
    except ValueError:
        return None
    # With so many quotation marks every member has a name of its own. It is quicker to count them than to look.
    plain = all(isinstance(x, dict) for x in found.values())
    names = len(found) + sum(map(len, found.values())) if plain else -1
    return found if text.count('"') == 2 * names else parse_json("{" + text + "}")
