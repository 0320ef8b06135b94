"""The one page style of every report: a single HTML file that refers to nothing outside itself and reads on a phone."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from headtune.analysis.utils.files import write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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


def unbroken(text: str) -> str:
    """Plain text as HTML that stays on one line."""
    return f"<span class='unbroken'>{escape(text)}</span>"


def percent(share: float) -> str:
    """`62%`; two digits below one percent."""
    return f"{100 * share:.0f}%" if share >= 0.01 or share == 0 else f"{100 * share:.2g}%"


def track(share: float) -> str:
    """A horizontal bar, filled to a share of its width."""
    return f"<span class='track'><span style='width:{100 * share:.1f}%'></span></span>"


def bars(rows: Sequence[tuple[str, float]]) -> str:
    """Shares of a whole as horizontal bars: label (plain text), share, percentage."""
    lines = "".join(f"<span>{escape(label)}</span>{track(share)}<span>{percent(share)}</span>" for label, share in rows)
    return f"<div class='bars'>{lines}</div>"


def html_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells are HTML already; the first column heads its row."""
    head = "".join(f"<th>{cell}</th>" for cell in header)
    body = "".join(
        f"<tr><th scope='row'>{row[0]}</th>{''.join(f'<td>{cell}</td>' for cell in row[1:])}</tr>" for row in rows
    )
    return f"<div class='wide'><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def png_of(figure: Figure, dpi: int = 110) -> bytes:
    """A matplotlib figure as PNG bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()


def picture(png: bytes, alt: str, caption: str, width: int | None = None) -> str:
    """An inlined picture; `caption` is HTML, `width` in CSS pixels (default: the picture's own)."""
    data = base64.b64encode(png).decode()
    size = "" if width is None else f" width='{width}'"
    return (
        f"<figure><img alt='{escape(alt, quote=True)}'{size} src='data:image/png;base64,{data}'>"
        f"<figcaption>{caption}</figcaption></figure>"
    )


def write_page(path: Path, title: str, body: str) -> None:
    """Write the page; `body` is HTML."""
    write_text(path, _PAGE.replace("{title}", escape(title)).replace("{body}", body))


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root { color-scheme: light dark; --fg: #1c1c1c; --soft: #5c5c5c; --bg: #fff; --card: #f5f5f3; --line: #d8d8d4;
  --red: #b3261e; --green: #1b7a3d; --blue: #2257a8; --grey: #6b6b6b; --bar: #d98a00;
  --a: 255, 166, 0; --p: 235, 87, 74; --n: 84, 141, 245; }
@media (prefers-color-scheme: dark) { :root { --fg: #e8e8e6; --soft: #a8a8a4; --bg: #161616; --card: #222;
  --line: #3c3c3a; --red: #ff8a80; --green: #7fd99a; --blue: #8ab4ff; --grey: #a8a8a8; --bar: #d08a10;
  --a: 176, 106, 0; --p: 196, 52, 42; --n: 45, 98, 205; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--fg); background: var(--bg); max-width: 62rem;
  margin: 0 auto; padding: 1rem; }
h1, h2, h3, h4, h5 { line-height: 1.2; } h1 { margin-bottom: .3rem; } h2 { margin-top: 2.5rem; }
h4 { margin: 0 0 .3rem; } h5 { margin: 0 0 .3rem; font-size: .85rem; font-weight: normal; color: var(--soft); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; } a { color: inherit; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .3rem .7rem; border-bottom: 1px solid var(--line); vertical-align: top; }
thead th { color: var(--soft); } tbody th { font-weight: normal; } .unbroken { white-space: nowrap; }
.note, figcaption { color: var(--soft); font-size: .9rem; } .lead { color: var(--soft); margin-top: 0; }
.verdict { border-left: .3rem solid; padding: .6rem .9rem; background: var(--card); font-size: 1.1rem; }
.verdict.good { border-color: var(--green); } .verdict.bad { border-color: var(--red); }
figure { margin: 1.5rem 0; } img { max-width: 100%; height: auto; background: #fff; border-radius: .4rem; }
article, .card { background: var(--card); padding: .8rem; margin: 1rem 0; border-radius: .4rem; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0 0 .5rem; font-size: .9rem; }
.prompt { color: var(--soft); } .sides { display: flex; flex-wrap: wrap; gap: 1rem 1.5rem; }
.sides > * { flex: 1 1 16rem; min-width: 0; }
.kinds { list-style: none; padding: 0; margin: 0; display: flex; flex-wrap: wrap; gap: .4rem; font-size: .8rem; }
.kinds li { border: 1px solid; border-radius: 1rem; padding: 0 .6rem; }
.repeat { color: var(--red); } .correct_new, .correct, .best { color: var(--green); }
.wrong, .incorrect { color: var(--grey); }
.missing { color: var(--grey); border-style: dashed !important; }
.card { padding: .5rem .8rem; margin: .6rem 0; } summary { cursor: pointer; } summary > b { font-size: 1.1rem; }
.card[open] > summary { margin-bottom: .7rem; } .gist { color: var(--soft); } .card .note { margin: .3rem 0; }
.card table { font-size: .9rem; } .card th, .card td { padding: .2rem .6rem .2rem 0; } .card > h4 { margin-top: 1rem; }
.card > .sides:last-child { margin-top: 1rem; }
.role { border: 1px solid var(--line); border-radius: 1rem; padding: 0 .6rem; font-size: .8rem; }
.bars { display: grid; grid-template-columns: max-content 1fr max-content; gap: .15rem .6rem; font-size: .9rem; }
.track { display: block; align-self: center; min-width: 4rem; height: .7rem; background: var(--line);
  border-radius: .2rem; overflow: hidden; }
td .track { height: .3rem; margin-top: .2rem; } .track > span { display: block; height: 100%; background: var(--bar); }
.chips { display: flex; flex-wrap: wrap; gap: .3rem; margin: 0; } .writes { gap: .4rem .8rem; margin: 0 0 .6rem; }
.chip { border: 1px solid var(--line); border-radius: .3rem; padding: 0 .4rem; font: .85rem/1.5 ui-monospace, monospace;
  unicode-bidi: isolate; overflow-wrap: anywhere; } .chip small { color: var(--soft); }
.chip.up { border-left: 3px solid var(--red); } .chip.down { border-left: 3px solid var(--blue); }
code, .tk { font-family: ui-monospace, monospace; font-size: .85rem; unicode-bidi: isolate; }
.tokens { line-height: 1.9; margin: 0; overflow-wrap: anywhere; } .gap { color: var(--soft); font-size: .8rem; }
.tk { --w: 0; padding: .15rem 0; border-radius: .15rem; } .tk.subject { border-bottom: 2px dotted; }
.tk.previous { border-bottom: 2px solid; } .tk.a { background: rgba(var(--a), var(--w)); }
.tk.p { background: rgba(var(--p), var(--w)); } .tk.n { background: rgba(var(--n), var(--w)); }
@media (max-width: 40rem) { .maps { overflow-x: auto; } .maps img { max-width: none; } .reads { white-space: nowrap; }
  table { font-size: .85rem; } th, td { padding: .3rem .4rem; }
  .wide th:first-child { position: sticky; left: 0; background: var(--bg); max-width: 40vw; overflow-wrap: anywhere; } }
</style>
</head>
<body>
{body}
</body>
</html>
"""
