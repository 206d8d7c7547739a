"""A fence of mkdocs that makes MathML of formulas, and a hook that lowers and raises the scripts in sentences.

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


# Scripts in a sentence, behind one letter or a bracket; and what of a page is no sentence.
IN_LINE = re.compile(
    r"(?P<base>(?<![A-Za-z])[^\W\d_]\u0302?|[)\]‖])_(?P<low>\{[^}]*}|[A-Za-zα-ωΑ-Ω∂]+|\d)"
    r"|\^(?P<high>\{[^}]*}|\([^()]*\)|[−-]?\d+(?:[./]\d+)*|−?[½¼]|−?[^\W\d_])"
)
NO_SENTENCE = re.compile(r"(<(pre|code|math|script|svg).*?</\2>|<[^>]+>)", re.DOTALL)
MARKED = re.compile(r"(```.*?```|`[^`\n]*`)|(?<=[\u0302)\]‖])_", re.DOTALL)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Keep the low line of a script from being taken for emphasis."""
    return MARKED.sub(lambda found: found[1] or r"\_", markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Lower and raise the scripts in sentences."""
    parts, at = [], 0
    for skipped in NO_SENTENCE.finditer(html):
        parts += [IN_LINE.sub(_in_line, html[at : skipped.start()]), skipped[0]]
        at = skipped.end()
    return "".join([*parts, IN_LINE.sub(_in_line, html[at:])])


def _in_line(found: re.Match[str]) -> str:
    if found["low"]:
        return f"{found['base']}<sub>{found['low'].strip('{}')}</sub>"
    return f"<sup>{found['high'].strip('{}()')}</sup>"


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
        if any(each["text"] for each in beside):
            return '<mspace width=".28em"/>'
        return "" if any(each["sign"] in APART for each in beside) else '<mspace width=".17em"/>'
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
        return f"<mtable>{cells}</mtable>"
    if token["letter"] == "Σ" and not token["high"]:
        return "<mo>∑</mo>"
    if token["hat"]:
        return f'<mover accent="true"><mi>{token["letter"]}</mi><mo stretchy="false">^</mo></mover>'
    kind = next(name for name in TAGS if token[name])
    inside = _math(token[kind]) if kind == "root" else escape(token[kind])
    return f"<{TAGS[kind]}>{inside}</{TAGS[kind].partition(' ')[0]}>"


def _script(source: str | None) -> str:
    return _math(source.lstrip("_^").strip("{}").translate(RAISED).translate(LOWERED)) if source else ""
