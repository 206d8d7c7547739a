"""A hook of mkdocs: pictures open at full size, sizes in a table stay on one line, docstrings link to pages.

A picture has a box that scrolls.
"""

from __future__ import annotations

import re
from typing import Any

IMAGES = re.compile(r'(?:<img [^>]*src="[^"]+"[^>]*>\s*)+')
IMAGE = re.compile(r'<img [^>]*src="([^"#]+)[^>]*>')
PAGES = re.compile(r"<code>docs/([\w/-]+)\.md</code>")
SIZES = re.compile(r"(?<=<t[dh]>)(?:\w{1,6}, )+\w{1,6}(?=</t[dh]>)")


def on_page_content(html: str, **_: Any) -> str:
    """Take pictures out of their paragraph, and wrap each into a link to its file, inside a box that scrolls."""
    html = PAGES.sub(r'<a href="../\1/">\g<0></a>', html)
    html = SIZES.sub(lambda sizes: sizes[0].replace(" ", "&nbsp;"), html)
    return IMAGES.sub(_box, html).replace("<p></p>", "")


def _box(pictures: re.Match[str]) -> str:
    links = IMAGE.sub(r'<a href="\1" title="Open at full size">\g<0></a>', pictures[0].strip())
    return f'</p><div class="picture">{links}</div><p>'
