"""Pages from Jinja2 templates: single HTML files that refer to nothing outside themselves and read on a phone.

A page's template extends `page.html.j2`, which brings the one style of all reports, and takes tables, pictures and bars
from `macros.html.j2`. Values are escaped unless they are `Markup`. A room with templates of its own gives its folder to
`render_page`:

    render_page(path, "comparison.html.j2", Path(__file__).parent / "templates", title=..., groups=...)
"""

from __future__ import annotations

import base64
import functools
import io
import math
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from headtune.analysis.utils.files import write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TEMPLATES = Path(__file__).parent / "templates"


@functools.cache
def environment(folder: Path = TEMPLATES) -> Environment:
    """The templates of a folder, then those of this room, which any page may extend, include and import."""
    result = Environment(
        loader=FileSystemLoader([folder, TEMPLATES]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters = (number, signed, with_interval, percent, cell, data_uri, visible)
    result.filters |= {function.__name__: function for function in filters}
    return result


def render_page(path: Path, template: str, folder: Path = TEMPLATES, **values: Any) -> None:
    """Write a page.

    Args:
        template: the name of a template that extends `page.html.j2`.
        folder: holds it.
        values: of its variables; `title` is one of every page.
    """
    write_text(path, environment(folder).get_template(template).render(values))


# --- numbers and words as pages show them: filters of every template --------------------------------------------------


def number(value: float | None) -> str:
    """Three significant digits, thousands in full; an en dash for what is not there."""
    if value is None or not math.isfinite(value):
        return "–"
    if 999.5 <= abs(value) < 1e6:
        return f"{value:.0f}"
    return f"{value:.3g}"


def with_interval(mean: float, interval: Sequence[float] | None) -> str:
    """`0.041 [0.031, 0.052]`, or the number alone where it has no interval."""
    if interval is None:
        return number(mean)
    return f"{number(mean)} [{number(interval[0])}, {number(interval[1])}]"


def signed(value: float | None) -> str:
    """`number` with a plus where it is positive."""
    return ("+" if value is not None and value > 0 else "") + number(value)


def percent(share: float) -> str:
    """`62%`; two digits below one percent."""
    return f"{100 * share:.0f}%" if share >= 0.01 or share == 0 else f"{100 * share:.2g}%"


def cell(value: str | float | None) -> str:
    """A table's cell: words as they are, numbers by `number`."""
    return value if isinstance(value, str) else number(value)


def visible(token: str) -> str:
    """A token in which white space and control characters are shown."""
    named = {" ": "␣", "\n": "⏎", "\t": "⇥"}
    return "".join(named.get(c) or (f"\\u{ord(c):04x}" if unicodedata.category(c)[0] in "CZ" else c) for c in token)


def data_uri(png: bytes) -> str:
    """PNG bytes as an address that needs no file."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def png_of(figure: Figure, dpi: int = 110) -> bytes:
    """A matplotlib figure as PNG bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()
