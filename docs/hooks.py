"""What the site needs beyond mkdocs: files from outside of ``pages``, equations as MathML, drawings
in the page.

Pages link to files of the repository by relative paths, which also lead there in the repository
itself. In the site a picture is such a file, and a Python file is a page that shows its source.
"""

from __future__ import annotations

import html
import os
import pathlib
import re
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGES = ROOT / "docs" / "pages"
_OUTSIDE = re.compile(r"\]\(((?:\.\./){2,}[\w./-]+)\)")
"""The target of a Markdown link that leaves ``pages``."""
_EQUATION = re.compile(
    r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', flags=re.DOTALL
)
_DRAWING = re.compile(r'<img alt="([^"]*)" src="(drawings/[\w-]+\.svg)" />')


def on_files(files: Files, *, config: Any) -> Files:
    """Add the pictures and sources to which pages link."""
    linked: set[str] = set()
    for page in PAGES.rglob("*.md"):
        targets = _OUTSIDE.findall(page.read_text())
        linked |= {_in_repository(page, target) for target in targets}
    for path in sorted(linked):
        files.append(_file(path, config))
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Links that leave ``pages`` lead to the copies of their files."""
    own = PAGES / page.file.src_uri

    def moved(match: re.Match[str]) -> str:
        target = _in_site(_in_repository(own, match[1]))
        return f"]({os.path.relpath(target, os.path.dirname(page.file.src_uri) or '.')})"

    return markdown if page.file.generated_by else _OUTSIDE.sub(moved, markdown)


def on_page_content(content: str, **_: Any) -> str:
    """Equations become MathML, which browsers draw by themselves; drawings follow the reader's
    light or dark."""
    content = _EQUATION.sub(lambda match: _mathml(match[3], block=match[2] == "["), content)
    return _DRAWING.sub(lambda match: f"<figure>{(PAGES / match[2]).read_text()}</figure>", content)


def _in_repository(page: pathlib.Path, target: str) -> str:
    """The path in the repository to which a page's link leads."""
    path = (page.parent / target).resolve()
    if not path.is_file():
        raise FileNotFoundError(f"{page.relative_to(ROOT)} links to {target}, which does not exist")
    return path.relative_to(ROOT).as_posix()


def _in_site(path: str) -> str:
    return f"source/{path}" if path.endswith(".png") else f"source/{path}.md"


def _file(path: str, config: Any) -> File:
    if path.endswith(".png"):
        return File.generated(config, _in_site(path), content=(ROOT / path).read_bytes())
    language = "python" if path.endswith(".py") else "text"
    code = (ROOT / path).read_text().rstrip()
    head = "---\nsearch:\n  exclude: true\nhide: [toc]\n---\n"
    page = f"{head}\n# {path}\n\n~~~~~~~~{language}\n{code}\n~~~~~~~~\n"
    return File.generated(config, _in_site(path), content=page)


def _mathml(latex: str, *, block: bool) -> str:
    drawn = convert(html.unescape(latex).strip(), display="block" if block else "inline")
    return f'<div class="equation">{drawn}</div>' if block else drawn
