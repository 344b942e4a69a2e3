"""`flagops.aten`: torch's own operators as functions, for values alone."""

import numpy as np
import pytest
import torch

import flagops
from flagops import registry, testing
from flagops.errors import Unsupported


def test_every_card_is_a_function():
    assert {f"aten.{name}" for name in dir(flagops.aten)} == registry.cards().keys() - registry.operators().keys()
    for name in dir(flagops.aten):
        function = getattr(flagops.aten, name)
        assert function is getattr(flagops.aten, name)
        assert function.operator.name == f"aten.{name}"
    with pytest.raises(AttributeError, match="has no attribute 'softmax'; did you mean '_softmax'"):
        flagops.aten.softmax  # noqa: B018


@pytest.mark.parametrize("kind", (np.asarray, torch.from_numpy))
def test_a_call_takes_arrays_of_either_kind(kind, rng):
    x, y = (kind(rng.standard_normal((5, 7)).astype(np.float32)) for _ in range(2))
    got = flagops.aten.add(x, y, "float64", alpha=2)
    assert type(got) is type(x)
    testing.assert_of("aten.add", got, x, y, "float64", 2)
    out = x * 0
    assert flagops.aten.mul(x, y, "float32", out=out, backend="numba") is out
    testing.assert_of("aten.mul", out, x, y, "float32")


def test_a_gradient_is_refused_and_not_lost():
    x = torch.ones(3, requires_grad=True)
    with pytest.raises(Unsupported, match=r"aten.exp computes values of plain tensors alone.*flagops.enable"):
        flagops.aten.exp(x, "float32")
    assert flagops.aten.argmax(x).item() == 0, "indices have no gradient"
    with torch.no_grad():
        assert not flagops.aten.exp(x, "float32").requires_grad
    with pytest.raises(Unsupported, match="plain tensors alone"):
        torch.vmap(lambda row: flagops.aten.exp(row, "float32"))(torch.ones(2, 3))


def test_a_compiled_function_runs_it_outside_its_graph():
    def function(x):
        return flagops.aten.add(2 * x, x, "float32") + 1

    torch._dynamo.reset()
    assert torch.compile(function, backend="eager")(torch.ones(3)).tolist() == [4, 4, 4]
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"flagops.aten has no operators of torch's"):
        torch.compile(function, backend="eager", fullgraph=True)(torch.ones(3))
