"""What every page is made of: its frame and looks, and pictures inside it, readable without a network."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDE, NARROW = (6.4, 4.6), (5.2, 4.0)  # inches: where two, and where three figures are in a row


def figure(
    caption: str, draw: Callable[..., Axes], *args: Any, size: tuple[float, float] = WIDE, **options: Any
) -> str:
    """One picture inside the page, sharp on dense screens, with its reading aid."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=size, layout="constrained")
    ax = draw(*args, ax=drawn.add_subplot(), **options)
    buffer = io.BytesIO()
    drawn.savefig(buffer, format="png", dpi=150)
    picture = base64.b64encode(buffer.getvalue()).decode("ascii")
    alt = escape(ax.get_title(loc="left"), quote=True)
    image = f"<img alt='{alt}' src='data:image/png;base64,{picture}'>"
    return f"<figure>{image}<figcaption>{caption}</figcaption></figure>"


def grid(figures: Sequence[str], kind: str = "grid") -> str:
    """Figures beside each other: two in a row, or three ("trio")."""
    return f"<div class='{kind}'>{''.join(figures)}</div>"


def captions_once(body: str) -> str:
    """The page without the captions that it already has further up."""
    seen: set[str] = set()

    def first(caption: re.Match[str]) -> str:
        again = caption[0] in seen
        seen.add(caption[0])
        return "" if again else caption[0]

    return re.sub(r"<figcaption>.*?</figcaption>", first, body)


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
{body}
<footer>Made by fspace. This page needs no network: every picture is inside the file.</footer>
</main>
</body>
</html>
"""

STYLE = """
:root { --ink: #1f2933; --soft: #52606d; --line: #e4e9ee; --blue: #2f6690; }
* { box-sizing: border-box; }
body { margin: 0; background: #f4f6f8; color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 40px 28px 60px; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .4rem; letter-spacing: -.01em; }
h2 { font-size: 1.25rem; margin: 2.4rem 0 .8rem; }
.lead { color: var(--soft); font-size: 1.05rem; margin: 0 0 1.4rem; }
.note { color: var(--soft); font-size: .88rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(170px, 1fr)); gap: 14px; }
.card { background: #fff; border: 1px solid var(--line); border-radius: 12px; padding: 16px 18px;
  color: var(--soft); font-size: .9rem; }
.card .value { font-size: 1.65rem; font-weight: 650; color: var(--blue); letter-spacing: -.02em; }
.grid, .trio { display: grid; gap: 18px; }
.grid { grid-template-columns: repeat(auto-fit, minmax(min(440px, 100%), 1fr)); }
.grid + .trio, .trio + .trio { margin-top: 18px; }
.trio { grid-template-columns: repeat(auto-fit, minmax(min(330px, 100%), 1fr)); }
figure .wide { border: 0; padding: 0 6px; margin: 0; }
figure .note { padding: 0 6px; }
figure { margin: 0; background: #fff; border: 1px solid var(--line); border-radius: 12px; padding: 14px; }
figure img { width: 100%; max-width: 680px; height: auto; display: block; margin: 0 auto; }
figcaption { color: var(--soft); font-size: .86rem; line-height: 1.45; padding: 10px 4px 0; }
.wide { overflow-x: auto; background: #fff; border: 1px solid var(--line); border-radius: 12px;
  padding: 6px 18px; margin-bottom: 14px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 8px 12px; border-bottom: 1px solid var(--line); font-weight: 400; }
tr:last-child > * { border-bottom: 0; }
tr > th:first-child { text-align: left; color: var(--soft); padding-left: 0; }
tr:first-child > th { color: var(--soft); font-size: .86rem; }
.dim { color: #8a94a0; }
.facts td { text-align: left; overflow-wrap: anywhere; }
.facts tr:first-child > th { font-size: inherit; }
.chosen > * { font-weight: 650; color: var(--blue) !important; }
.bar { width: 45%; }
.bar span { display: block; height: 10px; border-radius: 5px; background: #a9c8de; }
.chosen .bar span { background: var(--blue); }
details { margin-top: 18px; }
summary { cursor: pointer; color: var(--soft); margin-bottom: 10px; }
footer { margin-top: 48px; color: #8a94a0; font-size: .82rem; }
@media print { body { background: #fff; } figure { break-inside: avoid; } }
"""
