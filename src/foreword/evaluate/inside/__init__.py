"""Inside a prefix: what it does to a model's attention, in numbers and pictures.

Each diagnostic is a function that returns a dataclass with ``to_json()``, or :class:`Unavailable` with the reason why
this prefix or model has none; ``look`` runs all of them, ``write_page`` makes one page of it.
"""

from __future__ import annotations

from ._rows import Unavailable
from .attention import AttentionShare, Dilution, SiteShare, attention_share, dilution
from .layers import LayerLosses, layer_losses
from .look import PARTS, Look, look
from .norms import Norms, SiteNorms, norms
from .page import write_page
from .similarity import Likeness, Similarity, SiteLikeness, similarity
from .spectrum import SiteSpectrum, Spectrum, methods_of, spectrum
from .texts import batches_of
from .words import Lens, SiteWords, lens

__all__ = [
    "PARTS",
    "AttentionShare",
    "Dilution",
    "LayerLosses",
    "Lens",
    "Likeness",
    "Look",
    "Norms",
    "Similarity",
    "SiteLikeness",
    "SiteNorms",
    "SiteShare",
    "SiteSpectrum",
    "SiteWords",
    "Spectrum",
    "Unavailable",
    "attention_share",
    "batches_of",
    "dilution",
    "layer_losses",
    "lens",
    "look",
    "methods_of",
    "norms",
    "similarity",
    "spectrum",
    "write_page",
]
