"""HTML that cannot be injected into: every string is escaped unless it was built here, and no script may run."""

from __future__ import annotations

import base64
import html
import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
"""Second wall behind the escaping: the browser itself refuses scripts and every outside request."""

SMALL_PICTURE = 480
"""Pictures of fewer pixels across are enlarged."""
FIGURE_SCALE = 0.72
"""CSS pixels per pixel of a figure: figures 8.4 inches wide at 150 dpi fill the column, all with the same letters."""


class Markup(str):
    """Text that is HTML already, made by the functions below."""

    __slots__ = ()


Content = Markup | str | int | float | None


def tag(name: str, /, *children: Content, **attributes: Content) -> Markup:
    """An element; plain strings among children and attributes are escaped, None is left out, class_ means class."""
    inside = "".join(_escaped(c) for c in children if c is not None)
    listed = "".join(f' {k.rstrip("_")}="{_escaped(v)}"' for k, v in attributes.items() if v is not None)
    return Markup(f"<{name}{listed}>{inside}" + ("" if name in ("img", "br", "meta") else f"</{name}>"))


def joined(parts: Iterable[Content]) -> Markup:
    """Parts one after another."""
    return Markup("".join(_escaped(p) for p in parts if p is not None))


def table(
    head: Sequence[Content],
    rows: Iterable[Sequence[Content]],
    marked: Iterable[int] = (),
    class_: str | None = None,
) -> Markup:
    """A table whose first column is the row's heading; rows numbered in `marked` stand out."""
    stands_out = set(marked)
    body = []
    for place, row in enumerate(rows):
        cells = [tag("th", row[0], scope="row"), *(tag("td", c) for c in row[1:])]
        body.append(tag("tr", *cells, class_="chosen" if place in stands_out else None))
    header = tag("thead", tag("tr", *(tag("th", h, scope="col") for h in head))) if head else None
    return tag("div", tag("table", header, tag("tbody", *body), class_=class_), class_="scroll")


def facts(values: Mapping[str, Any]) -> Markup:
    """A two-column table of nested plain values; nested names are joined with a dot."""
    return table((), list(flattened(values)), class_="facts")


def figure(png: bytes | None, alt: str, caption: Content = None) -> Markup | None:
    """A PNG embedded in the page; None stays None. Small grids are enlarged without blurring."""
    if png is None:
        return None
    width = png_width(png) or 0
    source = "data:image/png;base64," + base64.b64encode(png).decode()
    small = width < SMALL_PICTURE
    shown = None if small else round(width * FIGURE_SCALE)
    image = tag("img", src=source, alt=alt, width=shown, class_="pixels" if small else None)
    return tag("figure", image, tag("figcaption", caption) if caption else None)


def png_width(data: bytes) -> int | None:
    """Width in pixels from the header of a PNG; None when it is not one."""
    if data[:8] != PNG_SIGNATURE or data[12:16] != b"IHDR" or len(data) < 24:
        return None
    return struct.unpack(">I", data[16:20])[0]


def page(title: str, body: Markup) -> bytes:
    """A whole document as UTF-8; characters that have no encoding become "?"."""
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        Markup(f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", title),
        Markup(f"<style>{STYLE}</style>"),
    )
    document = tag("html", head, tag("body", tag("main", body)), lang="en")
    return f"<!DOCTYPE html>\n{document}\n".encode("utf-8", errors="replace")


def _escaped(value: Content) -> str:
    return value if isinstance(value, Markup) else html.escape(str(value), quote=True)


def flattened(values: Any, path: str = "") -> Iterable[tuple[str, str]]:
    """Names, joined with dots, and words of nested plain values."""
    if isinstance(values, Mapping) and values:
        for key, value in values.items():
            yield from flattened(value, f"{path}.{key}" if path else str(key))
    else:
        plain = {None: "none", True: "yes", False: "no"}
        yield path, plain[values] if values is None or isinstance(values, bool) else str(values)


STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #59626e; --line: #dfe3e8; --paper: #ffffff; --tint: #f5f6f8;
  --accent: #0060a0; --warn: #fff4d6; --chosen: #fdf0cf; --gone: #c3c9d1; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8eb; --soft: #a2abb6; --line: #363c44; --paper: #15181c;
  --tint: #1f2328; --accent: #6db8ef; --warn: #40350f; --chosen: #4a3d13; --gone: #4b525b; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, "Segoe UI", Roboto, sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 2.5rem 1.5rem 4rem; }
h1 { font-size: 2rem; line-height: 1.2; margin: 0 0 .3rem; overflow-wrap: anywhere; }
h2 { font-size: 1.3rem; margin: 3rem 0 .8rem; padding-top: .8rem; border-top: 1px solid var(--line); }
h3 { font-size: 1.05rem; margin: 2.2rem 0 .4rem; } h2 + h3 { margin-top: 1rem; }
h4 { font-size: .95rem; margin: 1.4rem 0 .4rem; }
p { margin: .5rem 0; max-width: 46rem; overflow-wrap: anywhere; } p.soft { max-width: none; }
.soft, figcaption { color: var(--soft); font-size: .9rem; }
.notes { background: var(--warn); border-radius: 8px; padding: .8rem 1.2rem; margin: 1.5rem 0; }
.notes ul { margin: .3rem 0; padding-left: 1.2rem; overflow-wrap: anywhere; }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); gap: .8rem; margin: 1.6rem 0; }
.tile { background: var(--tint); border-radius: 10px; padding: .9rem 1.1rem; }
.tile b { display: block; font-size: 1.4rem; font-weight: 650; line-height: 1.4; white-space: nowrap; }
.tile span { display: block; color: var(--soft); font-size: .85rem; line-height: 1.4; }
figure { margin: 1rem 0; }
figure img { display: block; max-width: 100%; background: #fff; border-radius: 8px; }
img.pixels { width: 26rem; image-rendering: pixelated; }
figcaption { margin-top: .4rem; overflow-wrap: anywhere; }
.pair { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(20rem, 100%), 1fr)); gap: 1.2rem; }
.strip { display: grid; grid-template-columns: repeat(auto-fill, minmax(10rem, 1fr)); gap: 1rem; }
.pair img, .strip img { width: 100%; }
.pair figure, .strip figure { margin: .3rem 0; }
.scroll { overflow-x: auto; margin: .8rem 0; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .32rem .9rem .32rem 0; text-align: right; border-bottom: 1px solid var(--line); vertical-align: top; }
th { font-weight: 600; } thead th { color: var(--soft); font-weight: 500; vertical-align: bottom; }
tr > :first-child, .facts td, .words-last tr > :last-child { text-align: left; overflow-wrap: anywhere; }
tr > :first-child { padding-left: .5rem; }
.many td { text-align: left; padding-right: 1.4rem; min-width: 7rem; overflow-wrap: anywhere; }
.facts th { font-weight: 500; color: var(--soft); white-space: nowrap; }
tr.chosen { background: var(--chosen); }
.blocks { display: flex; flex-wrap: wrap; gap: 3px; margin: .6rem 0; font-size: .78rem; }
.blocks span { min-width: 1.75rem; text-align: center; padding: .1rem .2rem; border-radius: 4px;
  font-variant-numeric: tabular-nums; border: 1.5px solid var(--accent); }
.blocks .leaving { border-color: #d55e00; color: #d55e00; text-decoration: line-through; font-weight: 700; }
.blocks .gone { border: 1.5px dashed var(--gone); color: var(--gone); }
.chip { font-size: .8rem; font-weight: 500; color: var(--soft); border: 1px solid var(--line); border-radius: 9px;
  padding: .05rem .5rem; margin-left: .4rem; white-space: nowrap; }
pre { background: var(--tint); border-radius: 8px; padding: .9rem 1.1rem; font-size: .84rem; line-height: 1.5;
  white-space: pre-wrap; overflow-wrap: anywhere; }
summary { cursor: pointer; color: var(--accent); margin: .6rem 0; }
footer { margin-top: 3rem; color: var(--soft); font-size: .85rem; }
@media print { :root { color-scheme: light; --ink: #000; --soft: #444; --line: #ccc; --paper: #fff; --tint: #f3f3f3;
  --accent: #0060a0; --warn: #f3f3f3; --chosen: #eee; --gone: #aaa; }
  main { max-width: none; padding: 0; } body { font-size: 10.5pt; } figure, tr, .tile { break-inside: avoid; }
  h2, h3, h4 { break-after: avoid; } .scroll { overflow: visible; } }
"""
