"""Prefixes on an unmodified vLLM, against the same vLLM without, `foreword serve`, and the text sent again.

All servers stand on loopback in one run and are asked in turn, by streaming clients in this process.

``mixed``  16 prompts at once, each for a task of its own (a prefix of a text's tokens): throughput and time to a first
           token, against the base model, against `foreword serve`, and against sending each text before its prompt.
``first``  one prompt for a task that nobody asked for yet, then another for the same: the second finds the blocks. The
           same with a text sent twice.
``same``   whether the greedy answers of 16 tasks are those of `foreword serve` (rounding differs, and where two tokens
           are about as likely the answers part).

    make test-vllm                         # once: makes the environment .venv-vllm
    python benchmarks/on_vllm.py [--vllm-python .venv-vllm/bin/python] [--only mixed first same] [--rounds 5]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

from _measure import keep, plainly, ratios, take_turns

ROOT = Path(__file__).parents[1]
PROMPTS = ["The film was", "I watched this one late at night, and", "Nobody could have", "Yesterday I saw that"] * 4
ROWS = 16
PARTS = ("mixed", "first", "same")
SOURCE = ROOT / "README.md"  # any text that is long enough


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--vllm-python", default=str(ROOT / ".venv-vllm/bin/python"))
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--length", type=int, default=64, help="tokens of a text, and so of its prefix (mixed)")
    parser.add_argument("--long", type=int, default=512, help="the same, of those that are asked for twice (first)")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--no-keep", action="store_true", help="print only")
    options = parser.parse_args()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        texts = make_tasks(options, folder / "tasks")
        on_vllm = stack.enter_context(server(options, folder, "vllm"))
        record = {}
        if {"mixed", "same"} & set(options.only):
            own = stack.enter_context(server(options, folder, "foreword"))
        if "mixed" in options.only:
            record["mixed"] = mixed(options, on_vllm, own, texts)
        if "same" in options.only:
            record["same"] = same(options, on_vllm, own)
        if "first" in options.only:
            record["first"] = first(options, on_vllm, texts)
    for name, found in record.items():
        for key, value in found.items():
            print(f"{name}: {key}: {value:.4g}", flush=True)
    if not options.no_keep:
        shown = {k: v for k, v in vars(options).items() if k not in ("vllm_python", "only")}
        print("written:", keep("vllm", {n: {"options": shown, **found} for n, found in record.items()}, add=True))


def make_tasks(options, folder):
    """Prefixes of pieces of one text, saved; each piece by its task's name."""
    import torch

    import foreword as fw

    model, tokenizer = fw.load_model(options.model)
    ids = tokenizer(SOURCE.read_text(encoding="utf-8"))["input_ids"]
    texts = {}
    for kind, length in (("task", options.length), ("long", options.long)):
        for number in range(ROWS):
            begin = number * (len(ids) - length) // ROWS
            piece = ids[begin : begin + length]
            text = tokenizer.decode(piece)
            with torch.no_grad():
                made = fw.Prefix.from_text(model, tokenizer, text)
            made.save(folder / f"{kind}{number}")
            texts[f"{kind}{number}"] = text
    return texts


@contextmanager
def server(options, folder, engine):
    """A server of all tasks, and its address."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        port = bound.getsockname()[1]
    command = [sys.executable, "-m", "foreword", "serve", "--model", options.model, "--name", "base", "--port", port]
    command += ["--dtype", options.dtype, "--prefix-dir", folder / "tasks", "--max-length", 1024]
    if engine == "vllm":
        command += ["--engine", "vllm", "--vllm-python", options.vllm_python, "--", "--max-num-seqs", ROWS,
                    "--block-size", 32]  # fmt: skip
    else:
        command += ["--rows", ROWS]
    more = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING",
            "VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}  # fmt: skip
    log = (folder / f"{engine}.log").open("wb")
    process = subprocess.Popen(
        [str(c) for c in command], env={**os.environ, **more}, stdout=log, stderr=log, start_new_session=True
    )
    try:
        url = f"http://127.0.0.1:{port}"
        wait_for(url, process, folder / f"{engine}.log")
        yield url
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
        log.close()


def wait_for(url, process, log, seconds=600):
    """Until it answers."""
    import httpx

    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if process.poll() is not None:
            raise SystemExit(f"the server ended with {process.returncode}:\n{log.read_text()[-3000:]}")
        try:
            if httpx.get(f"{url}/v1/models", timeout=10).status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.5)
    raise SystemExit(f"no server after {seconds} s:\n{log.read_text()[-3000:]}")


def ask(url, requests, tokens):
    """Requests (model, prompt) at once, streamed; seconds to each one's first token, and its text."""
    import httpx

    async def one(client, model, prompt):
        body = {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True,
                "stream": True}  # fmt: skip
        began, waited, said = time.perf_counter(), None, []
        async with client.stream("POST", f"{url}/v1/completions", json=body) as response:
            if response.status_code != 200:
                raise SystemExit(f"{response.status_code}: {(await response.aread()).decode()}")
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    said += [c["text"] for c in json.loads(line[6:]).get("choices", ())]
                    waited = waited or time.perf_counter() - began
        assert len(said) >= min(tokens, 2) and waited is not None, f"{model}: {len(said)} events"
        return waited, "".join(said)

    async def all_of_them():
        async with httpx.AsyncClient(timeout=600) as client:
            return await asyncio.gather(*(one(client, *request) for request in requests))

    return asyncio.run(all_of_them())


def mixed(options, on_vllm, own, texts):
    """16 at once. The prompts are new ones in each run, so that no cache holds more than tasks and texts."""
    names = [f"task{number}" for number in range(ROWS)]
    fresh, waits = iter(range(1_000_000)), {}

    def variant(label, url, request):
        def run():
            prompts = [f"No. {next(fresh)}. {p}" for p in PROMPTS]
            found = ask(url, [request(n, p) for n, p in zip(names, prompts, strict=True)], options.new_tokens)
            waits.setdefault(label, []).append(statistics.median(wait for wait, _ in found))

        return plainly(run)

    variants = {
        "vLLM, base": variant("vLLM, base", on_vllm, lambda name, prompt: ("base", prompt)),
        "vLLM, 16 tasks": variant("vLLM, 16 tasks", on_vllm, lambda name, prompt: (name, prompt)),
        "vLLM, texts sent": variant("vLLM, texts sent", on_vllm, lambda name, prompt: ("base", texts[name] + prompt)),
        "foreword serve, 16 tasks": variant("foreword serve, 16 tasks", own, lambda name, prompt: (name, prompt)),
    }
    times = take_turns(variants, rounds=options.rounds)
    found = {}
    for other in variants:
        if other != "vLLM, 16 tasks":
            found[f"vLLM, 16 tasks: throughput / {other}"] = ratios(times, "vLLM, 16 tasks")[other]
    rounds = {label: own[1:] for label, own in waits.items()}  # without the warm-up
    for other in variants:
        if other != "vLLM, 16 tasks":
            found[f"vLLM, 16 tasks: time to a first token / {other}"] = ratios(rounds, other)["vLLM, 16 tasks"]
    return found


def same(options, on_vllm, own):
    """The answers of both."""
    requests = [(f"task{number}", prompt) for number, prompt in enumerate(PROMPTS)]
    theirs, ours = ([text for _, text in ask(url, requests, options.new_tokens)] for url in (on_vllm, own))
    agreed = [agreement(*pair) for pair in zip(theirs, ours, strict=True)]
    equal = sum(a == b for a, b in zip(theirs, ours, strict=True))
    return {"answers equal, of 16": equal, "part of an answer before they differ": statistics.mean(agreed)}


def agreement(a, b):
    """The part of two texts before they differ."""
    length = max(len(a), len(b))
    return next((i for i in range(length) if a[i : i + 1] != b[i : i + 1]), length) / length


def first(options, url, texts):
    """One at a time. A text's first request reads it, a task's first one loads the prefix's file."""
    waits = {"task, first": [], "task, second": [], "text, first": [], "text, second": [], "base": []}

    def one(model, prompt):
        return [wait for wait, _ in ask(url, [(model, prompt)], 2)]

    one("base", "One to begin with.")
    for number in range(ROWS):
        name = f"long{number}"
        for time_, label in enumerate(("first", "second")):
            prompt = f"No. {number}, {time_}. {PROMPTS[number]}"
            waits[f"task, {label}"] += one(name, prompt)
            waits[f"text, {label}"] += one("base", texts[name] + prompt)
            if label == "first":
                waits["base"] += one("base", prompt)
    found = {f"{label}: time to a first token / base": ratio for label, ratio in ratios(waits, "base").items()}
    found["task: first / second"] = ratios(waits, "task, second")["task, first"]
    found["first: task / text"] = ratios(waits, "text, first")["task, first"]
    found["second: task / text"] = ratios(waits, "text, second")["task, second"]
    return found


if __name__ == "__main__":
    main()
