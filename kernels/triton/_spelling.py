"""The arithmetic that all backends share, as functions of Triton's."""

import ast
import inspect
from functools import cache
from types import ModuleType
from typing import Any

import triton.language as tl

from ._common import INTERPRET
from ._source import jitted
from ._words import WORDS


class _Spelled(ast.NodeTransformer):
    """Writes ``x / y`` as the word that rounds it once, and constants of the module as numbers."""

    def __init__(self, module: ModuleType) -> None:
        self.module = module

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        self.generic_visit(node)
        if not isinstance(node.op, ast.Div):
            return node
        return ast.Call(ast.Name("divide", ast.Load()), [node.left, node.right], [])

    def visit_Name(self, node: ast.Name) -> ast.AST:
        value = getattr(self.module, node.id, None)
        return ast.Constant(value) if isinstance(value, float) else node


@cache
def spelled(module: ModuleType, name: str) -> Any:
    """A function of such a module, with those of its neighbours that it calls."""
    function = getattr(module, name)
    called = (n for n in function.__code__.co_names if n not in WORDS and inspect.isfunction(getattr(module, n, None)))
    tree = _Spelled(module).visit(ast.parse(inspect.getsource(function)))
    source = ast.unparse(ast.fix_missing_locations(tree))
    return _compiled(source, f"{module.__name__}.{name}", {n: spelled(module, n) for n in called})


@cache
def word_of(name: str, operands: tuple[str, ...]) -> Any:
    """A word as a function of its own."""
    given = ", ".join(operands)
    return _compiled(f"def {name}_({given}):\n    return {name}({given})", f"word {name}", {})


@cache
def folding(module: ModuleType, name: str, states: tuple[str, ...] = ("s",)) -> Any:
    """What makes one state of each row's by a function of two: Triton's reduction, which takes no function as an
    argument of a kernel's; in the interpreter, which would call it for each element, a tree."""
    merge = spelled(module, name)
    if INTERPRET.value:
        return _tree(merge)
    given = ", ".join(states) if len(states) == 1 else f"({', '.join(states)})"
    source = f"def folded({', '.join(states)}):\n    return tl.reduce({given}, 1, merge)"
    return _compiled(source, f"folded {module.__name__}.{name}", {"merge": merge})


def _tree(merge: Any) -> Any:
    def folded(*states: Any) -> Any:
        rows, n = states[0].shape
        while n > 1:
            n //= 2
            pairs = [tl.split(tl.reshape(s, (rows, n, 2))) for s in states]
            made = merge(*(a for a, _ in pairs), *(b for _, b in pairs))
            states = made if isinstance(made, tuple) else (made,)
        found = tuple(tl.reshape(s, (rows,)) for s in states)
        return found if len(found) > 1 else found[0]

    return folded


def _compiled(source: str, place: str, names: dict[str, Any]) -> Any:
    return jitted(source, place, {**WORDS, **names, "tl": tl, "__name__": __name__})
