"""A crowd: 64 clients with three requests each, for 32 tasks, within a budget that holds half of them.

Each answer is compared with the same request's alone, bytes with the budget, waits with a request's that is alone.
Every eighth client leaves its last request at the first token.

    python benchmarks/load.py [--new-tokens 32]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time

from _measure import hold_memory, keep
from serving import ROWS, TEXTS, engine, random_prefix, sampling, served, share

CLIENTS, REQUESTS, LOADED = 64, 3, 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--length", type=int, default=20, help="virtual tokens of a task")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--no-keep", action="store_true", help="print only")
    parser.add_argument("--client", help=argparse.SUPPRESS)  # the clients' own process
    options = parser.parse_args()
    if options.client is not None:
        asyncio.run(crowd(options.client, options.new_tokens))
        return
    hold_memory()
    import foreword as fw

    record = load(*fw.load_model(options.model), options)
    for key, value in record.items():
        print(f"{key}: {value:.4g}" if isinstance(value, float) else f"{key}: {value}", flush=True)
    if not options.no_keep:
        print("written:", keep("load", {"options": vars(options), **record}))


def load(model, tokenizer, options):
    """A crowd, within a budget."""
    import foreword as fw

    sites = fw.sites(model)
    prefixes = {f"task{i}": random_prefix(model, sites, options.length, i) for i in range(LOADED)}
    token = sum(s.parameters(1) for s in sites) * model.dtype.itemsize
    rows = ROWS * (16 + options.new_tokens + 2 * options.length)  # texts, and copies of what they read
    budget = fw.Budget(device_bytes=(LOADED // 2 * options.length + rows) * token)
    with engine(model, tokenizer, prefixes, budget) as made:
        alone, took = {}, []
        for number, task in enumerate(prefixes):
            began = time.perf_counter()
            alone[task] = made.generate([TEXTS[number % ROWS]], sampling(options), task)[0][0].text
            took.append(time.perf_counter() - began)
        with served(made, __file__, options.new_tokens) as ask:
            answer = json.loads(ask())
        usage, stats = made.library.usage, made.stats
        device = usage.tiers["device"]
    wrong = [a["task"] for a in answer if a["text"] is not None and a["text"] != alone[a["task"]]]
    other = [a for a in answer if a["text"] in {t for n, t in alone.items() if n != a["task"]} - {alone[a["task"]]}]
    whole = [a["whole"] for a in answer if a["text"] is not None]
    first = [a["first"] for a in answer]
    usual = share(took, 0.5)
    return {
        "answers": len(whole), "clients that left": len(answer) - len(whole), "cancelled": stats.cancelled,
        "answers unlike the same request alone": len(wrong), "answers of another task": len(other),
        "device: most bytes / limit": device.most / device.limit, "tasks moved": usage.counts.moves_down,
        "first token / a whole answer alone, p50": share(first, 0.5) / usual,
        "first token / a whole answer alone, p99": share(first, 0.99) / usual,
        "whole answer / a whole answer alone, p50": share(whole, 0.5) / usual,
        "whole answer / a whole answer alone, p99": share(whole, 0.99) / usual,
    }  # fmt: skip


async def crowd(url: str, tokens: int) -> None:
    """64 clients with three requests each; every eighth leaves its last one at the first token."""
    import httpx

    async def one(client, number):
        found = []
        for turn in range(REQUESTS):
            index = (number * 7 + turn * 11) % LOADED
            body = {"model": f"task{index}", "prompt": TEXTS[index % ROWS], "max_tokens": tokens, "temperature": 0,
                    "ignore_eos": True, "stream": True}  # fmt: skip
            leaves = number % 8 == 0 and turn == REQUESTS - 1
            began, first, text = time.perf_counter(), None, ""
            async with client.stream("POST", f"{url}/v1/completions", json=body) as response:
                if response.status_code != 200:
                    raise SystemExit(f"{response.status_code}: {(await response.aread()).decode()}")
                async for line in response.aiter_lines():
                    if line.startswith("data: {"):
                        first = first or time.perf_counter() - began
                        text += "".join(c["text"] for c in json.loads(line[6:])["choices"])
                        if leaves:
                            break
            found.append({"task": f"task{index}", "text": None if leaves else text, "first": first,
                          "whole": time.perf_counter() - began})  # fmt: skip
        return found

    limits = httpx.Limits(max_connections=CLIENTS)
    async with httpx.AsyncClient(timeout=600, limits=limits) as client:
        print("ready", flush=True)
        while await asyncio.to_thread(sys.stdin.readline):
            found = await asyncio.gather(*(one(client, i) for i in range(CLIENTS)))
            print(json.dumps([a for each in found for a in each]), flush=True)


if __name__ == "__main__":
    main()
