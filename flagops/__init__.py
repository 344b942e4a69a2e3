"""Operators of transformer models, replaced by kernels that are proved against a NumPy reference.

``flagops.matmul(a, b)`` and its kin run the best kernel for where the arrays lie; ``flagops.enable()`` puts the same
kernels under torch's own operators. Importing this module imports no framework: names load on first use.
"""

import os
import sys

from flagops._moved import Finder

__version__ = "0.1.0"

_HERE = os.path.dirname(os.path.abspath(__file__))
if not os.path.isdir(os.path.join(_HERE, "kernels")):  # a checkout: kernels/ and reference/ lie beside this folder
    __path__.append(os.path.dirname(_HERE))

sys.meta_path.insert(0, Finder)

_HOMES = {
    "Unsupported": "errors",
    "using": "config",
    "kernel": "registry",
    "operators": "registry",
    "coverage": "override.coverage",
    "window_indices": "deepseek_v4.indices",
    "hca_indices": "deepseek_v4.indices",
    "enable": "override",
    "load": "packed",
    "patch": "transformers",
    "AttentionCache": "deepseek_v4.cache",
    "AttentionConfig": "deepseek_v4.cache",
    "AttentionWeights": "deepseek_v4.layers",
    "CompressorWeights": "deepseek_v4.layers",
    "IndexerWeights": "deepseek_v4.layers",
    "sliding_window_attention": "deepseek_v4.layers",
    "csa_attention": "deepseek_v4.layers",
    "hca_attention": "deepseek_v4.layers",
}
_MODULES = frozenset(
    {
        "arrays",
        "aten",
        "backends",
        "bench",
        "checkpoint",
        "config",
        "deepseek_v4",
        "dispatch",
        "operator",
        "optim",
        "registry",
        "testing",
    }
)


def __getattr__(name):
    import importlib

    if name.startswith("_"):
        raise AttributeError(f"module 'flagops' has no attribute {name!r}")
    if name in _MODULES:
        return importlib.import_module(f"flagops.{name}")
    if name in _HOMES:
        value = getattr(importlib.import_module(f"flagops.{_HOMES[name]}"), name)
    else:
        from flagops import registry

        if name not in registry.operators():
            from flagops.errors import suggestion

            known = [*_HOMES, *_MODULES, *registry.operators()]
            raise AttributeError(f"module 'flagops' has no attribute {name!r}{suggestion(name, known)}")
        from flagops.call import of

        value = of(registry.operators()[name])
    globals()[name] = value
    return value


def __dir__():
    from flagops import registry

    return sorted({*globals(), *_HOMES, *_MODULES, *registry.operators()})
