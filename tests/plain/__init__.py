"""The plain path: arguments, partition, tags, weights, keys, state, errors and memory."""
