"""`bare`, a PrivateUse1 device in C++ that owns memory, views and copies, and no kernel that computes.

``load()`` builds and registers it, once a process; its memory is the host's. A device cannot be taken back, so tests
load it in a process of their own.
"""

import atexit
import hashlib
import os
import shutil
import sysconfig
import tempfile
import time
from functools import cache
from importlib import machinery, util
from pathlib import Path
from typing import Any

import torch

from flagops import config

SOURCE = Path(__file__).with_name("device.cpp")


class Unbuildable(RuntimeError):
    """What building the device needs is not installed; the message says what."""


@cache
def load() -> Any:
    """Register the device as ``torch.bare``.

    Raises:
        Unbuildable: nothing is built yet, and g++, ninja or Python's headers are missing.
    """
    from . import surface

    compiled = _import(_built())
    # The thread in which torch runs a device's backwards takes the GIL to drop the last one and to end itself; on
    # Python 3.11 it aborts the process if Python has ended before.
    os.environ.setdefault("TORCH_AUTOGRAD_SHUTDOWN_WAIT_LIMIT", "0")
    atexit.register(time.sleep, 0.1)
    torch.utils.rename_privateuse1_backend("bare")
    # Module.to makes new parameters on a PrivateUse1 device, one for each of those that were tied, unless it swaps.
    torch.__future__.set_swap_module_params_on_conversion(True)
    torch._register_device_module("bare", surface.module(compiled.default_generator()))
    torch.utils.generate_methods_for_privateuse1_backend(for_storage=True)
    return compiled


def own_copies(on: bool) -> None:
    """Whether copies from bare to bare are the device's own; else they need a kernel of ``aten::_copy_from``."""
    load().own_copies(on)


def fallback(mode: str) -> None:
    """What becomes of a call that has no kernel.

    Args:
        mode: ``none``, torch's own NotImplementedError; ``raise``, one that names the overload, raised by a fallback
            that makes every overload look as if it had a kernel; ``count``, it runs on the CPU and is counted.
    """
    load().set_fallback(mode)


def fallen(clear: bool = False) -> dict[str, int]:
    """How often the fallback ran each overload since the last `clear`."""
    counts = load().counts()
    if clear:
        load().clear_counts()
    return counts


def _built() -> Path:
    """The compiled device in the user's cache, under a name that says which torch and which source it is of."""
    key = hashlib.sha256(SOURCE.read_bytes() + sysconfig.get_config_var("SOABI").encode()).hexdigest()[:16]
    folder = Path(config.cache_folder()) / "bare"
    library = folder / f"torch-{torch.__version__}-{key}{machinery.EXTENSION_SUFFIXES[0]}"
    if not library.exists():
        missing = [tool for tool in ("g++", "ninja") if not shutil.which(tool)]
        if not Path(sysconfig.get_paths()["include"], "Python.h").exists():
            missing.append("Python.h")
        if missing:
            raise Unbuildable(f"the bare device is built with g++, ninja and Python's headers; missing: {missing}")
        folder.mkdir(parents=True, exist_ok=True)
        from torch.utils import cpp_extension

        with tempfile.TemporaryDirectory(dir=folder) as scratch:  # moved when whole, so that nobody loads half of it
            cpp_extension.load(
                "bare_device", [str(SOURCE)], extra_cflags=["-O1"], build_directory=scratch, is_python_module=False
            )
            os.replace(Path(scratch, "bare_device.so"), library)
    return library


def _import(library: Path) -> Any:
    spec = util.spec_from_file_location("bare_device", library)
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
