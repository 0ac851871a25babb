"""HTML for notebooks, with nothing but the standard library."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

Cell = str | float | None

_STYLE = """
.jaxnorm { --line: color-mix(in srgb, currentColor 20%, transparent); line-height: 1.45;
  --quiet: color-mix(in srgb, currentColor 65%, transparent); font-family: system-ui, sans-serif; }
.jaxnorm p { margin: 0.25rem 0; max-width: 50rem; }
.jaxnorm .quiet { color: var(--quiet); font-size: 0.86em; }
.jaxnorm code { font-family: ui-monospace, Menlo, Consolas, monospace; font-size: 0.92em; }
.jaxnorm .scroll { max-height: 26rem; overflow: auto; margin: 0.5rem 0; width: fit-content;
  max-width: 100%; border: 1px solid var(--line); border-radius: 4px; }
.jaxnorm table { border-collapse: collapse; margin: 0; font-size: 0.86em;
  font-variant-numeric: tabular-nums; }
.jaxnorm th, .jaxnorm td { padding: 0.22rem 0.7rem; text-align: right; white-space: nowrap;
  border: 0; border-bottom: 1px solid var(--line); background: none; }
.jaxnorm tr:last-child td { border-bottom: 0; }
.jaxnorm th { font-weight: 600; color: var(--quiet); }
.jaxnorm th:first-child, .jaxnorm td:first-child { text-align: left; }
.jaxnorm article { --tone: #005a9c; border-left: 3px solid var(--tone); border-radius: 3px;
  background: color-mix(in srgb, var(--tone) 6%, transparent); padding: 0.6rem 0.9rem;
  margin: 0.6rem 0; overflow-wrap: anywhere; }
.jaxnorm .critical { --tone: #b3261e; } .jaxnorm .warning { --tone: #a15c00; }
.jaxnorm .badge { color: color-mix(in srgb, var(--tone) 65%, currentColor); border: 1px solid;
  border-radius: 999px; font-size: 0.78em; font-weight: 650; padding: 0.05rem 0.5rem;
  margin-right: 0.4rem; }
.jaxnorm a { color: inherit; }
@media (prefers-color-scheme: dark) { .jaxnorm article { --tone: #6bb7f5; }
  .jaxnorm .critical { --tone: #ff8a80; } .jaxnorm .warning { --tone: #f0b14a; } }
"""


def block(*parts: str) -> str:
    """A block with a style of its own, which any notebook shows; the parts are HTML."""
    return f'<div class="jaxnorm"><style>{_STYLE}</style>{"".join(parts)}</div>'


def table(columns: Sequence[str], rows: Iterable[Sequence[Cell]]) -> str:
    """A table with a row of headings, which scrolls if it is long."""
    head = "".join(f"<th>{escape(name)}</th>" for name in columns)
    body = "".join(
        f"<tr>{''.join(f'<td>{_shown(cell)}</td>' for cell in row)}</tr>" for row in rows
    )
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def link(address: str) -> str:
    """A link to an address of the web, or any other text as it is."""
    shown = escape(address)
    if not address.startswith(("https://", "http://")):
        return shown
    return f'<a href="{shown}" rel="noreferrer" target="_blank">{shown}</a>'


def _shown(cell: Cell) -> str:
    if cell is None:
        return ""
    return f"<code>{escape(cell)}</code>" if isinstance(cell, str) else f"{cell:.3g}"
