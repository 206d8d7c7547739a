"""Look at every page of the built site in a browser, as a phone and as a desktop show it.

``python docs/_tools/check.py site`` prints each fault and exits with 1 if there is one: a block that is wider than its
column and does not scroll, a request that leaves the site, an error in the console. ``--pictures FOLDER`` keeps a
screenshot of each page, light and dark. ``--only recipes/`` takes the pages whose address begins so.
"""

from __future__ import annotations

import argparse
import functools
import os
import shutil
import sys
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

WIDTHS = (390, 1400)
TALLEST = 8000
SETTLED = 400
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
# Elements that reach beyond the article by more than the theme's margin of code on a phone, and stand in nothing that
# scrolls or cuts them off.
TOO_WIDE = """() => {
    const article = document.querySelector("article"), edge = article.getBoundingClientRect().right + 17;
    const held = (element) => {
        for (let box = element.parentElement; box && box !== article; box = box.parentElement)
            if (getComputedStyle(box).overflowX !== "visible") return true;
        return false;
    };
    const wide = [...article.querySelectorAll("*")].filter(
        (element) => element.getBoundingClientRect().right > edge && !held(element));
    const names = wide.map((element) => `<${element.localName}> ${element.textContent.trim().slice(0, 60)}`);
    if (document.documentElement.scrollWidth > window.innerWidth) names.push("the page itself");
    return names;
}"""


class Quiet(SimpleHTTPRequestHandler):
    """Serve files and say nothing."""

    def log_message(self, *_: object) -> None:
        """Leave the terminal to the faults."""


def faults(page: Page, address: str, url: str) -> Iterator[str]:
    """Open a page, and yield what is wrong with it."""
    found: list[str] = []
    page.on("console", lambda message: found.append(f"console: {message.text}") if message.type == "error" else None)
    page.on("pageerror", lambda error: found.append(f"error: {error}"))
    page.on("request", lambda request: None if request.url.startswith((url, "data:", "blob:")) else
            found.append(f"request: {request.url}"))  # fmt: skip
    page.goto(url + address, wait_until="load")
    found += [f"too wide: {name}" for name in page.evaluate(TOO_WIDE)]
    yield from found


def main() -> int:
    """Check the pages that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("site", type=Path)
    parser.add_argument("--pictures", type=Path)
    parser.add_argument("--only", default="")
    options = parser.parse_args()
    pages = sorted(str(path.parent.relative_to(options.site)) + "/" for path in options.site.rglob("index.html"))
    pages = [page.removeprefix("./") for page in pages if page.removeprefix("./").startswith(options.only)]
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(options.site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url, count = f"http://127.0.0.1:{server.server_port}/", 0
    with sync_playwright() as playwright:
        installed = next(filter(None, map(shutil.which, BROWSERS)), None)
        sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=installed, args=sandbox)
        for width in WIDTHS:
            # Colours matter to pictures alone.
            for scheme in ("light", "dark") if options.pictures else ("light",):
                viewport = {"width": width, "height": 900}
                context = browser.new_context(viewport=viewport, color_scheme=scheme)
                for address in pages:
                    page = context.new_page()
                    for fault in faults(page, address, url):
                        print(f"{address or 'front page'} at {width}, {scheme}: {fault}")
                        count += 1
                    if options.pictures:
                        options.pictures.mkdir(parents=True, exist_ok=True)
                        page.wait_for_timeout(SETTLED)
                        height = min(page.evaluate("document.documentElement.scrollHeight"), TALLEST)
                        name = f"{address.strip('/').replace('/', '-') or 'front'}-{width}-{scheme}.png"
                        clip = {"x": 0, "y": 0, "width": width, "height": height}
                        page.screenshot(path=options.pictures / name, full_page=True, clip=clip)
                    page.close()
                context.close()
        browser.close()
    server.shutdown()
    print(f"{len(pages)} pages at {' and '.join(map(str, WIDTHS))} pixels: {count} faults")
    return int(count > 0)


if __name__ == "__main__":
    sys.exit(main())
