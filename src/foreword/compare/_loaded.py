"""What the process that runs are forked from has loaded: nothing that computes."""

import contextlib

import foreword.compare.one
import foreword.compare.probing
import foreword.train.trainer

with contextlib.suppress(ImportError):
    import peft  # noqa: F401

__all__ = ["foreword"]
