"""Torch's operators that draw random numbers, on devices that have none of torch's own.

On the CPU and on CUDA they stay torch's, whose numbers a program with a seed relies on. Elsewhere each draw takes the
device's generator as it is, its seed and its offset, and moves the offset on, as torch's generators by counters do: so
`manual_seed` and a state that is set again give the same numbers, whatever the number of threads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..lowering import REFUSED, Pass, lowers
from ..steps import Steps
from .movement import copied, goal
from .pointwise import real

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_STEP = 4  # of an offset, which some of torch's generators want to be a multiple of it


def _state(generator: torch.Generator | None, device: torch.device) -> Tensor:
    """Seed and offset of a generator, by default the device's own, whose offset moves on."""
    import torch

    if generator is None:
        generator = torch.get_device_module(device).default_generators[device.index or 0]
    if generator.device.type != device.type:
        raise Pass(f"a generator of {generator.device}")
    seed, offset = generator.initial_seed(), generator.get_offset()
    generator.set_offset(offset + _STEP)
    signed = [value - (1 << 64) if value >= 1 << 63 else value for value in (seed, offset)]
    return torch.tensor(signed, dtype=torch.int64).to(device)


def _drawn(
    steps: Steps, card: str, like: Tensor, *scalars: Any, generator: torch.Generator | None, dtype: Any = None
) -> Tensor:
    """Numbers in the shape of a tensor, and in its dtype if no other is given."""
    import torch

    dtype = dtype or like.dtype
    out = goal(steps, like.shape, dtype, like=like)
    flat = out if out.is_contiguous() else torch.empty(like.shape, dtype=dtype, device=like.device)
    state = _state(generator, like.device)
    steps.run(card, state, flat.numel(), *scalars, real(dtype), out=flat.view(-1))
    return flat


def _floats(x: Tensor) -> None:
    if not x.is_floating_point():
        raise Pass(REFUSED)


@lowers("uniform_", to="aten.uniform", whole=True, random=True)
def uniform(steps: Steps, self: Tensor, from_: float = 0, to: float = 1, *, generator: Any = None) -> Tensor:
    _floats(self)
    if not from_ <= to:
        raise RuntimeError(f"uniform_ expects to return a [from, to) range, but found from={from_} > to={to}")
    return _drawn(steps, "aten.uniform", self, from_, to, generator=generator)


@lowers("normal_", to="aten.normal", whole=True, random=True)
def normal(steps: Steps, self: Tensor, mean: float = 0, std: float = 1, *, generator: Any = None) -> Tensor:
    _floats(self)
    if not std >= 0:
        raise RuntimeError(f"normal expects std >= 0.0, but found std {std}")
    return _drawn(steps, "aten.normal", self, mean, std, generator=generator)


@lowers("exponential_", to="aten.exponential", whole=True, random=True)
def exponential(steps: Steps, self: Tensor, lambd: float = 1, *, generator: Any = None) -> Tensor:
    _floats(self)
    if not lambd > 0:
        raise RuntimeError(f"exponential_ expects lambda > 0.0, but found lambda={lambd}")
    return _drawn(steps, "aten.exponential", self, lambd, generator=generator)


@lowers("random_", to="aten.random", whole=True, random=True)
def random(steps: Steps, self: Tensor, from_: int = 0, to: int | None = None, *, generator: Any = None) -> Tensor:
    import torch

    named = steps.form.schema.overload_name
    end = to
    if end is None and named == "from":
        end = 1 << 63
    elif end is None:
        exact = {torch.float64: 53, torch.float32: 24, torch.float16: 11, torch.bfloat16: 8, torch.bool: 1}
        kind = self.dtype
        end = (1 << exact[kind]) + kind.is_floating_point if kind in exact else torch.iinfo(kind).max + 1
    count = end - from_
    if count <= 0:
        raise RuntimeError(f"random_ expects 'from' to be less than 'to', but got from={from_} >= to={end}")
    if count >= 1 << 63:  # more than the card can be told: of all 64 bits, those beyond the end begin again
        numbers = _drawn(steps, "aten.random", self, from_, 0, generator=generator)
        if count == 1 << 64 or self.dtype != torch.int64:
            return numbers
        again = numbers + ((1 << 64) - count if count > 1 << 63 else -(1 << 63))
        return torch.where((numbers >= from_) & (numbers <= end - 1), numbers, again)
    if self.dtype == torch.bool:
        numbers = _drawn(steps, "aten.random", self, from_, count, generator=generator, dtype=torch.uint8)
        return copied(steps, numbers, torch.empty_like(self))
    return _drawn(steps, "aten.random", self, from_, count, generator=generator)


def _below(steps: Steps, like: Tensor, p: Any, generator: Any) -> Tensor:
    """True with a probability, which is one number or one for each element."""
    import torch

    precise = isinstance(p, torch.Tensor) and p.dtype == torch.float64
    dtype = torch.float64 if precise else torch.float32
    draws = _drawn(steps, "aten.uniform", like, 0.0, 1.0, generator=generator, dtype=dtype)
    limit = p if isinstance(p, torch.Tensor) else steps.number(float(p))
    return steps.run(
        "aten.lt", draws, limit, real(dtype), out=torch.empty(like.shape, dtype=torch.bool, device=like.device)
    )


@lowers("bernoulli_.float", to="aten.uniform", whole=True, random=True)
def bernoulli_number(steps: Steps, self: Tensor, p: float = 0.5, *, generator: Any = None) -> Tensor:
    if not 0 <= p <= 1:
        raise RuntimeError(f"bernoulli_ expects p to be in [0, 1], but got p={p}")
    return copied(steps, _below(steps, self, p, generator), self)


@lowers("bernoulli_.Tensor", to="aten.uniform", whole=True, random=True)
def bernoulli_each(steps: Steps, self: Tensor, p: Tensor, *, generator: Any = None) -> Tensor:
    return copied(steps, _below(steps, self, p.expand(self.shape), generator), self)


@lowers("bernoulli", to="aten.uniform", whole=True, random=True)
def bernoulli(steps: Steps, self: Tensor, *, generator: Any = None) -> Tensor:
    _floats(self)
    given = next(iter(steps.given), None)  # of any dtype
    out = goal(steps, self.shape, self.dtype if given is None else given.dtype, self)
    return copied(steps, _below(steps, self, self, generator), out)


@lowers("native_dropout", to="aten.uniform", whole=True, random=True)
def native_dropout(steps: Steps, input: Tensor, p: float, train: bool | None = None) -> tuple[Tensor, Tensor]:
    import torch

    _floats(input)
    if not 0 <= p <= 1:
        raise RuntimeError(f"dropout probability has to be between 0 and 1, but got {p}")
    out = torch.empty_like(input)
    if train is False or not p:
        return copied(steps, input, out), torch.ones(input.shape, dtype=torch.bool, device=input.device)
    mask = _below(steps, input, 1 - p, None)
    scale = 1 / (1 - p) if p < 1 else 0.0
    return steps.run("aten.native_dropout_backward", input, mask, real(input.dtype), scale, out=out), mask


@lowers("randperm.generator_out", to="aten.random", whole=True, random=True)
def randperm(steps: Steps, n: int, *, generator: Any = None) -> Tensor:
    import torch

    given = steps.given[0]
    like = torch.empty(n, dtype=torch.int64, device=given.device)  # type: ignore[union-attr]
    words = torch.empty_like(like)
    steps.run("aten.random", _state(generator, like.device), n, 0, 0, "int64", out=words)
    steps.run("aten.sort", words, False, out=(torch.empty_like(words), like))
    return like


@lowers("multinomial", to="aten.pick", whole=True, random=True)
def multinomial(
    steps: Steps, self: Tensor, num_samples: int, replacement: bool = False, *, generator: Any = None
) -> Tensor:
    """Without replacement those come first whose exponential waits, at rates of the weights, end first."""
    import torch

    _floats(self)
    if self.dim() not in (1, 2) or num_samples < 1 or (not replacement and num_samples > self.shape[-1]):
        raise Pass(REFUSED)
    out = torch.empty((*self.shape[:-1], num_samples), dtype=torch.int64, device=self.device)
    if not self.numel():
        return out
    least = self.reshape(-1).topk(1, largest=False).values.item()
    most = self.reshape(-1).topk(1).values.item()
    if not (least >= 0 and most < float("inf")):  # NaN is the greatest
        raise RuntimeError("probability tensor contains either `inf`, `nan` or element < 0")
    if self.dim() == 2:
        weightless = self.topk(1, -1).values.reshape(-1).topk(1, largest=False).values.item() <= 0
    else:
        weightless = most <= 0
    if weightless:
        raise RuntimeError("invalid multinomial distribution (sum of probabilities <= 0)")
    if replacement or num_samples == 1:
        draws = torch.empty(out.shape, dtype=torch.float64, device=self.device)
        steps.run(
            "aten.uniform", _state(generator, self.device), draws.numel(), 0.0, 1.0, "float64", out=draws.view(-1)
        )
        return steps.run("aten.pick", self, draws, out=out)
    waits = torch.empty(self.shape, dtype=torch.float64, device=self.device)
    steps.run("aten.exponential", _state(generator, self.device), waits.numel(), 1.0, "float64", out=waits.view(-1))
    rates = steps.run("aten.div", self, waits, "float64", out=torch.empty_like(waits))
    steps.run("aten.topk", rates, num_samples, True, out=(rates.new_empty(out.shape), out))
    return out
