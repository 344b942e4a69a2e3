"""numba's kernels compiled for a processor that is not here: ``python tests/lowering.py [OP...]``.

numba is told that it runs on a Neoverse N1 (aarch64, Neon, no SVE), and its execution engine writes assembly where
it would make machine code. Nothing is run: compiled functions return 0, or what Python makes of them where that is an
array or a tuple, on which calls of others depend. The last line is a JSON object: for each
operator how many functions were lowered, and how many of them hold each kind of instruction. Fails where none is fused,
or where a fused multiply-add became a call.
"""

import ctypes
import json
import re
import sys

import llvmlite.binding as llvm

TRIPLE, PROCESSOR = "aarch64-unknown-linux-gnu", "neoverse-n1"
FEATURES = {"neon": True, "fp-armv8": True, "fullfp16": True, "dotprod": True, "lse": True, "sve": False}
KINDS = {
    "fused vectors": r"\tfmla\tv\d+\.[24][sd]",
    "fused scalars": r"\tfmadd\t",
    "dot products": r"\tsdot\tv\d+",
    "vectors": r"\tv\d+\.(16b|8h|4s|2d)",
    "calls for an fma": r"\tbl\tfmaf?\b",
}
lowered: list[str] = []


class Engine:
    """In place of LLVM's: it takes modules, and gives addresses at which nothing happens."""

    def __init__(self, machine):
        self.machine, self.target_data, self.kept = machine, machine.target_data, []
        self.nothing = ctypes.PYFUNCTYPE(ctypes.py_object, *[ctypes.c_void_p] * 3)(lambda *arguments: 0)

    def add_module(self, module):
        lowered.append(self.machine.emit_assembly(module))

    def get_function_address(self, name):
        return ctypes.cast(self.nothing, ctypes.c_void_p).value

    def get_global_value_address(self, name):
        self.kept.append(ctypes.create_string_buffer(64))
        return ctypes.addressof(self.kept[-1])

    def set_object_cache(self, *hooks):
        """There are no objects."""

    def add_global_mapping(self, variable, address):
        """Nothing is linked."""

    def finalize_object(self):
        """Nothing is linked."""


def pretend():
    """Before numba is imported."""
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    target = llvm.Target.from_triple(TRIPLE)
    llvm.get_process_triple = lambda: TRIPLE
    llvm.Target.from_default_triple = staticmethod(lambda: target)
    llvm.get_host_cpu_name = lambda: PROCESSOR
    llvm.get_host_cpu_features = lambda: llvm.targets.FeatureMap(FEATURES)
    llvm.ExecutionEngine = Engine
    llvm.create_mcjit_compiler = lambda module, machine, use_lmm=None: Engine(machine)


def without_running(jit):
    """`jit`, but for the results."""
    from numba import types

    def pretending(function, owner=None):
        dispatcher = jit(function, owner)

        class Compiled(type(dispatcher)):
            def __call__(self, *arguments):
                nothing, result = super().__call__(*arguments), self.nopython_signatures[-1].return_type
                return self.py_func(*arguments) if isinstance(result, types.Array | types.BaseTuple) else nothing

        dispatcher.__class__ = Compiled
        return dispatcher

    return pretending


def main(names: list[str]) -> int:
    pretend()
    from flagops import config, registry, testing
    from flagops.backends import numba

    found, numba.jit = {}, without_running(numba.jit)
    with config.using(cache="/dev/null"):
        for name, operator in registry.operators().items():
            if not names or name in names:
                lowered.clear()
                print(f"lowering {name}", file=sys.stderr, flush=True)
                calls = sum(testing.touch(operator, "numba"))
                counts = {kind: sum(bool(re.search(word, text)) for text in lowered) for kind, word in KINDS.items()}
                found[name] = {"calls": calls, "functions": len(lowered)} | counts
    print(json.dumps(found))
    fused = sum(counts["fused vectors"] for counts in found.values())
    return int(not fused or any(counts["calls for an fma"] for counts in found.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
