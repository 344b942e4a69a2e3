"""Triton's interpreter without what it does over and over: the same numbers in half the time."""

from __future__ import annotations

from types import FunctionType


def quicken() -> None:
    """Let a launch put the interpreter's functions into `triton.language` once for each module whose code it runs.

    Triton looks through that whole package at every call of a device function, though what it has put there stays until
    the launch ends. Releases before 3.7 leave it there for good, and are left as they are.
    """
    from triton.runtime import interpreter

    if not hasattr(interpreter, "_LangPatchScope"):
        return
    patch, patched = interpreter._patch_lang, set[int]()

    class Scope(interpreter._LangPatchScope):
        def restore(self) -> None:
            patched.clear()
            super().restore()

    def once(function: FunctionType) -> Scope:
        scope, namespace = Scope(), id(function.__globals__)
        if namespace not in patched:
            patched.add(namespace)
            scope._changes = patch(function)._changes
        return scope

    interpreter._patch_lang = once
