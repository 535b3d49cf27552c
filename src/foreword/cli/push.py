"""`foreword push`: a prefix to a model hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from foreword.cli._shared import print_json, quiet


def run(
    folder: Annotated[Path, Argument(help="Folder of a saved prefix.")],
    to: Annotated[str, Argument(help="hf://OWNER/NAME, with @BRANCH or /FOLDER after it if need be.")],
    private: Annotated[bool | None, Option("--private/--public", help="Of a new repository.", show_default="the owner's setting")] = None,
    message: Annotated[str | None, Option(help="Of the commit.", show_default="what is pushed")] = None,
    as_json: Annotated[bool, Option("--json", help="Print the address as JSON.")] = False,
) -> None:  # fmt: skip
    """Put a prefix on a model hub; hf://OWNER/NAME then stands wherever the folder of a prefix is asked for."""
    quiet()
    from foreword.hub import Address
    from foreword.prefix import Prefix

    address = Address.of(to)
    version = Prefix.load(folder).push_to_hub(to, private=private, message=message)
    if as_json:
        print_json({"address": str(address), "version": version})
    else:
        typer.secho(f"{address}: pushed, as {version}", fg="green")
