"""How far torch is from a kernel: Python frames between the two, which are the cost of an overridden call."""

import dataclasses
import sys
from pathlib import Path

import pytest
import torch

import flagops
from flagops import registry
from flagops.backends import _launches, numba
from flagops.calls import replay

sys.path.insert(0, str(Path(__file__).parent))
from overriding import counted, untouched, usable  # noqa: F401

MOST = 5

A, B, ROW, OUT = torch.rand(4, 4), torch.rand(4, 4), torch.rand(4), torch.empty(4, 4)
STACK, Q = torch.rand(2, 4, 4), torch.rand(1, 2, 4, 16)
X, WEIGHT = torch.rand(3, 4, 8), torch.rand(8)
MASK = torch.ones(4, 4, dtype=torch.bool)
CODES = torch.rand(16, 128).to(torch.float8_e4m3fn)
SCALE = torch.tensor(0.5)
ROWS, EXPERTS = torch.rand(4, 8).bfloat16(), torch.rand(2, 8, 8).bfloat16()
OFFSETS = torch.tensor([1, 4], dtype=torch.int32)
CALLS = {
    "mm": lambda: torch.mm(A, B),
    "mm.out": lambda: torch.mm(A, B.t(), out=OUT),
    "bmm": lambda: torch.bmm(STACK, STACK),
    "baddbmm": lambda: torch.baddbmm(STACK, STACK, STACK),
    "baddbmm_": lambda: STACK.clone().baddbmm_(STACK, STACK),
    "mv": lambda: torch.mv(A, ROW),
    "dot": lambda: torch.dot(ROW, ROW),
    "addmm": lambda: torch.addmm(ROW, A, B),
    "addmm.out": lambda: torch.addmm(OUT, A, B, alpha=0.5, out=OUT),
    "addmv": lambda: torch.addmv(ROW, A, ROW, beta=2),
    "rms_norm": lambda: torch.rms_norm(X, (8,), WEIGHT, 1e-6),
    "rms_norm, two axes": lambda: torch.rms_norm(X, (4, 8)),
    "rms_norm, a gradient": lambda: torch.rms_norm(X.clone().requires_grad_(), (8,)),
    "scaled_dot_product_attention": lambda: torch._C._nn.scaled_dot_product_attention(Q, Q, Q, MASK),
    "_grouped_mm": lambda: torch._grouped_mm(ROWS, EXPERTS, offs=OFFSETS),
    "_scaled_mm": lambda: torch._scaled_mm(
        CODES, CODES.t(), scale_a=SCALE, scale_b=SCALE, out_dtype=torch.float32
    ),
}  # fmt: skip


class Loops:
    """Stands for a compiled kernel, and notes how many frames lie between a call and it."""

    def __init__(self):
        self.frames = []
        self.typeof_pyval = type

    def compile(self, _):
        return self

    def __call__(self, *_):
        self.note(sys._getframe(1))

    def note(self, frame):
        count = 0
        while frame.f_code is not calling.__code__:
            frame, count = frame.f_back, count + 1
        self.frames.append(count - 1)  # without the lambda above


def calling(call):
    """From here frames are counted."""
    call()


@pytest.mark.parametrize("backend", usable("numba", "torch", "numpy"))
@pytest.mark.parametrize("name", CALLS)
def test_frames_between_torch_and_a_kernel(name, backend, monkeypatch):
    loops, find = Loops(), registry.find

    def recorded(*args):
        if _launches.current.recording is None:
            loops.note(sys._getframe(1))
        else:
            numba.parallel(loops, 1, *map(numba.pointer, (x for x in args if hasattr(x, "data_ptr"))))

    def called(*_):
        loops.note(sys._getframe(1))

    def stub(operator, by):
        function = recorded if backend == "numba" else called
        return dataclasses.replace(find(operator, by), function=function, forwards_to="")

    monkeypatch.setattr(replay, "OFTEN", 1)
    monkeypatch.setattr(registry, "find", stub)
    monkeypatch.setattr(flagops.dispatch, "_plans", {})
    with numba.at_most(1), flagops.enable(backend=backend) as handle:
        for _ in range(4):
            calling(CALLS[name])
    done, left = counted(handle, name.partition(",")[0])
    assert (done, left) == (4, {})
    assert len(loops.frames) >= 4
    assert loops.frames[-1] <= MOST, loops.frames
