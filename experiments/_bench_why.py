"""Why a rival wins where it does: what was found in its compiled program."""

CAUSES: dict[tuple[str, str], str] = {}


def why(case: str, way: str) -> str:
    """The cause, or that nobody has looked."""
    return CAUSES.get((case, way)) or CAUSES.get(("", way)) or "not looked into yet"
