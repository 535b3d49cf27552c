"""The command line: one file a command. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

import typer

from foreword.cli import (
    compare,
    compress,
    demo,
    distill,
    doctor,
    eval,
    export,
    generate,
    import_,
    inspect,
    interference,
    look,
    meta,
    mirror,
    push,
    serve,
    train,
    tune,
)
from foreword.data._say import speaking
from foreword.errors import ForewordError

app = typer.Typer(
    name="foreword",
    help="Prefix tuning: train a few virtual tokens for a frozen transformer, save them, write with them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
for command in (
    train,
    tune,
    meta,
    distill,
    compress,
    generate,
    export,
    import_,
    push,
    serve,
    mirror,
    eval,
    compare,
    inspect,
    look,
    interference,
    demo,
    doctor,
):
    app.command(name=command.__name__.rsplit(".", 1)[1].rstrip("_"))(command.run)


@app.callback()
def _begin(context: typer.Context) -> None:
    context.with_resource(speaking("cli"))


def main() -> None:
    """Run a command; foreword's own errors and the system's are one plain message, as are warnings; Ctrl-C is quiet."""
    with _plain_warnings():
        _run()


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """Inside the block, a warning is its sentence, without the place in the code that it is from."""
    before = warnings.showwarning

    def show(
        message: Warning | str, category: type[Warning], filename: str, lineno: int,
        file: TextIO | None = None, line: str | None = None,
    ) -> None:  # fmt: skip
        if file is None and issubclass(category, UserWarning):
            typer.secho(f"warning: {message}", fg=typer.colors.YELLOW, err=True)
        else:
            before(message, category, filename, lineno, file, line)

    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = before


def _run() -> None:
    try:
        app()
    except (ForewordError, OSError) as exc:
        typer.secho(f"error: {exc}", fg=typer.colors.RED, err=True)
        sys.exit(1)
    except KeyboardInterrupt:
        typer.echo("stopped", err=True)
        sys.exit(130)
