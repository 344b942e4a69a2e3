"""What counts as a computing call, and which of them flagops served."""

import pytest

torch = pytest.importorskip("torch")

from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

import flagops  # noqa: E402
from flagops.override.report import Report  # noqa: E402
from flagops.tools import shares  # noqa: E402

X = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))


def nothing():
    return Report((), {})


@pytest.mark.parametrize(
    ("call", "count"),
    [
        (lambda x: x + x, 1),
        (lambda x: x.add_(x), 1),
        (lambda x: torch.add(x, x, out=x), 1),
        (lambda x: x[0].copy_(x[1]), 1),
        (lambda x: torch.nn.functional.linear(x[None], x), 1),
        (lambda x: torch.nn.functional.linear(x, x, x[0]), 1),
        (lambda x: torch.nn.functional.scaled_dot_product_attention(x[None, None], x[None, None], x[None, None]), 1),
        (lambda x: x.to(torch.bfloat16), 1),
        (lambda x: x.mean(0), 1),
        (lambda x: x.max(0), 1),
        (lambda x: torch.cat([x, x]), 1),
        (lambda x: x.t().reshape(16), 1),
        (lambda x: x.t().contiguous() @ x, 2),
        (lambda x: x[0].view(2, 2).t().unsqueeze(0).expand(3, 2, 2), 0),
        (lambda x: x.reshape(16), 0),
        (lambda x: torch.ops.aten._unsafe_view(x, [16]), 0),
        (lambda x: x.detach().unsqueeze_(0).squeeze_(0), 0),
        (lambda x: x.contiguous().to(torch.float32).split(2), 0),
        (lambda x: (x.unbind(), x.chunk(2), x.shape, x[0, 0].item()), 0),
        (lambda x: (torch.empty(3), torch.zeros(3), torch.arange(3), torch.full((2,), 1.0)), 0),
    ],
)
def test_what_computes(call, count):
    found = shares.measure(lambda: call(X.clone().fill_(1)), nothing)
    assert found.calls == count + 2  # the clone and the fill
    assert found.served_calls == found.served_time == 0
    assert found.time > 0


class Counting(TorchDispatchMode):
    """Counts what reaches the kernels by other means: operators that give memory of their own, or write."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        given = [x for x in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        held = {x.untyped_storage().data_ptr() for x in given}
        made = [x for x in torch.utils._pytree.tree_leaves(result) if isinstance(x, torch.Tensor) and x.numel()]
        fresh = any(x.untyped_storage().data_ptr() not in held for x in made)
        written = any(r.alias_info is not None and r.alias_info.is_write for r in function._schema.returns)
        self.count += bool(given) and (fresh or (written and torch.Tag.inplace_view not in function.tags))
        return result


def test_a_model_counted_by_a_dispatch_mode():
    pytest.importorskip("transformers")
    from flagops.deepseek_v4.examples import small_deepseek_v4

    model = small_deepseek_v4()
    ids = torch.randint(2, 60, (1, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model(input_ids=ids)
        with Counting() as counting:
            model(input_ids=ids)
        found = shares.measure(lambda: model(input_ids=ids), nothing)
    assert found.calls == counting.count > 500


def test_replaced_operators_of_torch():
    with flagops.enable(backend="numba") as handle:
        found = shares.measure(lambda: (X @ X + X).relu(), handle.report)
    assert (found.calls, found.served_calls) == (3, 1)
    assert 0 < found.of_time < 1
    assert found.of_calls == 1 / 3


def test_calls_left_to_torch_are_not_served():
    complex_ = torch.ones(4, 4, dtype=torch.complex64)
    with flagops.enable(backend="numba") as handle:
        found = shares.measure(lambda: (X @ X, complex_ @ complex_, X.relu()), handle.report)
        assert handle.report().replaced < handle.report().calls
    assert (found.calls, found.served_calls) == (3, 1)
    with flagops.enable(backend="torch") as handle:
        found = shares.measure(lambda: X @ X, handle.report)
    assert (found.calls, found.served_calls, found.served_time) == (1, 0, 0)


@pytest.mark.parametrize("backend", ["numba", "torch", "numpy"])
def test_operators_called_by_name(backend, monkeypatch):
    """Whatever torch operators their kernels call; one that no backend takes is not served."""

    def refuse(*args, **kwargs):
        raise flagops.Unsupported("not today")

    def run():
        flagops.rms_norm(X, None, 1e-6, backend=backend)
        with pytest.raises(flagops.Unsupported):
            flagops.swiglu(X, X)
        X.relu()

    monkeypatch.setattr(flagops, "swiglu", refuse)

    before = flagops.rms_norm
    found = shares.measure(run, nothing)
    assert (found.calls, found.served_calls) == (2, 1)
    assert flagops.rms_norm is before
    with pytest.raises(ZeroDivisionError):
        shares.measure(lambda: 1 / 0, nothing)
    assert flagops.rms_norm is before


def test_a_patched_model():
    """As many calls are served as the report counts, and of all that compute they are a part."""
    pytest.importorskip("transformers")
    from flagops.deepseek_v4.examples import small_deepseek_v4

    model = small_deepseek_v4()
    ids = torch.randint(2, 60, (1, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), flagops.patch(model, backend="numba") as handle:
        found = shares.measure(lambda: model(input_ids=ids), handle.report)
        assert found.served_calls == handle.report().replaced > 50
    assert found.calls > 2 * found.served_calls
    assert 0.1 < found.of_time < 1
