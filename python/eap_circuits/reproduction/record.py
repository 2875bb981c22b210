"""Results so far: a JSON file that is rewritten after every stage and read when work continues."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..errors import expected
from ..files import check_writable, read_json, write_json
from ..report.curves import jsonable

_FORMAT = "eap-circuits/{}-1"


class Record:
    """A JSON object in a file, or one inside it.

    Args:
        path: the file; it is read if it exists.
        request: what must be the same for work to continue, as plain JSON values.
        kind: which comparison's results these are, "reproduction" or "leaderboard".

    Raises:
        InputError: the file belongs to another request, or is not one of ours.
    """

    def __init__(self, path: Path, request: Mapping[str, Any], kind: str = "reproduction") -> None:
        self._path = check_writable(path)
        head = {"format": _FORMAT.format(kind), "request": jsonable(dict(request))}
        self.content: dict[str, Any] = read_json(path, f"results of a {kind}") if path.exists() else dict(head)
        for key, value in head.items():
            if self.content.get(key) != value:
                raise expected(str(path), f"results of this {key}", "another's; name another folder to keep both")
        self._whole = self.content

    def at(self, *keys: str) -> Record:
        """The object at these keys, created if it is missing."""
        inner = object.__new__(Record)
        inner._path, inner._whole, inner.content = self._path, self._whole, self.content
        for key in keys:
            inner.content = inner.content.setdefault(key, {})
        return inner

    def require(self, key: str, value: Any) -> None:
        """Store a value if the key has none; raises `InputError` if it has another one."""
        if self.get(key, lambda: value) != jsonable(value):
            raise expected(str(self._path), f"results of the same {key}", "others'; name another folder to keep both")

    def get(self, key: str, compute: Callable[[], Any]) -> Any:
        """The value at the key; it is computed and written if it is missing."""
        if key not in self.content:
            self.content[key] = jsonable(compute())
            write_json(self._path, self._whole, indent=1)
        return self.content[key]
