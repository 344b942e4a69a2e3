"""What a lowering that computes a whole call itself works with: cards run one after the other."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from flagops import dispatch, registry

from . import fuel
from .forms import Form
from .iteration import laid_out
from .lowering import REFUSED, Pass, number
from .recipes import choose, device_of, guard_of

if TYPE_CHECKING:
    from torch import Tensor


class Steps:
    """One call of torch's, in steps. Torch's operators that the lowering calls are calls like any other: ours, where
    they are replaced."""

    def __init__(self, form: Form, backend: Any, args: tuple[Any, ...]) -> None:
        self.form, self.backend, self._args = form, backend, args
        self._ran: dict[str, None] = {}

    @property
    def given(self) -> list[Tensor | None]:
        """The tensors that the call gives for results."""
        return [self._args[i] for i in self.form.outs]

    def run(self, operator: str, *inputs: Any, out: Any) -> Any:
        """Compute a card into `out`; returns it."""
        plan = choose(operator, (*inputs, out), self.backend)
        if fuel.tank is not None and not fuel.tank.take(self.form.name, plan.backend, self.form.inputs(self._args)):
            raise Pass("out of fuel")
        dispatch.execute(plan, (*inputs, out))
        self.note(plan.backend)
        return out

    def note(self, backend: str) -> None:
        """Whose kernels computed a part of the call."""
        self._ran[backend] = None

    def elementwise(self, operator: str, *operands: Any, dtype: str, scalars: tuple[Any, ...] = ()) -> Tensor:
        """A pointwise card of tensors and numbers, its result laid out as torch does. scalars: the card's others."""
        import torch

        operands = tuple(x if isinstance(x, torch.Tensor) else self.number(x) for x in operands)
        try:
            shape, strides = laid_out(operands, dtype)
        except RuntimeError:
            raise Pass(REFUSED) from None
        card = registry.operator(operator)
        made = getattr(torch, card.result_dtype({}, {"dtype": dtype}))
        steps = torch.empty(shape, device="meta").stride() if strides is None else strides
        out = torch.empty_strided(shape, steps, dtype=made, device=device_of(operands))
        return self.run(operator, *operands, dtype, *scalars, out=out)

    def number(self, value: Any) -> Tensor:
        """A number as a tensor, where a pointwise card, `aten.copy`, `aten.offset` or a ramp has an operand: their
        kernels read it in the host's memory on any device. To bring it there would wait for the device in each call,
        and spoil a graph that is recorded."""
        return number(value)

    def by(self, operator: str) -> str:
        """Who computed the call, as reports name it."""
        return "/".join((operator, *self._ran)) if self._ran else operator

    def _tensors(self) -> list[Tensor]:
        import torch

        found: list[Tensor] = []
        for x in self._args:
            found += [y for y in (x if isinstance(x, (list, tuple)) else (x,)) if isinstance(y, torch.Tensor)]
        return found

    def device(self) -> AbstractContextManager[Any]:
        """What makes the device of the call's tensors the current one."""
        guard = guard_of(device_of(self._tensors()))
        return guard() if guard else nullcontext()
