"""A PrivateUse1 device in Python whose tensors keep their elements in CPU tensors, and a flagops backend for it.

Run as a script by test_override.py in its own process: a device cannot be taken back.
"""

import sys
import tempfile
from pathlib import Path

import torch
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

CALLS: list[str] = []
RAN: list[str] = []


class MirrorTensor(torch.Tensor):
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, host):
        self = torch._C._acc.create_empty_tensor(host.shape, host.dtype)
        self.__class__ = cls
        return self

    def __init__(self, host):
        self.host = host


def host(x):
    return x.host if isinstance(x, MirrorTensor) else x


def make_device() -> torch.library.Library:
    _setup_privateuseone_for_python_backend("mirror")
    library = torch.library.Library("aten", "IMPL")

    def through_host(name: str) -> None:
        packet, _, overload = name.partition(".")
        op = getattr(getattr(torch.ops.aten, packet), overload or "default")

        def call(*args, **kwargs):
            CALLS.append(name)
            return MirrorTensor(op(*map(host, args), **{key: host(value) for key, value in kwargs.items()}))

        library.impl(name, call, "PrivateUse1")

    for name in (
        "mm",
        "addmm",
        "view",
        "t",
        "transpose.int",
        "sum",
        "sum.dim_IntList",
        "ones_like",
        "expand",
        "detach",
    ):
        through_host(name)

    def empty(size, *, dtype=None, layout=None, device=None, pin_memory=None, memory_format=None):
        return MirrorTensor(torch.empty(size, dtype=dtype))

    def empty_strided(size, stride, *, dtype=None, layout=None, device=None, pin_memory=None):
        return MirrorTensor(torch.empty_strided(size, stride, dtype=dtype))

    def copy_from(source, target, non_blocking=False):
        host(target).copy_(host(source))
        return target

    library.impl("empty.memory_format", empty, "PrivateUse1")
    library.impl("empty_strided", empty_strided, "PrivateUse1")
    library.impl("_copy_from", copy_from, "PrivateUse1")
    return library


class backend:
    """The descriptor of the backend `mirror`."""

    name = "mirror"
    dispatch_keys = ("PrivateUse1",)

    @staticmethod
    def kernels(operator):
        def matmul(a, b, out):
            RAN.append("matmul")
            host(out).copy_(host(a) @ host(b))

        def linear(x, weight, bias, out):
            RAN.append("linear")
            host(out).copy_(torch.nn.functional.linear(host(x), host(weight), host(bias)))

        return {"matmul": matmul, "linear": linear}.get(operator.name)

    @staticmethod
    def unavailable():
        return None

    @staticmethod
    def refuses(array):
        return None if isinstance(array, MirrorTensor) else "takes mirror tensors"

    @staticmethod
    def facts():
        return {}

    @staticmethod
    def synchronize():
        pass


def install_backend(folder: str) -> None:
    """What pip would leave behind for a package with the entry point `flagops.backends`."""
    info = Path(folder) / "mirror-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mirror\nVersion: 0.1\n")
    (info / "entry_points.txt").write_text("[flagops.backends]\nmirror = privateuse1:backend\n")
    sys.path.insert(0, folder)


def main() -> None:
    sys.modules.setdefault("privateuse1", sys.modules["__main__"])
    library = make_device()
    with tempfile.TemporaryDirectory() as folder:
        install_backend(folder)
        import flagops

        x, w, b = (torch.randint(-8, 9, shape).float() for shape in ((3, 4), (5, 4), (5,)))  # sums are exact
        y, v, c = (t.to("mirror").requires_grad_() for t in (x, w, b))
        before = repr(torch.library.get_kernel("aten::mm", "PrivateUse1"))
        with flagops.enable(backend="mirror") as handle:
            assert repr(torch.library.get_kernel("aten::mm", "PrivateUse1")) != before
            result = torch.nn.functional.linear(y, v, c)
            assert torch.equal(result.detach().cpu(), torch.nn.functional.linear(x, w, b))
            assert RAN == ["linear"], RAN
            result.sum().backward()
            assert RAN == ["linear", "matmul", "matmul"], RAN
            assert not {"mm", "addmm"} & set(CALLS), CALLS
            assert torch.equal(y.grad.cpu(), torch.ones(3, 5) @ w)
            assert torch.equal(v.grad.cpu(), torch.ones(5, 3) @ x)
            assert {row.key for row in handle.report().rows} == {"PrivateUse1"}
            assert handle.report().replaced == 3
            integers = torch.ones(2, 2, dtype=torch.long).to("mirror")
            assert (integers @ integers).cpu().tolist() == [[2, 2], [2, 2]]
            assert CALLS.count("mm") == 1
        assert repr(torch.library.get_kernel("aten::mm", "PrivateUse1")) == before
        with torch.no_grad():
            y @ v.t()
        assert (CALLS.count("mm"), len(RAN)) == (2, 3)
        with flagops.enable() as handle:
            y.detach() @ v.detach().t()
            assert RAN[3:] == ["matmul"]
    del library
    print("mirrored")


if __name__ == "__main__":
    main()
