"""A trained prefix made smaller: fewer tokens, fewer bits, what that costs on held-out data, and the best of it."""

from foreword.compression.measuring import HeldOut, held_out_loss, token_shares
from foreword.compression.merging import merge
from foreword.compression.pruning import prune
from foreword.compression.result import Compression
from foreword.compression.search import compress
from foreword.compression.shortening import shorten
from foreword.compression.storing import as_stored, halve, low_rank, quantize

__all__ = [
    "Compression",
    "HeldOut",
    "as_stored",
    "compress",
    "halve",
    "held_out_loss",
    "low_rank",
    "merge",
    "prune",
    "quantize",
    "shorten",
    "token_shares",
]
