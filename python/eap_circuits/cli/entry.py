"""The command line: the group, its commands, and how errors are shown."""

from __future__ import annotations

import errno
import inspect
import io
import os
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from itertools import islice
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from ..ranks import join, one_call, rank
from .console import quiet, say_error
from .session import PARTS

EXIT_ERROR, EXIT_INTERRUPTED = 2, 130


class _Group(TyperGroup):
    """Shows expected errors in one line, and takes its own options before or after the command's name."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.meta["typed"] = args
        return super().parse_args(ctx, _shared_first(args))

    def invoke(self, ctx: Any) -> Any:
        from ..provenance import COMMAND, command

        before = COMMAND.set(command(ctx.meta["typed"]))
        try:
            return self._invoked(ctx)
        finally:
            COMMAND.reset(before)

    def _invoked(self, ctx: Any) -> Any:
        if ctx.params.get("debug"):
            return self._shared(ctx)
        quiet()
        try:
            return self._shared(ctx)
        except KeyboardInterrupt:
            say_error("interrupted")
            raise typer.Exit(EXIT_INTERRUPTED) from None
        except Exception as error:
            message = _mistyped(error) or _expected(error)
            if message is None:
                raise
            say_error(message)
            raise typer.Exit(EXIT_ERROR) from None

    def _shared(self, ctx: Any) -> Any:
        """Ranks end a command together, and the first one shows what any of them has to say."""
        PARTS.set(ctx.params.get("tensor_parallel", 1))
        with one_call(str(ctx.invoked_subcommand)):
            return super().invoke(ctx)


def _shared_first(args: list[str]) -> list[str]:
    """The options of all commands, then the command with its own."""
    shared: list[str] = []
    own: list[str] = []
    left = iter(args)
    for arg in left:
        if arg == "--tensor-parallel":
            shared += [arg, *islice(left, 1)]
        else:
            (shared if arg == "--debug" or arg.startswith("--tensor-parallel=") else own).append(arg)
    return [*shared, *own]


def _mistyped(error: Exception) -> str | None:
    """The message for a wrong option or command. Typer's own takes a quarter of a second to draw."""
    context = getattr(error, "ctx", None)
    if context is None or not hasattr(error, "format_message"):
        return None
    return f"{error.format_message().rstrip('.')} ({context.command_path} --help says what there is)"


def _expected(error: Exception) -> str | None:
    """The message for an error caused by the input or the machine; None for a fault of our own."""
    from ..errors import InputError

    if isinstance(error, OSError) and error.errno == errno.EPIPE:
        return None  # the reader of our output has gone, and typer ends quietly
    if isinstance(error, ImportError) and (error.name or "").split(".")[0] in ("eap_circuits", "eap_kernels"):
        return None
    if type(error).__name__ == "OutOfMemoryError":
        return f"not enough memory ({_line(error)}); try a smaller --batch-size"
    if isinstance(error, (InputError, OSError, ImportError)):
        return _line(error)
    return None


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


app = typer.Typer(
    name="eap",
    cls=_Group,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(value: bool) -> None:
    if value:
        from .. import __version__

        typer.echo(f"eap-kernels {__version__}")
        raise typer.Exit


@app.callback(epilog="Start with: [bold]eap demo[/bold]. Each command has its own [bold]--help[/bold].")
def eap(
    debug: Annotated[bool, typer.Option("--debug", help="Show warnings, and full tracebacks of errors.")] = False,
    tensor_parallel: Annotated[
        int, typer.Option("--tensor-parallel", min=1, metavar="N", help="Divide the model among N processes.")
    ] = 1,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Find circuits in Hugging Face language models.

    EAP-IG scores every edge between two nodes of the model by how much the metric falls if the edge is corrupted.
    A circuit is a set of the strongest edges; its faithfulness says how much of the model's behaviour it keeps.

    Several GPUs, or processes, share a command's work: torchrun --nproc-per-node 8 -m eap_circuits attribute …
    A model too large for one GPU is divided with --tensor-parallel N; of more processes, every N have a copy.
    """


def main() -> None:
    """The console entry point."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed: what is meant for one must not go to the other
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115, as long as the process
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # what the terminal's encoding lacks
    join()
    if rank() > 0:
        with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
            app()
    code: Any = 0
    try:
        try:
            app()
        except SystemExit as ended:
            code = ended.code
        sys.stdout.flush()
    except OSError as error:  # of help, which is printed before a command begins, and of what is written at the end
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115, where Python writes what is left
        if not code and error.errno != errno.EPIPE:
            say_error(f"stdout: cannot be written ({error.strerror}).")
        code = code or EXIT_ERROR
    sys.exit(code)


def _help(command: Callable[..., None]) -> str:
    """The docstring with each paragraph on one line, so that it wraps to the terminal's width."""
    paragraphs = (inspect.getdoc(command) or "").split("\n\n")
    joined = [text if text.startswith(" ") else " ".join(text.split()) for text in paragraphs]
    return "\n\n".join(joined).replace("Examples:", "[bold]Examples[/bold]")


def _register() -> None:
    from .commands import about, attribute, card, data, demo, evaluate, export, report
    from .commands.benchmarks import leaderboard, mib, reproduce
    from .commands.learning import circuits, rankings

    commands: tuple[Callable[..., None], ...] = (
        demo.demo,
        data.data,
        attribute.attribute,
        rankings.learn,
        rankings.prune,
        rankings.ibcircuit,
        circuits.acdc,
        circuits.refine,
        evaluate.evaluate,
        evaluate.curve,
        card.card,
        export.export,
        report.report,
        reproduce.reproduce,
        leaderboard.leaderboard,
        mib.mib,
        about.tasks,
        about.check,
        about.tune,
        about.info,
    )
    for command in commands:
        app.command(help=_help(command))(command)


_register()
