"""The custom ops, a folder each: all that is known of an op stands there, and `registry` finds it."""
