"""A model of transformers without memory, its layers replaced by packed ones, and every tensor put into its place."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from flagops.checkpoint import Refused
from flagops.checkpoint.documents import AGAIN, line
from flagops.checkpoint.memory import resident
from flagops.checkpoint.plan import COPY, FP4, FP8, Output, Plan
from flagops.checkpoint.source import CONFIG, Source

from .arena import Arena
from .draft import attach
from .modules import PackedExpert, PackedExperts, PackedGroupedLinear, PackedLinear, StackedExperts, frozen
from .names import EXPERT, renamed
from .products import BLOCK, POWERS, Share, Stacked, Weight
from .storage import Mapped

PARTS = ("gate", "up", "down")
_PROJECTION = re.compile(r"self_attn\.o_[ab]_proj\.weight$")


class Place(NamedTuple):
    """Where a model holds a stored tensor: a parameter or buffer of a module, all of it or a part."""

    module: nn.Module
    leaf: str
    part: Any = ...


class Build:
    """Makes `model` of a source, and notes the `places` of its tensors by their stored names.

    quantise: whether activations are quantised before they are multiplied. pack: whether experts are copied into
    stacks. memory: the most bytes that the process may take with all weights, experts being read on demand; None for
    no bound. ranks: makes, of the model's configuration and whether its output projection is FP8, what says which parts
    are here (`flagops.packed.ranks.Ranks`); None for a model as a whole. draft: whether the model is given its draft
    layer.
    """

    def __init__(
        self,
        source: Source,
        dtype: torch.dtype,
        quantise: bool,
        pack: bool,
        memory: int | None = None,
        ranks: Callable[[Any, bool], Any] | None = None,
        draft: bool = False,
    ) -> None:
        plan = Plan(source)
        self.source, self.mapped, self.quantise, self._apiece = source, Mapped(source), quantise, memory is not None
        self.model = _blank(source, dtype)
        if draft:
            attach(self.model, source)
        self.config = self.model.config.get_text_config()
        self.places: dict[str, Place] = {}
        self._powers = _powers(source.config or {})
        self._blank = dict(_tensors(self.model))
        outputs = self._targets(plan, draft)
        fp8 = any(out.action == FP8 and _PROJECTION.search(target) for target, out in outputs.items())
        self.ranks = None if ranks is None else ranks(self.config, fp8)
        wide = _wide(self.model, dtype)
        experts: dict[str, dict[tuple[int, str], Output]] = defaultdict(dict)
        for target, out in outputs.items():
            stem, _, leaf = target.rpartition(".")
            expert = EXPERT.fullmatch(target)
            if expert:
                experts[expert[1]][int(expert[2]), expert[3]] = out
            elif out.action == COPY:
                self._plain(stem, leaf, out, torch.float32 if wide.search(target) else dtype)
            elif leaf == "weight" and isinstance(self.model.get_submodule(stem), nn.Linear):
                self._linear(stem, out)
            elif leaf == "gate_up_proj":
                self._stacked(stem, out, outputs.get(f"{stem}.down_proj"))
            elif leaf != "down_proj":
                raise Refused(f"{out.weight} is no weight of a linear layer or of experts; convert it: flagops convert")
        for stem, parts in experts.items():
            (self._packed if pack else self._apart)(stem, parts)
        self._finish(outputs, experts)
        self.arena = None if memory is None else self._arena(memory)

    def _targets(self, plan: Plan, draft: bool) -> dict[str, Output]:
        """What becomes of each parameter and buffer, by transformers' names."""
        model, found = self.model, dict[str, Output]()
        passed = [rf"(^|\.)layers\.{self.config.num_hidden_layers}\."]  # a draft layer follows the model's own
        if not draft:
            passed += [*(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()), r"(^|\.)mtp\."]
        for out in plan.outputs:
            target = renamed(out.name, self._blank, model.base_model_prefix, model.config.model_type)
            if target is None:
                if not any(re.search(pattern, out.name) for pattern in passed):
                    raise Refused(f"{out.weight} is no part of a {type(model).__name__}; remove it or correct {CONFIG}")
                continue
            if target in found:
                raise Refused(f"{out.weight} and {found[target].weight} are both {target}; keep one of them")
            found[target] = out
        return found

    def _plain(self, stem: str, leaf: str, out: Output, dtype: torch.dtype) -> None:
        blank = self._blank[f"{stem}.{leaf}"]
        _same(out, blank.shape)
        tensor = self.mapped[out.name]
        if self.ranks:
            tensor = self.ranks.plain(f"{stem}.{leaf}", tensor)
        tensor = tensor.to(dtype if blank.is_floating_point() else blank.dtype)
        module = self.model.get_submodule(stem)
        if leaf in module._buffers:
            module._buffers[leaf] = tensor
        else:
            module._parameters[leaf] = frozen(tensor)
        self.places[out.weight.name] = Place(module, leaf)

    def _weight(self, out: Output, shape: tuple[int, ...]) -> Weight:
        """Codes and scales where they lie; scales that are floats in float32."""
        _same(out, shape)
        if out.scale is None or out.action not in (FP4, FP8) or (out.action == FP8 and out.block != (BLOCK, BLOCK)):
            raise Refused(
                f"{out.weight} is of a format that no packed product takes (FP4 in groups of 32 and FP8 in blocks of "
                f"{BLOCK} x {BLOCK} are): convert it with flagops convert"
            )
        scale = self.mapped[out.scale.name]
        return Weight(self.mapped[out.weight.name], scale if scale.dtype.itemsize == 1 else scale.to(torch.float32))

    def _scales(self, out: Output) -> str | None:
        """The dtype of the scales of a weight's activations."""
        if not self.quantise:
            return None
        return POWERS if self._powers or (out.scale and out.scale.dtype != "F32") else "float32"

    def _linear(self, stem: str, out: Output) -> None:
        layer = self.model.get_submodule(stem)
        made = PackedGroupedLinear if "GroupedLinear" in type(layer).__name__ else PackedLinear
        weight = self._weight(out, self._blank[f"{stem}.weight"].shape)
        if self.ranks:
            weight = self.ranks.packed(f"{stem}.weight", weight)
        packed = made(weight, layer.bias, self._scales(out))
        self.model.set_submodule(stem, packed)
        self._note(out, packed, "weight")

    def _note(self, out: Output, module: nn.Module, leaf: str, part: Any = ..., scale_part: Any = ...) -> None:
        assert out.scale is not None
        self.places[out.weight.name] = Place(module, leaf, part)
        self.places[out.scale.name] = Place(module, f"{leaf}_scale_inv", scale_part)

    def _stacked(self, stem: str, gate_up: Output, down: Output | None) -> None:
        if down is None or down.action != gate_up.action:
            raise Refused(f"{gate_up.weight} has no down_proj of its format beside it; {AGAIN}")
        weights = [
            self._weight(out, self._blank[f"{stem}.{leaf}"].shape)
            for leaf, out in (("gate_up_proj", gate_up), ("down_proj", down))
        ]
        limit, scales, half = self._limit(gate_up), self._scales(gate_up), gate_up.shape[1] // 2
        if gate_up.action == FP8 and half % BLOCK and (self._apiece or scales != POWERS):
            raise Refused(f"{gate_up.weight}: blocks of {BLOCK} do not divide the {half} rows of a gate; convert it")
        mine, share = self._mine(gate_up.shape[0])
        weights = [Weight(*(x[mine.start : mine.stop] for x in weight)) for weight in weights]
        module = StackedExperts(weights[0], weights[1], limit, scales, share)
        if self._apiece:
            stacked = Stacked(module.stacked, limit, scales)
            each = [[PackedLinear(x, None, scales) for x in stacked.expert(i)] for i in range(len(mine))]
            experts = [PackedExpert(*layers) for layers in each]
            self.model.set_submodule(stem, PackedExperts(experts, limit, scales, share))
            return  # parts of the mapping, which are saved with it
        self.model.set_submodule(stem, module)
        self._note(gate_up, module, "gate_up_proj")
        self._note(down, module, "down_proj")

    def _mine(self, count: int) -> tuple[range, Share | None]:
        """Which experts of a layer are here; and how they are part of all, where they are not all."""
        share = self.ranks.share(count) if self.ranks else None
        return (share.here if share else range(count)), share

    def _experts(
        self, stem: str, parts: dict[tuple[int, str], Output]
    ) -> tuple[list[list[tuple[Output, Weight]]], Share | None]:
        """Gate, up and down of each expert of a layer that is here; raises Refused for one, here or not, that is
        missing or of another format."""
        count, rows, width = self._blank[f"{stem}.gate_up_proj"].shape
        shapes = {"gate": (rows // 2, width), "up": (rows // 2, width), "down": (width, rows // 2)}
        wanted = [(index, part) for index in range(count) for part in PARTS]
        for index, part in wanted:
            if (index, part) not in parts:
                raise Refused(f"{self._absent(f'{stem}.{index}.{part}_proj.weight')}")
        more = parts.keys() - set(wanted)
        if more:
            raise Refused(f"{parts[min(more)].weight} is of an expert beyond the {count} of {CONFIG}; correct it")
        first = parts[0, "gate"]
        for out in parts.values():
            if out.action != first.action:
                raise Refused(f"{out.weight} and {first.weight} are experts in two formats; convert both")
        mine, share = self._mine(count)
        found = [[(parts[i, part], self._weight(parts[i, part], shapes[part])) for part in PARTS] for i in mine]
        return found, share

    def _apart(self, stem: str, parts: dict[tuple[int, str], Output]) -> None:
        scales, made = self._scales(parts[next(iter(parts))]), []
        experts, share = self._experts(stem, parts)
        for expert in experts:
            layers = [PackedLinear(weight, None, scales) for _, weight in expert]
            for (out, _), layer in zip(expert, layers, strict=True):
                self._note(out, layer, "weight")
            made.append(PackedExpert(*layers))
        self.model.set_submodule(stem, PackedExperts(made, self._limit(parts[0, "gate"]), scales, share))

    def _packed(self, stem: str, parts: dict[tuple[int, str], Output]) -> None:
        """As `_apart`, copied into stacks expert by expert; the pages that were read are let go."""
        (experts, share), first = self._experts(stem, parts), parts[0, "gate"]
        half = first.shape[0]
        if first.action == FP8 and half % BLOCK:
            raise Refused(f"pack: blocks of {BLOCK} do not divide the {half} rows of {first.weight}; load it without")
        gate, _, down = (weight for _, weight in experts[0])
        both = Weight(*(torch.empty((len(experts), 2 * len(x), *x.shape[1:]), dtype=x.dtype) for x in gate))
        lower = Weight(*(torch.empty((len(experts), *x.shape), dtype=x.dtype) for x in down))
        module = StackedExperts(both, lower, self._limit(first), self._scales(first), share)
        self.model.set_submodule(stem, module)
        for index, expert in enumerate(experts):
            for (out, weight), leaf, at in zip(
                expert, ("gate_up_proj", "gate_up_proj", "down_proj"), (0, 1, 0), strict=True
            ):
                places = [(index, slice(at * len(x), (at + 1) * len(x))) for x in weight]
                self._note(out, module, leaf, *places)
                for x, name, place in zip(weight, (leaf, f"{leaf}_scale_inv"), places, strict=True):
                    getattr(module, name)[place].view(torch.uint8).copy_(x.view(torch.uint8))
                for stored in filter(None, (out.weight, out.scale)):
                    self.mapped.forget(stored.name)

    def _arena(self, memory: int) -> Arena:
        """Experts read on demand into what is left beside all other weights."""
        layers = [module for module in self.model.modules() if isinstance(module, PackedExperts)]
        if not layers:
            raise Refused(
                f"{self.source.folder} has no routed experts, which alone are read on demand; leave memory out"
            )
        each = [[module.expert(i) for i in range(len(module))] for module in layers]
        spared = sum(x.nbytes for experts in each for expert in experts for weight in expert for x in weight)
        rest = sum(x.nbytes for x in self.model.parameters()) - spared
        arena = Arena(self.mapped, each, memory - resident() - rest)
        for index, module in enumerate(layers):
            module.arena = arena, index
        return arena

    def _limit(self, out: Output) -> float | None:
        if getattr(self.config, "hidden_act", "silu") != "silu":
            raise Refused(
                f"{out.weight} is of experts with the activation {self.config.hidden_act}; only silu is known"
            )
        return getattr(self.config, "swiglu_limit", None)

    def _absent(self, target: str) -> str:
        return f"tensor {target!r} is missing from {self.source.folder}, by this or its official name; {AGAIN}"

    def _finish(self, outputs: dict[str, Output], experts: dict[str, Any]) -> None:
        """Tie what is tied, compute what only initialisation computes, refuse what is missing."""
        model = self.model
        tied = getattr(model, "_tied_weights_keys", None) or () if model.config.tie_word_embeddings else ()
        for name in self._blank:
            apart = name.removesuffix(".gate_up_proj").removesuffix(".down_proj") in experts
            if name not in outputs and not apart and name not in tied:
                raise Refused(self._absent(name))
        if tied:
            model.tie_weights()
        for name, module in model.named_modules():
            if any(x is not None and x.is_meta for x in module._buffers.values()):
                module._buffers.update(_initialised(name, module)._buffers)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        model.get_output_embeddings().register_forward_pre_hook(_as_made)
        model.eval()


def _blank(source: Source, dtype: torch.dtype) -> Any:
    """The model of a configuration on the meta device."""
    import transformers

    if source.config is None:
        raise Refused(f"{source.folder} has no {CONFIG}, which says what model this is; {AGAIN}")
    try:
        config = transformers.AutoConfig.from_pretrained(source.folder, trust_remote_code=False)
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    except (ValueError, KeyError, TypeError) as error:
        said = line(str(error).strip().partition("\n")[0])
        raise Refused(f"{source.folder / CONFIG} is of no model that transformers knows here: {said}") from error
    file = source.folder / "generation_config.json"
    if file.is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(source.folder)
    return model


def _tensors(model: Any) -> Any:
    """All that a state dict has, on the meta device."""
    return model.state_dict(keep_vars=True).items()


def _wide(model: Any, dtype: torch.dtype) -> re.Pattern[str]:
    """What transformers keeps in float32, by the names of modules or parameters."""
    names = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    if dtype is torch.float16:
        names |= set(getattr(model, "_keep_in_fp32_modules", None) or ())
    return re.compile(rf"(^|\.)({'|'.join(map(re.escape, sorted(names)))})(\.|$)" if names else r"(?!)")


def _powers(config: dict[str, Any]) -> bool:
    """Whether a configuration says that the scales of activations are powers of two."""
    holders = (config, config.get("text_config") or {})
    return any((holder.get("quantization_config") or {}).get("scale_fmt") == "ue8m0" for holder in holders)


def _as_made(head: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """The last token of a prompt with the strides of a tensor of its own. With those of a slice torch takes the head's
    product in bfloat16 for one of batches, and copies the weight: 320 ms in place of 7 for 32768 x 2048."""
    x, *others = args
    return x.reshape(-1, x.shape[-1]).view(x.shape), *others


def _same(out: Output, shape: tuple[int, ...]) -> None:
    if tuple(out.shape) != tuple(shape):
        raise Refused(f"{out.weight} is {list(out.shape)}, expected {list(shape)} by {CONFIG}; correct it, or {AGAIN}")


def _initialised(name: str, module: nn.Module) -> nn.Module:
    """A module like one of the model, such as its rotary embedding, with the buffers that no checkpoint has."""
    try:
        return type(module)(module.config)
    except (AttributeError, TypeError) as error:
        raise Refused(
            f"{name}, a {type(module).__name__}, keeps what cannot be computed again here: {error}"
        ) from error
