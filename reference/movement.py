"""Elements that go from one place to another, and are what they were."""

from __future__ import annotations

import math

from flagops.arrays import DTYPES
from flagops.operator import Tensor, operator
from flagops.scalars import dtype as dtype_scalar

from ._cards import LOADS, cast
from ._rounding import Array


@operator(
    name="aten.copy",
    tensors={"x": Tensor("...", DTYPES)},
    scalars={"dtype": dtype_scalar(DTYPES)},
    result=Tensor("...", "dtype"),
    workloads=LOADS,
    flops=lambda dims, batch: float(math.prod(batch)),
    exact=True,
)
def copy(x: Array, dtype: str) -> Array:
    """``x`` in another dtype.

    Args:
        x: of any shape, any real dtype, any strides.
        dtype: of the result.
        out: to write into; allocated if None.

    Returns:
        Floats rounded to nearest even, integers' low bits, True for what is not 0. Floats become integers as x86 has
        it: cut off, in 32 bits (64 for int64) whose low ones narrower integers take; what does not fit there, and NaN,
        becomes the least.

    Raises:
        TypeError: ``x`` is no array, or ``dtype`` is none of torch's real dtypes.

    Source: torch's ``aten::copy_`` and ``aten::_to_copy``.
    """
    return cast(x, dtype)
