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
    base, over = _base(token, is_sum=token["letter"] == "Σ" and not high), token["letter"] == "Σ"
    if low and high:
        return f"<msubsup>{base}{low}{high}</msubsup>"
    if low and over:
        return f"<munder>{base}{low}</munder>"
    return f"<msub>{base}{low}</msub>" if low else f"<msup>{base}{high}</msup>" if high else base


def _base(token: re.Match[str], is_sum: bool) -> str:
    if token["matrix"]:
        cells = [row.split(",") for row in token["matrix"][1:-1].split(";")]
        rows = ("".join(f"<mtd>{_math(cell.strip())}</mtd>" for cell in row) for row in cells)
        return f"<mrow><mo>[</mo><mtable>{''.join(f'<mtr>{row}</mtr>' for row in rows)}</mtable><mo>]</mo></mrow>"
    if token["root"]:
        return f"<msqrt>{_math(token['root'])}</msqrt>"
    if token["text"]:
        return f"<mtext>{escape(token['text'])}</mtext>"
    if token["number"]:
        return f"<mn>{token['number']}</mn>"
    if is_sum:
        return "<mo>∑</mo>"
    if token["letter"]:
        name = f"<mi>{token['letter']}</mi>"
        return f'<mover accent="true">{name}<mo stretchy="false">^</mo></mover>' if token["hat"] else name
    return f'<mo stretchy="false">{escape(token["sign"])}</mo>'


def _script(source: str | None) -> str:
    if not source:
        return ""
    return _math(source.lstrip("_^").strip("{}").translate(RAISED).translate(LOWERED))
