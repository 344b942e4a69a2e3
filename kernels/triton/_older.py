"""Kernels for Triton 3.2, which is what Ascend's speaks: a launch takes no tuples and no functions, a function no
tuples, and a dtype that is a constant answers no questions.

Each kernel is written once, with all of that. Here it is written again for the shapes of one call's tuples: what they
hold becomes parameters, loops over them are unrolled, functions become globals, and so in whatever the kernel calls.
"""

import ast
import inspect
import textwrap
from collections.abc import Iterator
from functools import cache
from typing import Any

from ._source import jitted

Shape = Any
"""Of a tuple: one of shapes; None stands for None, and ``...`` for what is passed."""
Shapes = tuple[tuple[str, Shape], ...]


def rewritten(kernel: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A kernel and what it is launched with, all by name, as Triton 3.2 takes them."""
    given = dict(zip(kernel.arg_names, arguments, strict=False)) | options
    functions = {name: value for name, value in given.items() if callable(value) and name in kernel.arg_names}
    shapes = {name: _shape(value) for name, value in given.items() if isinstance(value, tuple)}
    kept = {name: value for name, value in given.items() if name not in functions | shapes}
    parts = {part: value for name in shapes for part, value in _parts(name, given[name])}
    return _written(kernel, tuple(shapes.items()), tuple(functions.items())), kept | parts


def _shape(value: Any) -> Shape:
    return tuple(map(_shape, value)) if isinstance(value, tuple) else None if value is None else ...


def _parts(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """What a tuple passes, each under a name of its own; what is None is written into the kernel."""
    if isinstance(value, tuple):
        for at, part in enumerate(value):
            yield from _parts(f"{name}__{at}", part)
    elif value is not None:
        yield name, value


@cache
def _written(kernel: Any, shapes: Shapes, functions: tuple[tuple[str, Any], ...]) -> Any:
    """A function of Triton's for tuples of these shapes; its parameters that are functions are globals."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(kernel.fn))).body
    assert isinstance(definition, ast.FunctionDef)
    definition.decorator_list = []
    before = ast.unparse(definition)
    writer = _Writer({**kernel.fn.__globals__, **dict(functions)}, dict(shapes))
    writer.define(definition, dict(functions))
    source = ast.unparse(ast.fix_missing_locations(definition))
    if source == before:
        return kernel
    used = {node.id for node in ast.walk(definition) if isinstance(node, ast.Name)} & writer.names.keys()
    place = f"{kernel.fn.__module__}.{kernel.fn.__name__} for {shapes}"
    fixed = [p.name for p in getattr(kernel, "params", ()) if p.do_not_specialize]
    names = {"__name__": kernel.fn.__module__} | {name: writer.names[name] for name in used}
    return jitted(source, place, names, do_not_specialize=fixed)


class _Writer(ast.NodeTransformer):
    """Writes a function. What a name is known to stand for is an expression, or a tuple of such."""

    def __init__(self, names: dict[str, Any], shapes: dict[str, Shape]) -> None:
        self.names, self.shapes = names, shapes
        self.known = {name: _expressions(name, shape) for name, shape in shapes.items()}
        self.constants: set[str] = set()
        self.called: dict[Any, str] = {}

    def define(self, node: ast.FunctionDef, functions: dict[str, Any]) -> None:
        given, node.args.args = node.args.args, []
        for argument in given:
            names = [argument.arg]
            if argument.arg in self.shapes:
                names = [name for name, _ in _parts(argument.arg, self.shapes[argument.arg])]
            if argument.arg not in functions:
                node.args.args += [ast.arg(name, argument.annotation) for name in names]
                self.constants |= set(names) if argument.annotation else set()
        node.body = self.lines(node.body)

    def lines(self, body: list[ast.stmt]) -> list[ast.stmt]:
        made = [self.visit(line) for line in body]
        return [part for found in made for part in (found if isinstance(found, list) else [found])]

    def meaning(self, node: ast.AST) -> Any:
        """The expression, or tuple of such, that a name or an element of a tuple stands for; else None."""
        if isinstance(node, ast.Name):
            return self.known.get(node.id)
        if isinstance(node, ast.Subscript) and isinstance(found := self.meaning(node.value), tuple):
            at = self.visit(node.slice)
            return found[at.value] if isinstance(at, ast.Constant) and isinstance(at.value, int) else None
        return None

    def length(self, node: ast.AST) -> int | None:
        """Of ``len(tuple)``."""
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "len":
            found = self.meaning(node.args[0])
            return len(found) if isinstance(found, tuple) else None
        return None

    def visit_Name(self, node: ast.Name) -> ast.AST:
        found = self.meaning(node)
        return found if isinstance(found, ast.AST) and isinstance(node.ctx, ast.Load) else node

    def visit_Subscript(self, node: ast.Subscript) -> ast.AST:
        found = self.meaning(node)
        return found if isinstance(found, ast.AST) else self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        if ast.unparse(node.value) not in self.constants:
            return self.generic_visit(node)
        asked = f"tl.full((1,), 0, {ast.unparse(node.value)}).dtype.{node.attr}"
        return ast.parse(asked if node.attr == "is_floating" else f"tl.constexpr({asked})", mode="eval").body

    def visit_For(self, node: ast.For) -> Any:
        loop = node.iter
        if not isinstance(loop, ast.Call) or not loop.args or (length := self.length(loop.args[0])) is None:
            return self.generic_visit(node)
        made, text = [], "\n".join(map(ast.unparse, node.body))
        for at in range(length):
            self.known[ast.unparse(node.target)] = ast.Constant(at)
            made += self.lines(ast.parse(text).body)
        return made

    def visit_If(self, node: ast.If) -> Any:
        node.test = self.visit(node.test)
        if any(isinstance(part, ast.Name | ast.Call) for part in ast.walk(node.test)):
            return self.generic_visit(node)
        return self.lines(node.body if eval(ast.unparse(node.test)) else node.orelse)

    def visit_Assign(self, node: ast.Assign) -> Any:
        self.generic_visit(node)
        if isinstance(node.targets[0], ast.Name) and isinstance(node.value, ast.Tuple):
            self.known[node.targets[0].id] = tuple(node.value.elts)
            return []
        return node

    def visit_AugAssign(self, node: ast.AugAssign) -> ast.AST:
        if not isinstance(node.value, ast.Tuple) or not isinstance(node.target, ast.Name):
            return self.generic_visit(node)
        before = self.known[node.target.id]
        kept = f"{node.target.id}__{len(before)}"
        self.known[node.target.id] = (*before, ast.Name(kept, ast.Load()))
        return ast.Assign([ast.Name(kept, ast.Store())], self.visit(node.value.elts[0]))

    def visit_Call(self, node: ast.Call) -> ast.AST:
        if (length := self.length(node)) is not None:
            return ast.Constant(length)
        args = [part for x in node.args for part in (self.meaning(x.value) if isinstance(x, ast.Starred) else [x])]
        made = [found if isinstance(found := self.meaning(x), tuple) else self.visit(x) for x in args]
        if not isinstance(node.func, ast.Name):
            node.func = self.visit(node.func)
        elif hasattr(function := self.names.get(node.func.id), "arg_names"):
            node.func = ast.Name(self.name_of(node.func.id, function, made), ast.Load())
        node.args = [part for x in made for part in (_passed(x) if isinstance(x, tuple) else [x])]
        node.keywords = [ast.keyword(word.arg, self.visit(word.value)) for word in node.keywords]
        return node

    def name_of(self, name: str, function: Any, given: list[Any]) -> str:
        """What a function is called here that takes such tuples."""
        tuples = [(x, y) for x, y in zip(function.arg_names, given, strict=False) if isinstance(y, tuple)]
        shapes = tuple((x, _shape_of(found)) for x, found in tuples)
        made = _written(function, shapes, ())
        if made is function:
            return name
        word = self.called.setdefault(made, f"{name}__{len(self.called)}")
        self.names[word] = made
        return word


def _expressions(name: str, shape: Shape) -> Any:
    if isinstance(shape, tuple):
        return tuple(_expressions(f"{name}__{at}", part) for at, part in enumerate(shape))
    return ast.Constant(None) if shape is None else ast.Name(name, ast.Load())


def _absent(x: Any) -> bool:
    return isinstance(x, ast.Constant) and x.value is None


def _shape_of(found: Any) -> Shape:
    return tuple(map(_shape_of, found)) if isinstance(found, tuple) else None if _absent(found) else ...


def _passed(found: Any) -> list[ast.expr]:
    if isinstance(found, tuple):
        return [part for x in found for part in _passed(x)]
    return [] if _absent(found) else [found]
