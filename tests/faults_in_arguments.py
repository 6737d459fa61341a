"""Deliberate faults in how a call's arguments are read: entries by name."""

ROWS = [
    (
        "entries by name reach keywords alone", "_in_axes.py",
        "tuple(in_axes.get(name) for name in _positional_names(parameters, count))", "(None,) * count",
        "test_in_axes_by_name.py::test_an_entry_by_name_holds_wherever_the_argument_stands",
    ),
    (
        "a misspelled name passes", "_in_axes.py",
        "if unknown := [name for name in in_axes if name not in known]:", "if unknown := []:",
        "test_in_axes_by_name.py::test_is_refused",
    ),
    (
        "a misspelled option passes", "_in_axes.py",
        "        if name not in known:\n            raise TypeError(",
        "        if False:\n            raise TypeError(",
        "test_in_axes_by_name.py::test_is_refused",
    ),
    (
        "keyword arguments are whole", "_arguments.py",
        "axes = given.keywords[number] if isinstance(number, str) else",
        "axes = None if isinstance(number, str) else",
        "test_in_axes_by_name.py::test_keys_and_a_state_by_name",
    ),
]  # fmt: skip
