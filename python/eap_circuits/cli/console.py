"""What the command line shows: tables and JSON on stdout, progress and errors on stderr."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from ..report.tables import Table

Progress = Callable[[int, int], None]
_SPARE = {"scores": ".safetensors", "circuit": ".safetensors", "curve": ".json", "card": ".json", "report": ".html"}


def _console(stderr: bool = False) -> Console:
    from rich.console import Console

    return Console(stderr=stderr, highlight=False, emoji=False, soft_wrap=True)


def say(text: str = "") -> None:
    """Print a line on stdout; square brackets are printed as they are."""
    # Names of files may hold bytes that are no text.
    _console().print(text.encode("utf-8", "backslashreplace").decode(), markup=False)


def say_error(message: str) -> None:
    print(f"eap: error: {message}", file=sys.stderr)


def note(text: str) -> None:
    """Print a line about progress on stderr, if that is a terminal."""
    console = _console(stderr=True)
    if console.is_terminal:
        console.print(text, style="dim", markup=False)


def show_table(table: Table) -> None:
    """Print a table on stdout, with its marked row in bold; where it is too wide words are not cut, as a part of a
    number is another number."""
    from rich import box
    from rich.cells import cell_len
    from rich.markup import escape
    from rich.table import Table as RichTable

    look: dict[str, Any] = {"box": box.SIMPLE_HEAD, "collapse_padding": True, "pad_edge": False}
    shown = RichTable(title=escape(table.title), title_justify="left", title_style="bold", **look)
    rows = table.cells()
    for index, column in enumerate(table.columns):
        words = [word for text in (column.title, *(row[index] for row in rows)) for word in text.split()]
        least = max(map(cell_len, words), default=None)
        shown.add_column(escape(column.title), justify="right" if column.numeric else "left", min_width=least)
    for index, cells in enumerate(rows):
        shown.add_row(*map(escape, cells), style="bold green" if index == table.marked else None)
    _console().print(shown, soft_wrap=False, crop=False)


def show_json(value: Any) -> None:
    from ..report.curves import jsonable

    print(json.dumps(jsonable(value), indent=2, allow_nan=False))


@contextlib.contextmanager
def progress(what: str) -> Iterator[Progress]:
    """Show a bar on stderr until the work is done; nothing if stderr is not a terminal."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    console = _console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(32), MofNCompleteColumn(), TimeElapsedColumn())
    with Bars(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        bar = bars.add_task(what, total=None)
        yield lambda done, total: bars.update(bar, completed=done, total=total)


@contextlib.contextmanager
def working(what: str) -> Iterator[None]:
    """Show a spinner on stderr while something of unknown length runs; nothing if stderr is not a terminal."""
    console = _console(stderr=True)
    if console.is_terminal:
        with console.status(what):
            yield
    else:
        yield


def quiet() -> None:
    """Keep warnings and the progress bars of other libraries off the terminal."""
    from ..errors import InputWarning

    warnings.filterwarnings("ignore")
    warnings.filterwarnings("always", category=InputWarning)
    warnings.filterwarnings("always", category=UserWarning, module="eap_kernels")
    said: set[str] = set()

    def show(message: object) -> None:
        if str(message) not in said:
            said.add(str(message))
            print(f"eap: warning: {message}", file=sys.stderr)

    warnings.showwarning = lambda message, *_: show(message)
    for name, value in (
        ("TRANSFORMERS_VERBOSITY", "error"),
        ("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1"),
        ("HF_HUB_DISABLE_PROGRESS_BARS", "1"),
        ("HF_HUB_VERBOSITY", "error"),
        ("TQDM_DISABLE", "1"),
        ("TOKENIZERS_PARALLELISM", "false"),
    ):
        os.environ.setdefault(name, value)


def check_outputs(*paths: Path | None) -> None:
    """Before any work, refuse outputs that cannot be written or that go to the same file."""
    from ..errors import expected
    from ..files import check_writable

    given = [path for path in paths if path is not None]
    for path in given:
        check_writable(path)
    if len({path.resolve() for path in given}) < len(given):
        raise expected("outputs", "a file for each", ", ".join(map(str, given)))


def check_suffix(path: Path | None, *suffixes: str) -> None:
    from ..files import suffix_of

    if path is not None:
        suffix_of(path, suffixes)


def write(files: dict[str, str], name: str, save: Callable[[Path], object], path: Path | None) -> list[str]:
    """Write a result and note its file, if there is to be one; sentences on what went wrong, to say at the end."""
    from ..errors import reason
    from ..files import DAMAGED

    if path is None:
        return []
    try:
        save(path)
    except (*DAMAGED, ImportError) as error:
        return [reason(error), *keep_elsewhere(name, save)]
    files[name] = str(path)
    return []


@contextlib.contextmanager
def outlived(name: str, save: Callable[[Path], object], path: Path | None) -> Iterator[None]:
    """Inside, an interruption does not lose a result that is to be in no file: it is written elsewhere."""
    try:
        yield
    except KeyboardInterrupt:
        if path is None:
            print(*keep_elsewhere(name, save), file=sys.stderr)
        raise


def write_with_report(
    files: dict[str, str],
    name: str,
    save: Callable[[Path], object],
    path: Path | None,
    report: Callable[[Path], object],
    html: Path | None,
) -> list[str]:
    """`write` a result and its report; without the report, a result that is to be in no file is written elsewhere."""
    wrong = write(files, name, save, path)
    with outlived(name, save, path):
        unseen = write(files, "report", report, html)
    return [*wrong, *unseen, *(keep_elsewhere(name, save) if unseen and path is None else [])]


def conclude(files: dict[str, str], wrong: list[str], as_json: bool) -> None:
    """Say which files were written, if JSON has not, and raise with what went wrong, if anything did."""
    from ..errors import InputError

    if not as_json:
        for file in files.values():
            say(f"Wrote {file}.")
    if wrong:
        raise InputError(" ".join(wrong))


def keep_elsewhere(name: str, save: Callable[[Path], object]) -> list[str]:
    """Write a result that is in no file where it can be written; a sentence that says where, or that it cannot."""
    from ..files import DAMAGED

    for folder in (tempfile.gettempdir, os.getcwd, lambda: os.path.expanduser("~")):
        with contextlib.suppress(*DAMAGED, ImportError):
            path = Path(folder()).resolve() / f"eap-{name}-{secrets.token_hex(4)}{_SPARE[name]}"
            save(path)
            return [f"The file with the {name} is {path} instead."]
    return [f"Nor could the {name} be written elsewhere."]
