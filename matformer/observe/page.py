"""Pieces of a self-contained HTML page: nothing in it asks the network."""

from __future__ import annotations

import base64
import html
import mimetypes
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

STYLE = """
:root{color-scheme:light dark;--paper:#fbfaf7;--card:#ffffff;--ink:#24262b;--muted:#74777f;--grid:#e6e3dc;
--text:#4a5bb8;--image:#0e8074;--audio:#b8692a;--router:#8c4a86;--other:#4b5563;--faint:#a9acb4;
--good:#2f7d4f;--bad:#b3423a;--tint:#eceefa;--tint2:#dde1f5;--cont:#e3f2ee;--cont2:#cfe8e2;
--sans:system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;
--serif:"Iowan Old Style","Palatino Linotype",Palatino,"Book Antiqua",Georgia,serif;
--mono:ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace}
@media (prefers-color-scheme:dark){:root{--paper:#15171b;--card:#1c1f24;--ink:#e4e3df;--muted:#969aa3;--grid:#30343b;
--text:#93a2f5;--image:#4fc3b3;--audio:#e6a063;--router:#cf95ca;--other:#a3acb9;--faint:#5f646d;
--good:#6cc48d;--bad:#ee8379;--tint:#262b40;--tint2:#323957;--cont:#1b322f;--cont2:#234540}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.6 var(--sans);-webkit-text-size-adjust:100%}
main{max-width:1080px;margin:0 auto;padding:3.5rem 1.4rem 5rem}
h1{font:600 2.6rem/1.15 var(--serif);margin:0 0 .4rem;letter-spacing:-.01em}
h2{font:600 1.45rem/1.3 var(--serif);margin:3.6rem 0 .3rem}
h3{font:600 .95rem/1.4 var(--sans);margin:0 0 .3rem}
p{margin:.3rem 0 1rem;max-width:68ch}.lead{color:var(--muted);margin:0 0 1.3rem}
.quiet{color:var(--muted);font-size:.92rem}
.facts{display:grid;
grid-template-columns:repeat(auto-fit,minmax(140px,1fr));gap:1rem 1.6rem;margin:2rem 0 0;padding:1.2rem 0;
border-top:1px solid var(--grid);border-bottom:1px solid var(--grid)}
.facts dt{color:var(--muted);font-size:.8rem}.facts dd{margin:0;font-size:1.08rem;font-variant-numeric:tabular-nums}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums;font-size:.94rem}
th{font-weight:500;color:var(--muted);font-size:.82rem;text-align:left;white-space:nowrap}
th,td{padding:.55rem 1.1rem .55rem 0;border-bottom:1px solid var(--grid);vertical-align:baseline}
td.number,th.number{text-align:right;white-space:nowrap}td:last-child,th:last-child{padding-right:0}
.error{color:var(--muted);font-size:.84em}.good{color:var(--good)}.bad{color:var(--bad)}.even{color:var(--muted)}.mark{white-space:nowrap}
.grid{display:grid;gap:1.3rem;grid-template-columns:repeat(auto-fill,minmax(min(100%,var(--cell,300px)),1fr))}
.card{background:var(--card);border:1px solid var(--grid);border-radius:10px;padding:1rem 1.1rem;min-width:0}
svg.curve{display:block;width:100%;height:auto}
figure{margin:0}figcaption{font-size:.9rem;margin-top:.6rem;line-height:1.4;overflow-wrap:anywhere}
.trio{display:grid;grid-auto-flow:column;grid-auto-columns:1fr;gap:.5rem}
.trio span{display:block;color:var(--muted);font-size:.74rem;margin-top:.2rem}
.trio video{display:block;width:100%;border-radius:6px}
.trio img,.picture img{display:block;width:100%;aspect-ratio:1;object-fit:contain;border-radius:6px;background:#fff}
.none{display:grid;place-items:center;aspect-ratio:1;border:1px dashed var(--grid);border-radius:6px;color:var(--muted)}
.players{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,230px),1fr));gap:.8rem 1.2rem}
.players audio{width:100%;height:36px;display:block}.wave{display:block;width:100%;height:36px;color:var(--audio)}
.players span{color:var(--muted);font-size:.78rem}
.sample{font:.86rem/1.85 var(--mono);white-space:pre-wrap;overflow-wrap:anywhere;margin:.2rem 0 0}
.sample i{font-style:normal;padding:.12em 0;background:var(--tint);box-decoration-break:clone}
.sample i:nth-child(even){background:var(--tint2)}
.sample i.new{background:var(--cont)}.sample i.new:nth-child(even){background:var(--cont2)}
.sample b{color:var(--image);font-weight:700;padding:0 .25em}
.sample u{text-decoration:none;color:var(--muted);font-size:.8em}
.key{display:inline-block;padding:0 .45em;border-radius:3px;
background:linear-gradient(90deg,var(--tint) 50%,var(--tint2) 50%)}
.key.new{background:linear-gradient(90deg,var(--cont) 50%,var(--cont2) 50%)}
.pair{display:grid;grid-template-columns:88px 1fr;gap:1rem;align-items:start;font-size:.92rem}
.pair small{color:var(--muted);display:block}
details{margin-top:1rem}summary{cursor:pointer;color:var(--muted)}
pre{font:.82rem/1.6 var(--mono);overflow-x:auto;
background:var(--card);border:1px solid var(--grid);border-radius:10px;padding:1rem}
footer{margin-top:4rem;color:var(--muted);font-size:.86rem}
@media (max-width:560px){main{padding:2rem 1rem 3rem}h1{font-size:2rem}h2{margin-top:2.6rem}th,td{padding-right:.8rem}
.stack thead{display:none}.stack tr{display:block;padding:.7rem 0;border-bottom:1px solid var(--grid)}
.stack td,.stack td.number{display:block;border:0;padding:.12rem 0;text-align:left;white-space:normal}
.stack td[data-head],.stack td.number[data-head]{position:relative;padding-left:7em}
.stack td[data-head]::before{content:attr(data-head);position:absolute;left:0;color:var(--muted);font-size:.8rem}}
@media print{.card{break-inside:avoid}}
"""


def text(value: Any) -> str:
    """Whatever it is, as text that cannot become markup."""
    return html.escape(str(value))


def document(title: str, body: Iterable[str]) -> str:
    """The whole page."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:; media-src data:\">"
        f"<title>{text(title)}</title><style>{STYLE}</style></head>\n<body><main>\n"
        + "\n".join(body)
        + "\n</main></body></html>\n"
    )


def section(title: str, body: str, *, lead: str = "") -> str:
    """A titled part; `lead` says in a sentence how to read it."""
    introduction = f'<p class="lead">{text(lead)}</p>' if lead else ""
    return f"<section><h2>{text(title)}</h2>{introduction}{body}</section>"


def missing(title: str, why: str) -> str:
    """A part that has nothing to show, and why."""
    return f'<section><h2>{text(title)}</h2><p class="quiet">{text(why)}</p></section>'


def facts(pairs: Sequence[tuple[str, str]]) -> str:
    """Names and values in a row."""
    cells = "".join(f"<div><dt>{text(name)}</dt><dd>{text(value)}</dd></div>" for name, value in pairs)
    return f'<dl class="facts">{cells}</dl>'


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: Sequence[int] = ()) -> str:
    """A table of cells that are HTML already; columns `numbers` stand to the right.

    One with a head becomes a list of rows on a narrow screen, each cell named by its column.
    """

    def cell(tag: str, column: int, content: str) -> str:
        label = f' data-head="{text(head[column])}"' if tag == "td" and head and head[column] else ""
        return f"<{tag}{' class=number' if column in numbers else ''}{label}>{content}</{tag}>"

    def line(tag: str, cells: Sequence[str]) -> str:
        return "<tr>" + "".join(cell(tag, column, content) for column, content in enumerate(cells)) + "</tr>"

    top = f"<thead>{line('th', head)}</thead>" if head else ""
    inner = top + f"<tbody>{''.join(line('td', row) for row in rows)}</tbody>"
    return f'<div class="scroll"><table{" class=stack" if head else ""}>{inner}</table></div>'


def grid(cards: Iterable[str], *, cell: str = "300px") -> str:
    """Cards side by side, as many as fit."""
    inner = "".join(f'<div class="card">{card}</div>' for card in cards)
    return f'<div class="grid" style="--cell:{cell}">{inner}</div>'


def folded(summary: str, body: str) -> str:
    """Something to open."""
    return f"<details><summary>{text(summary)}</summary>{body}</details>"


def data_uri(path: Path) -> str | None:
    """The file inside its own address; None if it cannot be read."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    kind = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def number(value: float) -> str:
    """A number for people: 1,234,567 or 0.0123."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:,.1f}" if abs(value) >= 1000 else f"{value:.4g}"


def flat(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """(path, value) of every leaf of nested mappings."""
    leaves: list[tuple[str, Any]] = []
    for name, value in tree.items():
        path = f"{prefix} › {name}" if prefix else str(name)
        leaves += flat(value, path) if isinstance(value, Mapping) else [(path, value)]
    return leaves
