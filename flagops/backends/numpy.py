"""The references themselves as kernels: slow, exact, and the last resort on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from flagops import arrays
from flagops.backends import missing

if TYPE_CHECKING:
    from flagops.operator import Operator


class _Numpy:
    name = "numpy"
    dispatch_keys = ("CPU",)

    def kernels(self, operator: Operator) -> Callable[..., None]:
        """The operator's reference, its result rounded once into ``out``."""
        import numpy as np

        from flagops.reference._rounding import round_to

        def kernel(*args: Any) -> None:
            *inputs, out = args
            results = operator.each(operator.rounded(*(arrays.as_numpy(x) for x in inputs)))
            for place, result in zip(map(arrays.as_numpy, operator.each(out)), results, strict=True):
                codes = place.dtype == np.uint8
                place[...] = result.view(np.uint8) if codes else round_to(result, arrays.dtype_name(place))

        vars(kernel).update(
            __name__=operator.name, __module__=__name__, __signature__=operator.signature, deterministic=True
        )
        return kernel

    def unavailable(self) -> str | None:
        return missing("numpy") or missing("ml_dtypes")

    def refuses(self, array: Any) -> str | None:
        if arrays.is_numpy(array):
            return None
        if array.device.type != "cpu":
            return f"the tensor is on {array.device}, NumPy works on the CPU"
        return None if str(array.layout) == "torch.strided" else f"takes strided tensors, not {array.layout}"

    def facts(self) -> dict[str, str]:
        import ml_dtypes
        import numpy

        return {"version": numpy.__version__, "ml_dtypes": ml_dtypes.__version__}

    def synchronize(self) -> None:
        pass


backend = _Numpy()
