"""Render the status report as one HTML document that loads no other resources.

The template escapes every text, since anyone can choose the name of a caller. As a second defence, the
`Content-Security-Policy` header allows only the script and the style whose hashes it contains.
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
    """One bar of the plot.

    Its position, the heights of its two parts (up to `PLOT_HEIGHT`), and its tooltip.
    """

    x: int
    taken: float
    filled: float
    text: str


class Renderer:
    """Renders reports with a template that is compiled once."""

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
        """Return the HTML document of a report."""
        bars, top_label = _plot_bars(report)
        return self._template.render(
            report=report,
            bars=bars,
            plot_height=PLOT_HEIGHT,
            top_label=top_label,
            style=_STYLE,
            script=_SCRIPT,
            build=_BUILD,
        ).encode()


def _plot_bars(report: StatusReport) -> tuple[list[Bar], str]:
    """Return the bars of the plot and the label of its upper end.

    The upper end is the rate limit, or without one the number of calls of the busiest interval.
    """
    first_at = (report.at_seconds // report.span_seconds - len(report.spans) + 1) * report.span_seconds
    utilization = report.slot_use
    top_label = "100\u00a0%"
    if utilization is None:
        max_calls = max(1, *(interval.calls for interval in report.spans))
        max_sent = max(1, *(interval.sent for interval in report.spans))
        top_label = formatting.format_quantity(max_calls, "call")
        utilization = [
            ModelUtilization(
                taken=interval.calls / max_calls,
                filled=interval.calls / max_calls * interval.sent / max_sent,
            )
            for interval in report.spans
        ]
    bars = []
    for index, (interval, share) in enumerate(zip(report.spans, utilization, strict=True)):
        if interval.calls or interval.sent:
            text = (
                f"{formatting.format_clock(first_at + index * report.span_seconds)}: "
                f"{formatting.format_quantity(interval.calls, 'call')}, "
                f"{formatting.format_quantity(interval.sent, 'pair')}"
            )
            bars.append(
                Bar(index, round(share.taken * PLOT_HEIGHT, 2), round(share.filled * PLOT_HEIGHT, 2), text)
            )
    return bars, top_label
