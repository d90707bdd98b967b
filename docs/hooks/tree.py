"""For MkDocs: pages and files of the checkout that lie outside of docs/, and links to them.

On a Git host a page refers to others by their path in the tree. The site has some of them as pages (PAGES); any other
file of the tree that is linked is copied along, under files/. A link that leads to neither is left as it is, and fails
the strict build.
"""

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import get_plugin_logger
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]

# Path in the tree: page of the site.
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "benchmarks/README.md": "benchmarks.md",
    "data/README.md": "data.md",
    "models/README.md": "models.md",
    "tests/golden/README.md": "golden.md",
}

_PATHS = {page: path for path, page in PAGES.items()}
_FENCE = re.compile(r"^(`{3,}|~{3,})")
# A link or picture in Markdown, or one in HTML: what is before the target, the target, what is after.
_LINK = re.compile(r"(\]\()([^()\s]+)(\))|((?:src|href)=\")([^\"]+)(\")")
_REMOTE = re.compile(r"<(?:script|img|link|iframe|source)\b[^>]*?\b(?:src|href)=\"?(?:https?:)?//[^\"> ]+")
_log = get_plugin_logger("tree")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that lie outside of docs/."""
    for path, page in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links between files of the tree at where these files are in the site."""
    here = page.file.src_uri
    folder = posixpath.dirname(_PATHS.get(here, f"docs/{here}"))

    def place(match: re.Match[str]) -> str:
        before, target, after = match.group(1, 2, 3) if match[1] else match.group(4, 5, 6)
        path, hash_sign, anchor = target.partition("#")
        if not path or ":" in path:
            return match[0]
        there = _in_site(posixpath.normpath(posixpath.join(folder, path)), config, files)
        if there is None:
            return match[0]
        if match[4] and there.endswith(".md"):  # MkDocs maps links in Markdown, and leaves HTML alone
            there = f"{there[:-3]}.html"
        return f"{before}{posixpath.relpath(there, posixpath.dirname(here) or '.')}{hash_sign}{anchor}{after}"

    return "".join(text if is_code else _LINK.sub(place, text) for is_code, text in _pieces(markdown))


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """Warn, which fails the strict build, where a page would fetch something from elsewhere when it is read."""
    for remote in _REMOTE.findall(output):
        if 'rel="canonical"' not in remote:
            _log.warning(f"{page.file.src_uri} loads something from the network: {remote}")
    return output


def _in_site(path: str, config: MkDocsConfig, files: Files) -> str | None:
    """The site's name of a file of the tree, which is copied along if need be; None where there is no such file."""
    if path in PAGES:
        return PAGES[path]
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    if path.startswith("..") or not (ROOT / path).is_file():
        return None
    uri = f"files/{path}"
    if files.get_file_from_path(uri) is None:
        files.append(File.generated(config, uri, abs_src_path=str(ROOT / path)))
    return uri


def _pieces(markdown: str) -> Iterator[tuple[bool, str]]:
    """The text in order, each piece with whether it is code: a fenced block's line, or a code span."""
    fence = ""
    for line in markdown.splitlines(keepends=True):
        match = _FENCE.match(line)
        if fence:
            fence = "" if line.strip() == fence else fence
            yield True, line
        elif match:
            fence = match[1]
            yield True, line
        else:
            # The label of a link may be code: `[`name`](target)` is split after the label, which keeps `](target)`.
            for number, span in enumerate(re.split(r"(`+[^`]+`+)", line)):
                yield number % 2 == 1, span
