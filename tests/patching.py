"""Shared by the tests of `flagops.patch`: models, prompts, and how near a draw comes to a tie."""

import contextlib
import copy
import inspect
import json

import torch
from torch.overrides import TorchFunctionMode

from flagops.deepseek_v4.examples import small_deepseek_v4

__all__ = ["small_deepseek_v4"]

BACKENDS = ("numba", "torch")
BOUND = 1e-4  # promised for logits in float32
LAYERS = 3
CLEAR = 1e-5  # relative to the largest score: float32 models that round differently agree to 2e-6


def caching(cache):
    """A cache as the arguments that this version of transformers takes it by, and gives it back by."""
    from transformers import DeepseekV4ForCausalLM

    renamed = "cache" in inspect.signature(DeepseekV4ForCausalLM.forward).parameters
    return {"cache" if renamed else "past_key_values": cache}


def returned(out):
    (name,) = caching(None)
    return out[name]


def tokens(count, batch=1, seed=0, vocabulary=64):
    return torch.randint(2, vocabulary, (batch, count), generator=torch.Generator().manual_seed(seed))


def logits(model, ids, **more):
    with torch.no_grad():
        return model(input_ids=ids, **more).logits


def rows(handle):
    return {row.op: row for row in handle.report().rows}


def continued(model, ids, sizes, cache=None):
    """Logits of a sequence given in pieces of the sizes, with one cache."""
    pieces, at = [], 0
    with torch.no_grad():
        for size in sizes:
            out = model(input_ids=ids[:, at : at + size], **caching(cache), use_cache=True)
            pieces.append(out.logits)
            cache, at = returned(out), at + size
    return torch.cat(pieces, 1)


def gradients(model, ids, **more):
    model.zero_grad()
    model(input_ids=ids, labels=ids, **more).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def same_gradients(got, expected):
    """Float32 gradients relative to each one's largest element; a wrong formula is found in float64, to 1e-9.

    Models that only round differently are apart by 6e-5 in most draws of tokens, by 3e-4 in one of 40.
    """
    assert got.keys() == expected.keys()
    for name, x in expected.items():
        assert float((got[name] - x).abs().max()) <= 2e-3 * float(x.abs().max()), name


def state(model):
    """Everything about a model that a patch could leave behind."""
    return (
        [(name, id(module), sorted(module.__dict__), id(getattr(module.forward, "__func__", None)),
          id(module.__dict__.get("config"))) for name, module in model.named_modules()],
        json.dumps(model.config.to_dict(), sort_keys=True, default=str),
        model.config._attn_implementation,
        model.config._experts_implementation,
        list(model.state_dict()),
    )  # fmt: skip


@contextlib.contextmanager
def watched(model):
    """Collects how clearly the model's routers and indexers chose: the least margin over the largest score."""
    from transformers.models.deepseek_v4 import modeling_deepseek_v4 as modeling

    margins = []

    def margin(scores, count):
        if scores.numel() and scores.shape[-1] > count:
            best = scores.topk(count + 1, -1).values
            margins.append(float((best[..., -2] - best[..., -1]).min() / scores[scores.isfinite()].abs().max()))

    def router(module, args, output):
        margin(module.score_fn(output[0]) + module.e_score_correction_bias, module.top_k)

    def scorer(module, args, scores):
        length, entries = scores.shape[1:]
        first = length if length == 1 else 1  # a prefill from the start, or one token that sees every entry
        for t in range(first, length + 1):
            seen = entries if length == 1 else t // 4
            margin(scores[:, t - 1, :seen], model.config.index_topk)

    hooks = [m.register_forward_hook(router) for m in model.modules() if isinstance(m, modeling.DeepseekV4TopKRouter)]
    hooks += [
        m.register_forward_hook(scorer) for m in model.modules() if isinstance(m, modeling.DeepseekV4IndexerScorer)
    ]
    try:
        yield lambda: min(margins, default=1.0)
    finally:
        for hook in hooks:
            hook.remove()


class Exact(TorchFunctionMode):
    """transformers' code in float64: where it names float32 it means an accumulator."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.float:
            return args[0].double()
        args = [torch.float64 if x is torch.float32 else x for x in args]
        kwargs = {name: torch.float64 if x is torch.float32 else x for name, x in (kwargs or {}).items()}
        return function(*args, **kwargs)


def exact_twin(model):
    """The same model in float64, to run under `Exact`."""
    twin = copy.deepcopy(model).double()
    twin.set_experts_implementation("eager")  # torch's grouped product knows no float64
    return twin
