"""Checks a built site without the network: `python docs/check_site.py FOLDER`.

Every local link must lead to a file, and to an anchor in it where it names one. No page may load anything, such as a
script, a font or a picture, from elsewhere. Ends with 1 where something is wrong, after naming all of it.
"""

import re
import sys
from collections.abc import Iterator
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

LOADS = {"script": "src", "img": "src", "source": "src", "iframe": "src", "object": "data", "link": "href"}


class Page(HTMLParser):
    """What a page links to, what it loads, and its anchors."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.anchors = {"", "top"}
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = {name: value for name, value in attributes if value}
        self.anchors |= {found[name] for name in ("id", "name") if name in found}
        if tag == "a" and "href" in found:
            self.links.append(found["href"])
        elif LOADS.get(tag) in found:
            self.loads.append(found[LOADS[tag]])


@cache
def page(path: Path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


def wrong(site: Path) -> Iterator[str]:
    """Everything that is wrong with a site, in a sentence each."""
    for path in sorted(site.rglob("*.html")):
        name = path.relative_to(site)
        for link in page(path).loads:
            if urlsplit(link).netloc:
                yield f"{name} loads {link}, which is not part of the site"
        for link in [*page(path).links, *page(path).loads]:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not target.is_file():
                yield f"{name} links to {link}, which does not exist"
            elif target.suffix == ".html" and unquote(parts.fragment) not in page(target).anchors:
                yield f"{name} links to {link}, which has no such anchor"
    for path in sorted(site.rglob("*.css")):
        for url in re.findall(r"(?:url\(|@import )[\"']?((?:https?:)?//[^\"')]*)", path.read_text(encoding="utf-8")):
            yield f"{path.relative_to(site)} loads {url}, which is not part of the site"


if __name__ == "__main__":
    problems = list(dict.fromkeys(wrong(Path(sys.argv[1]).resolve())))
    print("\n".join(problems), end="\n" if problems else "", file=sys.stderr)
    sys.exit(bool(problems))
