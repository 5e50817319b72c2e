"""HTML of a page that needs nothing beside it: every text escaped, every picture in the page itself."""

import base64
import html
from collections.abc import Sequence
from typing import NamedTuple

STYLE = """
:root { color-scheme: light dark; --line: color-mix(in srgb, CanvasText 20%, Canvas); }
body { font: 16px/1.5 system-ui, sans-serif; background: Canvas; color: CanvasText; margin: 0 auto; padding: 1rem;
  max-width: 76rem; overflow-wrap: anywhere; }
h1, h2, h3 { line-height: 1.2; margin: 1.6em 0 0.5em; }
h2 { border-bottom: 1px solid var(--line); }
nav ul { columns: 16rem; padding-left: 1.2rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.9rem; font-variant-numeric: tabular-nums; }
th, td { border: 1px solid var(--line); padding: 0.25rem 0.5rem; text-align: left; vertical-align: top; }
td, th { overflow-wrap: normal; }
figure { margin: 1rem 0; break-inside: avoid; }
.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(22rem, 100%), 1fr)); gap: 0.5rem; }
.panels img { background: white; border-radius: 4px; width: 100%; max-width: 42rem; height: auto; }
.panels.wide { display: block; }
.panels.wide img { width: auto; min-width: min(100%, 44rem); max-width: 100%; image-rendering: pixelated; }
figcaption, .source { font-size: 0.85rem; }
.source summary { cursor: pointer; }
code { font-size: 0.9em; }
@media print {
  body { max-width: none; font-size: 10pt; }
  nav { display: none; }
  table { font-size: 7pt; }
  details::details-content { content-visibility: visible; block-size: auto; }
}
"""


class Picture(NamedTuple):
    """A picture, and what it shows in words."""

    kind: str  # its media type
    data: bytes
    alt: str


def text(value: object) -> str:
    """A value as HTML; what cannot be printed becomes U+FFFD."""
    return html.escape(printable(value))


def printable(value: object) -> str:
    """A value as words of one line."""
    return "".join(one if one.isprintable() else "\N{REPLACEMENT CHARACTER}" for one in str(value))


def code(value: object) -> str:
    return f"<code>{text(value)}</code>"


def paragraph(inside: str) -> str:
    return f"<p>{inside}</p>"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table that scrolls in its own box; cells are HTML, the first of a row is its heading."""
    lines = ["<tr>" + "".join(f'<th scope="col">{one}</th>' for one in head) + "</tr>"]
    for first, *others in rows:
        lines.append(f'<tr><th scope="row">{first}</th>' + "".join(f"<td>{one}</td>" for one in others) + "</tr>")
    return '<div class="scroll"><table>\n' + "\n".join(lines) + "\n</table></div>"


def folded(summary: str, inside: str, name: str = "") -> str:
    """What is read when it is asked for, and printed."""
    kind = f' class="{name}"' if name else ""
    return f"<details{kind}><summary>{summary}</summary>{inside}</details>"


def figure(pictures: Sequence[Picture], caption: str, source: str, wide: bool = False) -> str:
    """Pictures side by side, or one below the other on a narrow screen, with a caption and a source, both HTML."""
    images = [
        f'<img alt="{text(one.alt)}" src="data:{one.kind};base64,{base64.b64encode(one.data).decode()}">'
        for one in pictures
    ]
    panels = f'<div class="panels{" wide" if wide else ""}">' + "\n".join(images) + "</div>"
    return f"<figure>{panels}<figcaption>{caption}</figcaption>{source}</figure>"


def document(title: str, introduction: str, sections: Sequence[tuple[str, str, str]]) -> str:
    """A page with its contents; each section is an id, a heading and HTML."""
    contents = "".join(f'<li><a href="#{name}">{text(heading)}</a></li>' for name, heading, _ in sections)
    parts = [
        f'<section id="{name}"><h2>{text(heading)}</h2>\n{inside}\n</section>' for name, heading, inside in sections
    ]
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{text(title)}</title>",
            f"<style>{STYLE}</style></head><body>",
            f"<header><h1>{text(title)}</h1>{introduction}</header>",
            f'<nav aria-label="Contents"><ul>{contents}</ul></nav>',
            f"<main>{''.join(parts)}</main>",
            "</body></html>",
            "",
        ]
    )
