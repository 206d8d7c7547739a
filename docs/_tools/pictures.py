"""A hook of mkdocs: a picture scrolls where the page is narrower, and opens by itself at full size."""

from __future__ import annotations

import re
from typing import Any

IMAGE = re.compile(r'<p>((?:<img [^>]*src="[^"]+"[^>]*>\s*)+)</p>')
SOURCE = re.compile(r'(<img [^>]*src="([^"#]+)(#only-\w+)?"[^>]*>)')


def on_page_content(html: str, **_: Any) -> str:
    """Wrap each picture that stands by itself into a link to its file, inside a box that scrolls."""
    return IMAGE.sub(lambda match: f'<div class="picture">{SOURCE.sub(_linked, match[1])}</div>', html)


def _linked(match: re.Match[str]) -> str:
    return f'<a href="{match[2]}" title="Open at full size">{match[1]}</a>'
