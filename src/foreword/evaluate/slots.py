"""Does a text say what its table says, and nothing else? For tables such as E2E's: ``name[The Eagle], food[French]``.

Rules, not a model. Names are looked for as they are written. For E2E's closed slots there is a table of the wordings
that people use, at the level of what is meant: "cheap" and "less than £20" are one price, "low" and "1 out of 5" one
rating, as the people who wrote E2E's references took them. What the rules miss, they miss for every system alike:
docs/evaluation.md says how often that is, on human references.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache

from foreword.errors import DataError
from foreword.evaluate._counts import Counts, Given, mean, share

_SLOT = re.compile(r"([^\[\],]+)\[([^\]]*)\]")
_IS = r"(?: (?:is|are|was|were|being|of|at|in|as|an?|the|very|quite|it|by|from|customers?|been|has|have|to be|~))*"
_PRICES = rf"\bpric\w*(?: range)?{_IS}"
_RATED = rf"\brat(?:e[sd]?|ings?){_IS}"
_RATING = r"(?:(?:customers?|costumers?)'?(?: service)? |consumer |user |guest )?(?:rat|review|scor)"
_STARS = r"(?: star)?s?(?: out)?[- ](?:of[- ])?(?:5|five)\b"
_FAMILY = r"\b(?:famil|kid|child)"

# For each slot: what is meant, and how it is said. The texts are plain: lower case, no accents, names taken out.
_SAID: dict[str, dict[str, tuple[str, ...]]] = {
    "eatType": {
        "pub": (r"\bpubs?\b",),
        "coffee shop": (r"\bcoffee\b", r"\bcafes?\b"),
        "restaurant": (r"\brestaurants?\b", r"\bdiner\b", r"\beatery\b"),
    },
    "food": {
        "chinese": (r"\bchinese\b",),
        "english": (r"\benglish\b", r"\bbritish\b"),
        "fast food": (r"\bfast[- ]?foods?\b", r"\bburgers?\b"),
        "french": (r"\bfrench\b",),
        "indian": (r"\bindian\b", r"\bcurr(?:y|ies)\b"),
        "italian": (r"\bitalian\b", r"\bpastas?\b", r"\bpizzas?\b"),
        "japanese": (r"\bjapanese\b", r"\bsushi\b"),
    },
    "priceRange": {
        "low": (
            r"\bcheap", r"\binexpensive", r"\blow(?:er|ly)?[- ]?(?:cost|pric)", rf"{_PRICES} low\b",
            r"\b(?:less|lower|under|below|cheaper)(?: than| that| then)? ?£? ?20\b", r"\baffordabl", r"\bbudget\b",
        ),
        "moderate": (
            rf"\bmoderate(?:ly)?(?![- ]{_RATING})", r"\b(?:average|mid|medium)[- ]?(?:pric|cost|range)",
            r"\b(?:reasonabl[ey]|fair(?:ly)?)[- ]?(?:pric|cost)", r"\b20(?:\.00)? ?(?:-|to|and) ?£? ?25\b",
            rf"{_PRICES} (?:average|reasonable)\b",
        ),
        "high": (
            r"\bexpensive", r"\bhigh(?:er|ly)?[- ]?(?:end |in )?(?:cost(?!umer)|pric)", rf"{_PRICES} high\b",
            r"\b(?:more|over|above|greater|upwards)(?: than| that| then| of)? ?£? ?30\b", r"\bpricey\b", r"\bcostly\b",
            r"\bhigh[- ]end\b",
        ),
    },
    "customer rating": {
        "low": (
            rf"\b(?:low|poor|bad)(?:ly|er)?[- ]{_RATING}", rf"\b(?:1|one){_STARS}", r"\b1 ?/ ?5\b",
            r"\b(?:1|one)[- ]stars?\b", rf"{_RATED} (?:low|poor(?:ly)?|badly|(?:1|one)(?:{_STARS})?)\b",
            r"\bnot (?:well|highly)[- ]rated",
            rf"(?:\bnot|n't) (?:have |got |get )?(?:an? )?(?:very )?(?:good|high|great) {_RATING}",
        ),
        "average": (
            rf"\b(?:average|moderate)(?:ly)?[- ]{_RATING}", r"\baverage customer", rf"\b(?:3|three){_STARS}",
            r"\b3 ?/ ?5\b", r"\b(?:3|three)[- ]stars?\b", rf"{_RATED} (?:average|(?:3|three)(?:{_STARS})?)\b",
        ),
        "high": (
            rf"(?<!not )\b(?:high|excellent|great|good|top|well)(?:ly|est)?[- ](?:{_RATING}|recommend)",
            rf"\b(?:5|five){_STARS}", r"\b5 ?/ ?5\b", r"\b(?:5|five)[- ]stars?\b",
            rf"{_RATED} (?:high(?:ly)?|excellent|well|5|five)\b",
        ),
    },
    "area": {
        "riverside": (r"\briver", r"\bwaterfront\b"),
        "city centre": (
            r"\b(?:city|town)(?:'s)?[- ]?cent(?:re|er)", r"\bcent(?:re|er) of (?:the )?(?:city|town|cambridge)",
            r"\bcent(?:re|er) city\b", r"\bdowntown\b", r"\bcentral(?:ly)?\b", r"\bheart of\b",
            r"\bin the cent(?:re|er)\b",
        ),
    },
    "familyFriendly": {
        "no": (
            rf"\b(?:not(?! only)|non|no|never|isn'?t|aren'?t|doesn'?t|don'?t|nor|without)\b[^.;]{{0,30}}?{_FAMILY}",
            rf"n't\b(?! only)[^.;]{{0,30}}?{_FAMILY}", r"\badults?\b", r"\bun(?:family|kid|child)",
            rf"{_FAMILY}\w*[- ](?:unfriendly|free)\b", rf"\b(?:unsuitable|inappropriate)\b[^.;]{{0,12}}?{_FAMILY}",
            rf"{_FAMILY}\w*(?: (?:are|is))? not (?:allowed|welcomed?|permitted|admitted|recommended|suitable)\b",
        ),
        "yes": (r"\bfamil", r"\bkids?\b", r"\bchild"),
    },
}  # fmt: skip
# E2E's values, as the table above has them.
_MEANT = {
    "priceRange": {
        "cheap": "low", "less than £20": "low", "moderate": "moderate", "£20-25": "moderate", "high": "high",
        "more than £30": "high",
    },
    "customer rating": {
        "low": "low", "1 out of 5": "low", "average": "average", "3 out of 5": "average", "high": "high",
        "5 out of 5": "high",
    },
}  # fmt: skip
# People call any place a restaurant: that claims nothing.
_CLAIMS_NOTHING = {("eatType", "restaurant")}


@dataclass(frozen=True)
class Judged:
    """One text against its table.

    Attributes:
        slots: how many slots of the table can be looked for.
        missing: those that the text does not say.
        hallucinated: what the text says of a slot that the table has otherwise, or not at all.
    """

    slots: int
    missing: tuple[tuple[str, str], ...]
    hallucinated: tuple[tuple[str, str], ...]


def parse_table(text: str) -> dict[str, str]:
    """The slots of ``name[The Eagle], food[French]`` and their values.

    Raises:
        DataError: there is no slot.
    """
    found = {slot.strip(): value.strip() for slot, value in _SLOT.findall(text)}
    if not found:
        shown = text if len(text) <= 60 else text[:57] + "..."
        raise DataError(f"{shown!r} is not a table; expected slots and values such as name[The Eagle], food[French]")
    return found


def judge(texts: Sequence[str], tables: Sequence[str]) -> list[Judged]:
    """Each text against its table. Names that other tables have, and its own has not, are hallucinated.

    Raises:
        DataError: a table has no slot (see :func:`parse_table`).
    """
    parsed = [parse_table(t) for t in tables]
    names = {_plain(v) for table in parsed for slot, v in table.items() if _is_name(slot, v)} - {""}
    by_length = sorted(names, key=lambda name: (-len(name), name))
    return [_judged(text, table, by_length) for text, table in zip(texts, parsed, strict=True)]


def slot_coverage(given: Given) -> Counts:
    """Slots that the texts say, by slots of the tables."""
    each = _each(given)
    return share([j.slots - len(j.missing) for j in each], [j.slots for j in each])


def slot_hallucinated(given: Given) -> Counts:
    """The share of texts that say anything that their table does not."""
    return mean([float(bool(j.hallucinated)) for j in _each(given)])


def slot_error(given: Given) -> Counts:
    """The slot error rate (Wen et al. 2015): slots missing and slots hallucinated, by slots of the tables."""
    each = _each(given)
    return share([len(j.missing) + len(j.hallucinated) for j in each], [j.slots for j in each])


def tables(given: Given) -> list[dict[str, str]]:
    """The inputs as tables. Raises DataError for one that is none."""
    return [parse_table(text) for text in given.inputs]


def _each(given: Given) -> list[Judged]:
    return judge(given.predictions, given.inputs)


def _judged(text: str, table: dict[str, str], names: Iterable[str]) -> Judged:
    rest, said = _plain(text), set()
    for name in names:  # the longest first: a short one may be part of it
        rest, times = re.subn(rf"(?<!\w){re.escape(name)}(?!\w)", " ~ ", rest)
        if times:
            said.add(name)
    rest = " ".join(rest.split())
    wanted_names = {(slot, _plain(v)) for slot, v in table.items() if _is_name(slot, v)}
    missing = [(slot, name) for slot, name in wanted_names if name not in said]
    hallucinated = [("name", name) for name in said - {name for _, name in wanted_names}]
    wanted = {slot: _meant(slot, value) for slot, value in table.items() if slot in _SAID}
    for slot in _SAID:
        means = _means(slot, rest)
        if slot in wanted and wanted[slot] not in means:
            missing.append((slot, wanted[slot]))
        hallucinated += [(slot, m) for m in means if m != wanted.get(slot) and (slot, m) not in _CLAIMS_NOTHING]
    return Judged(len(wanted_names) + len(wanted), tuple(sorted(missing)), tuple(sorted(hallucinated)))


def _means(slot: str, text: str) -> list[str]:
    """What a text says of one of E2E's slots."""
    found = []
    for meaning, ways in _SAID[slot].items():
        # Taken out, so that "not family friendly" is not "family friendly" as well.
        text, times = re.subn("|".join(ways), " ~ ", text)
        if times:
            found.append(meaning)
    return found


def _meant(slot: str, value: str) -> str:
    plain = value.casefold()
    return _MEANT.get(slot, {}).get(plain, plain)


def _is_name(slot: str, value: str) -> bool:
    """Whether a value is to be looked for as it is written; of an unknown slot, yes and no cannot be."""
    return slot not in _SAID and value.casefold() not in ("yes", "no", "true", "false", "")


@cache
def _plain(text: str) -> str:
    """Lower case, without accents, a name's "the", and double spaces."""
    bare = "".join(c for c in unicodedata.normalize("NFKD", text.casefold()) if not unicodedata.combining(c))
    bare = bare.translate({0x2019: "'", 0x2018: "'", 0x2013: "-", 0x2014: "-"})
    return " ".join(re.sub(r"^the ", "", bare).split())
