"""Check that each link within the built site leads to a page and a place that exist.

Sphinx warns of most links that lead nowhere, but not of those that its theme, or HTML in a page, has made.

    python docs/check_links.py docs/_build/html
"""

from __future__ import annotations

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Page(HTMLParser):
    """What a page links to, and the places in it that can be linked to."""

    def __init__(self, text: str) -> None:
        """Read it."""
        super().__init__()
        self.links: set[str] = set()
        self.places: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Take note of one element."""
        for name, value in attrs:
            if value is None:
                continue
            if name == "id" or (tag == "a" and name == "name"):
                self.places.add(value)
            elif name in {"href", "src"}:
                self.links.add(value)


def broken_links(site: Path) -> list[str]:
    """Return the links that lead nowhere, each with its page."""
    pages = {path: Page(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html"))}
    broken = []
    for path, page in pages.items():
        for link in sorted(page.links):
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if target.is_dir():
                target /= "index.html"
            place = unquote(parts.fragment)
            if not target.exists() or (place and target in pages and place not in pages[target].places):
                broken.append(f"{path.relative_to(site)}: {link}")
    return broken


def main() -> int:
    """Check the site whose folder the command line names; return the exit code."""
    site = Path(sys.argv[1]).resolve()
    broken = broken_links(site)
    print(*broken, sep="\n", end="\n" if broken else "")
    print(
        f"{len(broken)} links within the site lead nowhere" if broken else "All links within the site lead somewhere."
    )
    return int(bool(broken))


if __name__ == "__main__":
    sys.exit(main())
