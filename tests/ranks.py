"""Runs functions of this file on several gloo processes: `python tests/ranks.py` is a job, its ranks are forks of it.

`launch` starts the job, hands each the same list of cases (name of a function here, its arguments), and returns what
every rank's function gave, pickled; a rank that raised has its exception there instead.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tempfile
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any


def launch(
    ranks: int, cases: list[tuple[str, dict[str, Any]]], device: str = "cpu", timeout: int = 300
) -> list[list[Any]]:
    """``results[case][rank]`` of each function on each rank."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "cases").write_bytes(pickle.dumps((cases, device, timeout)))
        job = subprocess.run(
            [sys.executable, "-W", "ignore", __file__, folder, str(ranks)],
            env=os.environ | {"OMP_NUM_THREADS": "1", "FLAGOPS_BACKEND": os.environ.get("FLAGOPS_BACKEND", "torch")},
            stderr=subprocess.PIPE,
            text=True,
            timeout=600,
        )
        results = [Path(folder, f"result{rank}") for rank in range(ranks)]
        for path in results:
            assert path.exists(), job.stderr
        return [list(case) for case in zip(*(pickle.loads(path.read_bytes()) for path in results), strict=True)]


class Counted:
    """The bytes this rank would send in ring algorithms, counted from what the collectives are given."""

    def __init__(self) -> None:
        self.sent = 0.0

    def __enter__(self) -> Counted:
        import torch.distributed as dist

        from flagops.distributed.projection import collective

        def share(group: Any) -> float:
            ranks = dist.get_world_size(group)
            return (ranks - 1) / ranks

        gather, scatter, reduce = collective("all_gather"), collective("reduce_scatter"), dist.all_reduce
        self.real = {function.__name__: function for function in (gather, scatter, reduce)}

        def counted_gather(out: Any, x: Any, group: Any, **kwargs: Any) -> Any:
            self.sent += out.nbytes * share(group)
            return gather(out, x, group=group, **kwargs)

        def counted_scatter(out: Any, x: Any, group: Any, **kwargs: Any) -> Any:
            self.sent += x.nbytes * share(group)
            return scatter(out, x, group=group, **kwargs)

        def counted_reduce(x: Any, group: Any, **kwargs: Any) -> Any:
            self.sent += 2 * x.nbytes * share(group)
            return reduce(x, group=group, **kwargs)

        for function, counted in ((gather, counted_gather), (scatter, counted_scatter), (reduce, counted_reduce)):
            setattr(dist, function.__name__, counted)
        return self

    def __exit__(self, *_: Any) -> None:
        import torch.distributed as dist

        for name, function in self.real.items():
            setattr(dist, name, function)


def weights(sizes: Any, dtype: str, seed: int, fp8: bool = False) -> list[Any]:
    """The whole weights (and scales), the same on every rank."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    shapes = ((sizes.groups * sizes.rank, sizes.width), (sizes.hidden, sizes.groups * sizes.rank))
    if not fp8:
        return [(torch.randn(s, generator=generator) / s[1] ** 0.5).to(getattr(torch, dtype)) for s in shapes]
    codes = [(torch.randn(s, generator=generator) * 8).to(torch.float8_e4m3fn) for s in shapes]
    scales = [
        torch.randint(115, 120, (-(-a // 128), -(-b // 128)), generator=generator, dtype=torch.uint8).view(
            torch.float8_e8m0fnu
        )
        for a, b in shapes
    ]
    return [*codes, *scales]


def heads(sizes: Any, tokens: int, dtype: str, seed: int) -> Any:
    import torch

    generator = torch.Generator().manual_seed(seed + 1)
    return torch.randn(tokens, sizes.heads, sizes.head_dim, generator=generator).to(getattr(torch, dtype))


def module(sizes: Any, dtype: str, seed: int, fp8: bool = False) -> Any:
    from flagops.distributed import GroupedOutputProjection

    wo_a, wo_b, *scales = weights(sizes, dtype, seed, fp8)
    return GroupedOutputProjection(wo_a, wo_b, sizes.groups, sizes.head_dim, *scales)


def mesh(device: str, names: tuple[str, ...] = ("tp",), shape: tuple[int, ...] | None = None) -> Any:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(device, shape or (dist.get_world_size(),), mesh_dim_names=names)


def project(
    device: str, sizes: Any, scheme: str, dtype: str, tokens: int, seed: int, fp8: bool = False
) -> dict[str, Any]:
    """Forward, backward and back to whole weights on one scheme."""
    import torch
    import torch.distributed as dist
    from torch.distributed.tensor.parallel import parallelize_module

    from flagops.distributed import GroupedOutputProjectionParallel, unshard

    rank, ranks = dist.get_rank(), dist.get_world_size()
    whole = heads(sizes, tokens, dtype, seed)
    mine = whole.tensor_split(ranks, 1)[rank].to(device)
    built = module(sizes, dtype, seed, fp8).to(device)
    before = {name: x.clone() for name, x in built.state_dict().items()}
    parallelize_module(built, mesh(device), GroupedOutputProjectionParallel(sizes.groups, scheme))
    with torch.no_grad(), Counted() as counted:
        y = built(mine)
    again = built(mine).detach()
    found = {
        "y": y.float().cpu().numpy() if dtype != "float64" else y.cpu().numpy(),
        "repeats": bool(torch.equal(y, again)),
        "sent": counted.sent,
        "cost": built.parallel.layout.cost(y.element_size()),
        "scheme": built.parallel.layout.scheme,
        "bytes": sum(x.to_local().nbytes for x in built.state_dict().values()),
    }
    if not fp8:
        mine.requires_grad_()
        weight = torch.linspace(-1, 1, y.numel(), device=device, dtype=torch.float64).view(y.shape)
        (built(mine).double() * weight).sum().backward()
        found["grad_o"] = mine.grad.double().cpu().numpy()
        found["grads"] = [x.grad.full_tensor().double().cpu().numpy() for x in (built.wo_a, built.wo_b)]
    unshard(built)
    found["restored"] = all(
        torch.equal(x.view(torch.uint8), before[n].view(torch.uint8)) for n, x in built.state_dict().items()
    )
    found["whole"] = bool(torch.equal(built.wo_a.detach().view(torch.uint8), before["wo_a"].view(torch.uint8)))
    return found


def save(device: str, sizes: Any, scheme: str, dtype: str, folder: str, fp8: bool = False) -> None:
    """A sharded projection through torch.distributed.checkpoint."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.tensor.parallel import parallelize_module

    from flagops.distributed import GroupedOutputProjectionParallel

    built = parallelize_module(
        module(sizes, dtype, 3, fp8), mesh(device), GroupedOutputProjectionParallel(scheme=scheme)
    )
    dcp.save(built.state_dict(), checkpoint_id=folder)


def load(device: str, sizes: Any, scheme: str, dtype: str, folder: str, fp8: bool = False) -> bool:
    """Whether a checkpoint saved at another number of ranks gives the very weights that were saved."""
    import torch
    import torch.distributed.checkpoint as dcp
    from torch.distributed.tensor.parallel import parallelize_module

    from flagops.distributed import GroupedOutputProjectionParallel, unshard

    built = parallelize_module(
        module(sizes, dtype, 4, fp8), mesh(device), GroupedOutputProjectionParallel(scheme=scheme)
    )
    state = built.state_dict()
    dcp.load(state, checkpoint_id=folder)
    built.load_state_dict(state)
    unshard(built)
    saved = module(sizes, dtype, 3, fp8).state_dict()
    return all(torch.equal(x.view(torch.uint8), saved[n].view(torch.uint8)) for n, x in built.state_dict().items())


def differ(device: str, sizes: Any, what: str) -> None:
    """Rank 1 brings something else than the others."""
    import dataclasses

    import torch.distributed as dist
    from torch.distributed.tensor.parallel import parallelize_module

    from flagops.distributed import GroupedOutputProjectionParallel

    odd = dist.get_rank() == 1
    wrong = dataclasses.replace(sizes, hidden=sizes.hidden + 1) if what == "shape" and odd else sizes
    built = module(wrong, "float64" if what == "dtype" and odd else "float32", 0)
    scheme = "split-rank" if what == "scheme" and odd else "replicate"
    parallelize_module(
        built, mesh(device), GroupedOutputProjectionParallel(99 if what == "groups" and odd else None, scheme)
    )


def wrong_mesh(device: str, sizes: Any) -> None:
    from torch.distributed.tensor.parallel import parallelize_module

    from flagops.distributed import GroupedOutputProjectionParallel

    parallelize_module(module(sizes, "float32", 0), mesh(device, ("dp",)), GroupedOutputProjectionParallel())


def illegal(device: str, sizes: Any) -> None:
    from torch.distributed.tensor.parallel import parallelize_module

    from flagops.distributed import GroupedOutputProjectionParallel

    parallelize_module(module(sizes, "float32", 0), mesh(device), GroupedOutputProjectionParallel())


def one_fails(device: str, sizes: Any) -> None:
    """Rank 1 calls with heads that do not fit; the others wait for it in a collective."""
    import torch.distributed as dist
    from torch.distributed.tensor.parallel import parallelize_module

    from flagops.distributed import GroupedOutputProjectionParallel

    built = parallelize_module(module(sizes, "float32", 0), mesh(device), GroupedOutputProjectionParallel())
    o = heads(sizes, 3, "float32", 0).tensor_split(dist.get_world_size(), 1)[0]
    built(o[:, :, :-1] if dist.get_rank() == 1 else o)


def model(device: str, scheme: str, groups: int, heads: int, seed: int) -> dict[str, Any]:
    """A whole DeepSeek-V4 with its attention heads divided: logits of a prompt and of steps after it, gradients, and
    the weights after the patch is undone."""
    import torch

    import flagops
    from flagops.deepseek_v4.examples import small_deepseek_v4

    whole = small_deepseek_v4(seed, num_attention_heads=heads, o_groups=groups, experts_implementation="eager")
    whole = whole.double().to(device)
    before = {name: x.clone() for name, x in whole.state_dict().items()}
    ids = torch.randint(2, 64, (2, 40), generator=torch.Generator().manual_seed(seed)).to(device)
    weight = torch.linspace(-1, 1, 2 * 40 * 64, dtype=torch.float64, device=device).view(2, 40, 64)
    found: dict[str, Any] = {}
    with torch.no_grad():
        unpatched = _steps(whole, ids)
    with flagops.patch(whole):
        (whole(ids).logits * weight).sum().backward()
        expected = {name: p.grad for name, p in whole.named_parameters() if p.grad is not None}
        whole.zero_grad()
        with torch.no_grad():
            plain = _steps(whole, ids)
    with flagops.patch(whole, mesh=mesh(device), scheme=scheme) as handle:
        with torch.no_grad():
            divided = _steps(whole, ids)
        (whole(ids).logits * weight).sum().backward()
        gradients = {name: p.grad for name, p in whole.named_parameters() if p.grad is not None}
        found["worst gradient"] = max(
            float((_whole(gradients[name]) - x).abs().max() / (1e-30 + x.abs().max())) for name, x in expected.items()
        )
        found["missing"] = sorted(expected.keys() - gradients.keys())
        found["calls"] = handle.report().replaced
        found["local heads"] = whole.model.layers[1].self_attn.sinks.to_local().shape[0]
    found["worst logit"] = float((divided - plain).abs().max())
    found["to transformers"] = float((divided - unpatched).abs().max())
    found["restored"] = all(torch.equal(x, before[name]) for name, x in whole.state_dict().items())
    return found


def trained(device: str, ids: Any) -> Any:
    """Logits of the trained model with its attention heads divided."""
    import torch

    import flagops
    from flagops.deepseek_v4.examples import trained_deepseek_v4

    whole = trained_deepseek_v4().to(device)
    with flagops.patch(whole, mesh=mesh(device)), torch.no_grad():
        return whole(ids.to(device)).logits.cpu()


def packed(device: str, folder: str, ids: Any, **options: Any) -> dict[str, Any]:
    """Logits of a checkpoint that is divided where it lies, and what this rank holds of it."""
    import torch

    import flagops

    model = flagops.load(folder, mesh=mesh(device), **options)
    held = model.state_dict()
    with torch.no_grad():
        logits = _steps(model, ids).float().numpy()
    arena = model.flagops_arena
    mapped = model.save_pretrained._mapped
    return {
        "logits": logits,
        "bytes": sum(x.numel() * (2 if "norm" in name else x.itemsize) for name, x in held.items()),  # as stored
        "copied": {
            name.rpartition("self_attn.")[2]
            for name, x in held.items()
            if x.dtype.itemsize == 1 and mapped.where(x) is None
        },
        "heads": {len(layer.self_attn.sinks) for layer in model.model.layers},
        "left": model.flagops.report().bypassed,
        "reads": arena and arena.report().reads,
        "refused": [_said(model.flagops.disable), _said(lambda: model.save_pretrained("nowhere"))],
    }


def odd_one(device: str, folder: str) -> None:
    """Rank 1 asks for another dtype."""
    import torch.distributed as dist

    import flagops

    flagops.load(folder, mesh=mesh(device), dtype="float32" if dist.get_rank() == 1 else "bfloat16")


def _said(call: Any) -> str:
    try:
        call()
    except (RuntimeError, ValueError) as error:
        return str(error)
    return "nothing"


def _whole(x: Any) -> Any:
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def _steps(whole: Any, ids: Any) -> Any:
    import torch

    logits, cache = [], None
    for part in (ids[:, :33], *ids[:, 33:].split(1, 1)):
        out = whole(part, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        logits.append(out.logits)
    return torch.cat(logits, 1)


def main(folder: str, ranks: str) -> None:
    cases, device, timeout = pickle.loads(Path(folder, "cases").read_bytes())
    if device == "cpu":  # imported once for all ranks; a CUDA context does not survive a fork
        import torch.distributed.checkpoint.state_dict
        import torch.distributed.tensor.parallel  # noqa: F401

        import flagops.distributed

        if any(name in ("model", "trained", "packed", "odd_one") for name, _ in cases):
            from transformers.models.deepseek_v4 import modeling_deepseek_v4  # noqa: F401

            import flagops.packed.load
            import flagops.transformers  # noqa: F401
    children = []
    for rank in range(int(ranks)):
        children.append(os.fork())
        if not children[-1]:
            try:
                work(folder, rank, int(ranks), cases, device, timeout)
            except BaseException:
                traceback.print_exc()
            os._exit(0)  # a group that a failed rank has left cannot be destroyed
    for child in children:
        os.waitpid(child, 0)


def work(folder: str, rank: int, ranks: int, cases: list[Any], device: str, timeout: int) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    backend = "nccl" if device == "cuda" else "gloo"
    if device == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        backend,
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=timeout),
    )
    results: list[Any] = []
    for name, arguments in cases:
        try:
            results.append(globals()[name](device, **arguments))
        except Exception as error:  # the test judges it
            results.append(error)
    Path(folder, f"result{rank}").write_bytes(pickle.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
