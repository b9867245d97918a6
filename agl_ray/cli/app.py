"""`agl-ray`: its verbs, and how errors become exit codes.

`main()` is the console script. An AglError is one paragraph on stderr and its exit code (2: the input was wrong, 1: the run
failed); any other error is a bug of ours: traceback and 1. Test alone: tests/unit/test_cli_app.py.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence

import typer

from agl_ray.cli import bench, check, config, dev, sft, store, train, version
from agl_ray.cli.verbs import Verbs
from agl_ray.types import AglError

app = typer.Typer(
    name="agl-ray",
    cls=Verbs,
    help="Train any LLM agent with reinforcement learning on a Ray cluster. `agl-ray VERB --help` shows an example of each.",
    epilog="--debug, anywhere, shows the traceback of an error. Exit codes: 0 done, 1 the run failed, 2 the input was wrong.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.command()(train.train)
app.command()(dev.dev)
app.command()(sft.sft)
app.command("config")(config.show)
app.command()(check.check)
app.add_typer(bench.app, name="bench")
app.add_typer(store.app, name="store")
app.command()(version.version)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    try:
        # Typer answers mistakes in the command itself (exit code 2), help, and Ctrl-C.
        app(words, prog_name="agl-ray")
    except SystemExit as done:
        return done.code if isinstance(done.code, int) else 1 if done.code else 0
    except Exception as error:  # noqa: BLE001  the edge of the program: every error ends as words and an exit code
        return _failed(error, debug)
    return 0


def _failed(error: Exception, debug: bool) -> int:
    """Say what went wrong; the exit code."""
    known = _own_error(error)
    if known is None or debug:
        traceback.print_exception(error)
    if known is None:
        print(f"agl-ray: unexpected {type(error).__name__}; this is a bug", file=sys.stderr)
        return 1
    print(f"agl-ray: {known}", file=sys.stderr)
    return known.exit_code


def _own_error(error: BaseException) -> AglError | None:
    """The AglError that `error` is, or that it brings from another process (Ray keeps the original in `cause`)."""
    original = getattr(error, "cause", None)
    if isinstance(original, BaseException):
        return _own_error(original)
    return error if isinstance(error, AglError) else None
