# SPDX-License-Identifier: Apache-2.0
"""Pieces of a report page. Text from models, files and people goes through `escaped`, which escapes it."""

import html
from typing import Any

from rlhf_fast.run.terminal import redacted


def section(key: str, title: str, content: str) -> str:
    """A part of the page with a heading; an empty string without content."""
    return f"<section id='{key}'><h2>{title}</h2>{content}</section>" if content else ""


def grid(*cards: str) -> str:
    """Cards beside one another, as many as the width allows."""
    return f"<div class='cards'>{''.join(cards)}</div>" if any(cards) else ""


def card(title: str, caption: str, svg: str) -> str:
    """A chart with a title and a caption."""
    return f"<figure><h3>{title}</h3>{svg}<figcaption>{caption}</figcaption></figure>"


def tile(name: str, before: float | None, after: float | None, note: str, digits: int = 2) -> str:
    """A headline figure, as "before -> after" if there is a before; an empty string if it was not measured."""
    if after is None:
        return ""
    shown = f"{after:.{digits}f}" if before is None else f"<s>{before:.{digits}f}</s> {after:.{digits}f}"
    return f"<div><span>{name}</span><b>{shown}</b><small>{note}</small></div>"


def escaped(value: Any) -> str:
    """Text that becomes no markup, and holds no secrets."""
    return html.escape(redacted(str(value)))


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,
initial-scale=1"> <title>{title}</title><style>{style}</style></head><body><main> {body} </main></body></html>
"""

STYLE = """
:root{color-scheme:light
dark;--bg:#f6f7f9;--card:#fff;--ink:#1b1f27;--soft:#5f6876;--line:#e3e6eb;--blue:#3b82f6}
@media(prefers-color-scheme:dark){:root{--bg:#0f1217;--card:#171b22;--ink:#e6e9ef;--soft:#98a1b0;--line:#2a303a}}
*{box-sizing:border-box} body{margin:0;background:var(--bg);color:var(--ink);font:15px/1.5
system-ui,-apple-system,"Segoe UI",sans-serif} main{max-width:1120px;margin:0 auto;padding:2rem 1rem 4rem}
h1{font-size:1.7rem;margin:0}h2{font-size:1.2rem;margin:2.6rem 0 .9rem}h3{font-size:.95rem;margin:0 0 .4rem}
.lead,small,figcaption{color:var(--soft)}.lead{margin:.2rem 0 0}small,figcaption{font-size:.8rem}
.tiles,.cards{display:grid;gap:.8rem;grid-template-columns:repeat(auto-fill,minmax(min(310px,100%),1fr))}
.tiles{grid-template-columns:repeat(auto-fill,minmax(160px,1fr));margin-top:1.2rem} .tiles
div,figure,details,.samples,.facts,.time{background:var(--card);border:1px solid
var(--line);border-radius:10px} .tiles div{padding:.7rem .9rem}.tiles span,.tiles small{display:block}.tiles
span{color:var(--soft);font-size:.85rem} .tiles b{font-size:1.35rem;font-variant-numeric:tabular-nums} .tiles
s{color:var(--soft);font-weight:400;font-size:1.05rem;text-decoration:none}.tiles s:after{content:" \\2192"}
figure{margin:0;padding:.9rem}figure svg{width:100%;height:auto;display:block}
table{border-collapse:separate;border-spacing:0;width:100%}
th,td{text-align:left;vertical-align:top;padding:.55rem .8rem;border-bottom:1px solid var(--line)}
tr:last-child>*{border-bottom:0}th{font-weight:600}thead th{color:var(--soft);font-size:.85rem}
h3+.samples{margin-top:.3rem}section>h3{margin-top:1.6rem}td small{display:block}.samples td,.samples
th{width:38%} .samples th:first-child{width:24%}.facts
th{width:14rem;font-weight:500;color:var(--soft)}.cut{color:var(--soft)}
details{margin-top:.8rem;padding:.6rem .9rem}summary{cursor:pointer}details table{border:0;margin-top:.5rem}
pre{overflow:auto;font-size:.82rem} .time{padding:.7rem .9rem;margin-bottom:.6rem}.time
span{float:right;font-variant-numeric:tabular-nums} .bar{display:flex;height:10px;margin:.35rem
0;border-radius:5px;overflow:hidden}.bar i{background:var(--blue)} .samples.compared
td,.samples.compared th{width:auto!important} @media(max-width:640px){.samples
thead{display:none}.samples tr,.samples td,.samples th{display:block;width:100%!important} .samples
tr>*{border:0;padding:.3rem .8rem}.samples tr{border-bottom:1px solid var(--line);padding:.4rem 0} .samples
td:before{color:var(--soft);font-size:.8rem;display:block} .samples
td:nth-child(2):before{content:"before"}.samples td:nth-child(3):before{content:"after"}}
"""
