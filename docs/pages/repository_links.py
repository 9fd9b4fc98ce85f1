"""MkDocs hook: links from a page to the rest of the repository work on the site as they do on a forge.

CONTRIBUTING.md and CHANGELOG.md become pages. Any other file that a page links to outside docs/ (a recipe, a source
file) is copied into the site below `repository/`. Such links are relative, so no address of a forge is needed. A link
to a file that does not exist stays as it is, and MkDocs reports it as dead.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

PAGES = ("CONTRIBUTING.md", "CHANGELOG.md")
COPIES = "repository"
_LINK = re.compile(r"(?<=\]\()(?![a-z+]+:|#)([^)\s#]+)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages, with their links seen from docs/, and the files that pages link to."""
    root = Path(config.config_file_path).parent
    for name in PAGES:
        text = (root / name).read_text(encoding="utf-8")
        moved = _LINK.sub(lambda found: posixpath.relpath(found[1], "docs"), text)
        files.append(File.generated(config, name, content=moved))
    for page in list(files.documentation_pages()):
        for target in map(_outside(page.src_uri), _LINK.findall(page.content_string)):
            if target and target not in PAGES and (root / target).is_file():
                copy = File.generated(config, f"{COPIES}/{target}", abs_src_path=str(root / target))
                copy.inclusion = InclusionLevel.NOT_IN_NAV
                if copy.src_uri not in files.src_uris:
                    files.append(copy)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links that leave docs/ at the pages and copies of `on_files`."""
    here = _outside(page.file.src_uri)

    def moved(found: re.Match[str]) -> str:
        target = here(found[1])
        inside = target if target in PAGES else f"{COPIES}/{target}"
        if not target or files.get_file_from_path(inside) is None:
            return found[1]
        return posixpath.relpath(inside, posixpath.dirname(page.file.src_uri) or ".")

    return _LINK.sub(moved, markdown)


def _outside(page: str) -> Callable[[str], str]:
    """A function from a link on a page to the path below the repository's root, or "" for a link within docs/."""
    folder = posixpath.join("docs", posixpath.dirname(page))

    def target(link: str) -> str:
        path = posixpath.normpath(posixpath.join(folder, link))
        return "" if path.startswith(("docs/", "../")) else path

    return target
