"""Indexing and random numbers: edits of their helpers that the suite must notice."""

MUTANTS = {
    "numba/_indexed.py": [
        ("aten.gather", "row % extent * plan[own + 2 + axis]", "row % extent * plan[own + 1 + axis]", 0),
        ("aten.gather", "given + limit if given < 0 and from_end", "given - limit if given < 0 and from_end", 0),
        ("aten.scatter", "return a * b", "return a + b", 0),
        ("aten.scatter", "return maximum(a, b)", "return minimum(a, b)", 0),
        ("aten.scatter", "row //= extent", "row //= 1", 0),
    ],
    "numba/_philox.py": [
        ("aten.uniform", "(left >> _HALF) ^ d ^ other", "(left >> _HALF) ^ d ^ key", 0),
        ("aten.uniform", "(other + _OTHER) & _LOW", "(other + _WEYL) & _LOW", 0),
        ("aten.random", "range(10)", "range(9)", 0),
        ("aten.normal", "s & _LOW, s >> _HALF", "s & _LOW, s & _LOW", 0),
    ],
}
