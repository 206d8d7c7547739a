"""A fence of markdown: what stands in a block marked ``formula`` becomes MathML, and stays readable as it is written.

Letters are variables, and ᵀ ⁻¹ ₂ are scripts, as are ``_x``, ``_{…}``, ``^p`` and ``^{…}``. ``[a, b; c, d]`` is a
matrix. Each line is a row. Two spaces part what stands in it, and six set a remark apart.
"""

from __future__ import annotations

import re
from html import escape
from typing import Any

RAISED = str.maketrans("ᵀ⁻⁺¹²³⁴", "⊤−+1234")
LOWERED = str.maketrans("₀₁₂ᵢⱼ", "012ij")
TOKEN = re.compile(
    r"""(?:(?P<matrix>\[[^]]*;[^]]*])|√\((?P<root>[^)]*)\)
    |(?P<text>(?:[a-z]{3,}[\w'-]*|of|by|or|on|in|is|as|to|Vh)(?![A-Za-z]))
    |(?P<number>\d+|½)|(?P<letter>[^\W\d_]|[∂∇])(?P<hat>\u0302?)|(?P<space>\s)|(?P<sign>.))
    (?P<low>[₀₁₂ᵢⱼ]+|_(?:\{[^}]*}|[A-Za-z]+|.))?
    (?P<high>(?:[ᵀ⁻⁺¹²³⁴′])+|\^(?:\{[^}]*}|−?(?:\d+|½|[a-z])))?""",
    re.VERBOSE,
)
TAGS = {"root": "msqrt", "text": "mtext", "number": "mn", "letter": "mi", "sign": 'mo stretchy="false"'}
# Signs that keep a distance of their own.
APART = set("=+−≤≥⪰≈←→·∘⊗,;:")


def fence(source: str, *_: Any, **__: Any) -> str:
    """Return the HTML of a block."""
    return f'<div class="formula">{"".join(map(_row, source.rstrip().splitlines()))}</div>'


def _row(line: str) -> str:
    told, *remarks = re.split(r"\s{6,}", line.strip())
    parts = [_whole(part) for part in re.split(r"\s{2,}", told)]
    return f"<div>{''.join(parts)}{''.join(f'<span>{_whole(part)}</span>' for part in remarks)}</div>"


def _whole(source: str) -> str:
    return f'<math display="block">{_math(source)}</math>'


def _math(source: str) -> str:
    tokens = list(TOKEN.finditer(source))
    neighbours = zip([None, *tokens], tokens, [*tokens[1:], None], strict=False)
    return f"<mrow>{''.join(_piece(*each) for each in neighbours)}</mrow>"


def _piece(before: re.Match[str] | None, token: re.Match[str], after: re.Match[str] | None) -> str:
    if token["space"]:
        beside = [each for each in (before, after) if each]
        width = ".28em" if any(each["text"] for each in beside) else ".17em"
        return "" if any(each["sign"] in APART for each in beside) else f'<mspace width="{width}"/>'
    low, high = (_script(token[name]) for name in ("low", "high"))
    if not (low or high):
        return _base(token)
    under = "munder" if token["letter"] == "Σ" else "msub"
    tag = "msubsup" if low and high else "msup" if high else under
    return f"<{tag}>{_base(token)}{low}{high}</{tag}>"


def _base(token: re.Match[str]) -> str:
    if token["matrix"]:
        rows = [[_math(cell.strip()) for cell in row.split(",")] for row in token["matrix"][1:-1].split(";")]
        cells = "".join(f"<mtr>{''.join(f'<mtd>{cell}</mtd>' for cell in row)}</mtr>" for row in rows)
        return f"<mrow><mo>[</mo><mtable>{cells}</mtable><mo>]</mo></mrow>"
    if token["letter"] == "Σ" and not token["high"]:
        return "<mo>∑</mo>"
    if token["hat"]:
        return f'<mover accent="true"><mi>{token["letter"]}</mi><mo stretchy="false">^</mo></mover>'
    kind = next(name for name in TAGS if token[name])
    inside = _math(token[kind]) if kind == "root" else escape(token[kind])
    return f"<{TAGS[kind]}>{inside}</{TAGS[kind].partition(' ')[0]}>"


def _script(source: str | None) -> str:
    return _math(source.lstrip("_^").strip("{}").translate(RAISED).translate(LOWERED)) if source else ""
