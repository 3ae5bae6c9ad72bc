"""``NestedGather``: rows of a matrix of nested integers, as floats."""
