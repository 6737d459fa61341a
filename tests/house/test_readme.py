"""Every block of Python in the README runs, and its two commands are single lines that CI uses."""

import pathlib
import re

import pytest

from tests.house import pages

ROOT = pathlib.Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
BLOCKS = pages.blocks(README)


@pytest.mark.parametrize("block", BLOCKS, ids=map(pages.title, BLOCKS))
def test_block_runs(block):
    pages.run(block)


def test_code_comes_before_line_35():
    assert README[: README.index("```python")].count("\n") < 35


def test_ci_runs_the_test_command():
    commands = re.findall(r"```sh\n(.*?)\n```", README, flags=re.DOTALL)
    assert len(commands) == 2
    assert all("\n" not in command for command in commands)
    assert "README.md" in (ROOT / ".ci/run").read_text()


def test_links_and_pictures_exist():
    for path in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", README):
        assert (ROOT / path).is_file(), path
