"""Each kind of scalar: what it takes, and which error says what about the rest."""

import math

import numpy as np
import pytest

from flagops import registry, scalars

KINDS = {
    "flag": scalars.flag(),
    "whole": scalars.whole(),
    "even": scalars.whole(least=2, below=10, even=True),
    "pair": scalars.pair(()),
    "real": scalars.real(()),
    "above": scalars.real((), above=0, finite=False, optional=True),
    "dtype": scalars.dtype(("bfloat16", "float16", "float32")),
}
TAKEN = [
    ("flag", np.bool_(True), True),
    ("whole", 2.0, 2),
    ("whole", np.int32(7), 7),
    ("even", 8, 8),
    ("pair", [np.int64(3), 5.0], (3, 5)),
    ("real", 3, 3.0),
    ("real", np.float32(0.5), 0.5),
    ("above", None, None),
    ("above", math.inf, math.inf),
    ("dtype", np.float16, "float16"),
]
REFUSED = [
    *[("flag", value, TypeError, "must be True or False") for value in (1, 0, "True", None, np.ones(2))],
    *[
        ("whole", value, TypeError, "must be a whole number")
        for value in (True, "3", 1.5, None, math.nan, math.inf, 1j)
    ],
    *[("whole", value, ValueError, "must be a whole number of at least 1") for value in (0, -1, -(10**30))],
    *[("even", value, ValueError, "must be an even whole number of at least 2 and below 10") for value in (3, 0, 10)],
    *[("pair", value, TypeError, "must be two whole numbers") for value in (3, (1, 2, 3), None)],
    ("pair", (1, "2"), TypeError, "must be a whole number, got '2'"),
    ("pair", (1, 0), ValueError, "must be a whole number of at least 1, got 0"),
    *[("real", value, TypeError, "must be a number, got") for value in (True, "0.5", None, 1j, np.bool_(True), [1.0])],
    *[("real", value, ValueError, "must be a finite number, got") for value in (math.nan, math.inf, -math.inf)],
    *[("above", value, ValueError, "must be a number above 0 or None") for value in (0, -1.0, math.nan)],
    ("above", "1", TypeError, "must be a number or None, got '1'"),
    ("dtype", "float64", ValueError, "must be bfloat16, float16 or float32, got float64"),
    ("dtype", 7, TypeError, "must be a dtype or its name"),
]


@pytest.mark.parametrize(("kind", "value", "result"), TAKEN)
def test_taken(kind, value, result):
    found = KINDS[kind].read("x: y", value)
    assert found == result
    assert type(found) is type(result)


@pytest.mark.parametrize(("kind", "value", "error", "words"), REFUSED)
def test_refused(kind, value, error, words):
    with pytest.raises(error, match=f"^x: y {words}"):
        KINDS[kind].read("x: y", value)


def test_torch_numbers_are_numbers():
    torch = pytest.importorskip("torch")
    assert KINDS["real"].read("x", torch.tensor(0.5)) == 0.5
    assert KINDS["dtype"].read("x", torch.bfloat16) == "bfloat16"
    with pytest.raises(TypeError, match="must be a number"):
        KINDS["real"].read("x", torch.ones(2))


def test_no_card_words_its_scalars_by_itself():
    for op in registry.operators().values():
        for name, scalar in op.scalars.items():
            assert scalar.parse.__module__ == "flagops.scalars", f"{op.name}: {name}"
