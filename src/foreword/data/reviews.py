"""From the text of a film review to what people say at its end."""

from __future__ import annotations

import html
import re


def ending(text: str, least: int = 12, most: int = 40) -> str:
    """The last sentences of a review, where people say what they think; empty if they have too many words."""
    kept: list[str] = []
    for sentence in reversed(re.split(r"(?<=[.!?])\s+(?=[A-Z\"'])", text)):
        kept.insert(0, sentence)
        if len(" ".join(kept).split()) >= least:
            break
    found = " ".join(kept)
    return found if least <= len(found.split()) <= most else ""


def plain(text: str) -> str:
    """A review without the marks of the web page that it came from."""
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", " ", text))).strip()
