"""`flagops.patch`: operators of a loaded DeepSeek-V4 model of Hugging Face transformers replaced, and put back.

The attention core is reached through transformers' AttentionInterface: a patched layer sees a copy of the configuration
that names ``flagops``, while the model keeps its own and with it the masks its eager attention would get. The grouped
output projection is bound per instance: the first product hands its input on, the second computes both.
"""

from __future__ import annotations

import copy
import logging
import sys
import threading
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from flagops import registry
from flagops.config import names
from flagops.errors import Unsupported, suggestion
from flagops.report import Report, Row

OPS = ("sparse_attention", "grouped_output_projection")
NAME = "flagops"
_MODELING = "transformers.models.deepseek_v4.modeling_deepseek_v4"

log = logging.getLogger("flagops")


def patch(model: Any, ops: str | Sequence[str] = OPS, backend: str | Sequence[str] | None = None) -> Handle:
    """Replace operators of a transformers `DeepseekV4ForCausalLM` (or a model that holds its attention layers).

    ops: any of ``"sparse_attention"`` (the attention core) and ``"grouped_output_projection"`` (``o_a_proj`` and
        ``o_b_proj`` in one call).
    backend: as in every operator; None takes the best available one.

    Returns a `Handle`, also a context manager: ``disable()`` restores the model exactly, ``report()`` says what ran.
    What flagops cannot take (a mask that is more than visible or not, dropout, a recorded attention) runs as before
    and is counted with its reason. Training works; a deep copy stays patched until the same handle is disabled.

    Raises TypeError for a model that holds no DeepSeek-V4 attention, ValueError for an unknown operator or backend, and
    Unsupported for a backend that cannot run here.
    """
    chosen = names(ops)
    for op in chosen:
        if op not in OPS:
            raise ValueError(f"patch: {op!r} is no operator of DeepSeek-V4 that can be replaced{suggestion(op, OPS)}")
    reasons = {name: registry.backend(name).unavailable() for name in names(backend or ())}
    if reasons and all(reasons.values()):
        raise Unsupported("patch: " + "; ".join(f"{name}: {reason}" for name, reason in reasons.items()))
    modeling = sys.modules.get(_MODELING)  # not loaded: the model cannot be one of its classes
    modules = getattr(model, "modules", tuple)
    layers = [m for m in modules() if isinstance(m, modeling.DeepseekV4Attention)] if modeling else []
    if not layers:
        raise TypeError(
            f"patch: a {type(model).__name__} holds no DeepSeek-V4 attention; "
            "expected a loaded transformers DeepseekV4ForCausalLM or DeepseekV4Model"
        )
    _register()
    return Handle(layers, chosen, backend)


class Handle:
    """One `patch`; `disable` undoes it, in any order of several."""

    def __init__(self, attentions: Iterable[Any], ops: tuple[str, ...], backend: str | Sequence[str] | None) -> None:
        self.ops = ops
        self.backend = backend
        self.active = True
        self._counts: Counter[tuple[str, str, str, str]] = Counter()
        self._untouched: dict[str, int | None] = {}
        self._lock = threading.Lock()
        self._layers = [_Layer.of(attention) for attention in attentions]
        for layer in self._layers:
            layer.handles.append(self)
            layer.install()
            if "grouped_output_projection" in ops and (reason := layer.foreign()):
                name = f"grouped_output_projection of layer {layer.attention.layer_idx}"
                self._untouched[f"{name}: {reason}"] = None

    def disable(self) -> None:
        """Put the model back as it was; a second call does nothing."""
        if self.active:
            self.active = False
            for layer in self._layers:
                layer.handles.remove(self)
                layer.install()

    def report(self) -> Report:
        """Per operator the calls by backend and, by reason, those that ran transformers' own code; below them the
        layers that could not be patched."""
        with self._lock:
            counts = dict(self._counts)
        rows = []
        for op, key in dict.fromkeys(seen[:2] for seen in counts):
            mine = {seen[2:]: number for seen, number in counts.items() if seen[:2] == (op, key)}
            replaced = {backend: number for (backend, _), number in mine.items() if backend}
            rows.append(Row(op, key, replaced, {reason: number for (_, reason), number in mine.items() if reason}))
        return Report(tuple(rows), self._untouched.copy())

    def replace(self, op: str, device: torch.device, arguments: tuple[Any, ...] | str) -> Any:
        """One call through flagops; None, counted, when `arguments` is a reason or no backend takes them."""
        import flagops

        result, backend, reason = None, "", ""
        if isinstance(arguments, str):
            reason = arguments
        else:
            try:
                result = getattr(flagops, op)(*arguments, backend=self.backend)
                backend = _backend(op, arguments, self.backend)
            except Unsupported as error:
                reason = str(error)
        seen = (op, device.type.upper(), backend, reason)
        if reason and seen not in self._counts:
            log.info("%s is left to transformers: %s", op, reason)
        with self._lock:
            self._counts[seen] += 1
        return result

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *exception: object) -> None:
        self.disable()

    def __deepcopy__(self, memo: dict[int, Any]) -> Handle:
        return self


class _Layer:
    """A patched attention module: what it was, and the handles that want something of it, newest last."""

    def __init__(self, attention: Any) -> None:
        self.attention = attention
        self.first, self.second = attention.o_a_proj, attention.o_b_proj
        self.config = attention.config
        self.view = copy.copy(attention.config)
        self.view._attn_implementation_internal = NAME
        self.handles: list[Handle] = []

    @classmethod
    def of(cls, attention: Any) -> _Layer:
        known: _Layer | None = attention.__dict__.get("_flagops")
        return known or cls(attention)

    def handle(self, op: str) -> Handle | None:
        return next((h for h in reversed(self.handles) if op in h.ops and h.active), None)

    def install(self) -> None:
        """Make the module what its handles want; without any, what it was."""
        attention = self.attention
        if self.handles:
            attention.__dict__["_flagops"] = self
        else:
            attention.__dict__.pop("_flagops", None)
        attention.config = self.view if self.handle("sparse_attention") else self.config
        first, second = self.first.__dict__, self.second.__dict__
        if self.handle("grouped_output_projection"):
            if self.foreign() is None:
                first["forward"], second["forward"] = self.hand_on, self.project
        elif first.get("forward") == self.hand_on and second.get("forward") == self.project:
            del first["forward"], second["forward"]

    def foreign(self) -> str | None:
        """Why the output projection is not transformers' own plain one, or None."""
        modeling = sys.modules[_MODELING]
        for module, plain, ours in (
            (self.first, modeling.DeepseekV4GroupedLinear, self.hand_on),
            (self.second, torch.nn.Linear, self.project),
        ):
            if type(module) is not plain or type(module.weight) is not torch.nn.Parameter or module.bias is not None:
                return f"the output projection holds a {type(module).__name__} that is no plain {plain.__name__}"
            if module.__dict__.get("forward", ours) != ours:
                return f"somebody else has bound the forward of a {plain.__name__}"
        return None

    def hand_on(self, grouped: torch.Tensor) -> torch.Tensor:
        """Stands for o_a_proj: `project` computes both products."""
        return grouped

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def project(self, o: torch.Tensor) -> Any:
        """Stands for o_b_proj, on the attention output with its heads flattened."""
        first, second = self.first, self.second

        def original() -> Any:
            grouped = type(first).forward(first, o.reshape(*o.shape[:-1], first.n_groups, -1))
            return type(second).forward(second, grouped.flatten(-2))

        handle = self.handle("grouped_output_projection")
        if handle is None:  # a deep copy whose handle is disabled
            return original()
        dtypes = sorted({str(x.dtype) for x in (o, first.weight, second.weight)})
        heads = o.reshape(*o.shape[:-1], -1, self.attention.head_dim)
        result = handle.replace(
            "grouped_output_projection",
            o.device,
            (heads, first.weight, second.weight, first.n_groups)
            if len(dtypes) == 1
            else f"input and weights mix {' and '.join(dtypes)}",
        )
        return original() if result is None else result


def visible_indices(mask: torch.Tensor) -> torch.Tensor | None:
    """int32 [b, s, k]: the keys that an additive mask [b, s, n] leaves visible, ascending, then -1.

    None when the mask holds anything but 0 and, for a hidden key, -inf or the least finite number.
    """
    visible = mask == 0
    if not bool((visible | (mask <= torch.finfo(mask.dtype).min)).all()):
        return None
    count = visible.sum(-1, keepdim=True)
    width = int(count.max()) if count.numel() else 0
    indices = torch.full((*mask.shape[:-1], width), -1, dtype=torch.int32, device=mask.device)
    indices[torch.arange(width, device=mask.device) < count] = visible.nonzero()[:, -1].to(torch.int32)
    return indices


@torch.compiler.disable  # type: ignore[untyped-decorator]
def attention_forward(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> Any:
    """The attention function registered with transformers: query [b, h, s, d], key = value [b, 1, n, d]."""
    layer: _Layer | None = module.__dict__.get("_flagops")
    config = layer.config if layer else module.config

    def original() -> Any:
        from transformers import AttentionInterface

        eager = sys.modules[type(module).__module__].eager_attention_forward
        chosen = config._attn_implementation
        function = eager if chosen == NAME else AttentionInterface().get_interface(chosen, eager)
        return function(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)

    handle = layer.handle("sparse_attention") if layer else None
    if handle is None:  # a deep copy whose handle is disabled, or a model that was never patched
        return original()
    asked = kwargs.get("output_attentions") or getattr(config, "output_attentions", False)
    reason = "the attention probabilities are asked for" if asked else "attention dropout" if dropout else None
    arguments = reason or _arguments(module, query, key, value, attention_mask, scaling)
    result = handle.replace("sparse_attention", query.device, arguments)
    return original() if result is None else (result, None)


def _arguments(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scaling: float
) -> tuple[Any, ...] | str:
    """The arguments of `flagops.sparse_attention`, or why there are none."""
    if key is not value or key.shape[1] != 1:
        return "key and value are not one shared head"
    if mask is None:
        return "no mask came (is the mask function registered under the same name?)"
    if mask.dim() != 4 or mask.shape[1] != 1 or mask.shape[-1] != key.shape[2]:
        return f"a mask of shape {tuple(mask.shape)} for keys of shape {tuple(key.shape)}"
    if query.dtype != key.dtype:
        return f"query and keys mix {query.dtype} and {key.dtype}"
    indices = visible_indices(mask[:, 0])
    if indices is None:
        return "the mask is more than visible or hidden"
    q = query.transpose(1, 2)
    sink = module.sinks.to(torch.float64 if q.dtype == torch.float64 else torch.float32)
    return q, key[:, 0], sink, indices.expand(q.shape[0], -1, -1), scaling


def _backend(op: str, arguments: tuple[Any, ...], backend: str | Sequence[str] | None) -> str:
    """The backend that a call just made has run on: its plan is remembered."""
    from flagops import dispatch

    operator = registry.operator(op)
    return dispatch.plan(operator, operator.fill(arguments, {}), backend, torch.is_grad_enabled()).backend


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, eager_mask)
