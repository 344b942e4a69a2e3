"""Shared by the tests of `flagops.enable`: torch's own kernels, which every test must leave as they were."""

import pytest
import torch

import flagops
from flagops import machine, order, override
from flagops.override import interpose
from flagops.override.forms import forms
from flagops.override.lowering import LOWERINGS

DEFAULT = [name for name, lowering in LOWERINGS.items() if not lowering.aten]
"""What is replaced where nobody names anything."""
FORMS = {name: tuple(forms(name)) for name in DEFAULT}
PRODUCTS = ("mm", "bmm", "baddbmm", "mv", "dot", "addmm", "addmv")
COMPOSITE = tuple(name for name, lowering in LOWERINGS.items() if lowering.composite)
PLACES = [(overload, key) for overloads in FORMS.values() for overload in overloads for key in ("CPU", "AutogradCPU")]
PLACES += [(name, "CPU") for name in override.WATCHED]


def whole(*shape, dtype=torch.float32):
    """Small whole numbers: sums of their products are exact, in whatever order they are taken."""
    return torch.randint(-8, 9, shape).to(dtype)


def everything_taken():
    """For a block a table by which numba takes all that is taken anywhere, whatever this machine's says."""
    rows, trained = {"*": ("numba", "torch", "numpy")}, {"scaled_dot_product_attention.training": ()}
    return order.forced(order.Table(machine.cpu_kind(), rows, {"*": ("numba",)} | trained, {}, "a test"))


def usable(*names):
    return [name for name in names if not flagops.registry.backend(name).unavailable()]


def kernels():
    return {place: kernel for place in PLACES if (kernel := _kernel(*place))}


def _kernel(name, key):
    try:
        return repr(torch.library.get_kernel(f"aten::{name}", key))
    except RuntimeError:
        return None


PLAIN = kernels()


@pytest.fixture(autouse=True)
def untouched():
    """Every test leaves torch as it was."""
    yield
    interpose.sweep()
    assert kernels() == PLAIN
    assert not interpose.live
    assert not interpose.buried


def counted(handle, name):
    """How many calls were replaced, and why others were not."""
    rows = [row for row in handle.report().rows if row.op == f"aten::{name}"]
    return (sum(rows[0].replaced.values()), rows[0].passed) if rows else (0, {})
