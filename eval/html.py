"""Pieces of the report's page: sections, pictures, tables, figures with their intervals."""

import base64
import html
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from eval.charts import Estimate
from eval.results import Results


def section(anchor: str, title: str, *parts: str) -> str:
    """A heading with what follows it."""
    body = "\n".join(part for part in parts if part)
    return f'<section>\n<h2 id="{anchor}">{escape(title)}</h2>\n{body}\n</section>\n'


def image(png: bytes, caption: str, alt: str, pixels: bool = False) -> str:
    """A picture with its caption (HTML), and a text for those who do not see it. pixels: keep the pixels sharp."""
    kind = ' class="pixels"' if pixels else ""
    source = f"data:image/png;base64,{base64.b64encode(png).decode()}"
    return f'<figure{kind}><img alt="{escape(alt)}" src="{source}"><figcaption>{caption}</figcaption></figure>'


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of HTML cells."""
    lines = [row_of("th", head), *(row_of("td", row) for row in rows)]
    return f'<div class="scroll"><table>{"".join(lines)}</table></div>'


def row_of(tag: str, cells: Sequence[str]) -> str:
    """One line of a table."""
    return "<tr>" + "".join(f"<{tag}>{cell}</{tag}>" for cell in cells) + "</tr>"


def not_checked(report: Mapping[str, Any]) -> str:
    """What a report says could not be checked for leaks, a paragraph each."""
    return "\n".join(f"<p><b>Not checked for leaks</b>: {escape(text)}.</p>" for text in report.get("unchecked", ()))


def made_by(results: Results, output: str) -> str:
    """A link to the command that made a figure."""
    titles = {entry["output"]: entry["title"] for entry in (*results.commands, *results.shipped)}
    if output not in titles:
        return ""
    name = re.split("[:,]", titles[output])[0]
    return f'<a class="command" href="#made-{escape(output)}">{escape(name)}</a>'


def bounds(entry: Mapping[str, float]) -> Estimate:
    """(value, low, high)"""
    return entry["value"], entry["low"], entry["high"]


def bracket(entry: Mapping[str, float]) -> str:
    """[0.750, 0.840]"""
    return f"[{number(entry['low'])}, {number(entry['high'])}]"


def cell(entry: Mapping[str, float], *notes: str) -> str:
    """A value, below it its interval, and below that notes."""
    return stacked(number(entry["value"]), bracket(entry), *notes)


def difference(entry: Mapping[str, float], *notes: str) -> str:
    """The same of a difference: "+0.025", below it "[+0.002, +0.048]"."""
    value, low, high = (entry[name] for name in ("value", "low", "high"))
    value, low, high = ("–" if one is None or one != one else signed(one) for one in (value, low, high))
    return stacked(value, f"[{low}, {high}]", *notes)


def signed(value: float) -> str:
    """0.0254 -> "+0.025", -0.0001 -> "0.000"."""
    return f"{value:+.3f}" if abs(value) >= 0.0005 else "0.000"


def stacked(value: str, *notes: str) -> str:
    """A value with notes below it."""
    return "<br>".join([value, *(f"<small>{line}</small>" for line in notes)])


def number(value: float | None) -> str:
    """0.12345 -> "0.123", 0.00012 -> "1.20e-04", 123.45 -> "123.5", 12345 -> "12,345"; a dash for what has no value."""
    if value is None or value != value:
        return "–"
    if isinstance(value, int):
        return f"{value:,}"
    if abs(value) >= 100:
        return f"{value:,.1f}"
    return f"{value:.3f}" if value == 0 or abs(value) >= 0.005 else f"{value:.2e}"


def escape(text: Any) -> str:
    """Text -> HTML."""
    return html.escape(str(text))
