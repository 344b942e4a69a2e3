"""Torch's pointwise operators by their cards: type promotion, numbers as operands, and what torch refuses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from flagops.arrays import HALF, parse_dtype

from ..iteration import laid_out
from ..lowering import REFUSED, Call, Lowered, Pass, Result, To, lowers

if TYPE_CHECKING:
    from torch import Tensor

    from ..steps import Steps


def _promotion() -> Sequence[Callable[..., Any]]:
    """Plans hang on what torch promotes operands to: a number of Python's, which is a tensor here, counts less."""
    import torch

    def promoted(self: Any, other: Any) -> Any:
        return torch.result_type(self, other)

    vars(promoted)["takes"] = ("self", "other")
    return (promoted,)


def real(dtype: Any) -> str:
    """The dtype of a computation. Raises Pass for complex numbers and formats of one byte."""
    if dtype.is_complex or (dtype.is_floating_point and dtype.itemsize == 1) or parse_dtype(dtype) in UNSIGNED:
        raise Pass(f"dtype {parse_dtype(dtype)}")
    return parse_dtype(dtype)


UNSIGNED = ("uint16", "uint32", "uint64")


def floats(dtype: Any) -> str:
    """The float dtype in which torch computes a function of numbers: the default one, of integers."""
    import torch

    return real(dtype if dtype.is_floating_point or dtype.is_complex else torch.get_default_dtype())


def _operand(to: To, x: Any) -> Tensor:
    return x if hasattr(x, "dtype") else to.number(x)


def default_dtype() -> Sequence[Callable[[], Any]]:
    import torch

    return (torch.get_default_dtype,)


@lowers("add", to="aten.add", state=_promotion, elementwise=True)
def add(to: To, self: Tensor, other: Any, *, alpha: Any = 1) -> Call:
    return _sum(to, self, other, alpha)


@lowers("sub", to="aten.add", state=_promotion, elementwise=True)
def sub(to: To, self: Tensor, other: Any, *, alpha: Any = 1) -> Call:
    import torch

    if torch.bool in (getattr(self, "dtype", None), getattr(other, "dtype", None)) or isinstance(other, bool):
        raise Pass(REFUSED)
    return _sum(to, self, other, -alpha)


def _sum(to: To, self: Tensor, other: Any, alpha: Any) -> Call:
    import torch

    dtype = torch.result_type(self, other)
    if dtype == torch.bool:
        if isinstance(alpha, float):
            raise Pass(REFUSED)
        if not alpha:
            return to("aten.copy", _operand(to, self).expand(to.out.shape), "bool")
        return to("aten.bitwise_or", _operand(to, self), _operand(to, other), "bool")
    return to("aten.add", _operand(to, self), _operand(to, other), real(dtype), alpha)


@lowers("mul", to="aten.mul", state=_promotion, elementwise=True)
def mul(to: To, self: Tensor, other: Any) -> Call:
    import torch

    dtype = torch.result_type(self, other)
    if dtype == torch.bool:
        return to("aten.bitwise_and", _operand(to, self), _operand(to, other), "bool")
    return to("aten.mul", _operand(to, self), _operand(to, other), real(dtype))


@lowers("div", to="aten.div", state=_promotion, elementwise=True)
def div(to: To, self: Tensor, other: Any) -> Call:
    import torch

    return to("aten.div", _operand(to, self), _operand(to, other), floats(torch.result_type(self, other)))


def _quotient(steps: Steps, card: str, self: Any, other: Any) -> Tensor:
    """Of integers none may be divided by 0, which is looked for first."""
    import torch

    dtype = torch.result_type(self, other)
    if dtype == torch.bool:
        raise Pass("division of bools")
    zero = other == 0
    if not dtype.is_floating_point and bool(zero.any() if isinstance(zero, torch.Tensor) else zero):
        raise RuntimeError("ZeroDivisionError")
    return steps.elementwise(card, self, other, dtype=real(dtype))


@lowers("div.Tensor_mode", to="aten.floor_divide", whole=True)
def rounded_quotient(steps: Steps, self: Any, other: Any, *, rounding_mode: str | None) -> Tensor:
    import torch

    dtype = torch.result_type(self, other)
    if rounding_mode is None:
        return steps.elementwise("aten.div", self, other, dtype=floats(dtype))
    several = isinstance(other, torch.Tensor) and other.numel() != 1  # one element stays in float32, as a number does
    if rounding_mode == "trunc" and dtype in (torch.bfloat16, torch.float16) and several:
        quotient = steps.elementwise("aten.div", self, other, dtype=floats(dtype))
        return steps.elementwise("aten.trunc", quotient, dtype=floats(dtype))
    return _quotient(steps, f"aten.{rounding_mode}_divide", self, other)


@lowers("xlogy", to="aten.log", whole=True)
def xlogy(steps: Steps, self: Any, other: Any) -> Tensor:
    """``self * log(other)``, of 0 it is 0 but for NaN; halves are rounded once."""
    import torch

    own = floats(torch.result_type(self, other))
    wide = "float32" if own in HALF else own
    product = steps.elementwise("aten.mul", self, steps.elementwise("aten.log", other, dtype=wide), dtype=wide)
    nothing = steps.elementwise("aten.eq", self, 0, dtype=wide)
    number = steps.elementwise("aten.eq", other, other, dtype=wide)
    whole = steps.elementwise("aten.where", nothing, 0.0, product, dtype=wide)
    return steps.elementwise("aten.where", number, whole, other, dtype=own)


def _divided(name: str) -> None:
    @lowers(name, to=f"aten.{name}", whole=True)
    def divided(steps: Steps, self: Any, other: Any) -> Tensor:
        return _quotient(steps, f"aten.{name}", self, other)


for _name in ("floor_divide", "remainder", "fmod"):
    _divided(_name)


def _comparison(name: str) -> None:
    @lowers(name, to=f"aten.{name}", state=_promotion, elementwise=True)
    def compare(to: To, self: Tensor, other: Any) -> Call:
        import torch

        return to(f"aten.{name}", _operand(to, self), _operand(to, other), real(torch.result_type(self, other)))


for _name in ("eq", "ne", "lt", "le", "gt", "ge"):
    _comparison(_name)


def _of_two(name: str, *names: str, computed: Callable[[Any], str] = real) -> None:
    @lowers(*(names or (name,)), to=f"aten.{name}", state=_promotion, elementwise=True)
    def binary(to: To, self: Tensor, other: Any) -> Call:
        import torch

        return to(f"aten.{name}", _operand(to, self), _operand(to, other), computed(torch.result_type(self, other)))


def _as_bool(dtype: Any) -> str:
    real(dtype)
    return "bool"


for _name in ("maximum", "minimum", "bitwise_and", "bitwise_or", "bitwise_xor"):
    _of_two(_name)


def _true_of_both(self: Tensor, other: Tensor) -> Result:
    import torch

    try:
        return *laid_out((self, other), parse_dtype(torch.result_type(self, other))), torch.bool
    except RuntimeError:
        raise Pass(REFUSED) from None


def _logical(name: str, card: str) -> None:
    @lowers(name, to=f"aten.{card}", elementwise=True, result=_true_of_both)
    def logical(to: To, self: Tensor, other: Tensor) -> Call:
        return to(f"aten.{card}", self, other, _as_bool(self.dtype))


for _name in ("and", "or", "xor"):
    _logical(f"logical_{_name}", f"bitwise_{_name}")


@lowers("logical_not", to="aten.eq", elementwise=True)
def logical_not(to: To, self: Tensor) -> Call:
    return to("aten.eq", self, to.number(False), _as_bool(self.dtype))


def _power(self: Any, exponent: Any) -> Result:
    """The powers of a number torch lays out row by row."""
    import torch

    if isinstance(self, torch.Tensor):
        return None
    return tuple(exponent.shape), None, torch.result_type(self, exponent)


@lowers("pow", to="aten.pow", elementwise=True, result=_power)
def pow(to: To, self: Any, exponent: Any) -> Call:
    import torch

    dtype = torch.result_type(self, exponent)
    computed, number = real(dtype), not isinstance(exponent, torch.Tensor)
    if number and exponent < 0 and not dtype.is_floating_point:
        raise Pass(REFUSED)
    if number and dtype == torch.bool:  # to the power of 1 it is itself, of 0 true
        return to("aten.bitwise_or", self, _operand(to, not exponent), "bool")
    if number and exponent == 2 and dtype.is_floating_point:
        return to("aten.mul", self, self, computed)
    return to("aten.pow", _operand(to, self), _operand(to, exponent), computed)


def _of_one(name: str, computed: Callable[[Any], str], result: Callable[..., Result] | None = None) -> None:
    card = f"aten.{name}"

    @lowers(name, to=card, elementwise=True, state=default_dtype, result=result)
    def unary(to: To, self: Tensor) -> Call:
        return to(card, self, computed(self.dtype))


for _name in (
    "sqrt", "rsqrt", "reciprocal", "exp", "expm1", "log", "log1p", "log2", "sin", "cos", "tanh", "erf", "sigmoid",
):  # fmt: skip
    _of_one(_name, floats)
for _name in ("neg", "abs", "relu", "bitwise_not"):
    _of_one(_name, real)


def _own_floats(dtype: Any) -> str:
    if not dtype.is_floating_point:
        raise Pass(f"dtype {parse_dtype(dtype)}")
    return real(dtype)


_of_one("silu", _own_floats)


def _whole(name: str) -> None:
    """A function that leaves some dtypes as they are."""

    @lowers(name, to=f"aten.{name}", elementwise=True)
    def rounded(to: To, self: Tensor) -> Call:
        dtype = real(self.dtype)
        if dtype == "bool" and name != "sign":
            raise Pass(REFUSED)
        as_it_is = dtype == "bool" or (name != "sign" and not self.dtype.is_floating_point)
        return to("aten.copy" if as_it_is else f"aten.{name}", self, dtype)


for _name in ("floor", "ceil", "trunc", "round", "sign"):
    _whole(_name)


@lowers("sgn", to="aten.sign", elementwise=True)
def sgn(to: To, self: Tensor) -> Call:
    """The sign, of real numbers."""
    dtype = real(self.dtype)
    return to("aten.copy" if dtype == "bool" else "aten.sign", self, dtype)


def _like_itself(self: Tensor) -> Result:
    """Torch gives zeros like integers, of which none is special; of floats it compares."""
    import torch

    if self.dtype.is_floating_point:
        return None
    return tuple(self.shape), torch.empty_like(self, device="meta").stride(), torch.bool


_of_one("isinf", floats, result=_like_itself)
for _name in ("isnan", "isneginf", "isposinf"):
    _of_one(_name, floats)


def _is_tanh(approximate: str) -> bool:
    if approximate not in ("none", "tanh"):
        raise Pass(REFUSED)
    return approximate == "tanh"


@lowers("gelu", to="aten.gelu", elementwise=True)
def gelu(to: To, self: Tensor, *, approximate: str = "none") -> Call:
    return to("aten.gelu", self, _own_floats(self.dtype), _is_tanh(approximate))


@lowers("gelu_backward", to="aten.gelu_backward", elementwise=True)
def gelu_backward(to: To, grad_output: Tensor, self: Tensor, *, approximate: str = "none") -> Call:
    return to("aten.gelu_backward", grad_output, self, _own_floats(self.dtype), _is_tanh(approximate))


@lowers("silu_backward", to="aten.silu_backward", elementwise=True)
def silu_backward(to: To, grad_output: Tensor, self: Tensor) -> Call:
    return to("aten.silu_backward", grad_output, self, _own_floats(self.dtype))


@lowers("sigmoid_backward", to="aten.sigmoid_backward", elementwise=True)
def sigmoid_backward(to: To, grad_output: Tensor, output: Tensor) -> Call:
    return to("aten.sigmoid_backward", grad_output, output, _own_floats(output.dtype))


@lowers("tanh_backward", to="aten.tanh_backward", elementwise=True)
def tanh_backward(to: To, grad_output: Tensor, output: Tensor) -> Call:
    return to("aten.tanh_backward", grad_output, output, _own_floats(output.dtype))


@lowers("threshold_backward", to="aten.threshold_backward", elementwise=True)
def threshold_backward(to: To, grad_output: Tensor, self: Tensor, threshold: Any) -> Call:
    return to("aten.threshold_backward", grad_output, self, real(self.dtype), threshold)


@lowers("softplus", to="aten.softplus", elementwise=True)
def softplus(to: To, self: Tensor, beta: Any = 1, threshold: Any = 20) -> Call:
    return to("aten.softplus", self, _own_floats(self.dtype), beta, threshold)


@lowers("softplus_backward", to="aten.softplus_backward", elementwise=True)
def softplus_backward(to: To, grad_output: Tensor, self: Tensor, beta: Any, threshold: Any) -> Call:
    return to("aten.softplus_backward", grad_output, self, _own_floats(self.dtype), beta, threshold)


@lowers("native_dropout_backward", to="aten.native_dropout_backward", elementwise=True, state=default_dtype)
def native_dropout_backward(to: To, grad_output: Tensor, mask: Tensor, scale: float) -> Call:
    return to("aten.native_dropout_backward", grad_output, mask, floats(grad_output.dtype), scale)


def _promote(*operands: Any) -> Any:
    """What torch computes in for several tensors."""
    import torch

    dtype = torch.result_type(operands[0], operands[1])
    for x in operands[2:]:
        dtype = torch.promote_types(dtype, x.dtype)
    return dtype


@lowers("addcmul", to="aten.addcmul", elementwise=True)
def addcmul(to: To, self: Tensor, tensor1: Tensor, tensor2: Tensor, *, value: Any = 1) -> Call:
    return to("aten.addcmul", self, tensor1, tensor2, real(_promote(self, tensor1, tensor2)), value)


@lowers("addcdiv", to="aten.addcdiv", elementwise=True)
def addcdiv(to: To, self: Tensor, tensor1: Tensor, tensor2: Tensor, *, value: Any = 1) -> Call:
    return to("aten.addcdiv", self, tensor1, tensor2, _own_floats(_promote(self, tensor1, tensor2)), value)


@lowers("lerp", to="aten.lerp", elementwise=True)
def lerp(to: To, self: Tensor, end: Tensor, weight: Any) -> Call:
    dtype = _own_floats(self.dtype)
    if end.dtype != self.dtype:
        raise Pass(REFUSED)
    if hasattr(weight, "dtype"):
        return to("aten.lerp", self, end, weight, dtype)
    return to("aten.lerp_scalar", self, end, dtype, weight)


@lowers("where", to="aten.where", elementwise=True)
def where(to: To, condition: Tensor, self: Any, other: Any) -> Call:
    import torch

    if condition.dtype not in (torch.bool, torch.uint8):
        raise Pass(REFUSED)
    dtype = real(torch.result_type(self, other))
    return to("aten.where", condition, _operand(to, self), _operand(to, other), dtype)


def _as_self(self: Tensor, *_: Any, **__: Any) -> Result:
    return tuple(self.shape), self.stride(), self.dtype


def _masked(self: Tensor, mask: Tensor, value: Any) -> Result:
    """Torch fills a clone, row by row."""
    import torch

    shape = torch.broadcast_shapes(self.shape, mask.shape)  # type: ignore[no-untyped-call]
    return shape, None, self.dtype


@lowers("masked_fill", to="aten.where", elementwise=True, result=_masked)
def masked_fill(to: To, self: Tensor, mask: Tensor, value: Any) -> Call:
    import torch

    if mask.dtype != torch.bool:
        raise Pass("a mask of another dtype than bool")
    filler = _operand(to, value)
    number = filler is not value
    if filler.dim() or not (number or torch.can_cast(filler.dtype, self.dtype)) or filler.dtype.is_complex:
        raise Pass(REFUSED)
    return to("aten.where", mask, filler, self, real(self.dtype))


def as_empty_like(self: Tensor, *_: Any, **__: Any) -> Result:
    """As `torch.empty_like` lays it out."""
    import torch

    return tuple(self.shape), torch.empty_like(self, device="meta").stride(), self.dtype


@lowers("fill", to="aten.copy", result=as_empty_like, uniform=True)
def fill(to: To, self: Tensor, value: Any) -> Lowered:
    filler = _operand(to, value)
    if filler.dim():
        raise Pass("a value that is no single number")
    return _moved(to, filler)


@lowers("zero", to="aten.copy", result=_as_self, uniform=True)
def zero(to: To, self: Tensor) -> Lowered:
    return _moved(to, to.number(0))


@lowers("copy", to="aten.copy", result=_as_self, elementwise=True)
def copy(to: To, self: Tensor, src: Tensor, non_blocking: bool = False) -> Lowered:
    return _moved(to, _operand(to, src))


def _moved(to: To, source: Tensor) -> Lowered:
    """Elements into the destination; complex numbers as their two parts."""
    import torch

    out, source = to.out, source.expand(to.out.shape)
    if not out.dtype.is_complex:
        return to("aten.copy", source, real(out.dtype))
    parts = torch.view_as_real(out)
    dtype = real(parts.dtype)
    if source.dtype.is_complex:
        return to("aten.copy", torch.view_as_real(source), dtype, out=parts)

    def in_steps() -> None:
        to.run("aten.copy", source, dtype, out=parts[..., 0])
        to.run("aten.copy", to.number(0).expand(out.shape), dtype, out=parts[..., 1])

    return in_steps


@lowers("clamp", to="aten.clamp", elementwise=True)
def clamp(to: To, self: Tensor, min: Any = None, max: Any = None) -> Lowered:
    dtype = self.dtype
    import torch

    for limit in (min, max):
        if limit is not None:
            dtype = torch.promote_types(dtype, torch.result_type(self, limit))
    computed = real(dtype)
    if (max is None and min is None) or (computed == "bool" and isinstance(max if min is None else min, bool)):
        raise Pass(REFUSED)
    if max is None:
        return to("aten.maximum", _operand(to, self), _operand(to, min), computed)
    if min is None:
        return to("aten.minimum", _operand(to, self), _operand(to, max), computed)
    return to("aten.clamp", _operand(to, self), _operand(to, min), _operand(to, max), computed)


@lowers("clamp_min", to="aten.maximum", elementwise=True)
def clamp_min(to: To, self: Tensor, min: Any) -> Lowered:
    return clamp(to, self, min)


@lowers("clamp_max", to="aten.minimum", elementwise=True)
def clamp_max(to: To, self: Tensor, max: Any) -> Lowered:
    return clamp(to, self, max=max)
