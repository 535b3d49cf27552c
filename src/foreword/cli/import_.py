"""`foreword import`: a prefix that another library trained."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from foreword.cli._shared import print_json, quiet
from foreword.errors import ConfigError


def run(
    folder: Annotated[Path, Argument(help="Folder of an adapter that PEFT saved (PREFIX_TUNING).")],
    out: Annotated[Path, Option(help="Folder for the prefix.")],
    model: Annotated[str | None, Option(help="Base model, as for train.", show_default="the one that the adapter names")] = None,
    keep_positions: Annotated[bool, Option("--keep-positions", help="Leave it for text that starts after the virtual tokens, as PEFT has it; models that aren't rotary always are.")] = False,
    overwrite: Annotated[bool, Option("--overwrite", help="Replace the prefix in --out.")] = False,
    as_json: Annotated[bool, Option("--json", help="Print what was written as JSON.")] = False,
) -> None:  # fmt: skip
    """Take over a prefix that PEFT trained; the pickle files of old adapters are not read."""
    quiet()
    from foreword.exchange.peft import base_of, read_peft
    from foreword.models import load_model

    name = model or base_of(folder)
    if name is None:
        raise ConfigError(f"{folder} doesn't say by what name its base model was loaded; give --model")
    if out.exists() and not overwrite:
        raise ConfigError(f"{out} exists; give another --out, or --overwrite")
    prefix = read_peft(folder, load_model(name)[0], keep_positions=keep_positions)
    prefix.save(out, overwrite=overwrite)
    if as_json:
        print_json(
            {
                "path": str(out),
                "length": prefix.longest,
                "sites": len(prefix.sites),
                "position_offset": prefix.position_offset,
            }
        )
    else:
        where = "0" if prefix.position_offset == 0 else f"{prefix.position_offset}, as PEFT has it"
        typer.secho(
            f"{out}: {prefix.longest} virtual tokens at {len(prefix.sites)} sites; text starts at {where}", fg="green"
        )
