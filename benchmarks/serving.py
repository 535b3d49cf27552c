"""Serving: many tasks in one batch, a long shared prefix, a thousand tasks, and the server against its own engine.

``mixed``   16 requests for 16 tasks in one batch, against the base model's own batch of 16 and PEFT's adapters in turn.
``shared``  one prefix of 2048 tokens for 16 rows, against a cache that holds it 16 times.
``many``    a thousand tasks: bytes, time to load, to find and to switch.
``server``  16 clients that stream over loopback, from a process of their own, against the engine called directly.

    python benchmarks/serving.py [--only mixed shared many server] [--rounds 5] [--new-tokens 64]
"""

from __future__ import annotations

import argparse
import asyncio
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from _measure import hold_memory, keep, plainly, ratios, take_turns

TEXTS = ["The film was", "I watched this one late at night, and", "Nobody could have", "Yesterday I saw that"] * 4
ROWS = 16
PARTS = ("mixed", "shared", "many", "server")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--length", type=int, default=20, help="virtual tokens of a task")
    parser.add_argument("--long", type=int, default=2048, help="of the shared prefix")
    parser.add_argument("--tasks", type=int, default=1000)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-keep", action="store_true", help="print only")
    parser.add_argument("--client", help=argparse.SUPPRESS)  # the clients' own process
    options = parser.parse_args()
    if options.client is not None:
        asyncio.run(clients(options.client, options.new_tokens))
        return

    hold_memory()
    import foreword as fw

    model, tokenizer = fw.load_model(options.model)
    record = {}
    for name in options.only:
        part = {"mixed": mixed, "shared": shared, "many": many, "server": server}[name]
        found = part(model, tokenizer, options)
        record[name] = {"options": {k: v for k, v in vars(options).items() if k != "only"}, **found}
        for key, value in found.items():
            print(f"{name}: {key}: {value:.4g}" if isinstance(value, float) else f"{name}: {key}: {value}", flush=True)
    if not options.no_keep:
        print("written:", keep("serving", record, add=True))


def random_prefix(model, sites, length, seed=0):
    """Keys and values as large as the model's own, by a seed."""
    import torch

    import foreword as fw

    generator = torch.Generator().manual_seed(seed)

    def draw(heads, dim):
        return 0.3 * torch.randn(heads, length, dim, generator=generator)

    return fw.Prefix.from_tensors(
        model, {s.name: (draw(s.kv_heads, s.key_dim), draw(s.kv_heads, s.value_dim)) for s in sites}
    )


@contextmanager
def library(model, prefixes, budget=None):
    """A library on the model, taken off again."""
    import foreword as fw

    made = fw.Library(model, budget=budget)
    try:
        for name, prefix in prefixes.items():
            made.add(name, prefix)
        yield made
    finally:
        made.detach()


@contextmanager
def engine(model, tokenizer, prefixes, budget=None):
    """A running engine."""
    import foreword as fw

    with library(model, prefixes, budget) as held:
        made = fw.Engine(held, tokenizer, fw.Limits(rows=ROWS)).start()
        try:
            yield made
        finally:
            made.stop()


def sampling(options):
    import foreword as fw

    return fw.Sampling(max_tokens=options.new_tokens, temperature=0.0, ignore_eos=True)


def left_padded(tokenizer, texts=TEXTS):
    tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.eos_token
    return dict(tokenizer(texts, return_tensors="pt", padding=True))


def generating(model, batch, options, **more):
    """Greedy generation of so many tokens, no early stop."""
    import torch

    def run():
        with torch.no_grad():
            return model.generate(
                **batch, **more, max_new_tokens=options.new_tokens, min_new_tokens=options.new_tokens, do_sample=False,
                pad_token_id=0,
            )  # fmt: skip

    return run


# ---------------------------------------------------------------- the four


def mixed(model, tokenizer, options):
    """Throughput against the base model's own batch of 16."""
    import foreword as fw

    sites = fw.sites(model)
    prefixes = {f"task{i}": random_prefix(model, sites, options.length, i) for i in range(ROWS)}
    batch, tasks = left_padded(tokenizer), list(prefixes)

    @contextmanager
    def by_engine(tasks=tasks):
        with engine(model, tokenizer, prefixes) as made:
            yield lambda: made.generate(TEXTS, sampling(options), tasks)

    @contextmanager
    def by_library():
        with library(model, prefixes) as held, held.use(tasks):
            yield generating(model, batch, options)

    variants = {
        "base": plainly(generating(model, batch, options)),
        "engine, 16 tasks mixed": by_engine,
        "engine, base model": lambda: by_engine(None),
        "library.use and generate, 16 tasks mixed": by_library,
    }
    if (peft := peft_model(model, options.length)) is not None:
        rows = [left_padded(tokenizer, [text]) for text in TEXTS]

        def one_after_the_other():
            for number, row in enumerate(rows):
                peft.set_adapter(f"task{number}")
                generating(peft, row, options)()

        variants["PEFT, one adapter after the other"] = plainly(one_after_the_other)
    times = take_turns(variants, rounds=options.rounds)
    found = {f"{n}: throughput / base": 1 / r for n, r in ratios(times, "base").items()}
    if peft is not None:
        by_peft = ratios(times, "engine, 16 tasks mixed")["PEFT, one adapter after the other"]
        found["engine, 16 tasks mixed: throughput / PEFT"] = by_peft
    return found


def peft_model(model, length):
    """PEFT with 16 adapters on the same model, or None without PEFT."""
    try:
        from peft import PrefixTuningConfig, get_peft_model
    except ImportError:
        return None
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=length)
    made = get_peft_model(model, config, adapter_name="task0")
    for number in range(1, ROWS):
        made.add_adapter(f"task{number}", config)
    return made.eval()


def shared(model, tokenizer, options):
    """Decoding with a long prefix that all rows share: once, against in each row's cache."""
    import torch
    from transformers import DynamicCache

    import foreword as fw

    sites = fw.sites(model)
    prefix = random_prefix(model, sites, options.long)
    batch = left_padded(tokenizer)
    length = batch["input_ids"].shape[1]

    def cache():
        made = DynamicCache()
        for layer, site in enumerate(sites):
            made.update(*(t[site.name].to(model.dtype).expand(ROWS, -1, -1, -1).contiguous()
                          for t in (prefix.keys, prefix.values)), layer)  # fmt: skip
        return made

    @contextmanager
    def concatenated(wanted):
        held = cache()
        mask = torch.cat([torch.ones(ROWS, options.long, dtype=torch.long), batch["attention_mask"]], 1)
        ids = torch.cat([torch.zeros(ROWS, options.long, dtype=torch.long), batch["input_ids"]], 1)
        yield generating(model, {"input_ids": ids, "attention_mask": mask}, wanted, past_key_values=held)

    @contextmanager
    def by_library(wanted):
        with library(model, {"long": prefix}) as held, held.use("long"):
            yield generating(model, batch, wanted)

    @contextmanager
    def by_engine(wanted):
        with engine(model, tokenizer, {"long": prefix}) as made:
            yield lambda: made.generate(TEXTS, sampling(wanted), "long")

    ways = {"in each row's cache": concatenated, "engine": by_engine, "library.use and generate": by_library}
    one = argparse.Namespace(new_tokens=1)
    variants = {(n, w.new_tokens): partial(way, w) for n, way in ways.items() for w in (options, one)}
    times = take_turns(variants, rounds=options.rounds)
    writing = {  # without the prompt and the first token
        n: [a - b for a, b in zip(times[n, options.new_tokens], times[n, 1], strict=True)] for n in ways
    }
    found = {f"{n}: decoding / in each row's cache": 1 / r for n, r in ratios(writing, "in each row's cache").items()}
    whole = ratios({n: times[n, options.new_tokens] for n in ways}, "in each row's cache")
    found |= {f"{n}: throughput / in each row's cache": 1 / r for n, r in whole.items()}
    copies = sum(t.numel() * t.element_size() for layer in cache().layers for t in (layer.keys, layer.values))
    with library(model, {"long": prefix}) as held, held.use("long"):
        seen = [held.view(s.name) for s in sites]
        read = sum(t.numel() * t.element_size() for v in seen for t in (v.keys, v.values))
    return {**found, "prompt tokens": length, "bytes of the prefix, read by 16 rows": read, "in 16 caches": copies}


def many(model, tokenizer, options):
    """A thousand tasks in memory."""
    import foreword as fw

    sites = fw.sites(model)
    one = random_prefix(model, sites, options.length)
    expected = options.tasks * sum(s.parameters(options.length) for s in sites) * model.dtype.itemsize
    with library(model, {}) as held, tempfile.TemporaryDirectory() as folder:
        one.save(Path(folder) / "one")
        began = time.perf_counter()
        for number in range(options.tasks):
            held.add(f"task{number:04d}", fw.Prefix.load(Path(folder) / "one"))
        loading = time.perf_counter() - began
        storages = {
            t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
            for name in held.names for group in (held[name].keys, held[name].values) for t in group.values()
        }  # fmt: skip
        names = [held.names[i * 7919 % options.tasks] for i in range(2000)]
        began = time.perf_counter()
        for name in names:
            held[name]
        lookup = (time.perf_counter() - began) / len(names)
        began = time.perf_counter()
        for name in names:
            with held.use(name):
                pass
        switch = (time.perf_counter() - began) / len(names)
        began = time.perf_counter()
        for name in names[:50]:
            with held.use(name):
                for site in sites:
                    held.view(site.name)
        first = (time.perf_counter() - began) / 50
    return {
        "tasks": options.tasks, "bytes": sum(storages.values()), "bytes expected": expected,
        "seconds to load one": loading / options.tasks, "seconds to find one": lookup, "seconds to switch": switch,
        "seconds to switch, and what all layers read made": first,
    }  # fmt: skip


@contextmanager
def served(made, script, new_tokens):
    """An engine behind HTTP, and a script's process of clients: gives what sends them off and returns their answer."""
    import socket

    import uvicorn

    from foreword.serve.http.app import create_app
    from foreword.serve.http.keys import Keys
    from foreword.serve.http.service import Settings

    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        app = create_app(made, Settings("base", Keys(()), Keys(())))
        running = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False, lifespan="off"))
        thread = threading.Thread(target=running.run, kwargs={"sockets": [bound]}, daemon=True)
        thread.start()
        while not running.started:
            time.sleep(0.01)
        url = f"http://127.0.0.1:{bound.getsockname()[1]}"
        command = [sys.executable, script, "--client", url, "--new-tokens", str(new_tokens)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            process.stdout.readline()  # it is ready

            def ask():
                process.stdin.write("go\n")
                process.stdin.flush()
                return process.stdout.readline()

            yield ask
            process.stdin.close()
        running.should_exit = True
        thread.join()


def server(model, tokenizer, options):
    """Throughput of 16 streaming clients against the engine called directly."""
    import foreword as fw

    prefixes = {f"task{i}": random_prefix(model, fw.sites(model), options.length, i) for i in range(ROWS)}
    waits: list[float] = []
    with engine(model, tokenizer, prefixes) as made, served(made, __file__, options.new_tokens) as ask:
        variants = {
            "engine": plainly(lambda: made.generate(TEXTS, sampling(options), list(prefixes))),
            "server": plainly(lambda: waits.extend(float(w) for w in ask().split())),
        }
        times = take_turns(variants, rounds=options.rounds)
    return {
        "server: throughput / engine": 1 / ratios(times, "engine")["server"],
        "seconds to a first token, p50": share(waits, 0.5), "seconds to a first token, p99": share(waits, 0.99),
    }  # fmt: skip


def share(numbers, part):
    """That many of the numbers are below."""
    return sorted(numbers)[min(len(numbers) - 1, int(len(numbers) * part))]


async def clients(url: str, tokens: int) -> None:
    """16 streaming clients, each time a line comes in; the times to their first tokens go out."""
    import httpx

    async def one(client, number):
        body = {"model": f"task{number}", "prompt": TEXTS[number], "max_tokens": tokens, "temperature": 0,
                "ignore_eos": True, "stream": True}  # fmt: skip
        began, first = time.perf_counter(), None
        async with client.stream("POST", f"{url}/v1/completions", json=body) as response:
            async for line in response.aiter_lines():
                if line and first is None:
                    first = time.perf_counter() - began
        return first

    async with httpx.AsyncClient(timeout=600) as client:
        print("ready", flush=True)
        while await asyncio.to_thread(sys.stdin.readline):
            firsts = await asyncio.gather(*(one(client, i) for i in range(ROWS)))
            print(*firsts, flush=True)


if __name__ == "__main__":
    main()
