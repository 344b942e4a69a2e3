"""Mutants that follow from the syntax of a kernel file: each operator of its arithmetic, each word with an opposite.

Comparisons and numbers are left out: a mask that reads one element too many changes no result, a step only the speed.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence

SWAPS = {
    ast.Add: "-", ast.Sub: "+", ast.Mult: "+", ast.Div: "*", ast.FloorDiv: "*", ast.Mod: "+", ast.LShift: ">>",
    ast.RShift: "<<", ast.BitAnd: "|", ast.BitOr: "&",
}  # fmt: skip
WORDS = {"minimum": "maximum", "maximum": "minimum", "min": "max", "max": "min"}
COMPILED = ("jit", "triton.jit")


def compiled(source: str) -> bool:
    """Whether a file has functions that are jitted, so that what surrounds them only divides work."""
    functions = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef))
    return any(ast.unparse(decorator) in COMPILED for node in functions for decorator in node.decorator_list)


def mutate(source: str, old: str, new: str, occurrence: int) -> str:
    """A source with one occurrence of a text replaced. Raises ValueError if it has no such occurrence."""
    parts = source.split(old)
    if len(parts) < occurrence + 2:
        raise ValueError(f"the kernel has changed: {old!r} occurs {len(parts) - 1} times")
    return old.join(parts[: occurrence + 1]) + new + old.join(parts[occurrence + 1 :])


def derived(source: str, operators: Sequence[str], jitted: bool) -> list[tuple[str, str, str, int]]:
    """Mutants of what each operator's kernel runs: (operator, text, its replacement, which occurrence).

    jitted: of jitted functions alone; what surrounds them divides work, and most of its numbers change no result.
    """
    tree = ast.parse(source)
    found: dict[tuple[int, int, str], str] = {}
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    for operator in operators:
        for name in _reached(operator, functions):
            if not jitted or any(ast.unparse(d) in COMPILED for d in functions[name].decorator_list):
                for start, end, new in _edits(source, functions[name]):
                    found.setdefault((start, end, new), operator)
    return [_listed(source, *edit, operator) for edit, operator in sorted(found.items())]


def _reached(operator: str, functions: dict[str, ast.FunctionDef]) -> list[str]:
    found: list[str] = []
    todo = [operator]
    while todo:
        name = todo.pop()
        if name in functions and name not in found:
            found.append(name)
            todo += [node.id for node in ast.walk(functions[name]) if isinstance(node, ast.Name)]
    return found


def _edits(source: str, function: ast.FunctionDef) -> Iterator[tuple[int, int, str]]:
    lines = [0]
    for line in source.splitlines(keepends=True):
        lines.append(lines[-1] + len(line))

    def place(line: int, column: int) -> int:
        return lines[line - 1] + len(source.splitlines()[line - 1].encode()[:column].decode())

    def end_of(node: ast.expr) -> tuple[int, int]:
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        return node.end_lineno, node.end_col_offset

    def operator(left: ast.expr, right: ast.expr, new: str) -> tuple[int, int, str]:
        start, end = place(*end_of(left)), place(right.lineno, right.col_offset)
        between = source[start:end]
        signs = between.strip(" ()\n")
        at = start + between.index(signs)
        return at, at + len(signs), new

    for statement in function.body:
        for node in ast.walk(statement):
            if isinstance(node, ast.BinOp) and type(node.op) in SWAPS:
                yield operator(node.left, node.right, SWAPS[type(node.op)])
            elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Load):
                word = node.id if isinstance(node, ast.Name) else node.attr
                end = place(*end_of(node))
                if word in WORDS:
                    yield end - len(word), end, WORDS[word]


def _listed(source: str, start: int, end: int, new: str, operator: str) -> tuple[str, str, str, int]:
    """An edit as the text of its line and what the line becomes, and which occurrence of that text it is."""
    first = source.rfind("\n", 0, start) + 1
    last = source.find("\n", end)
    line = source[first:last].strip()
    begin = source.index(line, first)
    edited = source[begin:start] + new + source[end : begin + len(line)]
    return operator, line, edited, source[:begin].count(line)
