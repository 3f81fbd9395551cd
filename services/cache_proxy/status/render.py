"""Makes the page of its figures: one HTML document that asks for nothing else.

Every text goes through the template's escaping: names of callers and failures may be anybody's. Besides, no
script and no style runs but those whose hashes the header has.
"""

import base64
import hashlib
from functools import partial
from pathlib import Path

import jinja2
import msgspec

from services.cache_proxy.status import formatting
from services.cache_proxy.status.report import Figures, SlotUse

_FOLDER = Path(__file__).parent
_STYLE = (_FOLDER / "page.css").read_text(encoding="utf-8")
_SCRIPT = (_FOLDER / "page.js").read_text(encoding="utf-8")
_BUILD = hashlib.sha256((_STYLE + _SCRIPT).encode()).hexdigest()[:12]
BARS_HIGH = 100


def _hash(text: str) -> str:
    return "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'"


HEADERS = {
    "Content-Security-Policy": "; ".join(
        [
            "default-src 'none'",
            f"style-src {_hash(_STYLE)}",
            f"script-src {_hash(_SCRIPT)}",
            "connect-src 'self'",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        ]
    ),
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class Bar(msgspec.Struct):
    """One span of the plot: where it stands, how high both its parts are of `BARS_HIGH`, and what it says."""

    x: int
    taken: float
    filled: float
    text: str


class Renderer:
    """The template, compiled once."""

    def __init__(self) -> None:
        environment = jinja2.Environment(
            autoescape=True, loader=jinja2.FileSystemLoader(_FOLDER), undefined=jinja2.StrictUndefined,
            trim_blocks=True, lstrip_blocks=True,
        )  # fmt: skip
        environment.filters |= {
            "count": formatting.count,
            "percent": formatting.percent,
            "whole_percent": partial(formatting.percent, digits=0),
            "duration": formatting.duration,
            "about": formatting.about,
            "clock": formatting.clock,
            "many": formatting.many,
        }
        self._template = environment.get_template("page.html")

    def __call__(self, figures: Figures) -> bytes:
        """The document."""
        bars, top = _bars(figures)
        return self._template.render(
            figures=figures,
            bars=bars,
            bars_high=BARS_HIGH,
            top=top,
            style=_STYLE,
            script=_SCRIPT,
            build=_BUILD,
        ).encode()


def _bars(figures: Figures) -> tuple[list[Bar], str]:
    """The plot, and what its upper end is. Without a limit that is the busiest span's number of calls."""
    first_at = (figures.at_seconds // figures.span_seconds - len(figures.spans) + 1) * figures.span_seconds
    use, top = figures.slot_use, "100\u00a0%"
    if use is None:
        most = max(1, *(span.calls for span in figures.spans))
        most_sent = max(1, *(span.sent for span in figures.spans))
        top = formatting.many(most, "call")
        use = [
            SlotUse(taken=span.calls / most, filled=span.calls / most * span.sent / most_sent)
            for span in figures.spans
        ]
    bars = []
    for at, (span, share) in enumerate(zip(figures.spans, use, strict=True)):
        if span.calls or span.sent:
            text = (
                f"{formatting.clock(first_at + at * figures.span_seconds)}: "
                f"{formatting.many(span.calls, 'call')}, {formatting.many(span.sent, 'pair')}"
            )
            bars.append(Bar(at, round(share.taken * BARS_HIGH, 2), round(share.filled * BARS_HIGH, 2), text))
    return bars, top
