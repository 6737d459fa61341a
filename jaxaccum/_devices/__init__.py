"""What varies over the devices of a mesh.

Arrays and their types enter; the axes over which they vary leave, and values that are made to vary,
or are summed, over them. It imports `_base` and `_jaxpr`.
"""
