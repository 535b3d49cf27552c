"""What training at a size that does not run here would take: arithmetic from a config, no weights, no measurement.

For each way to spread the base over the GPUs and each width of its weights: bytes on one GPU and bytes that one GPU
sends in one step, for a prefix, LoRA and full fine-tuning. Ring collectives: gathering or scattering n bytes over N
GPUs has each of them send n (N - 1) / N; an all-reduce is both, twice that.

    python benchmarks/paper_scale.py [--gpus 8 16 32 64] [--batch 1] [--tokens 2048] [--length 20] [--rank 16]
"""

from __future__ import annotations

import argparse
import itertools
from dataclasses import asdict, dataclass

from _measure import keep

WIDTHS = {"bf16": 2.0, "int8": 1.0, "int4": 0.5}
BF16, FLOAT = 2, 4
ADAMW = 8  # two float32 for each trained number


@dataclass(frozen=True)
class Base:
    """A decoder in the manner of Llama; the defaults are Llama-2-70B's config."""

    hidden: int = 8192
    intermediate: int = 28672
    layers: int = 80
    heads: int = 64
    kv_heads: int = 8
    head_dim: int = 128
    vocabulary: int = 32000

    @property
    def query_width(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def linear(self) -> int:
        """Weights of one layer's seven products: those that are stored narrow, and that LoRA stands on."""
        attention = 2 * self.hidden * (self.query_width + self.kv_width)
        return attention + 3 * self.hidden * self.intermediate

    @property
    def parameters(self) -> int:
        embeddings = 2 * self.vocabulary * self.hidden  # input and head, not tied
        return self.layers * (self.linear + 2 * self.hidden) + embeddings + self.hidden

    def stored(self, width: float) -> int:
        """Bytes of the weights: the products at this width, the rest in bf16 (scales of the quantised left out)."""
        products = self.layers * self.linear
        return round(products * width + (self.parameters - products) * BF16)

    def prefix(self, length: int) -> int:
        return self.layers * 2 * self.kv_width * length

    def lora(self, rank: int) -> int:
        """On all seven products: (inputs + outputs) x rank each."""
        sides = 2 * (self.hidden + self.query_width) + 2 * (self.hidden + self.kv_width)
        return self.layers * rank * (sides + 3 * (self.hidden + self.intermediate))

    def activations(self, rows: int, tokens: int) -> int:
        """Bytes in a step with checkpointing: each layer's input, one layer inside, and the logits three times.

        One layer inside: what the backward of its products, norms and gate reads, in bf16. The logits, their
        log-softmax and its gradient are float32.
        """
        inputs = self.layers * self.hidden * BF16
        inside = (4 * self.hidden + 2 * self.query_width + 2 * self.kv_width + 4 * self.intermediate) * BF16
        return rows * tokens * (inputs + inside + 3 * self.vocabulary * FLOAT)


@dataclass(frozen=True)
class Cost:
    """Bytes on one GPU at the peak of a step, and bytes that it sends in one step."""

    base: int
    trained: int
    copies: int
    activations: int
    reduced: int
    gathered: int

    @property
    def memory(self) -> int:
        return self.base + self.trained + self.copies + self.activations

    @property
    def traffic(self) -> int:
        return self.reduced + self.gathered


def cost(
    base: Base, method: str, width: str, sharded: bool, gpus: int, rows: int, tokens: int, length: int, rank: int
) -> Cost:
    """Of one method (``prefix``, ``lora``, ``full``) and one way to spread it."""
    numbers = {"prefix": base.prefix(length), "lora": base.lora(rank), "full": base.parameters}[method]
    weights = base.stored(WIDTHS[width])
    # Trained in float32 with its gradient and AdamW's state. Full fine-tuning counts the weights in bf16 as the base.
    trained = numbers * (FLOAT + FLOAT + ADAMW)
    gradient = numbers * FLOAT
    # The prefix beside the text for each row, in the layers' dtype: one layer's at a time with checkpointing.
    copies = rows * length * 2 * base.kv_width * BF16 if method == "prefix" else 0
    share = (gpus - 1) / gpus
    if not sharded:
        return Cost(weights, trained, copies, base.activations(rows, tokens), round(2 * share * gradient), 0)
    layer = weights // base.layers  # two are whole at a time: the one that is computed and the next
    # Gathered for the forward and again for the backward.
    gathered = round(2 * share * weights)
    if method == "full":  # its gradients are scattered, in float32, and its state lies in shards as well
        reduced, trained = round(share * gradient), trained // gpus
    else:  # small, plain and the same on all GPUs: averaged as in DDP
        reduced = round(2 * share * gradient)
    return Cost(weights // gpus + 2 * layer, trained, copies, base.activations(rows, tokens), reduced, gathered)


def readable(size: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, value in asdict(Base()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    parser.add_argument("--gpus", type=int, nargs="+", default=[8, 16, 32, 64])
    parser.add_argument("--batch", type=int, default=1, help="rows on each GPU")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--length", type=int, default=20)
    parser.add_argument("--rank", type=int, default=16)
    options = parser.parse_args()
    base = Base(**{name: getattr(options, name) for name in asdict(Base())})
    print(f"{base.parameters / 1e9:.2f} billion parameters; {options.batch} x {options.tokens} tokens on each GPU\n")
    print("| GPUs | spread | base | method | trained | memory of a GPU | all-reduce | all-gather |")
    print("| ---: | --- | --- | --- | ---: | ---: | ---: | ---: |")
    rows = []
    for gpus, sharded, width, method in itertools.product(
        options.gpus, (False, True), WIDTHS, ("prefix", "lora", "full")
    ):
        if method == "full" and width != "bf16":
            continue
        sizes = (gpus, options.batch, options.tokens, options.length, options.rank)
        found = cost(base, method, width, sharded, *sizes)
        spread = "FSDP2" if sharded else "DDP"
        trained = {"prefix": base.prefix(options.length), "lora": base.lora(options.rank), "full": base.parameters}
        rows.append({"gpus": gpus, "spread": spread, "width": width, "method": method, "trained": trained[method],
                     **asdict(found), "memory": found.memory, "traffic": found.traffic})  # fmt: skip
        print(
            f"| {gpus} | {spread} | {width} | {method} | {trained[method] / 1e6:.3g} M | {readable(found.memory)} | "
            f"{readable(found.reduced)} | {readable(found.gathered)} |"
        )
    keep("paper_scale", {"arithmetic": True, "options": vars(options), "rows": rows})


if __name__ == "__main__":
    main()
