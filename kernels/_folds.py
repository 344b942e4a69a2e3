"""The arithmetic of reductions, for every backend: what each does with an element, and with two results of parts.

A state `s` is what has been found so far; `x` is an element, `p` a number of the row, found before (its mean, its
greatest), and `a` a scalar of the call. The words (`exp`, `where`, ...) are the backend's own.
"""

# ruff: noqa: F821
# mypy: disable-error-code="name-defined, no-untyped-def"

INFINITY = float("inf")


def add(s, x, p, a):
    return s + x


def add_number(s, x, p, a):
    return s + where(x == x, x, 0)


def add_magnitude(s, x, p, a):
    return s + abs(x)


def add_square(s, x, p, a):
    return s + x * x


def add_power(s, x, p, a):
    return s + pow(abs(x), a)


def add_deviation(s, x, p, a):
    return s + (x - p) * (x - p)


def add_exponential(s, x, p, a):
    return s + exp(x - p)


def count(s, x, p, a):
    return s + where(x != 0, 1, 0)


def times(s, x, p, a):
    return s * x


def highest(s, x, p, a):
    return greater(s, x)


def lowest(s, x, p, a):
    return less(s, x)


def highest_magnitude(s, x, p, a):
    return greater(s, abs(x))


def lowest_magnitude(s, x, p, a):
    return less(s, abs(x))


def either(s, x, p, a):
    return s | x


def both(s, x, p, a):
    return s & x


def first_highest(s, k, x, i):
    return _chosen((x > s) | ((x != x) & (s == s)), s, k, x, i)


def first_lowest(s, k, x, i):
    return _chosen((x < s) | ((x != x) & (s == s)), s, k, x, i)


def merged_highest(s, k, x, i):
    same = (x == s) | ((x != x) & (s != s))
    return _chosen((x > s) | ((x != x) & (s == s)) | (same & (i < k)), s, k, x, i)


def merged_lowest(s, k, x, i):
    same = (x == s) | ((x != x) & (s != s))
    return _chosen((x < s) | ((x != x) & (s == s)) | (same & (i < k)), s, k, x, i)


def _chosen(better, s, k, x, i):
    return where(better, x, s), where(better, i, k)


def same(s, p, a):
    return s


def over(s, p, a):
    return s / a


def root(s, p, a):
    return sqrt(s)


def root_over(s, p, a):
    return sqrt(s / a)


def inverse_power(s, p, a):
    return pow(s, 1.0 / a)


def log_above(s, p, a):
    return log(s) + p


def where_finite(s, p, a):
    return where(abs(s) == INFINITY, 0, s)


def plus(s, t):
    return s + t


def product(s, t):
    return s * t


def greater(s, t):
    return where((t > s) | (t != t), t, s)  # a processor's own maximum is wrong of NaN, and mending it takes longer


def less(s, t):
    return where((t < s) | (t != t), t, s)


def any_of(s, t):
    return s | t


def all_of(s, t):
    return s & t
