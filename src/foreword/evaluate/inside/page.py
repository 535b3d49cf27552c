"""A look as one HTML page: no other files, nothing from the network, no scripts; readable on a telephone."""

from __future__ import annotations

import base64
import html
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from foreword import __version__
from foreword._begun import write_whole
from foreword.errors import ConfigError
from foreword.evaluate.inside import pictures
from foreword.evaluate.inside._rows import Unavailable, labels_of
from foreword.evaluate.inside.attention import AttentionShare, Dilution
from foreword.evaluate.inside.layers import LayerLosses
from foreword.evaluate.inside.look import NOT_ASKED, Look
from foreword.evaluate.inside.norms import Norms
from foreword.evaluate.inside.similarity import Similarity
from foreword.evaluate.inside.spectrum import Spectrum
from foreword.evaluate.inside.words import Lens

_SAID = 3  # words of a virtual token in the table
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 44rem; margin: 0 auto; padding: 1rem; color: #222; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; border-top: 1px solid #ddd; padding-top: 1rem; }
img { max-width: 100%; height: auto; display: block; margin: .6rem 0; }
.here { background: #f3f6fa; padding: .5rem .8rem; border-left: 3px solid #4a7ab5; }
.none { color: #777; } .wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .8rem; } td, th { padding: .2rem .5rem; vertical-align: top; }
td { border-top: 1px solid #eee; } th { text-align: left; white-space: nowrap; }
code { font: .9em ui-monospace, monospace; overflow-wrap: anywhere; }
.words td { white-space: nowrap; } .words small { color: #888; }
"""


def write_page(look: Look, path: Path) -> Path:
    """Write a look as HTML, all of it or nothing.

    Raises:
        ConfigError: the path is a folder, or its folder is missing or can't be written into.
    """
    check_page(path)
    write_whole(path, page(look))
    return path


def check_page(path: Path) -> None:
    """Raise ConfigError where a page can't be written, before it is made."""
    if path.is_dir():
        raise ConfigError(f"{path} is a folder; name the file for the page, e.g. {path / 'look.html'}")
    if not path.parent.is_dir():
        raise ConfigError(f"there is no folder {path.parent} for the page; make it first, or name another file")
    if not os.access(path.parent, os.W_OK):
        raise ConfigError(f"the page can't be written into {path.parent}; name a file in another folder with --out")


def page(look: Look) -> str:
    """The whole page."""
    about = look.about
    title = f"Inside {about['name']}"
    sections = "".join(
        [_share(look.share), _dilution(look.dilution), _first(look.share), _words(look.words), _norms(look.norms),
         _spectra(look), _likeness(look), _layers(look.layers)]
    )  # fmt: skip
    facts = [
        ("prefix", about["prefix"]),
        ("base model", f"{about['base_model'] or '?'} ({about['model_class']})"),
        ("texts", f"{about['texts']}" + (f", {about['tokens']:,} tokens" if about["tokens"] else "")),
        ("seen by", about["visible"]),
    ]
    if about["against"]:
        facts.append(("beside", f"{about['against']['name']}: {about['against']['prefix']}"))
    rows = "".join(f"<tr><th>{_text(k)}</th><td><code>{_text(v)}</code></td></tr>" for k, v in facts)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{_text(title)}</title>'
        f"<style>{_STYLE}</style></head><body>\n<h1>{_text(title)}</h1>\n<table>{rows}</table>\n"
        f"<p>Layers are counted from 0, from the input up. All numbers behind the pictures: "
        f"<code>foreword look … --json</code>.</p>\n{sections}\n"
        f"<p class=none>foreword {_text(__version__)}</p>\n</body></html>\n"
    )


# ------------------------------------------------------------------------------------------ sections


def _share(share: AttentionShare | Unavailable) -> str:
    def body(found: AttentionShare) -> str:
        known = {s.name: s.mean for s in found.sites if s.mean is not None}
        labels = labels_of({s.name: s.kind for s in found.sites})
        here = ""
        if known:
            most, least = max(known, key=lambda n: known[n]), min(known, key=lambda n: known[n])
            here = (
                f"Over all sites the prefix gets {sum(known.values()) / len(known):.1%} of the attention: most at "
                f"{labels[most]} ({known[most]:.1%}), least at {labels[least]} ({known[least]:.1%})."
            )
        if gates := sorted({w["kind"] for w in found.weights.values()}):
            here += f" Gates: {', '.join(gates)}."
            if "zero" in gates:
                here += (
                    " Behind a zero-initialised gate the two softmaxes stand apart, so there is no share as trained."
                )
        return (
            _here(here)
            + _picture(pictures.draw_share(found), "share of attention by layer and head")
            + "<p>The same against the position of the token that looks: where the lines fall, the text is drowning "
            "the prefix out.</p>"
            + _picture(pictures.draw_positions(found), "share of attention by position")
            + "<p>And by virtual token: a bright column is a token that every layer looks at, a dark one could go.</p>"
            + _picture(pictures.draw_tokens(found), "share of attention by virtual token")
        )

    return _section(
        "How much attention it gets",
        "Each cell is one attention head: the share of its attention that goes to the virtual tokens instead of the "
        "text, from 0 (it is not looked at) to 1 (nothing else is).",
        share,
        body,
    )


def _dilution(found: Dilution | Unavailable) -> str:
    def body(found: Dilution) -> str:
        variant = next((v for v in found.variants if any(x is not None for x in found.mean(v))), None)
        here = ""
        if variant is not None:
            means = found.mean(variant)
            here = (
                f"From {found.lengths[0]} to {found.lengths[-1]} tokens of text the mean share ({variant}) goes from "
                f"{means[0] or 0:.1%} to {means[-1] or 0:.1%}; tokens that are all alike would go from "
                f"{found.uniform[0]:.1%} to {found.uniform[-1]:.1%}."
            )
        return _here(here) + _picture(pictures.draw_dilution(found), "share of attention by length of text")

    return _section(
        "Dilution: longer texts",
        "The same texts, cut or grown to several lengths, and the share that the prefix has for a token that sees all "
        "of the text: a line that falls like the dashed one is diluted by every token. Strength is a weight on the "
        "prefix at inference, 1 as trained.",
        found,
        body,
    )


def _first(share: AttentionShare | Unavailable) -> str:
    def body(found: AttentionShare) -> str:
        known = [s for s in found.sites if s.from_first is not None and s.mean]
        here = ""
        if known:
            weight = sum(s.mean or 0 for s in known)
            part = sum((s.mean or 0) * (s.from_first or 0) for s in known) / weight
            base, beside = (sum(getattr(s, k) or 0 for s in known) / len(known) for k in ("first_base", "first"))
            virtual = sum(next(iter(s.tokens), 0.0) for s in known) / len(known)
            here = (
                f"The text's first token has {base:.0%} of attention in the base model and {beside:.0%} beside the "
                f"prefix, whose own first token has {virtual:.0%} (means over sites). Left out at one layer alone, the "
                f"prefix would leave {part:.0%} of its attention there to the text's first token."
            )
        return _here(here) + _picture(pictures.draw_first(found), "the first token's share")

    return _section(
        "Where its attention comes from",
        "Models park attention that has nowhere to go on the first token (a sink). Above: what that token has without "
        "and with the prefix; where the prefix's own first token has as much, it is the sink now, and the text lost "
        "little that it used. Below: how much of the prefix's share would be the text's first token's if this layer "
        "alone had no prefix: little, once the text's first token is a sink no more.",
        share,
        body,
    )


def _words(found: Lens | Unavailable) -> str:
    def body(found: Lens) -> str:
        labels = labels_of({s.name: s.kind for s in found.sites})
        longest = max(len(s.words) for s in found.sites)
        head = "".join(f"<th>{i}</th>" for i in range(longest))
        rows = []
        for site in found.sites:
            cells = "".join(f"<td>{'<br>'.join(_word(w, c) for w, c in said[:_SAID])}</td>" for said in site.words)
            if site.why:
                cells = f'<td class=none colspan="{longest}">not available: {_text(site.why)}</td>'
            rows.append(f"<tr><th>{_text(labels[site.name])}</th>{cells}</tr>")
        return f'<div class="wide words"><table><tr><th>layer</th>{head}</tr>{"".join(rows)}</table></div>'

    return _section(
        "What the virtual tokens say",
        "Each column is a virtual token, each row a layer: the words that its value speaks for if every head looks at "
        "it, read through the layer's own output projection and the model's vocabulary, with their probabilities. "
        "Early layers are rarely readable; trained tokens need not say words at all.",
        found,
        body,
    )


def _norms(found: Norms | Unavailable) -> str:
    return _section(
        "How large its keys and values are",
        "Norms of the virtual tokens beside the text's own at each layer: keys far from the text's are sought or "
        "shunned whatever the query is; values far above the text's shout.",
        found,
        lambda found: _picture(pictures.draw_norms(found), "norms of keys and values"),
    )


def _spectra(look: Look) -> str:
    known = {n: s for n, s in look.spectra.items() if isinstance(s, Spectrum)}
    first: Any = known or next(iter(look.spectra.values()))

    def body(found: dict[str, Spectrum]) -> str:
        lines = []
        for label, one in found.items():
            n = len(one.sites)
            rank, size, constant = (
                sum(getattr(s, what) for s in one.sites) / n for what in ("effective_rank", "size", "constant")
            )
            lines.append(
                f"{label}: effective rank {rank:.1f} of {one.width} (over {one.tokens} tokens), size {size:.2f}, "
                f"{constant:.0%} of it constant."
            )
        missing = [f"{n}: not available, {s.why}." for n, s in look.spectra.items() if isinstance(s, Unavailable)]
        return _here(" ".join([*lines, *missing])) + _picture(pictures.draw_spectra(found), "spectra of the change")

    return _section(
        "How rich its effect is",
        "What the prefix adds to each layer's attention output, over many tokens: above, how the variance is spread "
        "over directions (a steep line: a few directions do it all), then how many directions that is in effect, then "
        "how large the change is beside the output itself. A part that is the same for every token is constant, not "
        "rich.",
        first,
        body,
    )


def _likeness(look: Look) -> str:
    own = str(look.about["name"])
    itself = _section(
        "How alike its tokens are",
        "Red squares off the diagonal are virtual tokens that ask for, or say, the same thing.",
        look.similarity["itself"],
        lambda found: _picture(pictures.draw_cosines(found, (own, own)), "cosines of its tokens"),
    )
    others = [
        _section(
            f"Beside {label}",
            "Token by token: a red diagonal means that the same token does the same in both. By layer: cosine of "
            "tokens at the same place, CKA of their geometry, and how much the spaces that they span overlap; 1 is the "
            "same.",
            found,
            partial(_beside, names=(own, label)),
        )
        for label, found in look.similarity.items()
        if label != "itself"
    ]
    return itself + "".join(others)


def _beside(found: Similarity, names: tuple[str, str]) -> str:
    cosines = _picture(pictures.draw_cosines(found, names), "cosines of tokens") if found.keys else ""
    return cosines + _picture(pictures.draw_likeness(found), "likeness by layer")


def _layers(found: LayerLosses | Unavailable) -> str:
    def body(found: LayerLosses) -> str:
        labels = labels_of(found.kinds)
        needed = sorted(found.without, key=lambda n: found.whole - found.without[n])[:3]
        alone = min(found.only, key=lambda n: found.only[n])
        gain = found.none - found.whole
        here = (
            f"Loss {found.none:.3f} without the prefix, {found.whole:.3f} with it (nats a label, over "
            f"{found.labels:,}). Missed most: "
            + ", ".join(f"{labels[n]} (+{found.without[n] - found.whole:.3f})" for n in needed)
            + f". Best alone: {labels[alone]} (-{found.none - found.only[alone]:.3f}"
            + (f", {(found.none - found.only[alone]) / gain:.0%} of the whole)." if gain > 0 else ").")
        )
        return _here(here) + _picture(pictures.draw_layers(found), "loss by layer")

    return _section(
        "Which layers carry it",
        "Above: how much worse the model gets when one layer loses its part of the prefix. Below: how much better than "
        "the base model it is with that layer's part alone. Layers that matter in neither could do without.",
        found,
        body,
    )


# ------------------------------------------------------------------------------------------ parts of the page


def _section(title: str, reading: str, found: Any, body: Callable[[Any], str]) -> str:
    if found == NOT_ASKED:
        return ""
    inside = f"<p class=none>Not available: {_text(found.why)}.</p>" if isinstance(found, Unavailable) else body(found)
    return f"<h2>{_text(title)}</h2>\n<p>{_text(reading)}</p>\n{inside}\n"


def _here(text: str) -> str:
    return f"<p class=here>{_text(text)}</p>\n" if text else ""


def _picture(figure: Figure, alt: str) -> str:
    data = base64.b64encode(pictures.svg(figure)).decode()
    return f'<img alt="{_text(alt)}" src="data:image/svg+xml;base64,{data}">\n'


def _word(word: str, chance: float) -> str:
    shown = word.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥").replace("\r", "␍")
    return f"{_text(shown)} <small>{chance:.0%}</small>"


def _text(value: Any) -> str:
    """Escaped, and without what HTML can't hold."""
    kept = "".join(c if c.isprintable() or c in " \n" else "�" for c in str(value))
    return html.escape(kept)
