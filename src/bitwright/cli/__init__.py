"""The command line: `calls.py` says what each verb may be given, the module of its name what it does.

Nothing here, in `options.py` or in `calls.py` may import torch or pydantic at the top: ``bitwright --help`` answers in
under half a second.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from bitwright.cli.calls import CALLS
from bitwright.cli.signature import command
from bitwright.errors import BitwrightError, UsageError, debugging, lacks_memory, no_memory, of_the_machine, one_line
from bitwright.terminal import print_error

app = typer.Typer(
    name="bitwright",
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        from bitwright._version import __version__

        typer.echo(f"bitwright {__version__}")
        raise typer.Exit


@app.callback()
def _bitwright(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit")
    ] = False,
) -> None:
    """Turns a trained vision network and a few unlabelled images into the best low-bit network they can give.

    Start with `bitwright demo`; then `bitwright quantize MODEL IMAGES`. Every verb explains itself with `--help`.
    """


for kind in CALLS:
    app.command()(command(kind))


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; the entry point.

    Returns:
        0 done, 1 the job failed, 2 the call was wrong, 130 interrupted, 143 terminated.
    """
    _open_closed_streams()
    _show_what_has_no_letter()
    given = list(sys.argv[1:] if arguments is None else arguments)
    # Threads that sleep while they wait; spinning ones make everything many times slower on a machine with other work.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if any("\0" in each for each in given):
        print_error("Expected arguments without zero bytes, found one that holds some.")
        return UsageError.exit_code
    try:
        status = app(args=given or ["--help"], prog_name="bitwright", standalone_mode=False)
    except BitwrightError as error:
        if _speaks(error):
            print_error(error)
        return error.exit_code
    except KeyboardInterrupt:
        status = 130
    except SystemExit as left:  # completion has answered, a pipe was closed, or a Python file of the user's ended it
        if "_BITWRIGHT_COMPLETE" in os.environ or {"--install-completion", "--show-completion"} & set(given[:1]):
            return int(left.code or 0)
        if isinstance(left.__context__, OSError) and left.__context__.errno == errno.EPIPE:
            return 1
        print_error(f"A Python file ended the command (sys.exit({left.code!r})). Take that out of it.")
        return UsageError.exit_code
    except BaseException as error:  # a Python file of the user's may raise what is no Exception
        return _other(error, given)
    return status if isinstance(status, int) else 0


def _open_closed_streams() -> None:
    """Where a shell closed standard output or error (``>&-``), nothing is shown, and no file gets their number."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - as long as the process


def _show_what_has_no_letter() -> None:
    """An output of few letters gets the number of a sign that it lacks, and so it gets a name of odd bytes."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            with contextlib.suppress(OSError):  # what cannot be written at all is said where it is written
                stream.reconfigure(errors="backslashreplace")


def _speaks(error: BitwrightError) -> bool:
    """Whether this process says so: of several that ``torchrun`` started, one does."""
    if "MASTER_ADDR" not in os.environ or "RANK" not in os.environ:
        return True
    from bitwright import together

    return together.speaks(error)


def _other(error: BaseException, given: list[str]) -> int:
    """A wrong call, as typer sees it, or something that nobody expected."""
    if type(error).__name__ == "Abort":
        return 130
    describe, code = getattr(error, "format_message", None), getattr(error, "exit_code", 1)
    if callable(describe):  # every usage error of typer and click
        verb = next((a for a in given if not a.startswith("-")), "")
        known = {c.name or c.callback.__name__ for c in app.registered_commands if c.callback is not None}
        advice = f"bitwright {verb} --help" if verb in known else "bitwright --help"
        print_error(f"{one_line(str(describe())).rstrip('.')}. See {advice}.")
        return int(code)
    if (isinstance(error, OSError) or lacks_memory(error)) and not debugging():
        failure = of_the_machine(error) if isinstance(error, OSError) else no_memory(error)
        print_error(failure)
        return failure.exit_code
    hint = "" if debugging() else " BITWRIGHT_DEBUG=1 shows where."
    if debugging():
        import traceback

        traceback.print_exception(error)
    print_error(f"unexpected {type(error).__name__}: {one_line(str(error))[:300]}.{hint}")
    return 1
