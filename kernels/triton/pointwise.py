"""Each element of a result from one of each operand: every card of the family by its lane."""

import ast
import inspect
import linecache
from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl

from flagops import generated, registry
from flagops.arrays import arithmetic
from flagops.operator import Operator
from flagops.registry import kernel

from .. import _lanes
from ._elementwise import elementwise
from ._words import WORDS


class _Spelled(ast.NodeTransformer):
    """Writes ``x / y`` as the word that rounds it once, and constants as numbers."""

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        self.generic_visit(node)
        if not isinstance(node.op, ast.Div):
            return node
        return ast.Call(ast.Name("divide", ast.Load()), [node.left, node.right], [])

    def visit_Name(self, node: ast.Name) -> ast.AST:
        value = getattr(_lanes, node.id, None)
        return ast.Constant(value) if isinstance(value, float) else node


def lane_of(name: str, operands: tuple[str, ...]) -> Any:
    """A lane as a function of Triton's; a word of Triton's own comes before the lane of its name."""
    if name in WORDS:
        source = f"def {name}_({', '.join(operands)}):\n    return {name}({', '.join(operands)})"
    else:
        tree = _Spelled().visit(ast.parse(inspect.getsource(getattr(_lanes, name))))
        source = ast.unparse(ast.fix_missing_locations(tree))
    made = generated.function(source, f"lane {name}", {**WORDS, "tl": tl, "__name__": __name__})
    linecache.cache[made.__code__.co_filename] = len(source), None, source.splitlines(True), made.__code__.co_filename
    return triton.jit(made)


def _kernel(card: Operator) -> Callable[..., None]:
    """The kernel of a card."""
    flags = [name for name, scalar in card.scalars.items() if scalar.torch == "bool"]
    names = [card.function, *(f"{card.function}_{choice}" for choice in (*flags, "int64"))]
    lanes = {name: lane_of(name, tuple(card.tensors)) for name in names if name in WORDS or hasattr(_lanes, name)}
    takes = [card.positions[name] for name in card.scalars if name not in ("dtype", *flags)]
    chooses = [(card.positions[name], name) for name in flags]
    tensors = [(card.positions[name], tensor.dtypes == ("bool",)) for name, tensor in card.tensors.items()]
    where_dtype = card.positions["dtype"]

    @kernel(deterministic=True, batch_invariant=True)
    def run(*args: Any) -> None:
        acc = arithmetic(args[where_dtype])
        name = "_".join((card.function, *(flag for at, flag in chooses if args[at])))
        name = f"{name}_{acc}" if f"{name}_{acc}" in lanes else name
        kinds = [*("bool" if condition else acc for _, condition in tensors), *(acc for _ in takes)]
        operands = [args[at] for at in (*(at for at, _ in tensors), *takes)]
        elementwise(lanes[name], args[-1], operands, kinds)

    run.__name__, run.__signature__ = card.function, card.signature  # type: ignore[attr-defined]
    return run


EVERY_CARD = True

for _card in registry.cards().values():
    if _card.aten and _card.family == "pointwise":
        globals()[_card.function] = _kernel(_card)
