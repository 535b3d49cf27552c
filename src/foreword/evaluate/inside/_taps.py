"""What attention calls give: a slot over the slot that a site has (or over none), which keeps the output."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from foreword import _interface


class Tap(_interface.Slot):
    """Stands on an attention module, does what stood there before, and keeps what came out.

    Attributes:
        bare: whether the call goes by what stood there, to the model's own attention.
        out: of the last call, ``(B, S, H, value_dim)``; None: there was none.
    """

    def __init__(self, slot: _interface.Slot | None) -> None:
        self.slot = slot
        self.bare = False
        self.out: Tensor | None = None

    def __call__(
        self, delegate: _interface.Delegate, delegate_name: str, module: nn.Module, query: Tensor, key: Tensor,
        value: Tensor, attention_mask: Any, **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        if self.slot is None or self.bare:
            out = delegate(module, query, key, value, attention_mask, **kwargs)
        else:
            out = self.slot(delegate, delegate_name, module, query, key, value, attention_mask, **kwargs)
        self.out = out[0]
        return out


@contextmanager
def tapped(model: PreTrainedModel, names: Iterable[str]) -> Iterator[dict[str, Tap]]:
    """Inside the block, a tap stands on each of these attention modules, for the passes of this thread."""
    modules = {name: model.get_submodule(name) for name in names}
    taps = {name: Tap(_interface.slot_of(module)) for name, module in modules.items()}
    with _interface.slots_over({module: taps[name] for name, module in modules.items()}):
        yield taps
