"""`foreword inspect`: what is in a prefix folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

from foreword.cli._shared import print_json, quiet

if TYPE_CHECKING:
    from torch import Tensor

    from foreword.prefix import Prefix


def run(
    folder: Annotated[Path, Argument(help="Folder of a saved prefix.")],
    as_json: Annotated[bool, Option("--json")] = False,
) -> None:
    """Show a prefix: sites, lengths, bytes, norms, base model, training."""
    quiet()
    from foreword._prefix_file import WEIGHTS
    from foreword.hub import located, shown
    from foreword.prefix import Prefix

    prefix = Prefix.load(folder)
    record = {**describe(prefix), "file_bytes": (located(folder) / WEIGHTS).stat().st_size}
    if as_json:
        print_json(record)
        return
    _print(shown(folder), prefix, record)


def describe(prefix: Prefix) -> dict[str, Any]:
    """Everything there is to say about a prefix, for JSON."""
    sites = [
        {
            "name": s.name,
            "kind": s.kind,
            "length": prefix.length(s.name),
            "kv_heads": s.kv_heads,
            "key_dim": s.key_dim,
            "value_dim": s.value_dim,
            "sliding_window": s.sliding_window,
            "key_norm": _norm(prefix.keys[s.name]),
            "value_norm": _norm(prefix.values[s.name]),
            "weighed": s.name in prefix.log_weights,
            "gated": any(s.name in gates for gates in (prefix.bias, prefix.gates, prefix.readings)),
            "memory": s.name in prefix.memory,
            "memory_rank": up.shape[1] if (up := prefix.memory_up.get(s.name)) is not None else None,
        }
        for s in prefix.sites
    ]
    return {
        "base_model": prefix.fingerprint.base_model,
        "model_class": prefix.fingerprint.model_class,
        "layer_types": prefix.fingerprint.layer_types,
        "position_offset": prefix.position_offset,
        "rotary_sites": len(prefix.rotations),
        "parameters": prefix.num_parameters,
        "bytes": prefix.nbytes,
        "storage": {"keys": str(prefix.storage.keys), "values": str(prefix.storage.values)},
        "dtype": _dtype(prefix),
        "visible": prefix.visible.to_json(),
        "parts": [
            {**p, "parameters": sum(t.numel() for n, t in prefix.weights.items() if n.startswith(f"{p['method']}/"))}
            for p in prefix.parts
        ],
        "sites": sites,
        "metadata": dict(prefix.metadata),
    }


def _norm(states: Tensor) -> float:
    """Mean length of a token's vector; 0 where there is no token."""
    return float(states.float().norm(dim=-1).mean()) if states.numel() else 0.0


def _dtype(prefix: Prefix) -> str:
    tensors = (*prefix.keys.values(), *prefix.memory.values(), *prefix.weights.values())
    return str(tensors[0].dtype).removeprefix("torch.") if tensors else "?"


def _print(name: str, prefix: Prefix, record: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Column, Table

    console = Console()
    console.print(f"[bold]{name}[/bold]: {prefix!r}")
    console.print(f"base model {record['base_model'] or '?'} ({record['model_class']}), numbers {record['dtype']}")
    stored = "" if prefix.storage.plain else f" ({prefix.storage})"
    console.print(f"in memory {record['bytes']:,} bytes, its file {record['file_bytes']:,}{stored}")
    if any(s["weighed"] for s in record["sites"]):
        console.print("merged tokens count for several (weights of tokens)")
    console.print(f"text starts at position {prefix.position_offset}")
    if prefix.visible.kind != "all":
        console.print(f"seen by: {record['visible']}")
    if ranks := sorted({s["memory_rank"] for s in record["sites"]} - {None}):
        console.print(f"memory of rank {', '.join(map(str, ranks))}, stored as two factors")
    for part in record["parts"]:
        console.print(f"with {part['method']}: {part['parameters']:,} numbers")
    if not record["sites"]:
        return
    types = record["layer_types"]
    without = sum(n for kind, n in types.items() if "attention" not in kind or "linear" in kind)
    if without:
        kinds = ", ".join(k for k in types if "attention" not in k or "linear" in k)
        console.print(f"{without} of {sum(types.values())} layers have no attention to prefix ({kinds})")
    if unreached := record["metadata"].get("unreached"):
        console.print(f"nothing stands in the encoder ({unreached}), whose attention foreword doesn't reach")
    table = Table(
        Column("site", overflow="fold", min_width=26),
        "kind",
        "tokens",
        "key/value heads",
        "key norm",
        "value norm",
        "gate",
        "memory",
    )
    for site in record["sites"]:
        table.add_row(
            site["name"], site["kind"], str(site["length"]),
            f"{site['kv_heads']} × {site['key_dim']}/{site['value_dim']}",
            f"{site['key_norm']:.2f}", f"{site['value_norm']:.2f}", "yes" if site["gated"] else "",
            "yes" if site["memory"] else "",
        )  # fmt: skip
    console.print(table)
    compression = record["metadata"].get("compression", {})
    for name, value in {
        **record["metadata"].get("training", {}),
        **record["metadata"].get("metrics", {}),
        **({"compressed": compression.get("plan"), **compression.get("loss", {})} if compression else {}),
    }.items():
        typer.echo(f"{name}: {value}")
