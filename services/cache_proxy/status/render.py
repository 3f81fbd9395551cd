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
from services.cache_proxy.status.report import ModelUtilization, StatusReport

_FOLDER = Path(__file__).parent
_STYLE = (_FOLDER / "page.css").read_text(encoding="utf-8")
_SCRIPT = (_FOLDER / "page.js").read_text(encoding="utf-8")
_BUILD = hashlib.sha256((_STYLE + _SCRIPT).encode()).hexdigest()[:12]
PLOT_HEIGHT = 100


def _csp_hash(text: str) -> str:
    return "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'"


HEADERS = {
    "Content-Security-Policy": "; ".join(
        [
            "default-src 'none'",
            f"style-src {_csp_hash(_STYLE)}",
            f"script-src {_csp_hash(_SCRIPT)}",
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
            autoescape=True,
            loader=jinja2.FileSystemLoader(_FOLDER),
            undefined=jinja2.StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        environment.filters |= {
            "count": formatting.format_count,
            "percent": formatting.format_percent,
            "whole_percent": partial(formatting.format_percent, digits=0),
            "duration": formatting.format_duration,
            "about": formatting.format_ago,
            "clock": formatting.format_clock,
            "many": formatting.format_quantity,
        }
        self._template = environment.get_template("page.html")

    def __call__(self, report: StatusReport) -> bytes:
        """The document."""
        bars, top = _plot_bars(report)
        return self._template.render(
            figures=report,
            bars=bars,
            bars_high=PLOT_HEIGHT,
            top=top,
            style=_STYLE,
            script=_SCRIPT,
            build=_BUILD,
        ).encode()


def _plot_bars(report: StatusReport) -> tuple[list[Bar], str]:
    """The plot, and what its upper end is. Without a limit that is the busiest span's number of calls."""
    first_at = (report.at_seconds // report.span_seconds - len(report.spans) + 1) * report.span_seconds
    use, top = report.slot_use, "100\u00a0%"
    if use is None:
        most = max(1, *(span.calls for span in report.spans))
        most_sent = max(1, *(span.sent for span in report.spans))
        top = formatting.format_quantity(most, "call")
        use = [
            ModelUtilization(taken=span.calls / most, filled=span.calls / most * span.sent / most_sent)
            for span in report.spans
        ]
    bars = []
    for at, (span, share) in enumerate(zip(report.spans, use, strict=True)):
        if span.calls or span.sent:
            text = (
                f"{formatting.format_clock(first_at + at * report.span_seconds)}: "
                f"{formatting.format_quantity(span.calls, 'call')}, "
                f"{formatting.format_quantity(span.sent, 'pair')}"
            )
            bars.append(
                Bar(at, round(share.taken * PLOT_HEIGHT, 2), round(share.filled * PLOT_HEIGHT, 2), text)
            )
    return bars, top
