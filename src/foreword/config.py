"""What a prefix should be: how long, where, from what, how trained, how strong."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from foreword.errors import ConfigError
from foreword.sites import Site
from foreword.visibility import Predicate, parse

DEFAULT_TEXT = (
    "Read the text carefully, keep to its subject and style, and write what comes next: "
    "a clear, natural and complete answer in plain words."
)

_CHOICES = {
    "reparam": ("direct", "mlp", "low-rank"),
    "gate": (None, "head", "zero", "input"),
    "head": (None, "sequence", "token", "question", "choice"),
    "share": (None, "layers", "keys"),
}


def check_learning_rate(value: float | None, name: str = "learning_rate") -> None:
    """Raise ConfigError unless it is None or a positive number."""
    if value is not None and not 0 < value < float("inf"):
        raise ConfigError(f"{name}={value}; expected a positive number, or None for the usual one")


@dataclass(frozen=True)
class PrefixConfig:
    """A prefix to be trained (Li & Liang 2021, arXiv 2101.00190).

    Attributes:
        length: virtual tokens at each site; None: as many as the text of ``init`` has.
        init: a text whose keys and values the prefix starts from (the best start by far); ``"words:good film"``
            for words each read on its own; ``"random"``, scaled to the model's own keys and values; None for a
            general task text. With ``tasks``, a mapping from each of them to a start of its own as well, where
            ``"*"`` is for those that it doesn't name and for the ``common`` tokens; or ``"orthogonal"``: random, each
            task in a subspace of its own (``foreword.orthogonal``).
        repeat: whether an ``init`` text shorter than ``length`` is repeated (it is refused otherwise).
        reparam: what is trained: ``"direct"`` the keys and values, ``"mlp"`` an MLP that makes them (the paper's,
            with ``init="random"``; from a text, the MLP adds to it and starts at zero), ``"low-rank"`` a product
            added to the start.
        depth: layers of the MLP, 1 to 3. The paper has 2, with tanh between.
        hidden: width of the MLP and of the embedding that it reads.
        orthogonal: whether the MLP's layers start orthogonal instead of at PyTorch's usual random numbers.
        rank: rank of the low-rank product.
        per_kind: one MLP for each attention kind (the paper's BART) instead of one for all.
        sites: which attention sites: ``"first:4"``, ``"last:4"``, ``"every:2"`` (of each kind), a regular expression
            over whole names, a list of names or layer numbers, or None for all outside vision and audio towers.
        kinds: which kinds of site: some of ``self``, ``cross``, ``encoder``.
        lengths: other lengths by pattern over site names; the first that matches holds. 0: no prefix there.
        visible: which positions of the text see the prefix: ``"all"``; ``"infix"``: those after the input
            ([x; INFIX; y]), ``"infix:2"``: and the input's last 2; ``"first:16"``; ``"window:4:32"``; or a function
            from positions ``(B, S)`` to a bool tensor (which can't be saved).
        gate: None; ``"head"``: a learned weight per head on the prefix, from 1; ``"input"``: one for each query, read
            off the query, from 1; ``"zero"``: zero-initialised gated attention (LLaMA-Adapter), so that training
            starts at the base model exactly.
        strength: weight of the prefix against the text, 1 as trained, 0 none.
        dropout: probability of dropping each number of the prefix in training (P-Tuning v2).
        freeze_first: keep the first virtual token as initialised (the attention sink).
        position_offset: position that the text starts at. 0 keeps the base model's positions.
        head: train the model's own head as well and save it with the prefix (P-Tuning v2): ``"sequence"``,
            ``"token"``, ``"question"`` or ``"choice"``, which must be what the model has.
        tasks: names, for a prefix each in one run; each row of a batch says its own: ``model(..., task=[...])``.
        common: how many of the first virtual tokens are one set for all ``tasks``; the others are each task's own.
        condition: numbers in a vector that each row's prefix is made from: ``model(..., condition=(B, C))``. Needs
            ``reparam="mlp"``.
        share: None; ``"layers"``: one MLP makes each site's keys and values, told which (for ``reparam="mlp"``);
            ``"keys"``: ``tasks`` share their keys and have values of their own (for ``reparam="direct"``).
        learning_rate: of this part; None: the trainer's, or what is usual for the reparameterisation.
        head_learning_rate: of the head; None: 1e-3.
        seed: of the initialisation.
    """

    length: int | None = 20
    init: str | Mapping[str, str | None] | None = None
    repeat: bool = False
    reparam: Literal["direct", "mlp", "low-rank"] = "direct"
    depth: int = 2
    hidden: int = 512
    orthogonal: bool = False
    rank: int = 8
    per_kind: bool = False
    sites: str | Sequence[str | int] | None = None
    kinds: Sequence[str] = ("self", "cross", "encoder")
    lengths: Mapping[str, int] | None = None
    visible: str | Predicate = "all"
    gate: Literal["head", "zero", "input"] | None = None
    strength: float = 1.0
    dropout: float = 0.0
    freeze_first: bool = False
    position_offset: int = 0
    head: Literal["sequence", "token", "question", "choice"] | None = None
    tasks: Sequence[str] = ()
    common: int = 0
    condition: int | None = None
    share: Literal["layers", "keys"] | None = None
    learning_rate: float | None = None
    head_learning_rate: float | None = None
    seed: int = field(default=0, repr=False)

    def __post_init__(self) -> None:
        for name in ("kinds", "tasks"):
            if isinstance(value := getattr(self, name), str):
                raise ConfigError(f"{name}={value!r} is one text; expected a list, e.g. {name}=({value!r},)")
            object.__setattr__(self, name, tuple(value))  # JSON gives a list
        for name, allowed in _CHOICES.items():
            if (value := getattr(self, name)) not in allowed:
                raise ConfigError(f"{name}={value!r}; expected one of {', '.join(map(repr, allowed))}")
        for name, least in (("depth", 1), ("hidden", 1), ("rank", 1), ("position_offset", 0), ("common", 0)):
            if (value := getattr(self, name)) < least:
                raise ConfigError(f"{name}={value}; expected {least} or more")
        if self.depth > 3:
            raise ConfigError(f"depth={self.depth}; the MLP has 1, 2 or 3 layers")
        if self.length is not None and self.length < 1:
            raise ConfigError(f"length={self.length}; expected 1 or more virtual tokens")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout={self.dropout}; expected a probability from 0 to below 1")
        if not 0 <= self.strength < float("inf"):
            raise ConfigError(f"strength={self.strength}; expected 0 (no prefix) or a positive factor")
        check_learning_rate(self.learning_rate)
        check_learning_rate(self.head_learning_rate)
        if self.head_learning_rate is not None and self.head is None:
            raise ConfigError("head_learning_rate is that of a trained head; say which with head=, or leave it out")
        parse(self.visible)
        for init in self.init.values() if isinstance(self.init, Mapping) else [self.init]:
            self._check_init(init)
        self._check_lengths()
        self._check_given()

    def _check_init(self, init: str | None) -> None:
        if init is not None and not init.strip():
            raise ConfigError('init is an empty text; write a few words about the task, or use init="random"')
        if (init or "").startswith("words:") and not (init or "")[6:].split():
            raise ConfigError('init="words:" names no word; write e.g. init="words:film review praise"')
        if self.length is None and (init is None or init in ("random", "orthogonal")):
            raise ConfigError("length=None takes the length of the init text; give a text, or a length")

    def _check_lengths(self) -> None:
        for pattern, length in (self.lengths or {}).items():
            try:
                re.compile(pattern)
            except re.error as exc:
                raise ConfigError(f"lengths has {pattern!r}, which is not a regular expression: {exc}") from None
            if length < 0:
                raise ConfigError(f"lengths[{pattern!r}]={length}; expected 0 (no prefix there) or more")

    def _check_given(self) -> None:
        """What rows are given (tasks, conditions), and what encoders share."""
        for name in self.tasks:
            if not re.fullmatch(r"\w[\w.-]*", name):
                raise ConfigError(f"the task name {name!r} can't name a folder; use letters, digits, _ . and -")
        if len(set(self.tasks)) < len(self.tasks):
            raise ConfigError(f"tasks={self.tasks!r} names a task twice; expected different names")
        self._check_starts()
        self._check_common()
        if self.share == "keys" and not (self.tasks and self.reparam == "direct"):
            raise ConfigError('share="keys" is for several tasks with reparam="direct"; name them: tasks=("a", "b")')
        if self.orthogonal and self.reparam != "mlp":
            raise ConfigError('orthogonal=True is about the layers of an MLP; use reparam="mlp" with it')
        if self.share == "layers" and self.reparam != "mlp":
            raise ConfigError('share="layers" shares an MLP; use reparam="mlp" with it')
        if self.condition is None:
            return
        if self.condition < 1:
            raise ConfigError(f"condition={self.condition}; expected how many numbers a condition vector has")
        if self.tasks:
            raise ConfigError("tasks and condition can't be used together; make the task a part of the vector")
        if self.reparam != "mlp" or self.depth < 2:
            raise ConfigError(
                f"condition={self.condition} needs an MLP of 2 or 3 layers that reads the vector (of 1, all tokens "
                'would move alike); use reparam="mlp"'
            )

    def _check_starts(self) -> None:
        """Starts by task."""
        if isinstance(self.init, Mapping):
            unknown, missing = set(self.init) - {*self.tasks, "*"}, set(self.tasks) - set(self.init)
            if unknown or not self.tasks or (missing and "*" not in self.init):
                raise ConfigError(
                    f"init names {sorted(self.init)} and tasks {sorted(self.tasks)}; expected a start for each task "
                    '("*" is for those that are not named)'
                )
            if "orthogonal" in self.init.values():
                raise ConfigError('"orthogonal" is a start for all tasks together; give init="orthogonal"')
        if self.init == "orthogonal" and len(self.tasks) < 2:
            raise ConfigError(
                f'init="orthogonal" keeps tasks apart, and there are {len(self.tasks)}; name two or more '
                '(tasks=("a", "b")), or use init="random"'
            )

    def _check_common(self) -> None:
        """Tokens that all tasks share."""
        if not self.common:
            return
        if not self.tasks:
            raise ConfigError(f'common={self.common} is shared by tasks; name them: tasks=("a", "b")')
        lengths = [n for n in (self.length, *(self.lengths or {}).values()) if n]
        if lengths and self.common >= min(lengths):
            raise ConfigError(
                f"common={self.common} of {min(lengths)} virtual tokens leaves the tasks none of their own; expected "
                "fewer, or a greater length"
            )
        if self.freeze_first and self.common == 1:
            raise ConfigError("common=1 with freeze_first leaves nothing common to train; use 2 or more, or 0")

    def start_of(self, task: str) -> str | None:
        """The ``init`` of one task; ``"*"``: of the common tokens."""
        return self.init.get(task, self.init.get("*")) if isinstance(self.init, Mapping) else self.init

    def site_lengths(self, chosen: Sequence[Site], length: int) -> dict[str, int]:
        """Virtual tokens at each site, sites of length 0 left out.

        Raises:
            ConfigError: a pattern of ``lengths`` matches no site, or no site is left.
        """
        found: dict[str, int] = {}
        used: set[str] = set()
        for site in chosen:
            found[site.name] = length
            for pattern, n in (self.lengths or {}).items():
                if re.fullmatch(pattern, site.name):
                    found[site.name] = n
                    used.add(pattern)
                    break
        if unused := [p for p in self.lengths or {} if p not in used]:
            raise ConfigError(f"lengths has {unused[0]!r}, which matches no site such as {chosen[0].name!r}")
        found = {name: n for name, n in found.items() if n}
        if not found:
            raise ConfigError("lengths leaves no site with a virtual token")
        return found

    def to_json(self) -> dict[str, Any]:
        """As JSON can hold it; ``PrefixConfig(**...)`` reads it back."""
        record = asdict(self)
        record["kinds"], record["tasks"] = list(self.kinds), list(self.tasks)
        if callable(self.visible):
            record["visible"] = "function"
        if self.sites is not None and not isinstance(self.sites, str):
            record["sites"] = list(self.sites)
        return record
