"""What stands on a model while something is attached: a child module with the parameters, a slot at each site."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from foreword import _interface
from foreword._offloaded import device_of
from foreword._views import SitePrefix
from foreword._wrapped import inside
from foreword.attention import attend
from foreword.encoders import Frozen, PrefixEncoder
from foreword.errors import AttachError
from foreword.memory import Memory
from foreword.sites import Site

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

    def place(self, model: nn.Module, sites: Sequence[Site], trainable: bool) -> None:
        """Move what is ours to the model's device (weight parts are there), and a frozen prefix to its dtype."""
        place = model.get_submodule(sites[0].name) if sites else model
        first = next(place.parameters(), None)
        device = device_of(place if first is not None else model)
        if device.type == "meta":  # by a hook further out
            device = device_of(model)
        own = [self.encoder, self.bias, self.gate, self.reading, self.token_weights]
        for module in [*own, *([self.memory] if self.memory is not None else [])]:
            module.to(device)
        if not trainable and first is not None and first.is_floating_point():
            self.encoder.to(first.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PrefixHolder:
        super()._apply(fn, recurse)
        if self.moved is not None:
            self.moved()
        return self


class SiteSlot(_interface.Slot):
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


def require_detached(model: nn.Module) -> None:
    """Raise AttachError if the model has a prefix or a library on it."""
    if CHILD in model._modules or any(_interface.SLOT in m.__dict__ for m in model.modules()):
        raise AttachError(
            "the model has a prefix attached already; call detach() on what attach returned, give attach a list of "
            "what is to stand together, join two prefixes (Prefix.join), or hold several in a fw.Library"
        )


def tuning_of(model: nn.Module) -> Tuning | None:
    """The prefix that :func:`attach` put onto a model, or None."""
    holder = (model if CHILD in model._modules else inside(model))._modules.get(CHILD)
    return holder.tuning if isinstance(holder, PrefixHolder) else None
