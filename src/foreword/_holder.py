"""What stands on a model while something is attached: a child module with the parameters, a slot at each site."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from foreword import _interface
from foreword._views import SitePrefix
from foreword.attention import attend
from foreword.encoders import Frozen, PrefixEncoder
from foreword.errors import AttachError
from foreword.memory import Memory

if TYPE_CHECKING:
    from foreword.tuning import Tuning

CHILD = "foreword"


class PrefixHolder(nn.Module):
    """The child module that a model carries: what is trained, gates by site index."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder: PrefixEncoder = Frozen({})
        self.memory: Memory | None = None
        self.bias = nn.ParameterDict()
        self.gate = nn.ParameterDict()
        self.reading = nn.ParameterDict()
        self.token_weights = nn.ParameterDict()  # never trained: log-weights of tokens that stand for several
        self.weights = nn.ModuleDict()  # WeightParts by method
        self.tuning: Tuning | None = None
        self.moved: Callable[[], None] | None = None  # called after .to(), .half() and their like

    def log_weights(self, i: int, keys: Tensor) -> Tensor | None:
        """Of the tokens of the i-th site, ``(1|T, P)``, added to their scores; None: all count alike."""
        name = str(i)
        if name in self.token_weights:
            weights: Tensor = self.token_weights[name]
            return weights.unsqueeze(0)
        return self.encoder.log_weights(keys)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PrefixHolder:
        super()._apply(fn, recurse)
        if self.moved is not None:
            self.moved()
        return self


class SiteSlot:
    """Stands on an attention module and gives its calls the prefix of the pass."""

    def __init__(self, name: str, source: Any) -> None:
        self.name = name
        self.source = source

    def __call__(
        self, delegate: _interface.Delegate, delegate_name: str, module: nn.Module, query: Tensor, key: Tensor,
        value: Tensor, attention_mask: Any, **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        prefix: SitePrefix | None = self.source.view(self.name)
        if prefix is None:
            return delegate(module, query, key, value, attention_mask, **kwargs)
        seen = None if prefix.seen_by is None else self.source.seen(self.name, prefix, query)
        return attend(prefix, delegate, delegate_name, module, query, key, value, attention_mask, seen, **kwargs)


def require_model(model: Any, what: str = "attach") -> None:
    """Raise AttachError if this is no model, or one inside a wrapper that would not show what is attached."""
    if not isinstance(model, nn.Module):
        raise AttachError(
            f"{what} takes a model, and this is a {type(model).__name__}; load it first: "
            "model, tokenizer = fw.load_model(...)"
        )
    if isinstance(getattr(model, "_orig_mod", None), nn.Module):
        raise AttachError(
            f"{what} was given what torch.compile returned; give it the model itself (model._orig_mod). Compile after "
            "attaching, or have the trainer do it: torch_compile=True in its arguments"
        )
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        raise AttachError(
            f"{what} was given a {type(model).__name__}; give it the model inside (model.module). For several GPUs, "
            "attach to the model and launch the script with torchrun or accelerate, which wrap it in the trainer"
        )


def require_detached(model: nn.Module) -> None:
    """Raise AttachError if the model has a prefix or a library on it."""
    require_model(model)
    if CHILD in model._modules or any(_interface.SLOT in m.__dict__ for m in model.modules()):
        raise AttachError(
            "the model has a prefix attached already; call detach() on what attach returned, give attach a list of "
            "what is to stand together, join two prefixes (Prefix.join), or hold several in a fw.Library"
        )


def tuning_of(model: nn.Module) -> Tuning | None:
    """The prefix that :func:`attach` put onto a model, or None."""
    holder = model._modules.get(CHILD)
    return holder.tuning if isinstance(holder, PrefixHolder) else None
