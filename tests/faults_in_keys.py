"""Deliberate faults in the keys of examples; rows for tests/mutations.py."""

ROWS = [
    (
        "example keys fold the index, whatever the generator", "_program.py",
        'if by_index and jax.random.key_impl(key) in ("threefry2x32", "rbg"):', "if by_index:",
        "test_keys_and_carry.py::test_example_keys_are_those_of_split",
    ),
    (
        "example keys fold the index under every setting", "_program.py",
        "if by_index and", "if",
        "test_keys_and_carry.py::test_example_keys_are_those_of_split",
    ),
    (
        "a microbatch splits the key for itself alone", "_program.py",
        "count = len(examples) if batch_size is None else batch_size", "count = len(examples)",
        "test_keys_and_carry.py::test_example_keys_are_those_of_split",
    ),
    (
        "each shard splits the key for itself alone", "_program.py",
        "batch_size=own * shards", "batch_size=own",
        "test_mesh.py::test_example_keys_on_a_mesh_are_those_of_split_over_all_shards",
    ),
]  # fmt: skip
