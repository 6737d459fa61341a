"""Fewer examples of a costly test, and all under `deep`."""

from __future__ import annotations

import hypothesis

from tests.support.covering import EVERY


def part_of_the_examples(share: int) -> hypothesis.settings:
    """One of `share` examples of the profile, at least 10; all of them in a deep run."""
    count = hypothesis.settings.default.max_examples
    return hypothesis.settings(max_examples=count if count >= EVERY else max(10, count // share))
