"""Run notebooks top to bottom and store what they print and draw: ``python notebooks/run.py [NOTEBOOK ...]``.

Outputs are kept small and the same on every machine: no timings, pictures with a palette. A notebook that fails is left
as it was.
"""

from __future__ import annotations

import base64
import io
import os
import sys
import time
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from PIL import Image

HERE = Path(__file__).parent
PAIRS = ("01-Setup", "02-Train", "03-Inference", "04-Compare", "05-Look-inside")
ENGLISH, CHINESE = "{}.ipynb", "{}.zh-CN.ipynb"
_NO_WIDGETS = "ignore:IProgress"  # tqdm would like ipywidgets, and draws nothing here
_COLOURS = 256  # of a stored picture: a plot needs few, and takes half the bytes


def execute(path: Path, *, timeout: float = 1800) -> Any:
    """Run a notebook in its own folder with a fresh kernel; returns it with its new outputs.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed; the message has its code and the error.
    """
    notebook = nbformat.read(path, as_version=4)
    # Which python3 a kernel is, is the machine's business: it is the one that runs this.
    NotebookClient(
        notebook, timeout=timeout, kernel_name="python3", record_timing=False, coalesce_streams=True,
        extra_arguments=["--log-level=ERROR"],
        resources={"metadata": {"path": str(path.parent)}},
    ).execute(env={**os.environ, "PYTHONWARNINGS": _NO_WIDGETS})  # fmt: skip
    notebook.metadata["language_info"] = {"name": "python"}
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            if "image/png" in output.get("data", {}):
                output.data["image/png"] = _smaller(output.data["image/png"])
    return notebook


def _smaller(png: str) -> str:
    """The same picture with a palette, base64 in and out."""
    out = io.BytesIO()
    with Image.open(io.BytesIO(base64.b64decode(png))) as image:
        image.convert("RGB").quantize(_COLOURS, method=Image.Quantize.FASTOCTREE).save(out, "PNG", optimize=True)
    return base64.b64encode(out.getvalue()).decode()


def store(notebook: Any, path: Path) -> None:
    """Write it under a temporary name, then rename."""
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(nbformat.writes(notebook) + "\n", encoding="utf-8")
    temporary.replace(path)


def main(paths: list[Path]) -> None:
    """Run these, or all: the English ones first, for 02 makes what 03 and 05 read."""
    for path in paths or [HERE / form.format(name) for form in (ENGLISH, CHINESE) for name in PAIRS]:
        began = time.perf_counter()
        print(f"{path.name} … ", end="", flush=True)
        store(execute(path), path)
        print(f"{time.perf_counter() - began:.0f} s, {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main([Path(argument) for argument in sys.argv[1:]])
