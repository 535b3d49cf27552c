"""What a model, as it stands, writes for many inputs: in batches of like lengths, the same again from the same seed.

The input becomes the same tokens as in training (:func:`foreword.data.encode.prompt_ids`); the output ends where
training taught it to, at the tokenizer's end token, or at the model's own.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from foreword.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Input = str | Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Decoding:
    """How to write; greedy unless told otherwise.

    Attributes:
        max_new_tokens: the most tokens of an output.
        beams: width of beam search; 1: none.
        length_penalty: beam scores are divided by length to this power: above 1 for longer texts.
        sample: draw tokens instead of taking the likeliest.
        temperature, top_p, top_k: of drawing; ``top_k`` 0 is all tokens.
        no_repeat: no n-gram of this size twice in an output; 0: any.
        stop: an output ends before this text, e.g. a line end.
        max_input_tokens: a longer input loses its start, as in training; None: none does.
        seed: of drawing.
    """

    max_new_tokens: int = 64
    beams: int = 1
    length_penalty: float = 1.0
    sample: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    no_repeat: int = 0
    stop: str | None = None
    max_input_tokens: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("max_new_tokens", 1), ("beams", 1), ("top_k", 0), ("no_repeat", 0)):
            if (value := getattr(self, name)) < least:
                raise ConfigError(f"{name}={value}; expected {least} or more")
        if self.sample and self.beams > 1:
            raise ConfigError(f"sample=True with beams={self.beams}; choose drawing or beam search")
        if not self.temperature > 0 or not 0 < self.top_p <= 1:
            raise ConfigError(
                f"temperature={self.temperature} and top_p={self.top_p}; expected above 0, and above 0 up to 1"
            )
        if self.stop == "":
            raise ConfigError("stop is an empty text, which is everywhere; leave it out, or give e.g. a line end")

    @classmethod
    def paper(cls, task: str = "table", **changes: Any) -> Decoding:
        """Prefix-Tuning's own (Li & Liang 2021, section 5.2): ``table``: 5 beams; ``summary``: 6 beams, penalty 0.8.

        For tables the paper names no length penalty, and its code leaves transformers' default, 1.
        """
        if task not in ("table", "summary"):
            raise ConfigError(f"Decoding.paper({task!r}); the paper's tasks are 'table' and 'summary'")
        own = {"beams": 5, "length_penalty": 1.0} if task == "table" else {"beams": 6, "length_penalty": 0.8}
        return cls(**{**own, **changes})

    def options(self) -> dict[str, Any]:
        """The same as arguments of ``generate``."""
        found: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "num_beams": self.beams}
        found |= {"do_sample": self.sample, "no_repeat_ngram_size": self.no_repeat}
        if self.beams > 1:
            found |= {"length_penalty": self.length_penalty, "early_stopping": False}
        if self.sample:
            found |= {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        return found

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Batch:
    """What was written in one go.

    Attributes:
        number: which batch it is; the order of batches depends on the inputs alone.
        rows: places of its inputs.
        texts: what was written for them.
    """

    number: int
    rows: tuple[int, ...]
    texts: tuple[str, ...]


def predict(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    inputs: Sequence[Input],
    *,
    settings: Decoding | None = None,
    batch_size: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """What the model writes for each input, without the input.

    Args:
        model: as it stands: a prefix counts if one is attached. It is in eval mode meanwhile.
        inputs: texts, or conversations for the model to answer (lists of ``{"role", "content"}``).
        settings: how to write; None: greedily, up to 64 tokens.
        progress: called with how many inputs are done, and how many there are.

    Raises:
        DataError: an input has no tokens, or is a conversation and the tokenizer has no chat template.
        ConfigError: ``batch_size`` is below 1.
    """
    found = [""] * len(inputs)
    done = 0
    for batch in batches(model, tokenizer, inputs, settings=settings, batch_size=batch_size):
        for row, text in zip(batch.rows, batch.texts, strict=True):
            found[row] = text
        done += len(batch.rows)
        if progress is not None:
            progress(done, len(inputs))
    return found


def batches(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    inputs: Sequence[Input],
    *,
    settings: Decoding | None = None,
    batch_size: int = 8,
    skip: Collection[int] = (),
) -> Iterator[Batch]:
    """The same batch by batch, as each is done. Those numbered in ``skip`` are left out, and change nothing else."""
    from foreword.data.encode import prompt_ids
    from foreword.sites import evaluating

    if batch_size < 1:
        raise ConfigError(f"batch_size={batch_size}; expected 1 or more")
    settings = settings or Decoding()
    ids = prompt_ids(
        inputs, tokenizer, seq2seq=bool(model.config.is_encoder_decoder), max_length=settings.max_input_tokens
    )
    # The longest first: if the memory is too small, that shows at once.
    order = sorted(range(len(ids)), key=lambda i: (-len(ids[i]), i))
    with evaluating(model):
        for number, start in enumerate(range(0, len(order), batch_size)):
            if number not in skip:
                rows = tuple(order[start : start + batch_size])
                texts = _written(model, tokenizer, [ids[i] for i in rows], settings, number)
                yield Batch(number, rows, tuple(texts))


def _written(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[list[int]],
    settings: Decoding,
    number: int,
) -> list[str]:
    import torch

    from foreword.generation import write_on

    options = settings.options() | _ends(model, tokenizer)
    stop = settings.stop
    # Among beams, others may still be worth going on with.
    if stop and settings.beams == 1 and _can_write(tokenizer, stop):
        options["stop_strings"] = [stop]
    with torch.random.fork_rng():
        torch.manual_seed(1_000_003 * settings.seed + number)  # a batch's own, whichever ran before it
        texts = write_on(model, tokenizer, rows, **options)
    return [text if stop is None else text.partition(stop)[0] for text in texts]


def _ends(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The tokens that end an output: the model's own, and the tokenizer's, which training put there."""
    own: Any = getattr(model.generation_config, "eos_token_id", None)
    ends = {*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id} - {None}
    return {"eos_token_id": sorted(ends)} if ends else {}


def _can_write(tokenizer: PreTrainedTokenizerBase, text: str) -> bool:
    """Whether the vocabulary has tokens for a text; generate refuses to wait for one that it has not."""
    return text in tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"])
