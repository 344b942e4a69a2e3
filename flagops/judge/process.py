"""What a process looks like: settings, random state, names of libraries; a kernel leaves all of it as it was."""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

WATCHED = (
    "builtins", "gc", "math", "operator", "os", "random", "sys", "threading", "time", "numpy", "numpy.lib", "ml_dtypes",
    "torch", "torch.nn.functional", "torch.testing", "torch.random", "torch.Tensor",
)  # fmt: skip


def settings() -> dict[str, Any]:
    """What can be read in microseconds."""
    found: dict[str, Any] = {
        "environment": _environment(),
        "working folder": os.getcwd(),
        "Python threads": threading.active_count(),
        "Python's random state": random.getstate(),
        "NumPy's random state": tuple(np.random.get_state())[1:3],  # noqa: NPY002 - of whatever draws without a generator
        "NumPy's floating-point errors": np.geterr(),
        "flush-to-zero": float(np.float32(1e-45) * np.float32(1)) == 0,
        "recursion limit": sys.getrecursionlimit(),
        "standard output": id(sys.stdout),
        "trace function": (sys.gettrace(), sys.getprofile()),
        "handler of SIGINT": signal.getsignal(signal.SIGINT),
    }
    torch = sys.modules.get("torch")
    if torch is not None:
        found |= {
            "torch's threads": torch.get_num_threads(),
            "torch's default dtype": torch.get_default_dtype(),
            "torch's random state": torch.get_rng_state().numpy().tobytes(),
            "torch's gradient mode": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
            "torch's deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
            "torch's float32 precision": torch.get_float32_matmul_precision(),
            "torch's oneDNN": torch.backends.mkldnn.enabled,
            "torch's flush-to-zero": bool((torch.tensor([1e-45]) * 1 == 0).item()),
        }
    return found


def _environment() -> dict[str, str]:
    """But for what torch itself sets when a part of it is first used."""
    return {name: value for name, value in os.environ.items() if not name.startswith("TORCHINDUCTOR_")}


def restore(found: dict[str, Any]) -> None:
    """Give back what the next kernel would suffer from."""
    os.chdir(found["working folder"])
    for name in _environment().keys() - found["environment"].keys():
        del os.environ[name]
    os.environ.update(found["environment"])
    random.setstate(found["Python's random state"])
    np.seterr(**found["NumPy's floating-point errors"])
    torch = sys.modules.get("torch")
    if torch is not None and "torch's threads" in found:
        torch.set_num_threads(found["torch's threads"])
        torch.set_default_dtype(found["torch's default dtype"])
        torch.set_flush_denormal(found["torch's flush-to-zero"])
        torch.set_grad_enabled(found["torch's gradient mode"][0])
        torch.use_deterministic_algorithms(found["torch's deterministic algorithms"])
        torch.set_float32_matmul_precision(found["torch's float32 precision"])
        if torch.backends.mkldnn.enabled != found["torch's oneDNN"]:  # torch's own test helpers forbid to set it
            torch.backends.mkldnn.enabled = found["torch's oneDNN"]


def names() -> dict[tuple[str, str], Any]:
    """The functions and classes of the libraries that kernels and their judge are made of, and of flagops."""
    found = {}
    for module, space in _spaces():
        found.update({(module, n): x for n, x in space.items() if callable(x) and not n.startswith("__")})
    return found


def _spaces() -> Iterator[tuple[str, dict[str, Any]]]:
    for name, module in sorted(sys.modules.items()):
        ours = name.startswith("flagops.") and not name.startswith("flagops.kernels.")
        if module is not None and (ours or name in WATCHED):
            yield name, dict(vars(module))
    torch = sys.modules.get("torch")
    if torch is not None:
        yield "torch.Tensor", dict(vars(torch.Tensor))


class Watch:
    """What a process looked like when it was made; `changes` says what is otherwise, and puts it back."""

    def __init__(self, read: Callable[[], dict[Any, Any]] = settings) -> None:
        self.read, self.before = read, read()

    def changes(self) -> list[str]:
        after = self.read()
        changed = [k for k, value in self.before.items() if k in after and not _same(after[k], value)]
        gone = [k for k in self.before if k not in after]
        if self.read is settings:
            if changed or gone:
                restore(self.before)
            return [f"{k} ({_brief(self.before[k])} before, {_brief(after[k])} after)" for k in changed]
        changed = [k for k in changed if not _own(k[0], after[k])]
        for module, name in changed + gone:
            space = sys.modules.get(module) or getattr(sys.modules["torch"], "Tensor", None)
            setattr(space, name, self.before[module, name])
        return [f"{module}.{name}" for module, name in changed + gone]


def _own(module: str, value: Any) -> bool:
    """Whether a library replaced a name of its own: parts of torch do when they are imported."""
    return (getattr(value, "__module__", None) or "").partition(".")[0] == module.partition(".")[0]


def _same(one: Any, two: Any) -> bool:
    if one is two:
        return True
    if isinstance(one, tuple) and isinstance(two, tuple):
        return len(one) == len(two) and all(map(_same, one, two))
    return bool(np.array_equal(one, two)) if isinstance(one, np.ndarray) else bool(one == two)


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 60 else f"{text[:40]}..."
