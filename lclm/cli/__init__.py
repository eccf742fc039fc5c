"""The `lclm` command. Each verb imports its own part when called, so that `--help` is instant."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from importlib import import_module
from typing import Any, NoReturn, cast

import typer

from lclm.cli.shared import app

__all__ = ["app", "main"]

# in the order of the verbs in `lclm --help`
for part in ("runs", "checkpoints", "asking", "compressing", "data", "recipes"):
    import_module(f"lclm.cli.{part}")


def show_error(error: BaseException) -> None:
    """One screen that says what went wrong, without a traceback; a line on processes other than the first."""
    rank = os.environ.get("RANK", "0")
    if rank != "0":
        print(f"[process {rank}] {error}", file=sys.stderr, flush=True)
        return
    from rich.console import Console
    from rich.panel import Panel
    from rich.text import Text

    text = str(error)
    if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
        text = f"{error.strerror}: {error.filename}" if error.strerror and error.filename else text
    Console(stderr=True).print(
        Panel(
            Text(text or type(error).__name__),
            title="error",
            title_align="left",
            subtitle="--debug shows the traceback",
            subtitle_align="right",
            border_style="red",
        )
    )


def main(arguments: list[str] | None = None) -> Any:
    """Run the command. A user's or the machine's error ends it with exit code 2 and without a traceback.

    Codes of `lclm train` are those of lclm.train.ends.
    """
    from lclm.train import ends

    end = cast("Callable[[int], NoReturn]", ends.end if arguments is None else sys.exit)
    arguments = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in arguments
    try:
        return app(args=[argument for argument in arguments if argument != "--debug"], prog_name="lclm")
    except ends.Requeue as stopped:
        reason = str(stopped).partition("\n")[0]  # a library in which a signal was met may have added lines
        typer.echo(f"stopped: {reason}; the same command goes on")
        end(ends.REQUEUE)
    except ends.Lost as lost:
        show_error(lost)
        end(ends.LOST)
    except (ValueError, OSError) as error:
        if debug:
            traceback.print_exc()
            end(1)
        show_error(error)
        end(ends.WRONG)
    except KeyboardInterrupt:
        end(130)
    except Exception:
        traceback.print_exc()
        end(1)
