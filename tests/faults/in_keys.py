"""Deliberate faults in the keys of examples."""

from tests.faults.fault import Fault

FAULTS = [
    Fault(
        "example keys fold the index, whatever the generator",
        "example_keys",
        'if compat.splits_by_index() and jax.random.key_impl(key) in ("threefry2x32", "rbg"):',
        "if compat.splits_by_index():",
        "plain/test_keys_and_carry.py::test_example_keys_are_those_of_split",
    ),
    Fault(
        "example keys fold the index under every setting",
        "example_keys",
        "if compat.splits_by_index() and",
        "if",
        "plain/test_keys_and_carry.py::test_example_keys_are_those_of_split",
    ),
    Fault(
        "a microbatch splits the key for itself alone",
        "example_keys",
        "count = len(examples) if batch_size is None else batch_size",
        "count = len(examples)",
        "plain/test_keys_and_carry.py::test_example_keys_are_those_of_split",
    ),
    Fault(
        "each shard splits the key for itself alone",
        "Program._keys_of",
        "batch_size=own * shards",
        "batch_size=own",
        "meshes/test_mesh.py::test_example_keys_on_a_mesh_are_those_of_split_over_all_shards",
    ),
    Fault(
        "all examples draw from the key of the first",
        "_generator.random_bits",
        "(data[1:]), 0, axis)",
        "(jnp.broadcast_to(data[1:2], data[1:].shape)), 0, axis)",
        "plain/test_example_keys.py::test_the_axis_that_grows_holds_the_examples",
    ),
    Fault(
        "what all share is drawn from an example's key",
        "_generator.random_bits",
        "typed(data[0])",
        "typed(data[1])",
        "plain/test_example_keys.py::test_the_axis_that_grows_holds_the_examples",
    ),
    Fault(
        "an axis as long as the microbatch is the examples'",
        "_axis",
        "if length == size and _grown(shape, i) in larger)",
        "if length == size)",
        "flax/test_example_streams_draws.py::"
        "test_what_all_examples_share_is_drawn_once_for_the_batch",
    ),
    Fault(
        "any generator draws under vmap",
        "_each",
        'if base == "threefry2x32":',
        "if base:",
        "plain/test_example_keys.py::test_the_axis_that_grows_holds_the_examples",
    ),
    Fault(
        "draws are not compared with those of twice as many",
        "FlatFunction.traced",
        "example_keys.check(list",
        "(list",
        "flax/test_example_streams.py::test_draws_that_belong_to_no_example_are_refused",
    ),
    Fault(
        "the count of a stream runs through the microbatches",
        "selector",
        "path in chosen or counts(path, x)",
        "path in chosen",
        "flax/test_example_streams.py::test_every_example_has_the_mask_of_its_own_key",
    ),
    Fault(
        "streams that nothing advanced are forgotten",
        "Streams.updated",
        "jnp.where(ran > 0, new, old)",
        "new",
        "flax/test_example_streams.py::test_streams_are_left_where_every_microbatch_is_skipped",
    ),
    Fault(
        "a replaced key is taken",
        "_check_kept",
        "if is_key and not example_keys.is_joined(new.dtype):",
        "if False:",
        "flax/test_example_streams.py::test_a_stream_keeps_its_kind",
    ),
    Fault(
        "keys are traced as if all devices shared them",
        "types_in_loop.cut",
        "varying.vary(jnp.int32(0), frozenset(mesh_axes))",
        "jnp.int32(0)",
        "meshes/test_mesh.py::test_keys_are_traced_with_the_types_with_which_they_run",
    ),
    Fault(
        "gathered parameters lose the streams of the examples",
        "adapted:changed",
        "if not isinstance(fun, Adapted):",
        "if True:",
        "flax/test_example_streams.py::test_gathered_parameters_keep_the_streams_of_the_examples",
    ),
    Fault(
        "the audit takes the examples' draws for the microbatch's",
        "_by_example",
        "axes = varying(op.out_shapes()) if",
        "axes = [] if True or",
        "flax/test_example_streams.py::test_the_audit_still_finds_examples_that_meet",
    ),
]
