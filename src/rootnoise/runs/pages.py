"""The parts of a page: one file of HTML, for phones, print and dark mode, which loads nothing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from rootnoise.runs.palette import BLUE, ORANGE

STYLE = """
:root { color-scheme: light dark; --line: #8886; --soft: #8882; }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 1.5rem auto; padding: 0 1rem;
  color: CanvasText; background: Canvas; }
h1 { font-size: 1.5rem; line-height: 1.25; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
.claim { border-left: 4px solid BLUE; padding: .3rem 1rem; background: var(--soft); }
.none { border-color: ORANGE; }
.big { display: flex; flex-wrap: wrap; gap: .5rem 2.5rem; padding: 0; list-style: none; }
.big b { display: block; font-size: 1.6rem; font-variant-numeric: tabular-nums; }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr));
  gap: 1rem 2rem; }
figure { margin: 0; break-inside: avoid; } figcaption { font-size: .9rem; }
svg { width: 100%; height: auto; display: block; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .6rem; text-align: left; border-bottom: 1px solid var(--line);
  overflow-wrap: anywhere; vertical-align: top; }
td:first-child, th:first-child { white-space: nowrap; }
.scroll { overflow-x: auto; }
.pictures > :only-child { max-width: 46rem; }
@media (max-width: 34rem) {
  .many thead { display: none; }
  .many tr { display: block; padding: .4rem 0; border-bottom: 1px solid var(--line); }
  .many td { display: flex; justify-content: space-between; gap: 1rem; border: 0; padding: .1rem; }
  .many td::before { content: attr(data-name); }
  .many td:first-child { font-weight: 600; }
}
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: var(--soft);
  padding: .6rem 1rem; }
dt { font-weight: 600; } dd { margin: 0 0 .6rem 0; }
@media print { body { max-width: none; } h2 { break-after: avoid; } }
""".replace("BLUE", BLUE).replace("ORANGE", ORANGE)


def document(title: str, parts: Sequence[str], style: str = "") -> str:
    """Return the whole page; the parts are HTML, and `style` adds to the common one."""
    body = "\n".join(parts)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{STYLE}{style}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""


def figure(svg: str, caption: str) -> str:
    """Return a picture with its caption."""
    return f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>\n"


def definitions(pairs: Sequence[tuple[str, str]]) -> str:
    """Return a list of words and what they mean."""
    return f"<dl>{''.join(f'<dt>{escape(a)}</dt><dd>{escape(b)}</dd>' for a, b in pairs)}</dl>"


def table(heads: Sequence[str], rows: Iterable[tuple[str, ...]]) -> str:
    """Return a table of text; on a phone, one of many columns has a line for each of its cells."""
    many = len(heads) > 2
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in heads)
    body = ""
    for row in rows:
        cells = zip(heads, row, strict=True)
        body += f"<tr>{''.join(_cell(name if many else '', text) for name, text in cells)}</tr>\n"
    kind = ' class="many"' if many else ""
    made = f"<table{kind}><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="scroll">{made}</div>'


def _cell(name: str, text: str) -> str:
    label = f' data-name="{escape(name)}"' if name else ""
    return f"<td{label}>{escape(text)}</td>"
