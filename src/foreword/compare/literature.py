"""What the literature reports for the presets' questions: other models, other budgets, so not to be ranked with ours.

Li & Liang 2021 is "Prefix-Tuning: Optimizing Continuous Prompts for Generation", ACL 2021, 2021.acl-long.353; Hu et al.
2021 is "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

_PREFIX, _LORA = "Li & Liang 2021 (ACL)", "Hu et al. 2021 (arXiv 2106.09685)"
_E2E = ["", "BLEU", "NIST", "METEOR", "ROUGE-L", "CIDEr"]


@dataclass(frozen=True)
class Reported:
    """What a paper reports.

    Attributes:
        where: paper and table.
        setting: the model and the data.
        cells: a table, its head first; empty: it is a finding in words.
        said: the finding, in our words.
    """

    where: str
    setting: str
    cells: tuple[tuple[str, ...], ...] = ()
    said: str = ""


def _table(where: str, setting: str, head: list[str], *rows: str, said: str = "") -> Reported:
    """Each row is written ``name | number number …``."""
    split = (row.split(" | ") for row in rows)
    return Reported(where, setting, (tuple(head), *((name, *numbers.split()) for name, numbers in split)), said)


LITERATURE: Mapping[str, tuple[Reported, ...]] = {
    "methods": (
        _table(
            f"{_PREFIX}, Table 2", "GPT-2 medium on all of E2E, beam search of 5", _E2E,
            "full fine-tuning | 68.8 8.71 46.1 71.1 2.43", "the top two layers | 68.1 8.59 46.0 70.8 2.41",
            "adapter, 3 % | 68.9 8.71 46.1 71.3 2.47", "adapter, 0.1 % | 66.3 8.41 45.0 69.8 2.40",
            "prefix, 0.1 % | 70.3 8.82 46.3 72.1 2.46",
        ),
        _table(
            f"{_LORA}, Table 3", "GPT-2 medium on all of E2E", _E2E,
            "prefix, 0.35M (from the first version of the paper above) | 69.7 8.81 46.1 71.4 2.49",
            "LoRA, 0.35M | 70.4 8.85 46.8 71.8 2.53",
        ),
    ),
    "placement": (
        _table(
            f"{_PREFIX}, Table 5", "GPT-2 medium on all of E2E", _E2E,
            "prefix | 70.3 8.82 46.3 72.1 2.46",
            "embedding only, 1 token | 48.1 3.33 32.1 60.2 1.10", "embedding only, 10 | 62.2 6.70 38.6 66.4 1.75",
            "embedding only, 20 | 61.9 7.11 39.3 65.6 1.85",
            "infix, 1 token | 67.9 8.63 45.8 69.4 2.42", "infix, 10 | 67.2 8.48 45.8 69.9 2.40",
            "infix, 20 | 66.7 8.47 45.8 70.0 2.42",
        ),
    ),
    "length": (
        Reported(
            f"{_PREFIX}, Figure 4", "GPT-2 medium on DART, BART on XSUM",
            said="quality rises up to 10 virtual tokens for tables and 200 for summaries, then falls a little",
        ),
    ),
    "reparameterisation": (
        Reported(
            f"{_PREFIX}, section 4.3", "GPT-2 and BART",
            said="training the prefix's own numbers is unstable, and slightly worse than an MLP that makes them",
        ),
    ),
    "initialisation": (
        Reported(
            f"{_PREFIX}, section 7.4 and Figure 5", "few examples",
            said="random starts are worse and vary more, words about the task are a little better than unrelated ones; "
            "with all the data the start makes no difference",
        ),
    ),
    "low-data": (
        Reported(
            f"{_PREFIX}, section 6.3", "GPT-2 medium on 50, 100, 200 and 500 examples of E2E, ten models each",
            said="a prefix is better than full fine-tuning by 2.9 BLEU on average; the gap narrows with more examples",
        ),
    ),
    "extrapolation": (
        _table(
            f"{_PREFIX}, Table 4", "BART large on XSUM: trained on news, tested on sports",
            ["", "ROUGE-1", "ROUGE-2", "ROUGE-L"],
            "full fine-tuning | 38.15 15.51 30.26", "prefix | 39.23 16.74 31.51",
        ),
        _table(
            f"{_PREFIX}, Table 2", "GPT-2 medium on WebNLG: BLEU on kinds of table seen and unseen in training",
            ["", "seen", "unseen"], "full fine-tuning | 64.7 26.7", "adapter, 3 % | 60.5 47.9",
            "prefix, 0.1 % | 62.9 45.3",
        ),
    ),
}  # fmt: skip

CAUTION = (
    "Another model, other data, metric scripts and budgets: what to compare is the order of the methods, not the "
    "numbers."
)
