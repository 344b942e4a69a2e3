"""The forms of the tests of indexing and selection on the bare device, on which none but flagops' kernels compute.

Prints what failed, a line each.
"""

import contextlib
import sys
from pathlib import Path

import numpy as np
import torch

import flagops

sys.path.insert(0, str(Path(__file__).parent))
import bare
import test_aten_indexing
import test_aten_selection
from aten_calls import DTYPES, Draw


def main() -> int:
    bare.load()
    torch.bare.host_memory = True
    rng, failed = np.random.default_rng(int(sys.argv[1])), 0
    forms = [(form, Draw) for form in test_aten_indexing.FORMS]
    forms += [(form, test_aten_selection.Special) for form in test_aten_selection.FORMS]
    with flagops.enable(backend="numba"):  # which leaves the CPU to torch
        for form, draw in forms:
            for dtype in DTYPES:
                if not test_aten_selection.computes(form, dtype):
                    continue
                function, given = form(draw(rng, dtype))
                expected = function(*given)
                with contextlib.nullcontext() if given else torch.device("bare"):
                    got = function(*(x.to("bare") for x in given))
                pairs = zip(got, expected, strict=True) if isinstance(got, tuple) else [(got, expected)]
                for one, other in ((one.cpu(), other) for one, other in pairs):
                    if one.dtype != other.dtype or not torch.equal(one.nan_to_num(9), other.nan_to_num(9)):
                        print(form.__name__, dtype, [x.shape for x in given])
                        failed = 1
    return failed


if __name__ == "__main__":
    sys.exit(main())
