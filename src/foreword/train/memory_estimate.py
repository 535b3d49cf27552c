"""What a training step will need in memory, before the run starts.

The weights are counted. What a step keeps for its backward is not guessed from the architecture: a few small steps
run, every tensor that they make is counted for as long as it lives, and that is carried over to the batch asked for
(``foreword.train._live``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sized
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from heapq import nlargest
from typing import Any, cast

import torch
from accelerate.utils import convert_outputs_to_fp32
from rich.table import Table
from torch import Tensor, nn
from transformers import PreTrainedModel

from foreword._choice import LONG_TEXT
from foreword._offloaded import to_the_end
from foreword.attention import attention_path
from foreword.data.mixture import TaskMixture
from foreword.errors import ConfigError
from foreword.train._live import Batch, bytes_of, size_of, step_peak
from foreword.train.trainer import PrefixTrainer

# What AdamW keeps of each trained number; optimizers that keep less are named, by how their name begins.
_ADAMW_BYTES = 8
_STATE_BYTES = {"sgd": 0, "rmsprop": 4, "adagrad": 4, "lion": 4, "adafactor": 0, "lomo": 0}
_LINEAR_CHUNK = 64  # tokens that transformers' linear attention (Qwen3-Next's, say) computes at a time
_WORDS = {
    "base": "base model, as loaded",
    "trained": "what is trained",
    "kept_copy": "its last good copy",
    "gradients": "gradients",
    "optimizer": "optimizer state",
    "once": "a step, whatever the batch",
    "prefix_copies": "a step, for each row whatever its length",
    "activations": "a step, by tokens",
    "logits": "logits and what the loss makes of them",
}


@dataclass(frozen=True)
class MemoryEstimate:
    """The memory at the peak of a training step, in bytes, of one process.

    Attributes:
        base: frozen weights and buffers as they are loaded, shared ones once, quantised ones as they are stored, those
            that are kept elsewhere (offloaded) not: what a step brings in of them is in ``once``.
        trained: parameters that are trained.
        kept_copy: the copy of them that a diverging run is taken back to.
        gradients: those that stand throughout a step: with accumulation; else they are part of the step.
        optimizer: what the optimizer keeps.
        once: what a step has alive at its highest moment whatever its batch.
        prefix_copies: what grows with the rows and not with their tokens: above all the prefix, copied for each row.
        activations: what grows with the tokens, without the logits.
        logits: logits, their softmax and its gradient.
        rows, tokens: the batch it is for.
        checkpointing: whether activations are computed again in the backward instead of kept.
    """

    base: int
    trained: int
    kept_copy: int
    gradients: int
    optimizer: int
    once: int
    prefix_copies: int
    activations: int
    logits: int
    rows: int
    tokens: int
    checkpointing: bool

    @property
    def parts(self) -> dict[str, int]:
        """Bytes by part."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name in _WORDS}

    @property
    def total(self) -> int:
        """Bytes at the peak."""
        return sum(self.parts.values())

    @property
    def step(self) -> int:
        """Bytes that a step needs on top of what stands all the time."""
        return self.once + self.prefix_copies + self.activations + self.logits

    def describe(self) -> str:
        """One line."""
        rest = self.total - self.base - self.step
        return (
            f"about {_readable(self.total)} at the peak of a step on {self.rows} x {self.tokens} tokens: base model "
            f"{_readable(self.base)}, the step {_readable(self.step)} (logits {_readable(self.logits)}), what is "
            f"trained {_readable(rest)}"
        )

    def table(self) -> Table:
        """The parts, for ``rich.console.Console.print``."""
        table = Table(title=f"{self.rows} rows x {self.tokens} tokens" + ", checkpointing" * self.checkpointing)
        table.add_column("part")
        table.add_column("memory", justify="right")
        for name, size in self.parts.items():
            table.add_row(_WORDS[name], _readable(size))
        table.add_section()
        table.add_row("at the peak", _readable(self.total))
        return table

    def to_json(self) -> dict[str, Any]:
        """All fields, and the total."""
        return {**asdict(self), "total": self.total}


def estimate_memory(trainer: PrefixTrainer, batch: Batch | None = None) -> MemoryEstimate:
    """The memory of a training step, from small steps with the trainer's own loss and arguments.

    Nothing of the run changes: not the weights, nor the random state, nor what the model is set to.

    Args:
        batch: what the model would be given; None: the longest examples of the training set, as many as a batch has.

    Raises:
        ConfigError: without a batch: the trainer has no training set whose examples can be looked at.
    """
    batch = batch if batch is not None else longest_batch(trainer)
    model, args = cast(PreTrainedModel, trainer.model), trainer.args
    batch = cast(Batch, trainer._prepare_inputs(batch))
    trained = [p for p in model.parameters() if p.requires_grad]
    size, numbers = bytes_of(trained), sum(p.numel() for p in trained)
    standing = args.gradient_accumulation_steps > 1
    vocabulary = getattr(model.config.get_text_config(), "vocab_size", None)
    rows, tokens = size_of(batch)
    # From here on the attention takes another path, which the small steps are to take as well.
    masked = any(k.endswith("attention_mask") and not bool(v.all()) for k, v in batch.items())
    path = attention_path("merged" if tokens >= LONG_TEXT and not masked else "auto")
    here = [t for t in (*model.parameters(), *model.buffers()) if not t.is_meta]
    with _as_in_training(trainer, model), path:
        linear = any("linear" in str(t) for t in getattr(model.config.get_text_config(), "layer_types", None) or [])
        chunk = _LINEAR_CHUNK if linear else 1
        peak = step_peak(_step(trainer, model, trained, standing), batch, vocabulary, here, chunk)
    everything = bytes_of(here)
    return MemoryEstimate(
        base=everything - size,
        trained=size,
        kept_copy=size,
        # In several processes there is a second copy of them, in the buckets that are sent.
        gradients=size * (int(standing) + int(args.world_size > 1)),
        optimizer=numbers * _state_bytes(str(args.optim)),
        once=peak.once,
        prefix_copies=peak.rows,
        activations=peak.tokens,
        logits=peak.logits,
        rows=rows,
        tokens=tokens,
        checkpointing=bool(args.gradient_checkpointing),
    )


def longest_batch(trainer: PrefixTrainer) -> Batch:
    """The longest examples of the training set in one batch.

    Raises:
        ConfigError: there is no training set, or one that is only streamed.
    """
    data: Any = trainer.train_dataset
    if not isinstance(data, Sized) or not len(data) or not hasattr(data, "__getitem__"):
        raise ConfigError(
            "the memory of a step is estimated on the longest examples, and this training set has no length or no "
            "examples; give estimate_memory a batch"
        )

    def length(index: int) -> int:
        example = data[index]
        named = (example.get(n) for n in ("input_ids", "labels")) if hasattr(example, "get") else ()
        return max((len(v) for v in named if isinstance(v, Sized)), default=0)

    rows = trainer.args.train_batch_size
    longest = nlargest(rows, range(len(data)), key=length)
    if isinstance(data, TaskMixture) and rows > 1 and len(data.parts) > 1:
        # Rows of one task share its prefix, and a batch of several has copies: so is this one, from its first rows on.
        first = data[longest[0]]["task"]
        longest[1] = max((i for i in range(len(data)) if data[i]["task"] != first), key=length)
    collate = trainer._get_collator_with_removed_columns(trainer.data_collator)
    return cast(Batch, collate([data[i] for i in longest]))


def _step(
    trainer: PrefixTrainer, model: PreTrainedModel, trained: list[nn.Parameter], standing: bool
) -> Callable[[Batch], None]:
    def step(batch: Batch) -> None:
        for parameter in trained:
            parameter.grad = None
        if standing:  # made outside of what is counted
            with torch.utils._python_dispatch._disable_current_modes():
                for parameter in trained:
                    parameter.grad = torch.zeros_like(parameter)
        with to_the_end(model):
            with trainer.compute_loss_context_manager():
                loss = cast(Tensor, trainer.compute_loss(model, batch))
            loss.backward()

    return step


@contextmanager
def _as_in_training(trainer: PrefixTrainer, model: PreTrainedModel) -> Iterator[None]:
    """Set the model up as ``train`` does, and back."""
    args, training = trainer.args, model.training
    buffers = [(b, b.clone()) for b in model.buffers()]
    devices = [model.device] if model.device.type == "cuda" else []
    forward = model.__dict__.get("forward")
    with torch.random.fork_rng(devices), torch.enable_grad():
        try:
            model.train()
            if args.gradient_checkpointing:
                wanted = dict(cast(dict[str, Any], args.gradient_checkpointing_kwargs or {"use_reentrant": False}))
                more = {name: wanted.pop(name) for name in ("every_n_layers", "offload") if name in wanted}
                model.gradient_checkpointing_enable(wanted, **more)
            if trainer.accelerator.native_amp:  # as accelerate wraps it, which is not undone there
                model.forward = convert_outputs_to_fp32(_autocast(trainer, model.forward))
            yield
        finally:
            if forward is not None:
                model.forward = forward
            else:
                model.__dict__.pop("forward", None)
            if args.gradient_checkpointing:
                model.gradient_checkpointing_disable()
            model.train(training)
            trainer.tuning._passes.forget()
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)
                for parameter in model.parameters():
                    parameter.grad = None


def _autocast(trainer: PrefixTrainer, forward: Callable[..., Any]) -> Callable[..., Any]:
    def inside(*args: Any, **kwargs: Any) -> Any:
        with trainer.accelerator.autocast():
            return forward(*args, **kwargs)

    return inside


def _state_bytes(optimizer: str) -> int:
    name = optimizer.rsplit(".", 1)[-1].lower()
    if "8bit" in name:
        return 2
    return next((n for start, n in _STATE_BYTES.items() if name.startswith(start)), _ADAMW_BYTES)


def _readable(size: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if abs(size) < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"
