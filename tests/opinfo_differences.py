"""What is wrong with the outcome of a call, by the rules that opinfo_judge.py states."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch
from opinfo_calls import Check, Outcome, Room, equal, observe, same_bits

ROUNDINGS, DRAWS = 8, 4


def differences(check: Check, ours: Outcome, theirs: Outcome, exact: bool, names: set[str], step: bool) -> str:
    """What is wrong with our outcome; empty if nothing is. step: the replaced `names` are steps of what is called."""
    if equal(ours, theirs):
        return ""
    if ours.error or theirs.error:
        if (ours.error or " ")[0] != (theirs.error or " ")[0]:
            return f"{ours.error or 'a result'} where torch has {theirs.error or 'a result'}"
        text = (ours.error or " ")[1]
        named = text == (theirs.error or " ")[1] or any(name in text for name in names)
        return "" if named else f"an error that does not name the operator: {text}"
    if ours.facts != theirs.facts:
        pairs = zip(ours.facts, theirs.facts, strict=False)
        return next((f"{a} where torch has {b}" for a, b in pairs if a != b), "another number of results")
    if ours.warned != theirs.warned:
        return f"warnings {ours.warned} where torch has {theirs.warned}"
    if ours.changed != theirs.changed and not check.writes:
        return f"an input was {'' if ours.changed else 'not '}changed"
    again = [theirs, *(observe(check, Room(moved=i + 1)) for i in range(DRAWS))]
    wide, narrow = (
        [observe(check, Room(floats=x, moved=i)) for i in range(DRAWS + 1)] for x in (torch.float64, torch.float32)
    )
    sizes = []
    for i, (o, t) in enumerate(zip(ours.leaves, theirs.leaves, strict=True)):
        if not isinstance(t, torch.Tensor) or not t.is_floating_point():
            exact_here = True
        else:
            exact_here, noise = exact, _noise(t, _results(again, i, t), _results(wide, i, t) or [t.double()])
            if t.dtype == torch.float64:
                noise = noise.seen_in_float32(_results(narrow, i, t))
            sizes.append((i, o, noise))
        if exact_here and not (same_bits(o, t) or _equal_picks(check, o, t)):
            return f"result {i} differs from torch's, whose bits it should have"
    largest = [
        max((x[x.isfinite()].max().item() for x in part if x.isfinite().any()), default=0.0) for part in _parts(sizes)
    ]
    for i, o, noise in sizes:
        t = theirs.leaves[i]
        unit = (
            max(torch.finfo(dtype).eps for dtype in (t.dtype, check.computed) if dtype and dtype.is_floating_point) / 2
        )
        problem = _too_far(o, t, noise, unit, largest if step else [0.0] * 3, ROUNDINGS if step else 2)
        if problem:
            return f"result {i}: {problem}"
    return ""


def _equal_picks(check: Check, ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Whether both are indices of the same elements but for the choice among equal ones, none of them twice."""
    if check.picks is None or theirs.dtype != torch.int64 or ours.shape != theirs.shape:
        return False
    x, dim = check.picks
    if not x.dim():
        return False
    if ours.dim() < x.dim():
        ours, theirs = ours.unsqueeze(dim), theirs.unsqueeze(dim)
    twice = (ours.sort(dim).values.diff(dim=dim) == 0).any()
    ours, theirs = (x.detach().gather(dim, index) for index in (ours, theirs))
    return not twice and bool(((ours == theirs) | ((ours != ours) & (theirs != theirs))).all())


def _results(outcomes: list[Outcome], i: int, like: torch.Tensor) -> list[torch.Tensor]:
    found = (outcome.leaves[i] for outcome in outcomes if len(outcome.leaves) > i)
    return [x.double() for x in found if isinstance(x, torch.Tensor) and x.shape == like.shape]


@dataclass(frozen=True)
class Noise:
    """What a result is in float64, and how far from it torch's is, and it itself moves, where inputs are moved."""

    exact: torch.Tensor
    torchs: torch.Tensor
    spread: torch.Tensor

    def seen_in_float32(self, narrow: list[torch.Tensor]) -> Noise:
        """Torch's error in float64, whose own result cannot show it: that in float32, as roundings are smaller."""
        unit = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
        off = (((x - self.exact).abs() * unit).nan_to_num(0, 0, 0) for x in narrow)
        return replace(self, torchs=functools.reduce(torch.fmax, off, self.torchs))


def _noise(t: torch.Tensor, again: list[torch.Tensor], wide: list[torch.Tensor]) -> Noise:
    exact, *moved = wide
    zero = torch.zeros_like(exact)
    farthest = (functools.reduce(torch.fmax, [(x - exact).abs() for x in found], zero) for found in (again, moved))
    return Noise(exact, *farthest)


def _parts(sizes: list[tuple[int, torch.Tensor, Noise]]) -> tuple[list[torch.Tensor], ...]:
    noises = [noise for _, _, noise in sizes]
    return [n.exact.abs() for n in noises], [n.torchs for n in noises], [n.spread for n in noises]


def _too_far(
    ours: torch.Tensor, theirs: torch.Tensor, noise: Noise, unit: float, least: list[float], times: int
) -> str:
    """Why a result is not near enough; least: what |e|, T and s are at least; times: how many T it may be off."""
    o, t, exact = ours.double(), theirs.double(), noise.exact
    regular = t.isfinite() & exact.isfinite()
    strange = ~regular & ~((o == t) | (o.isnan() & t.isnan()))
    strange &= ~((o - exact).abs() <= ROUNDINGS * (unit * exact.abs() + noise.spread))  # torch's is wrong
    if strange.any():
        return f"{o[strange][0].item()} where torch has {t[strange][0].item()}"
    size, torchs, spread = (
        x.clamp(min=y) for x, y in zip((exact.abs(), noise.torchs, noise.spread), least, strict=True)
    )
    smallest = torch.finfo(theirs.dtype).smallest_normal * torch.finfo(theirs.dtype).eps
    bound = torch.fmax(times * torchs, ROUNDINGS * (unit * size + spread) + smallest)
    wrong = regular & ~((o - exact).abs() <= bound) & (o != t)
    if not wrong.any():
        return ""
    at = int(((o - exact).abs() / bound)[wrong].argmax())
    o, t, exact, bound = (x[wrong][at].item() for x in (o, t, exact, bound))
    return f"{o!r} where torch has {t!r}, in float64 {exact!r}; {abs(o - exact) / bound:.3g} times what is allowed"
