"""The site builds without a warning and loads nothing from elsewhere; every block of its pages
runs, every link leads.

Built offline, in a process of its own, as its command says.
"""

import importlib
import os
import pathlib
import re
import subprocess
import sys
import types
from html.parser import HTMLParser

import pytest

from tests.house import pages

ROOT = pathlib.Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted((DOCS / "pages").glob("*.md"))
REFERENCE = "\n".join(path.read_text() for path in sorted((DOCS / "pages/api").glob("*.md")))


def build(directory):
    """The command of the site, without the theme's notice about its own future."""
    command = ["-m", "mkdocs", "build", "--strict", "-f", "docs/mkdocs.yml", "-d"]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(
        [sys.executable, *command, str(directory)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    directory = tmp_path_factory.mktemp("site")
    built = build(directory)
    assert built.returncode == 0, built.stderr
    return directory


class Sources(HTMLParser):
    """What a browser loads by itself: scripts, styles, pictures; and the links that a reader may
    follow."""

    def __init__(self, path):
        super().__init__()
        self.loaded, self.links, self.math = [], [], 0
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        named = dict(attrs)
        self.math += tag == "math"
        if tag == "a":
            self.links.append(named.get("href") or "")
        elif tag in ("script", "img", "iframe", "source"):
            self.loaded.append(named.get("src") or "")
        elif tag == "link" and named.get("rel") not in ("prev", "next", "canonical"):
            self.loaded.append(named.get("href") or "")


def astray(sources, directory):
    """What is loaded from outside of the site, and what leads nowhere in it. A reader may follow a
    link to a paper."""
    own = [address for address in sources.links if not address.startswith("https://")]
    return [address for address in [*sources.loaded, *own] if not _is_in(directory, address)]


def _is_in(directory, address):
    path = address.partition("#")[0]
    return not re.match(r"\w+:|//", address) and (not path or (directory / path).exists())


def test_the_site_builds_and_loads_nothing_from_elsewhere(site):
    found = sorted(site.rglob("*.html"))
    assert len(found) > len(PAGES)
    for path in found:
        if path.name != "404.html":  # whose addresses begin at the server's root
            assert not astray(Sources(path), path.parent), path
    assert Sources(site / "index.html").math >= 4
    assert 'class="arithmatex"' not in (site / "index.html").read_text()


def test_what_leads_astray_is_found(tmp_path):
    page = tmp_path / "page.html"
    links = (
        '<a href="page.html#top"></a><a href="gone.html"></a><a '
        'href="https://arxiv.org/abs/1706.02677"></a>'
    )
    page.write_text(links + '<script src="https://cdn.net/x.js"></script>')
    assert astray(Sources(page), tmp_path) == ["https://cdn.net/x.js", "gone.html"]


def test_pictures_sources_and_drawings_are_in_the_site(site):
    assert (site / "source/experiments/pictures/bert.png").read_bytes().startswith(b"\x89PNG")
    assert (
        "test_equals_the_full_batch"
        in (site / "source/tests/plain/test_value_and_grad.py.html").read_text()
    )
    for name in ("coupled", "how-it-works"):
        assert '<svg class="drawing"' in (site / f"{name}.html").read_text()


def test_a_link_that_leaves_the_pages_must_lead_to_a_file():
    sys.path.insert(0, str(DOCS))
    try:
        hooks = importlib.import_module("hooks")
    finally:
        sys.path.remove(str(DOCS))
    assert (
        hooks._in_repository(DOCS / "pages/faq.md", "../../tests/house/test_docs.py")
        == "tests/house/test_docs.py"
    )
    with pytest.raises(FileNotFoundError, match=r"faq\.md links to \.\./\.\./tests/gone\.py"):
        hooks._in_repository(DOCS / "pages/faq.md", "../../tests/gone.py")


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_the_blocks_of_a_page_run_in_order(path):
    names = None
    for block in pages.blocks(path.read_text()):
        names = pages.run(block, names)


def test_an_output_that_is_not_what_is_printed_fails():
    (block,) = pages.blocks('```python\nprint(1 + 1)\n```\n```text title="output"\n3\n```\n')
    with pytest.raises(AssertionError):
        pages.run(block)
    pages.run(block._replace(output="2\n"))


@pytest.mark.parametrize("room", ["", ".accumulators", ".nnx", ".linen", ".testing"])
def test_every_public_name_is_in_the_reference(room):
    public = exported(importlib.import_module(f"jaxaccum{room}"))
    assert public
    shown = re.findall(rf"^::: jaxaccum{room}\.([\w.]+)$", REFERENCE, flags=re.MULTILINE)
    assert set(public) <= {path.rpartition(".")[2] for path in shown}


def exported(module):
    """What `module` offers, but for its modules: its ``__all__``, or the names that it imports as
    themselves."""
    if hasattr(module, "__all__"):
        return module.__all__
    names = re.findall(
        r"import (\w+) as \1$", pathlib.Path(module.__file__).read_text(), flags=re.MULTILINE
    )
    return [name for name in names if not isinstance(getattr(module, name), types.ModuleType)]
