"""The projection as a module, and the parallel style that shards it: DTensor weights, torch.distributed collectives."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ParallelStyle

import flagops
from flagops import arrays, config
from flagops.distributed.layout import Layout, Shards, Sizes

WEIGHTS = ("wo_a", "wo_b", "wo_a_scale", "wo_b_scale")
TOKENS_IN_FLIGHT = 1024
"""Tokens whose communication runs while the next ones are computed, where no gradient is recorded."""

Pending = Callable[[], Tensor]


class GroupedOutputProjection(nn.Module):
    """`flagops.grouped_output_projection` with its weights, whole or, after `GroupedOutputProjectionParallel`, sharded.

    Args:
        wo_a: ``[groups * r, heads / groups * head_dim]``; wo_b: ``[hidden, groups * r]``; floats, or e4m3 with
            ``wo_a_scale`` and ``wo_b_scale``, one for each 128 x 128 block.
        groups: number of groups; head_dim: channels of a head.
    """

    wo_a: Tensor
    wo_b: Tensor
    wo_a_scale: Tensor | None
    wo_b_scale: Tensor | None

    def __init__(
        self,
        wo_a: Tensor,
        wo_b: Tensor,
        groups: int,
        head_dim: int,
        wo_a_scale: Tensor | None = None,
        wo_b_scale: Tensor | None = None,
        backend: str | Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        self.groups, self.head_dim, self.backend = groups, head_dim, backend
        for name, value in zip(WEIGHTS, (wo_a, wo_b, wo_a_scale, wo_b_scale), strict=True):
            _hold(self, name, value)
        self.parallel: ParallelProjection | None = None

    @property
    def sizes(self) -> Sizes:
        (rows, width), (hidden, _) = self.wo_a.shape, self.wo_b.shape
        return Sizes(self.groups * width // self.head_dim, self.head_dim, self.groups, rows // self.groups, hidden)

    def forward(self, o: Tensor) -> Tensor:
        """o: ``[..., heads, head_dim]``, where sharded this rank's heads; to ``[..., hidden]`` on every rank."""
        wo_a, wo_b, a_scale, b_scale = (local(getattr(self, name)) for name in WEIGHTS)
        if self.parallel is None:
            return Weights(wo_a, wo_b, a_scale, b_scale, self.backend).whole(o, self.groups)
        return self.parallel(o, wo_a, wo_b, a_scale, b_scale)

    def extra_repr(self) -> str:
        shared = f", {self.parallel.layout.scheme} over {self.parallel.layout.tp} ranks" if self.parallel else ""
        return f"groups={self.groups}, head_dim={self.head_dim}{shared}"


class GroupedOutputProjectionParallel(ParallelStyle):
    """Shards a `GroupedOutputProjection` over a dimension of a device mesh, for `parallelize_module`.

    groups: must be the module's; None takes it from the module.
    scheme: ``"replicate"``, ``"split-input"``, ``"split-rank"``, or ``"auto"``, which weighs bytes sent, weights held
        and whole FP8 blocks (`Layout.explain` says how). Up to as many ranks as groups they are the same.
    mesh_dim: the dimension, where the mesh has several.

    Each rank brings the same whole weights (or DTensors) and keeps its shard. The ranks compare notes once, here;
    whatever is wrong on one raises the same ValueError on all. A call then checks its own arguments only, and a rank
    that fails leaves its message for the others, whose collectives end with it.
    """

    def __init__(self, groups: int | None = None, scheme: str = "auto", mesh_dim: str = "tp") -> None:
        self.groups, self.scheme, self.mesh_dim = groups, scheme, mesh_dim

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        mesh = ranks_of(device_mesh, self.mesh_dim)
        with agreed(mesh) as note:
            if not isinstance(module, GroupedOutputProjection):
                raise TypeError(f"expected a flagops.distributed.GroupedOutputProjection, got {type(module).__name__}")
            if module.parallel:
                raise ValueError("the projection is sharded already; unshard() it first")
            if self.groups not in (None, module.groups):
                raise ValueError(f"groups = {self.groups}, but the module has {module.groups}")
            fp8 = module.wo_a_scale is not None or module.wo_b_scale is not None
            layout = Layout.of(module.sizes, mesh.size(), self.scheme, fp8)
            shapes = {n: (tuple(x.shape), str(x.dtype)) for n in WEIGHTS if (x := getattr(module, n)) is not None}
            note.update(layout=layout, weights=shapes)
        parallel = ParallelProjection(layout, mesh, module.backend)
        for name in WEIGHTS:
            whole = getattr(module, name)
            if whole is not None:
                placements = layout.placements[name.removesuffix("_scale")]
                _hold(module, name, shard(gather(whole), parallel.mesh, placements))
        module.parallel = parallel
        return module


class Products(Protocol):
    """What a rank multiplies between collectives, with its shards."""

    def whole(self, o: Tensor, groups: int) -> Tensor:
        """Both products, ``[..., heads, head_dim] -> [..., hidden]``."""
        ...

    def first(self, o: Tensor, wide: bool = False) -> Tensor:
        """``o @ wo_a.T`` of one group; `wide` keeps the sums in float32."""
        ...

    def second(self, z: Tensor) -> Tensor:
        """``z @ wo_b.T``."""
        ...


class ParallelProjection:
    """The projection of one rank: its heads, its weights, and the collectives between."""

    def __init__(self, layout: Layout, mesh: DeviceMesh, backend: str | Sequence[str] | None = None) -> None:
        self.layout, self.backend = layout, backend
        self.ranks = mesh
        self.mesh = mesh if layout.parts == 1 else mesh._unflatten(0, layout.mesh, ("group", "part"))
        if layout.parts == 1:
            self.all, self.part = mesh.get_group(), None
            self.sum = self.all
        else:
            self.all, self.part = mesh.get_group(), self.mesh.get_group("part")
            self.sum = self.mesh.get_group("group") if layout.scheme == "replicate" else self.all

    def __call__(
        self, o: Tensor, wo_a: Tensor, wo_b: Tensor, a_scale: Tensor | None = None, b_scale: Tensor | None = None
    ) -> Tensor:
        """o ``[..., heads / tp, head_dim]`` to ``[..., hidden]``; weights are this rank's shards."""
        with failing_together():
            self._check(o, wo_a)
            trains = torch.is_grad_enabled() and any(x.requires_grad for x in (o, wo_a, wo_b))
            products = Weights(wo_a, wo_b, a_scale, b_scale, self.backend)
            if trains and not o.numel():
                return self.compute(o, products) + 0 * (o.sum() + wo_a.sum() + wo_b.sum())
            return self.compute(o, products, whole=trains)

    def compute(self, o: Tensor, products: Products, whole: bool = False) -> Tensor:
        """The same with products of somebody else's; `whole` takes all tokens in one piece, as gradients need it."""
        flat = o.flatten(0, -3) if o.dim() > 2 else o[None]
        if not len(flat):
            return o.new_zeros(*o.shape[:-2], self.layout.sizes.hidden)
        pieces = [flat] if whole else list(torch.split(flat, TOKENS_IN_FLIGHT))
        started: list[Pending] = [self._gather(x) for x in pieces]
        for step in self._stages(products, o.dtype):
            started = [step(wait()) for wait in started]
        y = torch.cat([wait() for wait in started])
        return y.view(*o.shape[:-2], y.shape[-1])

    def _stages(self, products: Products, dtype: torch.dtype) -> list[Callable[[Tensor], Pending]]:
        """What happens to the heads of some tokens; communication that a step begins, the next one waits for."""
        layout = self.layout
        if layout.parts == 1 or layout.scheme == "replicate":
            return [lambda o: self._sum(products.whole(o, layout.local_groups))]
        if layout.scheme == "split-rank":
            return [lambda o: self._sum(products.second(products.first(o.flatten(-2))))]
        return [
            lambda o: self._scatter(products.first(o.flatten(-2), wide=True)),
            lambda z: self._sum(products.second(z.to(dtype))),
        ]

    def _check(self, o: Tensor, wo_a: Tensor) -> None:
        layout = self.layout
        expected = (layout.local_heads, layout.sizes.head_dim)
        if o.dim() < 2 or tuple(o.shape[-2:]) != expected:
            raise ValueError(f"o has shape {tuple(o.shape)}, expected [..., {expected[0]}, {expected[1]}] on each rank")
        if wo_a.dtype.itemsize > 1 and o.dtype != wo_a.dtype:
            raise TypeError(f"o is {o.dtype}, the weights are {wo_a.dtype}")
        if o.device != wo_a.device:
            raise ValueError(f"o is on {o.device}, the weights are on {wo_a.device}")

    def _gather(self, o: Tensor) -> Pending:
        """The heads of the whole group, where the scheme wants them."""
        if self.part is None or self.layout.scheme == "split-input":
            return lambda: o
        return _started(_Gather, gathering, o, self.part, self.layout.scheme == "split-rank")

    def _scatter(self, z: Tensor) -> Pending:
        """This rank's part of the sum over the group."""
        return _started(_Scatter, _scattering, z, self.part)

    def _sum(self, y: Tensor) -> Pending:
        return _started(_Sum, summing, y, self.sum)


def _started(function: Any, begin: Callable[[Tensor, Any], Pending], x: Tensor, group: Any, *how: Any) -> Pending:
    """A collective begun, or where a gradient is recorded done at once by its autograd function."""
    if x.requires_grad and torch.is_grad_enabled():
        made: Tensor = function.apply(x, group, *how)
        return lambda: made
    return begin(x, group)


class Weights(NamedTuple):
    """Shards of the weights: floats, or FP8 with scales, whose second product quantises its activations."""

    wo_a: Tensor
    wo_b: Tensor
    a_scale: Tensor | None = None
    b_scale: Tensor | None = None
    backend: str | Sequence[str] | None = None

    def whole(self, o: Tensor, groups: int) -> Tensor:
        scales = self.a_scale, self.b_scale
        given = scales if any(scale is not None for scale in scales) else ()
        return flagops.grouped_output_projection(o, self.wo_a, self.wo_b, groups, *given, backend=self.backend)

    def first(self, o: Tensor, wide: bool = False) -> Tensor:
        """FP8 weights are expanded a few rows at a time."""
        wo_a, scale = self.wo_a, self.a_scale
        dtype = torch.promote_types(o.dtype, torch.float32) if wide else o.dtype
        step = max(128, config.budget() // 4 // (max(1, wo_a.shape[1]) * 4) // 128 * 128)
        x, made = o.to(dtype), []
        for start in range(0, wo_a.shape[0], step):
            rows = wo_a[start : start + step]
            if scale is not None:
                blocks = scale[start // 128 : -(-(start + len(rows)) // 128)]
                rows = flagops.fp8_dequantize(rows, blocks, dtype=arrays.dtype_name(o))
            made.append(flagops.linear(x, rows.to(dtype)))
        return made[0] if len(made) == 1 else torch.cat(made, -1)

    def second(self, z: Tensor) -> Tensor:
        """For FP8 weights z is quantised by groups of 128 first."""
        wo_b, scale = self.wo_b, self.b_scale
        if scale is None:
            return flagops.linear(z, wo_b)
        codes, steps = flagops.fp8_quantize(z)
        return flagops.fp8_matmul(codes, steps, wo_b, scale, dtype=arrays.dtype_name(z))


def gathering(o: Tensor, group: Any) -> Pending:
    """[n, h, c] of each rank as [n, ranks * h, c], heads in the order of the ranks."""
    ranks = dist.get_world_size(group)
    made = o.new_empty(ranks * len(o), *o.shape[1:])
    wait = _begin(collective("all_gather"), made, o.contiguous(), group=group)
    return lambda: torch.unflatten(wait(made), 0, (ranks, -1)).movedim(0, 1).flatten(1, 2)


def _scattering(z: Tensor, group: Any) -> Pending:
    """[n, r] of each rank as this rank's [n, r / ranks] of their sum."""
    ranks = dist.get_world_size(group)
    parts = torch.unflatten(z, -1, (ranks, -1)).movedim(-2, 0).flatten(0, 1).contiguous()
    made = z.new_empty(len(z), parts.shape[-1])
    wait = _begin(collective("reduce_scatter"), made, parts, group=group)
    return lambda: wait(made)


def collective(name: str) -> Callable[..., Any]:
    """A collective on one tensor by the name that this torch prefers; 2.13 has renamed those of 2.11."""
    older = {"all_gather": "all_gather_into_tensor", "reduce_scatter": "reduce_scatter_tensor"}[name]
    found: Callable[..., Any] = getattr(dist, f"{name}_single", None) or getattr(dist, older)
    return found


def summing(y: Tensor, group: Any) -> Pending:
    """The sum over the ranks in float32, rounded once to the dtype of `y`."""
    total = y.to(torch.promote_types(y.dtype, torch.float32), copy=True)
    wait = _begin(dist.all_reduce, total, group=group)
    return lambda: wait(total).to(y.dtype)


class _Gather(torch.autograd.Function):
    """Gathered heads. Where the ranks go on with parts of the work (`partial`), their gradients are summed."""

    @staticmethod
    def forward(ctx: Any, o: Tensor, group: Any, partial: bool) -> Tensor:
        ctx.group, ctx.partial, ctx.heads = group, partial, o.shape[1]
        return gathering(o, group)()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        if not ctx.partial:
            mine = dist.get_rank(ctx.group)
            return grad[:, mine * ctx.heads : (mine + 1) * ctx.heads], None, None
        width = grad.shape[-1]
        wide = grad.to(torch.promote_types(grad.dtype, torch.float32))
        own = torch.unflatten(_scattering(wide.flatten(1), ctx.group)(), -1, (ctx.heads, width))
        return own.to(grad.dtype), None, None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return _scattering(z, group)()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return gathering(grad[:, None], ctx.group)().flatten(1), None


class _Sum(torch.autograd.Function):
    """Every rank has the whole sum and the whole gradient of it, which is that of each summand."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, group: Any) -> Tensor:
        return summing(y, group)()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def shard(whole: Tensor, mesh: DeviceMesh, placements: Shards) -> DTensor:
    """This rank's part of a tensor that every rank holds, as a DTensor; nothing is sent."""
    local, kinds = whole, []
    for dim, (kind, axis) in enumerate(placements[: mesh.ndim]):
        kinds.append(Shard(axis) if kind == "shard" else Replicate())
        if kind == "shard":
            if local.shape[axis] % mesh.size(dim):
                raise ValueError(f"axis {axis} of {tuple(local.shape)} cannot be cut into {mesh.size(dim)} equal parts")
            local = local.tensor_split(mesh.size(dim), axis)[mesh.get_local_rank(dim)]
    local = local.detach().clone(memory_format=torch.contiguous_format)
    made: DTensor = DTensor.from_local(local, mesh, kinds, run_check=False, shape=whole.shape, stride=whole.stride())
    return made


def gather(x: Any) -> Tensor:
    """The whole of a DTensor, on every rank; any other tensor as it is. One-byte formats travel as uint8."""
    if not isinstance(x, DTensor):
        return x
    x = x.detach()
    local = x.to_local()
    if local.dtype.itemsize > 1 or local.dtype == torch.uint8:
        return x.full_tensor()
    raw = DTensor.from_local(
        local.view(torch.uint8), x.device_mesh, x.placements, run_check=False, shape=x.shape, stride=x.stride()
    )
    return raw.full_tensor().view(local.dtype)


def unshard(module: nn.Module) -> nn.Module:
    """Gather the weights of every sharded projection in a module back: all ranks call it together."""
    for one in module.modules():
        if isinstance(one, GroupedOutputProjection) and one.parallel:
            for name in WEIGHTS:
                if getattr(one, name) is not None:
                    _hold(one, name, gather(getattr(one, name)))
            one.parallel = None
    return module


def ranks_of(mesh: DeviceMesh, name: str) -> DeviceMesh:
    """The one dimension of a mesh that is meant; ValueError if there is none of that name."""
    names = mesh.mesh_dim_names or ()
    if name in names:
        return mesh if mesh.ndim == 1 else mesh[name]
    if mesh.ndim == 1 and not names:
        return mesh
    raise ValueError(f"the mesh has no dimension {name!r}, only {', '.join(names) or f'{mesh.ndim} unnamed ones'}")


@contextmanager
def agreed(mesh: DeviceMesh) -> Iterator[dict[str, Any]]:
    """Ranks say what they are about to build, or why they cannot; a difference is a ValueError on all of them."""
    note: dict[str, Any] = {}
    try:
        yield note
    except (TypeError, ValueError) as error:
        note["error"] = str(error)
    group = mesh.get_group()
    notes: list[dict[str, Any]] = [note for _ in range(mesh.size())]
    if dist.get_backend(group) != "fake":  # one process that stands for all has nobody to ask
        dist.all_gather_object(notes, note, group=group)
    for rank, other in enumerate(notes):
        if "error" in other:
            raise ValueError(f"rank {rank}: {other['error']}")
    for rank, other in enumerate(notes):
        for key, value in other.items():
            if value != notes[0].get(key):
                raise ValueError(f"rank {rank} has {key} {value}, but rank 0 has {notes[0].get(key)}")


_FAILURE = "flagops.distributed/failure"


class PeerFailed(RuntimeError):
    """A collective ended because another rank failed; the message is that rank's."""


@contextmanager
def failing_together() -> Iterator[None]:
    """A rank that raises leaves its message in the process group's store, for those whose collectives then break."""
    try:
        yield
    except PeerFailed:
        raise
    except Exception as error:
        if dist.get_backend() != "fake":
            _store().set(_FAILURE, f"rank {dist.get_rank()}: {type(error).__name__}: {error}")
        raise


def _begin(collective: Callable[..., Any], *tensors: Tensor, group: Any) -> Callable[[Tensor], Tensor]:
    """Start a collective; the function returned waits for it and hands its result on."""
    try:
        work = collective(*tensors, group=group, async_op=True)
    except RuntimeError as error:
        raise _peer_failed(error) from error

    def wait(result: Tensor) -> Tensor:
        try:
            work.wait()
        except RuntimeError as error:
            raise _peer_failed(error) from error
        return result

    return wait


def _peer_failed(error: RuntimeError) -> RuntimeError:
    """What the rank that broke a collective has to say, if it said anything."""
    try:
        known = _store().check([_FAILURE])
    except RuntimeError:  # the store went with the rank that held it
        known = False
    return PeerFailed(_store().get(_FAILURE).decode()) if known else PeerFailed(f"a collective failed: {error}")


def _store() -> Any:
    return dist.distributed_c10d._get_default_store()


def local(x: Any) -> Any:
    """This rank's part of a DTensor; any other tensor, or None, as it is."""
    return x.to_local() if isinstance(x, DTensor) else x


def _hold(module: nn.Module, name: str, value: Tensor | None) -> None:
    """Floats that can train are parameters, codes and scales buffers; a parameter goes on training or not as before."""
    before = module._parameters.pop(name, None)
    module._buffers.pop(name, None)
    if value is not None and value.is_floating_point() and value.dtype.itemsize > 1 and not name.endswith("_scale"):
        before = value if before is None and isinstance(value, nn.Parameter) else before
        module.register_parameter(name, nn.Parameter(value, requires_grad=before is None or before.requires_grad))
    else:
        module.register_buffer(name, value)
