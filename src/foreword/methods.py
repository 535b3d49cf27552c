"""The other methods that ``attach`` takes, alone or together with a prefix: one configuration each.

A memory and a prompt stand at the attention like a prefix. LoRA, adapters, BitFit and full fine-tuning change the
layers themselves; they are here to be compared with, and to be combined.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Literal

from foreword.config import PrefixConfig, check_learning_rate
from foreword.errors import ConfigError


@dataclass(frozen=True)
class _Method:
    def __post_init__(self) -> None:
        check_learning_rate(getattr(self, "learning_rate", None))
        for name in ("rank", "width", "length"):
            value = getattr(self, name, None)
            if value is not None and value < 1:
                raise ConfigError(f"{name}={value}; expected 1 or more")
        dropout = getattr(self, "dropout", 0.0)
        if not 0 <= dropout < 1:
            raise ConfigError(f"dropout={dropout}; expected a probability from 0 to below 1")

    def to_json(self) -> dict[str, Any]:
        """As JSON can hold it, with the method's name."""
        record = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}
        return {"method": type(self).method, **record}  # type: ignore[attr-defined]


@dataclass(frozen=True)
class MemoryConfig(_Method):
    """A memory beside the attention (PrefixMemory-Tuning, arXiv 2506.13674): ``o + phi(q)^T M`` per query head.

    Attributes:
        rank: M is a product of this rank; None: M is whole, ``heads * key_dim * value_dim`` numbers a site.
        activation: phi: ``"elu"`` or ``"gelu"``.
        queries: as the model uses them (``"rotated"``, after RoPE), or before their rotation (``"plain"``).
        sites, kinds: as for :class:`~foreword.config.PrefixConfig`.
        learning_rate: None: 1e-3. A memory diverges where a prefix begins to learn.
    """

    method: ClassVar[str] = "memory"
    rank: int | None = None
    activation: Literal["elu", "gelu"] = "elu"
    queries: Literal["rotated", "plain"] = "rotated"
    sites: str | Sequence[str | int] | None = None
    kinds: Sequence[str] = ("self", "cross", "encoder")
    learning_rate: float | None = None
    seed: int = field(default=0, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "kinds", tuple(self.kinds))
        for name, allowed in (("activation", ("elu", "gelu")), ("queries", ("rotated", "plain"))):
            if (value := getattr(self, name)) not in allowed:
                raise ConfigError(f"{name}={value!r}; expected one of {', '.join(map(repr, allowed))}")


@dataclass(frozen=True)
class PromptConfig(_Method):
    """Prompt tuning (Lester et al. 2021, arXiv 2104.08691): virtual tokens at the input embeddings only.

    A causal model computes the same keys and values for them whatever the text is, so they run through the layers
    once a pass instead of once a row, and what is saved is a prefix like any other. In an encoder-decoder model they
    stand before the encoder's input, and what is saved is their embeddings.

    Attributes:
        length: virtual tokens; None: as many as the text of ``init`` has.
        init: a text whose embeddings they start from; ``"vocabulary"``: of random frequent tokens; ``"random"``; None
            for a general task text.
        repeat: whether a text shorter than ``length`` is repeated.
        position_offset: position that the text starts at; the length of the prompt makes models with learned
            positions see it as real tokens. (``visible`` and this are for decoder-only models.)
        learning_rate: None: 0.3 for a text or vocabulary start.
    """

    method: ClassVar[str] = "prompt"
    length: int | None = 20
    init: str | None = None
    repeat: bool = False
    visible: str = "all"
    position_offset: int = 0
    learning_rate: float | None = None
    seed: int = field(default=0, repr=False)


@dataclass(frozen=True)
class LoRAConfig(_Method):
    """LoRA (Hu et al. 2021, arXiv 2106.09685) through PEFT: a low-rank change of linear layers.

    Attributes:
        rank, alpha, dropout: PEFT's ``r``, ``lora_alpha`` and ``lora_dropout``.
        targets: names of linear layers; None: PEFT's choice for the model (usually q and v).
        options: further fields of ``peft.LoraConfig`` (``use_dora``, ``use_rslora``, …).
        learning_rate: None: 3e-3.
    """

    method: ClassVar[str] = "lora"
    rank: int = 8
    alpha: int = 16
    dropout: float = 0.0
    targets: str | Sequence[str] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    learning_rate: float | None = None
    seed: int = field(default=0, repr=False)


@dataclass(frozen=True)
class AdapterConfig(_Method):
    """Bottleneck adapters: ``h + W_up act(W_down h)`` on a sublayer's output, W_up from zero.

    Attributes:
        width: of the bottleneck.
        style: ``"houlsby"`` (arXiv 1902.00751): after attention and feed-forward; ``"pfeiffer"`` (arXiv 2005.00247):
            after the feed-forward only.
        activation: ``"relu"`` or ``"gelu"``.
        learning_rate: None: 1e-3.
    """

    method: ClassVar[str] = "adapter"
    width: int = 32
    style: Literal["houlsby", "pfeiffer"] = "houlsby"
    activation: Literal["relu", "gelu"] = "relu"
    learning_rate: float | None = None
    seed: int = field(default=0, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, allowed in (("style", ("houlsby", "pfeiffer")), ("activation", ("relu", "gelu"))):
            if (value := getattr(self, name)) not in allowed:
                raise ConfigError(f"{name}={value!r}; expected one of {', '.join(map(repr, allowed))}")


@dataclass(frozen=True)
class BitFitConfig(_Method):
    """BitFit (Ben Zaken et al. 2021, arXiv 2106.10199): only the biases are trained.

    Attributes:
        missing: what to do in models without biases (Llama's kin): ``"error"``, or ``"add"`` biases of zero to their
            linear layers.
        learning_rate: None: 1e-3.
    """

    method: ClassVar[str] = "bitfit"
    missing: Literal["error", "add"] = "error"
    learning_rate: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.missing not in ("error", "add"):
            raise ConfigError(f"missing={self.missing!r}; expected 'error' or 'add'")


@dataclass(frozen=True)
class FullConfig(_Method):
    """Full fine-tuning: every parameter is trained (and put back by ``detach``: it costs a copy of the model).

    Attributes:
        parameters: a regular expression over parameter names; None: all.
        learning_rate: None: 2e-5.
    """

    method: ClassVar[str] = "full"
    parameters: str | None = None
    learning_rate: float | None = None


Config = PrefixConfig | MemoryConfig | PromptConfig | LoRAConfig | AdapterConfig | BitFitConfig | FullConfig

# A prefix moves far more per step than weights do, and each way of making it has a step of its own.
LEARNING_RATES = {
    "direct": 2e-2, "low-rank": 5e-3, "mlp": 1e-3, "memory": 1e-3, "prompt": 0.3, "lora": 3e-3, "adapter": 1e-3,
    "bitfit": 1e-3, "full": 2e-5, "head": 1e-3,
}  # fmt: skip


def usual_learning_rate(config: Config) -> float:
    """What a method is usually trained with (the same for every model: a start to search from)."""
    return LEARNING_RATES[config.reparam if isinstance(config, PrefixConfig) else config.method]
