"""`foreword mirror`: a folder of prefixes that follows an object store, for servers that read folders."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Argument, Option

from foreword.errors import ConfigError, StoreError

if TYPE_CHECKING:
    from foreword.serve.mirror import Change

_COLORS = {"new": "green", "replaced": "green", "removed": "yellow", "refused": "red"}


def run(
    source: Annotated[str, Argument(help="Where the prefixes are: s3://bucket/prefixes, gs://…, or what else fsspec reads. Each folder in it is one.")],
    folder: Annotated[Path, Argument(help="The folder that follows it, for --prefix-dir.")],
    every: Annotated[str | None, Option(help="Look again after so long (30s, 5m), until Ctrl-C.", show_default="look once")] = None,
    keep_removed: Annotated[bool, Option("--keep-removed", help="Keep here what is gone there.")] = False,
    as_json: Annotated[bool, Option("--json", help="A line of JSON for each change.")] = False,
) -> None:  # fmt: skip
    """Keep a folder as a store has it: new and replaced prefixes are fetched, checked, and renamed into place."""
    from foreword._allowance import parse_seconds

    pause = None
    if every is not None:
        pause = parse_seconds(every)
        if not pause:
            raise ConfigError(f"--every {every!r} is no time; expected one like 30s, 5m or 1h")
    from foreword.serve.mirror import Mirror

    mirror = Mirror(source, folder, remove=not keep_removed)
    before: list[Change] = []
    while True:
        try:
            changes = mirror.once()
        except StoreError as exc:
            if pause is None:
                raise
            typer.secho(f"{exc}; looking again in {every}", fg="red", err=True)
            changes = []
        for change in (c for c in changes if c not in before):  # what is refused again was told
            _tell(change, as_json)
        if pause is None:
            raise typer.Exit(1 if any(c.what == "refused" for c in changes) else 0)
        before = changes
        time.sleep(pause)


def _tell(change: Change, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps({"time": time.time(), **asdict(change)}))
    else:
        said = f": {change.message}" if change.message else ""
        typer.secho(f"{change.what} {change.name}{said}", fg=_COLORS[change.what])
