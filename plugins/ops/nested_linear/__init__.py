"""``NestedLinear``: a linear layer with a matrix of nested integers."""
