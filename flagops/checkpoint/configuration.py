"""What a configuration says of the weights' formats: read at every depth, then rewritten there, or refused by name.

A statement that stays behind makes a checkpoint that loads as something else than it is. So every place counts, those
that disagree are refused, and so is each that speaks of a format in words that are not known here.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Sequence
from typing import Any

from .documents import Refused, shown, whole
from .integers import Integers
from .source import CONFIG

SECTION = "quantization_config"
_DTYPES = ("torch_dtype", "dtype")
_SKIPPED = ("modules_to_not_convert", "ignored_layers")
_STATED: dict[str, tuple[str, ...]] = {
    "quant_method": ("fp8", "deepseek_v4_fp8", "fbgemm_fp8", "compressed-tensors", "modelopt", "mxfp4"),
    "fmt": ("e4m3", "e5m2"),
    "scale_fmt": ("ue8m0", "float"),
    "scale_dtype": ("fp8", "e8m0", "ue8m0", "fp32", "float32"),
    "activation_scheme": ("dynamic", "static"),
    "expert_dtype": ("fp4", "fp8"),
}
_NAMING = ("fp8", "deepseek_v4_fp8")  # the methods whose sections can name modules that are not quantised
_GROUPS = "config_groups"  # where compressed-tensors and ModelOpt describe weights and activations
_ANYWHERE = ("expert_dtype", "weight_block_size", "scale_fmt", "scale_dtype", "activation_scheme")
_SPEAKS = re.compile(r"(^|_)(quant|quanti[sz](e|ed|ation))(_|$)|^compression_config$")
_NARROW = re.compile(r"(mx|nv)?(fp|u?int|float)[48](_e\dm\d\w*)?|u?e\dm\d(fn\w*)?", re.IGNORECASE)
_DEEPEST = 64
_WIDEST = (1 << 31) - 1  # rows or columns of a block
Path = tuple[str | int, ...]


class Configuration:
    """A parsed ``config.json``, or None; raises Refused for what is not known or contradicts itself.

    block: rows and columns that share a scale in FP8, 128 x 128 where nothing is said.
    bits: of weights in groups, 0 where nothing is said. dtypes: what numbers are said to be.
    """

    def __init__(self, config: dict[str, Any] | None) -> None:
        self.config = config
        self.sections: list[str] = []
        self._found: dict[str, tuple[str, Any]] = {}
        for path, holder in _walk(config or {}):
            self._read(path, holder[path[-1]])
        block = self._found.get("weight_block_size", ("", [128, 128]))[1]
        self.block: tuple[int, int] = (block[0], block[1])
        self.bits: int = self._found.get("num_bits", ("", 0))[1]
        said = (holder[path[-1]] for path, holder in _walk(config or {}) if path[-1] in _DTYPES)
        self.dtypes = {name for name in said if isinstance(name, str)}

    def _read(self, path: Path, value: Any) -> None:
        key, place, inside = path[-1], _written(path), SECTION in path[:-1]
        if key == SECTION:
            if not isinstance(value, dict | None):
                raise Refused(f"{CONFIG}: {place} is {shown(value)}, expected an object; correct it")
            self.sections += [place] if value is not None else []
        elif inside and _GROUPS in path[:-1]:
            self._read_group(path, value)
        elif key == "weight_block_size":
            if not isinstance(value, list) or len(value) != 2 or not all(whole(n, 1, _WIDEST) for n in value):
                raise Refused(
                    f"{CONFIG}: {place} is {shown(value)}, expected two positive numbers such as [128, 128], each at "
                    f"most {_WIDEST}; correct it"
                )
            self._agree(key, place, value)
        elif key in _STATED and (inside or key in _ANYWHERE):
            if value is not None and value not in _STATED[key]:
                expected = " or ".join(_STATED[key])
                raise Refused(f"{CONFIG}: {place} {shown(value)} is not known, expected {expected}; correct it")
            if value is not None:
                self._agree(key, place, value)
        elif inside:
            if key in _SKIPPED and not _texts(value):
                raise Refused(f"{CONFIG}: {place} is {shown(value)}, expected a list of names; correct it")
        elif key in _DTYPES:
            if not isinstance(value, str | None):
                raise Refused(f"{CONFIG}: {place} is {shown(value)}, expected the name of a dtype; correct it")
        elif (value and _SPEAKS.search(str(key))) or (isinstance(value, str) and _NARROW.fullmatch(value)):
            said = value[:80] if isinstance(value, str) else shown(value)
            raise Refused(
                f"{CONFIG}: {place} describes a format ({said}) in a way that flagops does not know and "
                f"would leave as it is; say it in {SECTION}, or remove it if it does not concern the weights"
            )

    def _read_group(self, path: Path, value: Any) -> None:
        key, place = path[-1], _written(path)
        if path[-2] != "weights" or value is None:
            return
        if key == "num_bits":
            if not whole(value, 1):
                raise Refused(f"{CONFIG}: {place} is {shown(value)}, expected a number of bits; correct it")
            self._agree(key, place, value)
        elif key == "block_structure":
            self._read((*path[: path.index(_GROUPS)], "weight_block_size"), value)

    def _agree(self, key: str, place: str, value: Any) -> None:
        first, said = self._found.setdefault(key, (place, value))
        if said != value:
            raise Refused(f"{CONFIG}: {place} is {shown(value)}, but {first} is {shown(said)}; keep one of the two")

    def in_bf16(
        self, left: Sequence[str] = (), others: Sequence[str] = (), fp4: bool = False
    ) -> tuple[dict[str, Any] | None, list[str]]:
        """The configuration after a conversion to BF16, and what was changed, in words.

        left: modules whose weights stay quantised; the sections that describe them stay and name the `others`.
        fp4: whether packed FP4 is among them.
        """
        if self.config is None:
            return None, []
        if left and not self.sections:
            raise Refused(
                f"{CONFIG} has no {SECTION} that describes what is kept quantised, such as {left[0]}; add one"
            )
        place, method = self._found.get("quant_method", ("", _NAMING[0]))
        if left and method not in _NAMING:
            raise Refused(
                f"--keep leaves {left[0]} quantised, and flagops cannot name what is converted beside it where {place} "
                f"is {method!r}; keep no quantised weights"
            )
        made, changes = copy.deepcopy(self.config), []
        for path, holder in list(_walk(made)):
            key, place, inside = path[-1], _written(path), SECTION in path[:-1]
            gone = key == "expert_dtype" and not fp4 if left else not inside and key in (SECTION, *_ANYWHERE)
            if gone:
                del holder[key]
                changes.append(f"remove {place}")
            elif key == SECTION and left and holder[key] is not None:
                changes += _name(holder[key], place, others)
            elif key in _DTYPES and not inside and holder[key] not in ("bfloat16", None if path[1:] else "bfloat16"):
                holder[key] = "bfloat16"
                changes.append(f"set {place} to 'bfloat16'")
        if not any(name in made for name in _DTYPES):
            made[_DTYPES[0]] = "bfloat16"
            changes.append(f"set {_DTYPES[0]} to 'bfloat16'")
        return made, changes

    def in_integers(
        self, to: Integers, left: Sequence[str], wide: Sequence[str]
    ) -> tuple[dict[str, Any] | None, list[str]]:
        """The configuration after linear layers have become integers, and what was changed, in words.

        left: tensors that are kept in formats of the source. wide: modules that are not quantised.
        """
        if left:
            raise Refused(
                f"--keep leaves {left[0]} in a format that cannot stand beside {to.name}; keep wide ones only"
            )
        if self.config is None:
            raise Refused(f"SRC has no {CONFIG}, where loaders look for what the codes mean; add it, or use --to bf16")
        made, changes = self.in_bf16()
        assert made is not None
        made[SECTION] = to.section(wide)
        return made, [*changes, f"describe {to.name} in {SECTION}, and name {len(wide)} modules that are not"]

    def in_fp8(self, floating: str | None = None) -> tuple[dict[str, Any] | None, list[str]]:
        """The configuration after FP4 weights have become FP8 with e8m0 scales, and what was changed, in words.

        floating: an FP8 weight that keeps scales of float32.
        """
        if self.config is None:
            return None, []
        if "quant_method" not in self._found:
            raise Refused(
                f"{CONFIG} has no {SECTION} with a quant_method: FP8 weights would load as mere numbers; "
                f"add {{'quant_method': 'fp8', 'weight_block_size': [128, 128]}} or use --to bf16"
            )
        place, scales = self._found.get("scale_fmt", ("scale_fmt", "ue8m0"))
        if floating or scales != "ue8m0":
            what = f"{floating} keeps scales of float32" if floating else f"{place} is {scales!r}"
            raise Refused(f"{what}, but the scales of FP4 weights in FP8 are e8m0; use --to bf16")
        made, changes = copy.deepcopy(self.config), []
        places = list(_walk(made))
        beside = not any(path[-1] == "expert_dtype" for path, _ in places)
        for path, holder in places:
            place = _written(path)
            if path[-1] == "expert_dtype" and holder["expert_dtype"] != "fp8":
                holder["expert_dtype"] = "fp8"
                changes.append(f"set {place} to 'fp8'")
            if place in self.sections and "scale_fmt" not in self._found:
                holder[SECTION]["scale_fmt"] = "ue8m0"
                changes.append(f"set {place}.scale_fmt to 'ue8m0'")
            if place in self.sections and beside:
                holder["expert_dtype"] = "fp8"
                changes.append(f"set {place.removesuffix(SECTION)}expert_dtype to 'fp8'")
        return made, changes


def statements(config: Any) -> list[str]:
    """The places of a parsed configuration that speak of narrow formats, in words."""
    found = []
    for path, holder in _walk(config):
        key, value = path[-1], holder[path[-1]]
        narrow = isinstance(value, str) and _NARROW.fullmatch(value)
        if narrow or (value and (key == "weight_block_size" or _SPEAKS.search(str(key)))):
            found.append(f"{_written(path)} {str(value)[:40]!r}" if narrow else _written(path))
    return found


def modules(converted: Sequence[str], plain: Sequence[str], left: Sequence[str]) -> tuple[list[str], list[str]]:
    """Modules of weights that are not quantised, or whole layers of them, by name; and those `left` quantised.

    converted, plain: weights that no longer are, and never were, quantised.

    Loaders take the experts of a layer as one module, and a name as meant that starts or ends like one given.
    transformers begins all names with ``model.``, which the published checkpoints leave out, and orders a layer's
    modules otherwise: only whole layers stand for what is in them.
    """
    kept = dict.fromkeys(_module(name) for name in left)
    above = {name[:end] for name in kept for end in [*(i for i, c in enumerate(name) if c == "."), len(name)]}
    must = dict.fromkeys(_module(name) for name in converted)
    found: dict[str, None] = {}
    for name in [*must, *(_module(name) for name in plain)]:
        parts = name.split(".")
        ends = [*(i + 1 for i, part in enumerate(parts) if part.isdigit()), len(parts)]
        starts = (".".join(parts[:end]) for end in ends)
        cover = next((start for start in starts if start not in above), None)
        same = name if cover is None else next((module for module in kept if module.endswith(cover)), None)
        if same is not None and name in must:
            raise Refused(
                f"--keep: weights of {same} would be kept quantised and those of {name} be converted, which "
                f"{_SKIPPED[0]} of {CONFIG} cannot tell apart; keep both or neither"
            )
        if same is None and cover is not None:
            found[cover] = None
    bare = [name for name in found if not name.startswith("model.")]
    return [*found, *(f"model.{name}" for name in bare)], list(kept)


def _module(name: str) -> str:
    """The module that a tensor belongs to; all experts of a layer are one."""
    parts = name.split(".")
    return ".".join(parts[: parts.index("experts") + 1] if "experts" in parts[:-1] else parts[:-1]) or name


def _name(section: dict[str, Any], place: str, others: Sequence[str]) -> list[str]:
    names = [name for name in _SKIPPED if name in section] or [_SKIPPED[0]]
    for name in names:
        section[name] = list(dict.fromkeys([*(section[name] or [] if name in section else []), *others]))
    return [f"name {len(others)} modules that are not quantised in {place}.{name}" for name in names]


def _texts(value: Any) -> bool:
    return value is None or (isinstance(value, list) and all(isinstance(name, str) for name in value))


def _walk(config: Any) -> Iterator[tuple[Path, Any]]:
    """Every place of a configuration, in its order, and the object or list that holds it."""
    waiting: list[tuple[Path, Any]] = [((), config)]
    while waiting:
        path, value = waiting.pop()
        if len(path) > _DEEPEST:
            raise Refused(f"{CONFIG}: {_written(path)[:80]} lies deeper than {_DEEPEST} levels; correct it")
        keys = value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
        for key in keys:
            yield (*path, key), value
        waiting += [((*path, key), value[key]) for key in reversed(list(keys)) if isinstance(value[key], dict | list)]


def _written(path: Path) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".")
