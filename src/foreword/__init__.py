"""foreword: prefix tuning, engineered.

A few virtual tokens before the keys and values of every attention layer of a frozen transformer.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from foreword._boundary import boundary
    from foreword.attention import attention_path
    from foreword.compression import compress
    from foreword.config import PrefixConfig
    from foreword.data.mixture import TaskMixture
    from foreword.errors import (
        AttachError,
        BudgetError,
        ConfigError,
        DataError,
        DeadlineError,
        DivergedError,
        ForewordError,
        InexactWarning,
        MismatchError,
        MissingPartError,
        OverloadedError,
        PrecisionWarning,
        PrefixFileError,
        StoppedError,
        StoreError,
        UnsupportedModelError,
    )
    from foreword.methods import AdapterConfig, BitFitConfig, FullConfig, LoRAConfig, MemoryConfig, PromptConfig
    from foreword.models import load_model
    from foreword.prefix import Prefix
    from foreword.serve.admission import Limits
    from foreword.serve.budget import Budget
    from foreword.serve.engine import Engine
    from foreword.serve.library import Library
    from foreword.serve.request import Sampling
    from foreword.shares import attention_shares
    from foreword.sites import Site, sites
    from foreword.storage import Storage
    from foreword.train.arguments import PrefixTrainingArguments
    from foreword.train.distill import distill
    from foreword.train.growth import Growth
    from foreword.train.meta import MetaResult, meta_train
    from foreword.train.meta_config import MetaConfig
    from foreword.train.monitor import Monitor
    from foreword.train.rollback import RollBack
    from foreword.train.stages import LayerByLayer, Stage
    from foreword.train.trainer import PrefixTrainer
    from foreword.tuning import Tuning, attach

__version__ = "0.1.0"

# Names are looked up when first used, so that `foreword --help` doesn't wait for torch.
_HOMES = {
    "attention_path": "attention",
    "boundary": "_boundary",
    **dict.fromkeys(
        ("AdapterConfig", "BitFitConfig", "FullConfig", "LoRAConfig", "MemoryConfig", "PromptConfig"), "methods"
    ),
    "compress": "compression",
    "PrefixConfig": "config",
    "TaskMixture": "data.mixture",
    "load_model": "models",
    "Prefix": "prefix",
    "Budget": "serve.budget",
    "Engine": "serve.engine",
    "Library": "serve.library",
    "Limits": "serve.admission",
    "Sampling": "serve.request",
    "attention_shares": "shares",
    "Site": "sites",
    "sites": "sites",
    "Storage": "storage",
    "PrefixTrainingArguments": "train.arguments",
    "PrefixTrainer": "train.trainer",
    "distill": "train.distill",
    "Growth": "train.growth",
    "MetaConfig": "train.meta_config",
    "MetaResult": "train.meta",
    "meta_train": "train.meta",
    "Monitor": "train.monitor",
    "RollBack": "train.rollback",
    "LayerByLayer": "train.stages",
    "Stage": "train.stages",
    "Tuning": "tuning",
    "attach": "tuning",
    **dict.fromkeys(
        (
            "AttachError",
            "BudgetError",
            "ConfigError",
            "DataError",
            "DeadlineError",
            "DivergedError",
            "ForewordError",
            "InexactWarning",
            "MismatchError",
            "MissingPartError",
            "OverloadedError",
            "PrecisionWarning",
            "PrefixFileError",
            "StoppedError",
            "StoreError",
            "UnsupportedModelError",
        ),
        "errors",
    ),
}

__all__ = [
    "AdapterConfig",
    "AttachError",
    "BitFitConfig",
    "Budget",
    "BudgetError",
    "ConfigError",
    "DataError",
    "DeadlineError",
    "DivergedError",
    "Engine",
    "ForewordError",
    "FullConfig",
    "Growth",
    "InexactWarning",
    "LayerByLayer",
    "Library",
    "Limits",
    "LoRAConfig",
    "MemoryConfig",
    "MetaConfig",
    "MetaResult",
    "MismatchError",
    "MissingPartError",
    "Monitor",
    "OverloadedError",
    "PrecisionWarning",
    "Prefix",
    "PrefixConfig",
    "PrefixFileError",
    "PrefixTrainer",
    "PrefixTrainingArguments",
    "PromptConfig",
    "RollBack",
    "Sampling",
    "Site",
    "Stage",
    "StoppedError",
    "Storage",
    "StoreError",
    "TaskMixture",
    "Tuning",
    "UnsupportedModelError",
    "attach",
    "attention_path",
    "attention_shares",
    "boundary",
    "compress",
    "distill",
    "load_model",
    "meta_train",
    "sites",
]


class _Package(ModuleType):
    """``foreword.sites`` is a function of ours and a file of the import system's; the function wins."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value.sites if name == "sites" and isinstance(value, ModuleType) else value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'foreword' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"foreword.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
