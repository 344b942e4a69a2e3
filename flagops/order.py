"""Who computes a call, as measured: the kernel that an explicit call takes, and the calls of torch that `enable` takes.

A table belongs to a class of machine: the file that FLAGOPS_ORDER names, else what `flagops tune` made on this machine,
else that of ``orders/``, made by the same command on a machine of the class.

    {"run": {"*": ["numba", "torch"], "matmul.bfloat16.many": ["torch", "numba"]},
     "replace": {"matmul.float32": ["numba"], "scaled_dot_product_attention.training": []},
     "kind": "cpu-amd-avx512-bf16", "made": {...}, "measured": {...}}

A key is an operator, ``.dtype`` of its result and ``.one``, ``.few`` or ``.many`` rows, the longest that is there, or
``*``. `run` lists backends, of which the first that takes the call computes it. `replace` lists those that take a call
from torch's own kernel; where it lists none, the call stays torch's.
"""

from __future__ import annotations

import functools
import json
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flagops import arrays, config, machine, registry
from flagops.errors import suggestion

if TYPE_CHECKING:
    from flagops.operator import Operator

log = logging.getLogger("flagops")

FEW = 16
"""The most rows that are few."""
CLASSES = ("one", "few", "many")
SHIPPED = Path(__file__).parent / "orders"
OTHER = "other"
"""The class of a device that no table was made for."""

Rows = Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class Table:
    """Backends by key, of the calls that are made and of the calls that are replaced; where and when that was found."""

    kind: str
    run: Rows
    replace: Rows
    made: Mapping[str, Any]
    source: str

    def runs(self, operator: str, dtype: str, rows: str) -> tuple[str, ...]:
        """The backends that an explicit call asks, in this order."""
        return _found(self.run, (f"{operator}.{dtype}.{rows}", f"{operator}.{dtype}", operator, "*"))

    def replaces(self, operator: str, dtype: str, rows: str, training: bool = False) -> tuple[str, ...]:
        """The backends that take a call from torch's own kernel; none where that is faster.

        training: whether a gradient is recorded, so that the backward counts as well.
        """
        trained = (f"{operator}.training",) if training else ()
        return _found(self.replace, (*trained, f"{operator}.{dtype}.{rows}", f"{operator}.{dtype}", operator, "*"))

    def replaces_any(self, operator: str) -> bool:
        """Whether some call of an operator is taken from torch."""
        rest = () if operator in self.replace else self.replace.get("*", ())
        return bool(rest) or any(names for key, names in self.replace.items() if key.split(".")[0] == operator)

    def words(self) -> str:
        """Where the table comes from, for reports."""
        when = f", made {self.made['date']}" if "date" in self.made else ""
        return f"{self.source}{when}{' on ' + self.made['cpu'] if 'cpu' in self.made else ''}"


def _found(rows: Rows, keys: Iterable[str]) -> tuple[str, ...]:
    return next((rows[key] for key in keys if key in rows), ())


def rows_of(operator: Operator, shape: Sequence[int]) -> str:
    """The class of a call by the rows of its first result that share what they are multiplied with, or just the rows:
    tokens where the card has such an axis (s, t, or m of a product), else all axes but the last."""
    words = operator.result.axes.split()
    tokens = [len(words) - at for at, word in enumerate(words) if word in ("s", "t", "m")]
    count = shape[-tokens[0]] if tokens and len(shape) >= tokens[0] else math.prod(shape[:-1])
    return "one" if count <= 1 else "few" if count <= FEW else "many"


def of(x: Any) -> Table:
    """The table in force for where an array lies."""
    return table(machine.kind(x))


_forced: list[Table] = []


@contextmanager
def forced(instead: Table) -> Iterator[None]:
    """For a block of the process another table, which calls that have been planned before do not notice."""
    _forced.append(instead)
    try:
        yield
    finally:
        _forced.pop()


def table(kind: str) -> Table:
    """The table in force for a class of machine."""
    if _forced and _forced[-1].kind == kind:
        return _forced[-1]
    return _table(kind, config.current().order, config.cache_folder())


def tuned(kind: str, cache: str) -> Path:
    """Where `flagops tune` keeps what it found for a class of machine."""
    return Path(cache) / f"order-{kind}.json"


@functools.cache
def _table(kind: str, given: str, cache: str) -> Table:
    if given:
        return read(Path(given), f"FLAGOPS_ORDER={given}")
    return _kept(tuned(kind, cache)) or shipped(kind)


def _kept(path: Path) -> Table | None:
    """What `flagops tune` keeps, if it is there and still true of this machine; else why not is logged."""
    if not path.is_file():
        return None
    try:
        found = read(path, "flagops tune")
        reason = stale(found)
    except ValueError as error:
        reason = str(error)
    if reason is None:
        return found
    log.warning("%s is not used: %s; run `flagops tune` again", path, reason)
    return None


def shipped(kind: str) -> Table:
    """The table of flagops itself for a class of machine, of the nearest one where there is none."""
    parts = kind.split("-")
    names = ["-".join(parts[:n]) for n in range(len(parts), 0, -1)]
    path = next(path for name in (*names, OTHER) if (path := SHIPPED / f"{name}.json").is_file())
    return read(path, f"flagops/orders/{path.name}")


def stale(kept: Table) -> str | None:
    """Why a table of this machine is no longer one, or None: other libraries or another CPU make other speeds."""
    changed = [(name, kept.made.get(name), value) for name, value in identity().items()]
    return "; ".join(f"{name} was {was!r} and is {value!r}" for name, was, value in changed if was != value) or None


@functools.cache
def identity() -> dict[str, str]:
    """What the speeds of a machine hang on: its CPU and the libraries that compute."""
    found = {"cpu": machine.cpu_model()}
    for name in ("flagops", "torch", "numba", "triton"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = ""
    return found


def read(path: Path, source: str) -> Table:
    """A table from its file. Raises ValueError for what is none, naming file and key."""
    try:
        found = json.loads(path.read_text())
        run, replace = found["run"], found["replace"]
        made, kind = found.get("made", {}), str(found.get("kind", ""))
        whole = [*run.items(), *replace.items()]
    except OSError as error:
        raise ValueError(f"{source}: {error.strerror or error}") from None
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{source} is no table of `flagops tune`: {type(error).__name__}: {error}") from None
    for key, names in whole:
        _refuse_unknown(source, key, names)
    return Table(kind, _tuples(run), _tuples(replace), made, source)


def _tuples(rows: Mapping[str, Sequence[str]]) -> Rows:
    known = registry.backend_names()
    return {key: tuple(name for name in names if name in known) for key, names in rows.items()}


def _refuse_unknown(source: str, key: str, names: Any) -> None:
    operator, *rest = key.split(".")
    cards = [*registry.operators(), "*"]
    if operator not in cards:
        raise ValueError(f"{source}: {key}: flagops has no operator {operator!r}{suggestion(operator, cards)}")
    known = [(*arrays.DTYPES, "training"), CLASSES]
    for word, words in zip(rest, known, strict=False):
        if word not in words:
            raise ValueError(f"{source}: {key}: {word!r} is none of {', '.join(words)}")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{source}: {key}: expected a list of backends, got {names!r}")


def order(operator: Operator, dtype: str, shape: Sequence[int], x: Any) -> tuple[str, ...]:
    """The backends that an explicit call asks. One that somebody's package adds is asked where it is named or measured,
    on devices that are not torch's own, and where nobody else has a kernel of the operator."""
    kind = machine.kind(x)
    listed = table(kind).runs(operator.name, dtype, rows_of(operator, shape))
    others = tuple(name for name in registry.backend_names() if name not in listed and name not in registry.BUILT_IN)
    if not others:
        return listed
    written = any(registry.written(operator.name, name) for name in listed if name != "numpy")
    return listed if written and machine.torchs_own(kind) else (*others, *listed)
