"""A call of the user's function, made ready for the loop.

The function, its arguments and the options enter. They are checked, the batch is cut into
microbatches, the function is traced at each of their sizes, and its outputs are read by their tags.
A `Program` and the arrays of the call leave: all that the engines need. It imports `_base`,
`_jaxpr` and `_devices`.

To add a tag: its class is in `tags`, how it combines is in `reductions`, and `output_parts` reads
it.
"""
