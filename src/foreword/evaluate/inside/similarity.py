"""How alike two prefixes are, token by token and layer by layer; or the tokens of one prefix."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from foreword.errors import ForewordError, MismatchError
from foreword.evaluate.inside._rows import Unavailable
from foreword.prefix import Prefix


@dataclass(frozen=True)
class Likeness:
    """Of two sets of tokens; 1 is the same.

    Attributes:
        cosine: mean of tokens that stand at the same place (of the shorter set), from -1.
        cka: linear CKA (Kornblith et al. 2019, arXiv 1905.00414) with tokens as the examples, from 0; None: the lengths
            differ, or there are fewer than 2 tokens.
        overlap: mean squared cosine of the angles between the spaces that the tokens span, from 0.
    """

    cosine: float
    cka: float | None
    overlap: float


@dataclass(frozen=True)
class SiteLikeness:
    """Two prefixes at one site. None: not both have virtual tokens here, or a memory.

    Attributes:
        memory: cosine of the memories' matrices.
    """

    name: str
    kind: str
    keys: Likeness | None
    values: Likeness | None
    memory: float | None


@dataclass(frozen=True)
class Similarity:
    """Two prefixes, or one beside itself.

    Attributes:
        keys, values: cosine of each token of the first with each of the second, mean over sites.
        sites: layer by layer.
    """

    keys: list[list[float]]
    values: list[list[float]]
    sites: list[SiteLikeness]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def similarity(prefix: Prefix, other: Prefix, *, force: bool = False) -> Similarity | Unavailable:
    """Compare two prefixes of one base model, at the sites that both stand at; lengths may differ.

    Keys are compared where they stand before the same text: the other prefix is shifted to this one's position.

    Args:
        force: compare prefixes of base models of one shape whose weights differ.

    Raises:
        MismatchError: they belong to different models.
    """
    shapes = {s.name: (s.kv_heads, s.key_dim, s.value_dim) for s in other.sites}
    both = [s for s in prefix.sites if s.name in shapes]
    wrong = next((s for s in both if shapes[s.name] != (s.kv_heads, s.key_dim, s.value_dim)), None)
    if wrong is not None or (prefix.sites and other.sites and not both):
        where = f"at {wrong.name} their heads differ" if wrong else "they stand at no site in common"
        raise MismatchError(
            f"these prefixes can't be compared: {where}. They are of {prefix.fingerprint.model_class or '?'} "
            f"({prefix.fingerprint.base_model or 'unnamed'}) and {other.fingerprint.model_class or '?'} "
            f"({other.fingerprint.base_model or 'unnamed'}); expected two of one base model"
        )
    if not force and (difference := prefix.fingerprint.difference(other.fingerprint)) is not None:
        raise MismatchError(f"these prefixes are of different base models: {difference}")
    tokens = [s.name for s in both if prefix.length(s.name) and other.length(s.name)]
    chosen = [s for s in both if s.name in tokens or (s.name in prefix.memory and s.name in other.memory)]
    if not chosen:
        return Unavailable("the two have no virtual tokens and no memory at the same site")
    if prefix.position_offset != other.position_offset:
        try:
            other = other.shift(prefix.position_offset - other.position_offset)
        except ForewordError as exc:
            return Unavailable(f"they expect text at different positions, and that can't be undone: {exc}")
    matrices = [
        _mean([_cosines(_rows(mine[n]), _rows(theirs[n])) for n in tokens])
        for mine, theirs in ((prefix.keys, other.keys), (prefix.values, other.values))
    ]
    return Similarity(matrices[0], matrices[1], [_of_site(prefix, other, s.name, s.kind) for s in chosen])


def _of_site(prefix: Prefix, other: Prefix, name: str, kind: str) -> SiteLikeness:
    keys = _likeness(prefix.keys[name], other.keys[name])
    values = _likeness(prefix.values[name], other.values[name])
    mine, theirs = (_whole_memory(p, name) for p in (prefix, other))
    memory = None
    if mine is not None and theirs is not None:
        memory = float(torch.cosine_similarity(mine.flatten(), theirs.flatten(), dim=0))
    return SiteLikeness(name, kind, keys, values, memory)


def _likeness(mine: Tensor, theirs: Tensor) -> Likeness | None:
    a, b = _rows(mine), _rows(theirs)
    n = min(len(a), len(b))
    return Likeness(float(torch.cosine_similarity(a[:n], b[:n]).mean()), cka(a, b), overlap(a, b)) if n else None


def _rows(states: Tensor) -> Tensor:
    """``(G, P, dim)`` -> a row a token, ``(P, G * dim)``, float64."""
    return states.detach().cpu().double().transpose(0, 1).flatten(1)


def _cosines(a: Tensor, b: Tensor) -> Tensor:
    return _unit(a) @ _unit(b).T


def _unit(rows: Tensor) -> Tensor:
    """Rows of length 1; those of length 0 stay."""
    return torch.nn.functional.normalize(rows, dim=1)


def _mean(matrices: list[Tensor]) -> list[list[float]]:
    """Mean over sites of the tokens that every one has."""
    if not matrices:
        return []
    height, width = (min(m.shape[i] for m in matrices) for i in (0, 1))
    mean: list[list[float]] = torch.stack([m[:height, :width] for m in matrices]).mean(0).tolist()
    return mean


def cka(a: Tensor, b: Tensor) -> float | None:
    """Linear CKA of ``(P, D)`` and ``(P, E)``, ``|B^T A|^2 / (|A^T A| |B^T B|)`` of centred columns; None: none."""
    if len(a) != len(b) or len(a) < 2:
        return None
    a, b = a - a.mean(0), b - b.mean(0)
    grams = a @ a.T, b @ b.T  # <A A^T, B B^T> = |B^T A|^2, by P x P products
    size = float(grams[0].norm() * grams[1].norm())
    return float((grams[0] * grams[1]).sum()) / size if size else None


def overlap(a: Tensor, b: Tensor) -> float:
    """Mean squared cosine of the principal angles between the row spaces of ``(P, D)`` and ``(Q, D)``."""
    spaces = [_basis(x) for x in (a, b)]
    least = min(len(s) for s in spaces)
    return float((spaces[0] @ spaces[1].T).square().sum()) / least if least else 0.0


def _basis(rows: Tensor) -> Tensor:
    """Orthonormal rows that span the same space."""
    _, sizes, basis = torch.linalg.svd(rows, full_matrices=False)
    return basis[sizes > 1e-6 * sizes[0]] if len(sizes) and sizes[0] > 0 else basis[:0]


def _whole_memory(prefix: Prefix, name: str) -> Tensor | None:
    """A site's memory as one matrix a head, ``(H, key_dim, value_dim)``."""
    if name not in prefix.memory:
        return None
    memory = prefix.memory[name].detach().cpu().double()
    return memory @ prefix.memory_up[name].detach().cpu().double() if name in prefix.memory_up else memory
