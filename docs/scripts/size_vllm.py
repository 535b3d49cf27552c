"""Sizing of tasks on vLLM, on paper: bytes and blocks of prefixes, and of LoRA adapters on the same arithmetic.

    python docs/scripts/size_vllm.py [--length 64] [--block 16] [--device-gb 80]

Everything is counted from a model's shape; nothing is measured, and no speed is guessed but one bound: a step of
decoding reads all weights and the keys and values of all running requests once, so a device of so many bytes a second
makes no more steps a second than that. (Reading a shared prefix once for all its requests would make it less; we don't
count on that.) Reading the prompts is not in it.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass


@dataclass(frozen=True)
class Model:
    """A dense decoder in 16 bits. ``devices`` share it by tensor parallelism."""

    name: str
    parameters: float
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    devices: int

    @property
    def kv_bytes(self) -> int:
        """Of one token, over all devices."""
        return 2 * 2 * self.layers * self.kv_heads * self.head_dim

    def lora_bytes(self, rank: int) -> int:
        """Of one adapter on q, k, v and o, in 16 bits: ``rank * (in + out)`` numbers for each."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return 2 * rank * self.layers * (2 * (self.hidden + q) + 2 * (self.hidden + kv))


MODELS = (
    Model("7B", 7.6e9, 28, 3584, 28, 4, 128, 1),  # the shape of Qwen2.5-7B
    Model("70B", 70.6e9, 80, 8192, 64, 8, 128, 4),  # of Llama-3-70B
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--length", type=int, default=64, help="virtual tokens of a task")
    parser.add_argument("--block", type=int, default=16, help="tokens of a block of the cache")
    parser.add_argument("--device-gb", type=float, default=80)
    parser.add_argument("--bandwidth", type=float, default=3.35e12, help="bytes a second of a device's memory")
    parser.add_argument("--text", type=int, default=1024, help="tokens of a request, prompt and answer")
    parser.add_argument("--answer", type=int, default=256, help="of them, the answer's")
    parser.add_argument("--rank", type=int, default=16, help="of LoRA")
    options = parser.parse_args()
    for model in MODELS:
        print(table(model, options))
        print()


def table(model: Model, o: argparse.Namespace) -> str:
    """Markdown."""
    weights = 2 * model.parameters
    cache = model.devices * o.device_gb * 1e9 * 0.9 - weights
    blocks = int(cache // (model.kv_bytes * o.block))
    full = o.length // o.block
    prefix, lora = o.length * model.kv_bytes, model.lora_bytes(o.rank)
    own = -(-(o.length + o.text) // o.block) - full  # blocks that a request has to itself

    def steps(running: int) -> float:
        """A second, with so many requests that have half of their answer."""
        each = (o.length + o.text - o.answer / 2) * model.kv_bytes
        return model.devices * o.bandwidth / (weights + running * each)

    rows = [
        f"**{model.name}**, {model.devices} device(s) of {o.device_gb:g} GB, {o.length} virtual tokens, "
        f"blocks of {o.block}",
        "",
        "| | |",
        "| --- | --- |",
        f"| KV bytes of a token | {model.kv_bytes:,} |",
        f"| cache left beside the weights (90 % of memory) | {cache / 1e9:.1f} GB, {blocks:,} blocks |",
        f"| a task's prefix | {prefix / 1e6:.2f} MB, of {o.length} tokens {full * o.block} in {full} shared blocks |",
        f"| a LoRA of rank {o.rank} on q, k, v, o | {lora / 1e6:.2f} MB ({lora / prefix:.1f} times the prefix) |",
        f"| tasks whose prefixes fill the whole cache | {blocks // max(full, 1):,} |",
        f"| blocks of a request of {o.text} tokens beside them | {own} |",
        f"| least time of a step, for one request | {1e3 / steps(1):.1f} ms |",
        "",
        "| tasks | all prefixes, on disk in 16 bits | blocks if all are cached | requests at once beside them "
        f"| answers a second, at most | all LoRAs (rank {o.rank}) |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for tasks in (10, 1_000, 100_000):
        held = min(tasks * full, blocks)
        fits = tasks * full + own <= blocks
        # Prefixes that aren't in use are evicted like any cached block: what is needed is one for each request.
        rooms = (blocks - held) // own if fits else blocks // (own + full)
        rows.append(
            f"| {tasks:,} | {tasks * prefix / 1e9:.3g} GB | {tasks * full:,}{'' if fits else ' (do not fit)'} | "
            f"{rooms:,}{'' if fits else ', each with a prefix of its own'} | {rooms * steps(rooms) / o.answer:,.0f} | "
            f"{tasks * lora / 1e9:.3g} GB |"
        )
    return "\n".join(rows)


if __name__ == "__main__":
    main()
