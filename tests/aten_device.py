"""The forms of the tests of indexing and selection on the bare device, on which none but flagops' kernels compute.

``python tests/aten_device.py SEED backend`` prints what failed, a line each. Triton's kernels run in its interpreter,
with TRITON_INTERPRET=1, which brings the device's memory to the host's and back for each.
"""

import contextlib
import sys
from pathlib import Path

import numpy as np
import torch

import flagops
from flagops import registry

sys.path.insert(0, str(Path(__file__).parent))
import bare
import test_aten_indexing
import test_aten_selection
from aten_calls import DTYPES, Draw


def computing_by_triton() -> None:
    """Let the interpreter stand for the Triton of a device whose memory the host cannot address."""
    import interpreter

    from flagops.backends import triton

    interpreter.quicken()
    registry.backend("triton").dispatch_keys = ("PrivateUse1",)
    triton._device = lambda interpreting: ("bare", None)


def main(seed: str, backend: str) -> int:
    bare.load()
    torch.bare.host_memory = backend == "numba"
    if backend == "triton":
        computing_by_triton()
    rng, failed = np.random.default_rng(int(seed)), 0
    forms = [(form, Draw) for form in test_aten_indexing.FORMS]
    forms += [(form, test_aten_selection.Special) for form in test_aten_selection.FORMS]
    with flagops.enable(backend=backend):  # which leaves the CPU to torch
        for form, draw in forms:
            for dtype in DTYPES if backend == "numba" else [DTYPES[i] for i in rng.permutation(len(DTYPES))[:2]]:
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
    sys.exit(main(*sys.argv[1:]))
