"""Mutants that follow from the syntax of a kernel file: each operator of its arithmetic, each word with an opposite.

Comparisons and numbers are left out: a mask that reads one element too many changes no result, a step only the speed.

``python tests/derived.py FILE`` prints them, FILE as in `mutants.MUTANTS`.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator

SWAPS = {
    ast.Add: "-", ast.Sub: "+", ast.Mult: "+", ast.Div: "*", ast.FloorDiv: "*", ast.Mod: "+", ast.LShift: ">>",
    ast.RShift: "<<", ast.BitAnd: "|", ast.BitOr: "&",
}  # fmt: skip
WORDS = {"minimum": "maximum", "maximum": "minimum", "min": "max", "max": "min"}
COMPILED = ("jit", "triton.jit")


def derived(source: str, operators: list[str], compiled: bool) -> list[tuple[str, str, str, int]]:
    """Mutants as `mutants.MUTANTS` lists them, of what each operator's kernel runs; of jitted functions if `compiled`.

    What surrounds jitted functions divides work, and most of its numbers change no result.
    """
    tree, found = ast.parse(source), {}
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    for operator in operators:
        for name in _reached(operator, functions):
            if not compiled or any(ast.unparse(d) in COMPILED for d in functions[name].decorator_list):
                for start, end, new in _edits(source, functions[name]):
                    found.setdefault((start, end, new), operator)
    return [_listed(source, *edit, operator) for edit, operator in sorted(found.items())]


def _reached(operator: str, functions: dict[str, ast.FunctionDef]) -> list[str]:
    found, todo = [], [operator]
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

    def operator(left: ast.expr, right: ast.expr, new: str) -> tuple[int, int, str]:
        start, end = place(left.end_lineno, left.end_col_offset), place(right.lineno, right.col_offset)
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
                end = place(node.end_lineno, node.end_col_offset)
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


if __name__ == "__main__":
    import mutants

    for mutant in mutants.derivable(sys.argv[1]):
        print(*mutant, sep="\t")
