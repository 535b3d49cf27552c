"""What a search may try, and for how long: the space, its points that can be built, and the budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from foreword import _allowance
from foreword.config import DEFAULT_TEXT, PrefixConfig
from foreword.errors import ConfigError
from foreword.methods import usual_learning_rate

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from foreword.sites import Site

REPARAMS = ("direct", "mlp", "low-rank")
FACTORS = (0.1, 3.0)  # of the usual learning rate, where no range is given


@dataclass(frozen=True)
class Budget:
    """How long to search: a number of trials, or seconds spent on trials. Exactly one of them.

    Both are of the whole study: of all its runs, and of all processes that work on it.

    Raises:
        ConfigError: neither or both are given, or one is not above 0.
    """

    trials: int | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        _allowance.check(self.trials, self.seconds, "trials")

    @classmethod
    def parse(cls, text: str) -> Budget:
        """``"20"`` or ``"20 trials"``: trials; ``"300s"``, ``"10m"``, ``"2h"``: time.

        Raises:
            ConfigError: it is neither.
        """
        return cls(*_allowance.parse(text, "trials", 20))


@dataclass(frozen=True)
class Point:
    """One choice of the space, but for the learning rate."""

    reparam: str
    init: str | None
    length: int


@dataclass(frozen=True)
class SearchSpace:
    """What to choose among.

    Attributes:
        lengths: virtual tokens.
        learning_rates: lowest and highest; drawn evenly on a log scale. None: from 0.1 to 3 times what is usual for
            the reparameterisation (``foreword.methods.LEARNING_RATES``).
        inits: starts, as for :class:`PrefixConfig`; None is its general text.
        reparams: reparameterisations.
        base: everything else of the configuration. As it is, it is the *default configuration*, which every search
            tries first and which the best is compared with.

    Raises:
        ConfigError: a list is empty or holds what can't be, or the range is not one.
    """

    lengths: Sequence[int] = (5, 10, 20, 50)
    learning_rates: tuple[float, float] | None = None
    inits: Sequence[str | None] = (None, "random")
    reparams: Sequence[str] = REPARAMS
    base: PrefixConfig = field(default_factory=PrefixConfig)

    def __post_init__(self) -> None:
        for name in ("lengths", "inits", "reparams"):
            values = tuple(dict.fromkeys(getattr(self, name)))
            if not values:
                raise ConfigError(f"{name} is empty; expected at least one to try")
            object.__setattr__(self, name, tuple(sorted(values)) if name == "lengths" else values)
        if wrong := [n for n in self.lengths if n < 1]:
            raise ConfigError(f"a length of {wrong[0]}; expected 1 or more virtual tokens")
        if unknown := [r for r in self.reparams if r not in REPARAMS]:
            raise ConfigError(f"the reparameterisation {unknown[0]!r}; expected some of {', '.join(REPARAMS)}")
        if any(i is not None and not i.strip() for i in self.inits):
            raise ConfigError('a start is an empty text; write a few words about the task, or "random"')
        if self.learning_rates is not None:
            low, high = self.learning_rates
            if not 0 < low <= high < float("inf"):
                raise ConfigError(f"learning rates from {low:g} to {high:g}; expected 0 < lowest <= highest")

    def config(self, point: Point, learning_rate: float | None = None) -> PrefixConfig:
        """The configuration of a point.

        Raises:
            ConfigError: there is none.
        """
        chosen: dict[str, Any] = {"reparam": point.reparam, "init": point.init, "length": point.length}
        return replace(self.base, **chosen, learning_rate=learning_rate)

    def default(self) -> PrefixConfig:
        """The default configuration, with its learning rate."""
        return replace(self.base, learning_rate=self.base.learning_rate or usual_learning_rate(self.base))

    def points(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
    ) -> tuple[list[Point], dict[Point, str]]:
        """The points that can be trained, and what is wrong with the others.

        Raises:
            ConfigError: there is none that can, or the default configuration can't.
        """
        from foreword.sites import sites as find_sites

        found = find_sites(model)
        if wrong := _problem(self.base, found, model, tokenizer):
            raise ConfigError(f"the default configuration, which a search tries first, can't be trained: {wrong}")
        good: list[Point] = []
        bad: dict[Point, str] = {}
        for point in (Point(r, i, n) for r in self.reparams for i in self.inits for n in self.lengths):
            try:
                problem = _problem(self.config(point), found, model, tokenizer)
            except ConfigError as exc:
                problem = str(exc)
            if problem:
                bad[point] = problem
            else:
                good.append(point)
        if not good:
            reasons = "; ".join(list(dict.fromkeys(bad.values()))[:3])
            raise ConfigError(f"no point of the search space can be trained: {reasons}")
        return good, bad

    def to_json(self) -> dict[str, Any]:
        """As JSON can hold it."""
        rates = list(self.learning_rates) if self.learning_rates is not None else None
        return {
            "lengths": list(self.lengths), "learning rates": rates, "inits": list(self.inits),
            "reparams": list(self.reparams), "other options": self.base.to_json(),
        }  # fmt: skip


def _problem(
    config: PrefixConfig, found: Sequence[Site], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> str:
    """Why a configuration can't be trained on the model; empty: it can."""
    from foreword.sites import select

    chosen = select(found, config.sites, config.kinds)
    inits = list(config.init.values()) if not isinstance(config.init, str | None) else [config.init]
    lengths = []
    for init in inits:
        tokens = _tokens(init, model, tokenizer)
        if tokens == 0:
            return f"the init text {init!r} has no token in this tokenizer"
        longest = max(config.site_lengths(chosen, config.length or tokens or 1).values())
        lengths.append(longest)
        repeats = config.repeat or init is None or init.startswith("words:")
        if tokens is not None and longest > tokens and not repeats:
            return f"the init text {init!r} has {tokens} tokens and the prefix {longest}; write more, or repeat it"
    if config.freeze_first and max(lengths) == 1:
        return "a prefix of length 1 whose first token is frozen has nothing to train"
    return ""


def _tokens(init: str | None, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """How many tokens a text has; None where there is no text."""
    if init in ("random", "orthogonal"):
        return None
    text = init if init is not None else DEFAULT_TEXT
    if text.startswith("words:"):
        return sum(len(tokenizer(f" {w}", add_special_tokens=False)["input_ids"]) for w in text[6:].split())
    ids = tokenizer(text)["input_ids"]
    ends = model.config.is_encoder_decoder and ids and ids[-1] == tokenizer.eos_token_id
    return len(ids) - 1 if ends else len(ids)
