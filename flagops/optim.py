"""The Muon optimiser: momentum, orthogonalised by `flagops.newton_schulz`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flagops import config, newton_schulz

HEADS = ("head", "lm_head", "embed_out", "output")
"""Names of output heads, which `split_parameters` leaves to AdamW."""


class Muon(torch.optim.Optimizer):
    """Muon as DeepSeek-V4 trains with it, for parameters that are matrices.

    For each matrix: ``M = momentum * M + G``, ``U = newton_schulz(momentum * M + G)`` (of M alone without Nesterov's
    momentum), ``W = W * (1 - lr * weight_decay) - lr * gamma * sqrt(max(n, m)) * U``. The root mean square of an update
    is ``gamma`` times the learning rate, as AdamW's about is, whose rates and decay it can share.

    Args:
        params: parameters or groups of them, each ``[n, m]``, or ``[e, n, m]`` as e independent matrices (experts).
        lr: the learning rate.
        momentum: of the running sum of gradients, kept in the parameter's dtype.
        weight_decay: decoupled, as in AdamW.
        nesterov: look one step ahead.
        gamma: the root mean square of an update.
        steps: Newton-Schulz iterations.
        backend: of `newton_schulz`; None for the best.

    Raises ValueError for a parameter of another rank, or numbers out of range, and RuntimeError for sparse gradients.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 2.7e-4,
        momentum: float = 0.95,
        weight_decay: float = 0.1,
        nesterov: bool = True,
        gamma: float = 0.18,
        steps: int = 10,
        backend: str | Sequence[str] | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "gamma": gamma,
            "steps": steps,
            "backend": backend,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in every optimiser; parameters must be matrices or stacks of them."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            for name in ("lr", "weight_decay", "gamma"):
                if not group[name] >= 0:
                    raise ValueError(f"Muon: {name} must be at least 0, got {group[name]}")
            if not 0 <= group["momentum"] < 1:
                raise ValueError(f"Muon: momentum must be at least 0 and below 1, got {group['momentum']}")
            for parameter in group["params"]:
                _check(parameter)
        except ValueError:
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for moves in self._alike(group):
                _update(moves, group)
        return loss

    def _alike(self, group: dict[str, Any]) -> Iterator[list[tuple[nn.Parameter, Tensor]]]:
        """Parameters of one shape and their momenta, as many as the byte budget allows: small matrices, orthogonalised
        one by one, leave threads idle."""
        given = [p for p in group["params"] if p.grad is not None]
        if any(p.grad.is_sparse for p in given):
            raise RuntimeError("Muon takes no sparse gradients; use SparseAdam for such embeddings")
        alike: dict[Any, list[tuple[nn.Parameter, Tensor]]] = {}
        for parameter in given:
            moves = alike.setdefault((parameter.shape[-2:], parameter.dtype, parameter.device), [])
            moves.append((parameter, self._move(parameter, parameter.grad, group)))
            if sum(ahead.nbytes for _, ahead in moves) > config.budget() // 8:
                yield list(moves)
                moves.clear()
        yield from filter(None, alike.values())

    def _move(self, parameter: Tensor, grad: Tensor, group: dict[str, Any]) -> Tensor:
        """The momentum with a gradient in it, one step ahead if it is Nesterov's."""
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        moved = state["momentum_buffer"].mul_(group["momentum"]).add_(grad)
        return grad.add(moved, alpha=group["momentum"]) if group["nesterov"] else moved


def _update(moves: list[tuple[nn.Parameter, Tensor]], group: dict[str, Any]) -> None:
    """Turn parameters of one shape by their orthogonalised momenta."""
    stacks = [ahead.reshape(-1, *ahead.shape[-2:]) for _, ahead in moves]
    together = torch.cat(stacks) if len(stacks) > 1 else moves[0][1]
    found = newton_schulz(together, group["steps"], backend=group["backend"])
    directions = torch.split(found, [len(stack) for stack in stacks]) if len(stacks) > 1 else [found]
    rate = group["lr"]
    for (parameter, _), direction in zip(moves, directions, strict=True):
        parameter.mul_(1 - rate * group["weight_decay"])
        scale = rate * group["gamma"] * max(parameter.shape[-2:]) ** 0.5
        parameter.sub_(direction.view(parameter.shape).mul_(scale))


def _check(parameter: Tensor) -> None:
    shape = list(parameter.shape)
    if len(shape) < 2:
        raise ValueError(
            f"Muon: a parameter has shape {shape}, expected a matrix or a stack of them; "
            "give norms, biases and scales to AdamW (flagops.optim.split_parameters does)"
        )
    if len(shape) > 3:
        raise ValueError(f"Muon: a parameter has shape {shape}; reshape it to [n, m] or [e, n, m], or use AdamW for it")
    if not parameter.is_floating_point():
        raise ValueError(f"Muon: a parameter is {parameter.dtype}, expected a real floating-point type")


def split_parameters(model: nn.Module, heads: Iterable[str] = HEADS) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The parameters of a model for Muon, and those for AdamW, by DeepSeek-V4's rule.

    AdamW has embeddings, the output head, and all that is no matrix: norms, biases, and the bases and scales of
    hyper-connections. Parameters that ask for no gradient are in neither list.

    heads: names of modules that are output heads.
    """
    named = set(heads)
    left = {id(p) for m in model.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag)) for p in m.parameters()}
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in named:
            left |= {id(p) for p in module.parameters(recurse=False)}
    muon: list[nn.Parameter] = []
    adamw: list[nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            (adamw if id(parameter) in left or parameter.dim() not in (2, 3) else muon).append(parameter)
    return muon, adamw


__all__ = ["Muon", "split_parameters"]
