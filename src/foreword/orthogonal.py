"""Tasks in subspaces of their own: a start by QR, and a measure of how much they share that can be a penalty.

A query head reads the keys and values of one key/value head, so what a task can do there lies in the span of its
tokens, in ``key_dim`` or ``value_dim`` dimensions. Two tasks' outputs are orthogonal whatever the attention weights
just when their values are so in every head. Where the tokens of all tasks are more than a head has dimensions, the
heads of a site are taken together (``kv_heads * dim``): less than that, and the most that there is room for.

Keeping tasks apart by orthogonal subspaces is O-LoRA's idea (arXiv 2310.14152, eq. 8, for the factors of LoRA). Here
the entries are cosines, so that scaling a token up or down makes no difference.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from foreword.encoders import PrefixEncoder
from foreword.errors import ConfigError
from foreword.sites import Site


def in_spaces(states: Tensor) -> Tensor:
    """Tokens of T tasks in the spaces that they can be orthogonal in: ``(T, G, P, D)`` -> ``(S, T * P, C)``.

    S is G and C is D where all tokens fit into a head; else S is 1 and C is G * D.
    """
    tasks, heads, length, dim = states.shape
    if tasks * length <= dim:
        return states.transpose(0, 1).reshape(heads, tasks * length, dim)
    return states.transpose(1, 2).reshape(1, tasks * length, heads * dim)


def check_room(sites: Mapping[str, Site], lengths: Mapping[str, int], tasks: int) -> None:
    """Raise ConfigError where ``tasks * length`` orthogonal tokens don't fit into a site."""
    for name, length in lengths.items():
        site = sites[name]
        room = site.kv_heads * min(site.key_dim, site.value_dim)
        if tasks * length > room:
            raise ConfigError(
                f'init="orthogonal": {tasks} tasks of {length} tokens of their own are {tasks * length} directions, '
                f"and {name} has {room} ({site.kv_heads} heads of {min(site.key_dim, site.value_dim)}); use "
                f"{room // tasks} tokens or fewer for each, fewer tasks, or another start with the penalty instead "
                "(PrefixTrainingArguments(orthogonality=...))"
            )


def orthogonalised(states: Tensor) -> Tensor:
    """The same tokens made orthogonal by QR, each of its own length: ``(T, G, P, D)``.

    In each space (``in_spaces``) a token keeps what is orthogonal to those before it, so numbers drawn at a
    model's scale, dimension by dimension, keep it about.
    """
    tasks, heads, length, dim = states.shape
    rows = in_spaces(states.double())
    q, r = torch.linalg.qr(rows.mT)  # (S, C, T * P), (S, T * P, T * P)
    signs = torch.where(r.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0)
    made = q.mT * (signs * rows.norm(dim=-1)).unsqueeze(-1)
    if len(made) == heads and made.shape[-1] == dim:
        made = made.view(heads, tasks, length, dim).transpose(0, 1)
    else:
        made = made.view(tasks, length, heads, dim).transpose(1, 2)
    return made.to(states.dtype).contiguous()


def overlap(states: Tensor) -> Tensor:
    """How much two tasks share at a site: ``(T, G, P, D)`` -> ``(T, T)``, from 0 to 1.

    The mean squared cosine between a token of one and a token of the other, over the spaces of ``in_spaces``. It is 0
    just when they are orthogonal, does not change when a token is scaled, and has a finite gradient for tokens of 0.
    Tokens in random directions give 1 / C.
    """
    tasks, _, length, _ = states.shape
    rows = torch.nn.functional.normalize(in_spaces(states.float()), dim=-1, eps=1e-6)
    squares = (rows @ rows.mT).square()  # (S, T * P, T * P)
    return squares.unflatten(2, (tasks, length)).unflatten(1, (tasks, length)).mean((0, 2, 4))


def penalty(encoder: PrefixEncoder, tasks: int) -> Tensor:
    """The mean :func:`overlap` over pairs of tasks, keys and values, and sites, of the trained tokens of their own.

    Tokens that are common to all tasks, a frozen first one, and keys that tasks share have no part in it.
    """
    given = torch.arange(tasks, device=next(encoder.parameters()).device)
    active = None if encoder.active is None else encoder.active - encoder.freeze_first
    apart = torch.triu_indices(tasks, tasks, 1, device=given.device)
    found = []
    for keys, values in encoder.encode(given):
        for states in (values,) if getattr(encoder, "share_keys", False) else (keys, values):
            own = states[..., encoder.common : active, :]
            if own.shape[-2]:
                found.append(overlap(own)[apart[0], apart[1]].mean())
    return torch.stack(found).mean() if found else torch.zeros((), device=given.device)
