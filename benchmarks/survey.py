"""Every text, encoder-decoder and vision-language class of the installed transformers, small, held to exactness.

Of each class that can be made small, with random weights in float64:

- with slots in place and nothing to add, its output is the base model's to the bit, and after detach as well;
- with a prefix, its output on each of the four paths, the gradients of keys and values, and what ``generate`` writes
  are those of attention written out (``_explicit.py``);
- or foreword refuses it, with the reason.

Writes ``results/survey.json``; ``--docs`` writes the table of docs/models.md from it. Vision-language models are given
text alone. Some 5 minutes on one core.

    python benchmarks/survey.py [--only REGEX] [--docs]
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import sys
import time
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
import transformers as tf

import foreword as fw
from _explicit import Explicit
from _small_models import NotBuiltError, build, classes, text
from foreword._interface import only_slots

RESULTS = Path(__file__).parent / "results" / "survey.json"
DOCS = Path(__file__).parents[1] / "docs" / "models.md"
START, END = "<!-- survey -->", "<!-- /survey -->"
# Of the output's size: files of models compute some of it in float32, and few don't run in float64 at all.
TOLERANCES = {torch.float64: 1e-5, torch.float32: 3e-4}
LENGTH, WRITTEN = 4, 4


class WrongError(Exception):
    """Something isn't what it should be; the message says by how much."""


def look(name: str) -> tuple[str, str]:
    """What becomes of a class: (``exact`` | ``refused`` | ``wrong`` | ``fails`` | ``not built``, why)."""
    try:
        model = build(name).requires_grad_(False)
        inputs = text(model, 2, 12)
        base = output(model, inputs)
    except NotBuiltError as exc:
        return "not built", str(exc)
    try:
        return "exact", check(model, inputs, base)
    except fw.ForewordError as exc:
        return "refused", str(exc)
    except WrongError as exc:
        return "wrong", str(exc)
    except Exception as exc:
        return "fails", f"{type(exc).__name__}: {first_line(exc)}"


def check(model: Any, inputs: dict[str, Any], base: torch.Tensor) -> str:
    """Hold a model to all of it; returns what is worth saying."""
    tolerance = TOLERANCES[model.dtype]
    same("an empty library", output_under(fw.Library(model), model, inputs), base, 0)
    sites = [s for s in fw.sites(model) if not s.tower]
    generator = torch.Generator().manual_seed(1)
    states = {
        s.name: tuple(0.7 * torch.randn(s.kv_heads, LENGTH, d, generator=generator) for d in (s.key_dim, s.value_dim))
        for s in sites
    }
    nothing = {n: tuple(t[:, :0] for t in pair) for n, pair in states.items()}
    same("attention written out", explicit(model, inputs, nothing), base, tolerance)
    want = explicit(model, inputs, states)
    prefix = fw.Prefix.from_tensors(model, states)
    tuning = fw.attach(model, prefix, strength=0)
    same("strength 0", output(model, inputs), base, 0)
    tuning.strength = 1
    for path in ("auto", "concat", "merged", "step"):
        with fw.attention_path(path):
            same(f"path {path}", output(model, inputs), want, tolerance)
    said = written(model, inputs, tuning, states)
    tuning.detach()
    same("after detach", output(model, inputs), base, 0)
    gradients(model, inputs, prefix, states, 30 * tolerance)
    same("after training and detach", output(model, inputs), base, 0)
    return said


def output(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return first_tensor(model(**inputs))


def output_under(library: fw.Library, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    try:
        return output(model, inputs)
    finally:
        library.detach()


def explicit(model: Any, inputs: dict[str, Any], states: dict[str, Any]) -> torch.Tensor:
    with only_slots(model, lambda name: Explicit(*states[name]) if name in states else None), torch.no_grad():
        return first_tensor(model(**inputs))


def written(model: Any, inputs: dict[str, Any], tuning: fw.Tuning, states: dict[str, Any]) -> str:
    """Compare what is generated; says so where the class doesn't generate from text."""
    if not model.can_generate():
        return "does not generate"
    prompt = {"input_ids": inputs["input_ids"]}
    settings = {"max_new_tokens": WRITTEN, "do_sample": False, "num_beams": 1}
    try:
        with only_slots(model, lambda _: None):
            model.generate(**prompt, **settings)
    except Exception as exc:
        return f"generate fails by itself ({type(exc).__name__})"
    got = model.generate(**prompt, **settings)
    with only_slots(model, lambda name: Explicit(*states[name]) if name in states else None):
        want = model.generate(**prompt, **settings)
    if not torch.equal(got, want):
        raise WrongError(f"generate writes {got[:, -WRITTEN:].tolist()}, expected {want[:, -WRITTEN:].tolist()}")
    return ""


def gradients(model: Any, inputs: dict[str, Any], prefix: fw.Prefix, states: dict[str, Any], tolerance: float) -> None:
    leaves = {n: tuple(t.clone().requires_grad_() for t in pair) for n, pair in states.items()}
    with only_slots(model, lambda name: Explicit(*leaves[name]) if name in leaves else None):
        first_tensor(model(**inputs)).double().square().mean().backward()
    tuning = fw.attach(model, prefix, trainable=True)
    made = {n: tuple(t.detach().requires_grad_() for t in pair) for n, pair in tuning.encoder().items()}
    tuning.encoder.forward = lambda given=None: made  # type: ignore[method-assign]
    first_tensor(model(**inputs)).double().square().mean().backward()
    tuning.detach()
    for name in leaves:
        for what, ours, theirs in zip(("keys", "values"), made[name], leaves[name], strict=True):
            if theirs.grad is not None:
                assert ours.grad is not None
                same(f"gradient of {what} at {name}", ours.grad, theirs.grad, tolerance)


def same(what: str, got: torch.Tensor, want: torch.Tensor, tolerance: float) -> None:
    if got.shape != want.shape:
        raise WrongError(f"{what}: shape {tuple(got.shape)}, expected {tuple(want.shape)}")
    off = float((got.double() - want.double()).abs().max() / want.double().abs().max().clamp(min=1e-12))
    if not (off <= tolerance or torch.equal(got, want)):
        raise WrongError(f"{what}: off by {off:.2g} of its size")


def first_tensor(found: Any) -> torch.Tensor:
    if "logits" in found:
        return found.logits
    values = found.values() if isinstance(found, dict) else found
    return next(v for v in values if isinstance(v, torch.Tensor) and v.is_floating_point())


def first_line(exc: Exception) -> str:
    return str(exc).splitlines()[0][:120] if str(exc) else ""


def table(results: dict[str, Any]) -> str:
    """The results as Markdown: exact ones in one paragraph per kind, all others with their reason."""
    found = results["classes"]
    count = {
        r: sum(c["result"] == r for c in found.values()) for r in ("exact", "refused", "not built", "wrong", "fails")
    }
    lines = [
        f"Made by `benchmarks/survey.py` on {results['date']} with transformers {results['transformers']} and torch "
        f"{results['torch']}: {len(found)} classes, {count['exact']} exact, {count['refused']} refused, "
        f"{count['not built']} not built small, {count['wrong'] + count['fails']} wrong.",
        "",
        "| kind | exact |",
        "| --- | --- |",
    ]
    for kind, title in (("CAUSAL_LM", "decoders"), ("SEQ_TO_SEQ_CAUSAL_LM", "encoder-decoders, also of sound"),
                        ("MASKED_LM", "encoders"), ("IMAGE_TEXT_TO_TEXT", "vision-language (given text)")):  # fmt: skip
        names = [n for n, c in found.items() if c["kind"] == kind and c["result"] == "exact"]
        lines.append(f"| {title} | {', '.join(names)} |")
    for result, title in (("refused", "the error says"), ("wrong", "what is wrong"), ("fails", "what fails")):
        rows = {n: c["why"] for n, c in found.items() if c["result"] == result}
        if rows:
            lines += ["", f"| {result} | {title} |", "| --- | --- |"]
            lines += [f"| {', '.join(names)} | {why} |" for why, names in grouped(rows).items()]
    rest = [n for n, c in found.items() if c["result"] == "not built"]
    why = (
        "Not looked at, for they could not be made small by the names of their sizes alone, need what isn't installed, "
        "or read no text by itself (`benchmarks/results/survey.json` says which): "
    )
    lines += ["", f"{why}{', '.join(rest)}."]
    return "\n".join(lines)


def grouped(rows: dict[str, str]) -> dict[str, list[str]]:
    """Names by their reason, without what is of one model in it."""
    by: dict[str, list[str]] = {}
    for name, why in rows.items():
        short = why.replace(name, "the class").replace("|", "\\|").replace("\n", " ")
        by.setdefault(short[:200] + ("…" if len(short) > 200 else ""), []).append(name)
    return by


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="classes whose name matches this regular expression; nothing is written")
    parser.add_argument(
        "--docs", action="store_true", help="write the table of docs/models.md from the results and stop"
    )
    options = parser.parse_args()
    if options.docs:
        page = DOCS.read_text(encoding="utf-8")
        before, rest = page.split(START)
        after = rest.split(END)[1]
        DOCS.write_text(f"{before}{START}\n{table(json.loads(RESULTS.read_text()))}\n{END}{after}", encoding="utf-8")
        return
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    found: dict[str, Any] = {}
    for name, kind in classes().items():
        if options.only and not re.fullmatch(options.only, name):
            continue
        begun = time.perf_counter()
        result, why = look(name)
        why = re.sub(r"'/[^']*'?", "…", why)  # a path of this machine
        found[name] = {"kind": kind, "result": result, "why": why}
        if result in ("wrong", "fails") or options.only:
            print(f"{name}: {result} {why} ({time.perf_counter() - begun:.1f} s)", flush=True)
        elif sys.stderr.isatty():
            print(f"\r{len(found)} classes", end="", file=sys.stderr)
    if not options.only:
        record = {"date": datetime.date.today().isoformat(), "transformers": tf.__version__, "torch": torch.__version__}
        RESULTS.write_text(json.dumps({**record, "classes": found}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
