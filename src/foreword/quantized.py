"""Base models whose weights are 8 or 4 bits wide, through transformers' quantisation backends.

A prefix is trained through such a base as through any other: the weights are widened where they are used, in the
backward as well, and stay as they are. torch and transformers are imported inside the functions (see ``models``).
"""

from __future__ import annotations

import ctypes
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from foreword.errors import AttachError, ConfigError, MissingPartError

if TYPE_CHECKING:
    from torch import nn

# What each width can be made by, first what is preferred: torchao's int8 is weights only and needs nothing besides;
# bitsandbytes' nf4 is nearer to the weights than quanto's int4.
BACKENDS = {"int8": ("torchao", "quanto", "bitsandbytes"), "int4": ("bitsandbytes", "quanto")}
_MODULES = {"torchao": "torchao", "quanto": "optimum.quanto", "bitsandbytes": "bitsandbytes"}
_PEFT_IS_ON = "_hf_peft_config_loaded"
_PACKAGES = {"torchao": "torchao", "quanto": "optimum-quanto", "bitsandbytes": "bitsandbytes"}


def quantization_config(wanted: str) -> Any:
    """What ``from_pretrained(quantization_config=...)`` takes.

    Args:
        wanted: ``"int8"`` or ``"int4"``: with the first backend of ``BACKENDS`` that is installed; or with one that is
            named, ``"int4:quanto"``.

    Raises:
        ConfigError: another width, or a backend that does not make it.
        MissingPartError: no backend that makes it is installed.
    """
    width, _, named = wanted.partition(":")
    if width not in BACKENDS or (named and named not in BACKENDS[width]):
        forms = [f"{w}:{b}" for w, backends in BACKENDS.items() for b in backends]
        raise ConfigError(f'quantize={wanted!r}; expected "int8", "int4" or one with its backend: {", ".join(forms)}')
    candidates = (named,) if named else BACKENDS[width]
    backend = next((b for b in candidates if _installed(_MODULES[b])), None)
    if backend is None:
        packages = " or ".join(f"pip install {_PACKAGES[b]}" for b in candidates)
        raise MissingPartError(f"a base in {width} needs a package that is not installed: {packages}")
    return _config(width, backend)


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package that a dotted name is in
        return False


def _config(width: str, backend: str) -> Any:
    import transformers

    if backend == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig

        return transformers.TorchAoConfig(Int8WeightOnlyConfig())
    if backend == "quanto":
        return transformers.QuantoConfig(weights=width)
    if width == "int8":
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    return transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")


def give_back_memory() -> None:
    """Return what the wide weights took to the system (glibc): it would stay with the process, larger than the model.

    Quantising frees the wide weights one by one between the narrow ones that stay, so the C library keeps the gaps.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


@contextmanager
def adapters_are_on(model: nn.Module) -> Iterator[None]:
    """Inside the block, a Trainer takes a quantised base: it asks for adapters on it, and knows PEFT's only."""
    before = model.__dict__.get(_PEFT_IS_ON)
    if getattr(model, "is_quantized", False):
        model.__dict__[_PEFT_IS_ON] = True
    try:
        yield
    finally:
        model.__dict__.pop(_PEFT_IS_ON, None)
        if before is not None:
            model.__dict__[_PEFT_IS_ON] = before


def keep_backward(model: nn.Module) -> None:
    """Have 4-bit weights of bitsandbytes stay in the form that has a backward.

    On CPUs with bf16 instructions it packs them anew in the first forward pass in eval mode, for a kernel without
    one: what stands below gets no gradient then, and nothing says so.

    Raises:
        AttachError: that has happened already.
    """
    for name, module in model.named_modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            raise AttachError(
                f"{name} was packed by bitsandbytes for inference on this CPU (by a forward pass in eval mode), and "
                "gradients do not pass through that; load the model again and attach before it is run"
            )
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False
