"""`torch.compile(model, backend="flagops")`: under `flagops.enable` a graph computes what eager code does, by the same
kernels, to the last bit."""

import functools
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import flagops
from flagops import override
from flagops.override.compiled import backend
from flagops.testing import assert_near

sys.path.insert(0, str(Path(__file__).parent))
from overriding import counted, untouched, usable  # noqa: F401

BACKENDS = usable("numba", "torch")


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()


compiled = functools.partial(torch.compile, backend="flagops", fullgraph=True)


class Layer(torch.nn.Module):
    """A layer of Llama: RMSNorm, grouped heads, rotary positions, SwiGLU."""

    def __init__(self, width=16, heads=4, groups=2):
        super().__init__()
        self.head = width // heads
        self.norms = torch.nn.ModuleList(torch.nn.RMSNorm(width) for _ in range(2))
        keys = groups * self.head
        self.projections = torch.nn.ModuleList(torch.nn.Linear(width, n, bias=False) for n in (width, keys, keys))
        self.out, self.down = (torch.nn.Linear(n, width, bias=False) for n in (width, 24))
        self.gate, self.up = (torch.nn.Linear(width, 24, bias=False) for _ in range(2))

    def forward(self, x):
        angles = torch.arange(x.shape[1])[:, None] / 10.0 ** torch.arange(self.head)

        def turned(y):
            left, right = y.chunk(2, -1)
            return y * angles.cos() + torch.cat((-right, left), -1) * angles.sin()

        y = self.norms[0](x)
        q, k, v = (p(y).unflatten(-1, (-1, self.head)).transpose(1, 2) for p in self.projections)
        y = F.scaled_dot_product_attention(turned(q), turned(k), v, is_causal=True, enable_gqa=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        y = self.norms[1](x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(32, 16)
        self.layers = torch.nn.ModuleList(Layer() for _ in range(2))

    def forward(self, tokens):
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        return F.linear(x, self.embedding.weight)


def step(model, tokens):
    """Loss and gradients."""
    logits = model(tokens)
    loss = F.cross_entropy(getattr(logits, "logits", logits).flatten(0, 1), tokens.flatten())
    return loss, *torch.autograd.grad(loss, list(model.parameters()))


def fates(handle):
    return {row.op: (row.replaced, row.passed) for row in handle.report().rows}


def same(got, expected):
    return all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("name", BACKENDS)
def test_training_is_that_of_eager_code_call_by_call(name):
    model, tokens = Model(), torch.randint(32, (2, 7))
    plain = step(model, tokens)
    with flagops.enable("default", backend=name) as handle:
        eager = step(model, tokens)
    expected = fates(handle)
    assert {"aten::rms_norm", "aten::scaled_dot_product_attention", "aten::mm"} <= expected.keys()
    with flagops.enable("default", backend=name) as handle:
        got = step(compiled(model), tokens)
    assert fates(handle) == expected
    assert same(got, eager)
    for x, y in zip(got, plain, strict=True):  # a chain of some 30 operators, each sum of at most 32 terms
        assert_near(x, y, 30 * 32, y.abs().max())


def test_every_replaced_operator_is_kept_in_inference():
    model, tokens = Model(), torch.randint(32, (2, 7))
    call = compiled(model)
    with torch.no_grad():
        with flagops.enable("all", backend="numpy") as handle:
            eager = model(tokens)
        expected = fates(handle)
        with flagops.enable("all", backend="numpy") as handle:
            got = call(tokens)
        assert fates(handle) == expected
        assert torch.equal(got, eager)
        assert {"aten::silu", "aten::mul.Tensor", "aten::cat"} <= expected.keys()
        with flagops.enable("all", backend="numpy"):
            covered = [flagops.coverage(function, tokens) for function in (model, call)]
    seen = [{(row.overload, row.served, row.calls) for row in found.rows} for found in covered]
    assert seen[0] == seen[1]


def test_one_graph_serves_every_length():
    model = Model()
    call = compiled(model, dynamic=True)
    before = graphs()
    with flagops.enable("default", backend=BACKENDS[0]):
        for length in (5, 9, 14):
            tokens = torch.randint(32, (2, length))
            assert same(step(call, tokens), step(model, tokens))
    assert graphs() == before + 1


def test_a_model_of_transformers_is_one_graph():
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 32}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
    model, tokens = transformers.LlamaForCausalLM(config), torch.randint(32, (2, 7))
    before = graphs()
    with flagops.enable("default", backend=BACKENDS[0]) as handle:
        assert same(step(compiled(model), tokens), step(model, tokens))
    assert graphs() == before + 1
    assert counted(handle, "scaled_dot_product_attention") == (4, {})


def test_a_graph_follows_the_handles_in_force():
    call, x = compiled(lambda x: F.rms_norm(x, (8,))), torch.randn(3, 8)
    before = graphs()
    for name in (*BACKENDS, BACKENDS[0]):
        with flagops.enable("rms_norm", backend=name) as handle:
            assert torch.equal(call(x), F.rms_norm(x, (8,)))
        assert handle.report().rows[0].replaced == {f"rms_norm/{name}": 2}
    assert graphs() == before + 1


def test_with_nothing_replaced_a_call_is_refused():
    call, x = compiled(lambda x: x @ x), torch.eye(3)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"while nothing is replaced; call it under flagops\.enable\(\)"):
            call(x)
        with flagops.enable():
            call(x)


@pytest.mark.parametrize("given", ({"mode": "max-autotune"}, {"options": {"ops": "all"}}), ids=str)
def test_options_are_refused(given):
    with pytest.raises(
        torch._dynamo.exc.BackendCompilerFailed, match=f"unexpected keyword argument '{next(iter(given))}'"
    ):
        compiled(lambda x: x + 1, **given)(torch.eye(3))


def test_it_is_found_by_its_name():
    from torch._dynamo.backends.registry import lookup_backend

    assert "flagops" in torch._dynamo.list_backends()
    assert lookup_backend("flagops") is backend


@pytest.mark.drawn
def test_only_other_graphs_bypass():
    x = torch.randn(3, 8)
    with flagops.enable("default", backend=BACKENDS[0]) as handle:
        compiled(lambda x: F.rms_norm(x, (8,)))(x)
        assert handle.report().bypassed[override.COMPILED] is None
        assert counted(handle, "rms_norm") == (1, {})
        torch.compile(lambda x: F.rms_norm(x, (8,)))(x)
        assert handle.report().bypassed[override.COMPILED] == 1
        assert counted(handle, "rms_norm") == (1, {})


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return F.rms_norm(x * x, (8,))

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad * ctx.saved_tensors[0]


def autocast(x, w):
    with torch.autocast("cpu", torch.bfloat16):
        return F.rms_norm(F.dropout(x @ w), (8,)).float()


def in_place(x, w):
    y = x.clone().add_(1)
    y[:, 0] = w[0, 0]
    with torch.no_grad():
        z = (x @ w).mean()
    return F.rms_norm(y @ w, (8,)) + z


def branch(x, w):
    return torch.cond(x.sum() > 0, lambda x, w: F.rms_norm(x @ w, (8,)), lambda x, w: (x @ w).sin(), (x, w))


def checkpointed(x, w, **options):
    def part(x, w):
        return F.rms_norm(F.dropout(x @ w), (8,)).tanh()

    return checkpoint(part, x, w, use_reentrant=False, **options)


def keep_products(context, op, *args, **kwargs):
    return CheckpointPolicy.MUST_SAVE if op is torch.ops.aten.mm.default else CheckpointPolicy.PREFER_RECOMPUTE


def selected(x, w):
    return checkpointed(x, w, context_fn=functools.partial(create_selective_checkpoint_contexts, keep_products))


CALLS = (autocast, in_place, branch, checkpointed, selected, lambda x, w: Square.apply(x @ w))


@pytest.mark.parametrize("call", CALLS, ids=lambda f: f.__name__.replace("<lambda>", "function"))
def test_whatever_stands_in_a_graph(call):
    """Dropout draws the same numbers, in what is computed again for the backward too."""
    x, w = torch.randn(4, 8, requires_grad=True), torch.randn(8, 8, requires_grad=True)
    found = []
    for function in (compiled(call), call):
        torch.manual_seed(torch.initial_seed())
        with flagops.enable("default", backend=BACKENDS[0]) as handle:
            y = function(x, w)
            found.append((y, *torch.autograd.grad(y.square().sum(), (x, w))))
        found.append(fates(handle))
    assert same(found[0], found[2])
    if call is not branch:  # which torch traces anew in every eager call
        assert found[1] == found[3]


def test_torchs_other_node_for_checkpoints():
    with torch._functorch.config.patch(functionalize_rng_ops=True):
        test_whatever_stands_in_a_graph(checkpointed)
