"""A model larger than its budget: experts are read on demand, and nothing of the results depends on how many fit."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

sys.path.insert(0, str(Path(__file__).parent))
from load_data import generated, logits, source  # noqa: E402

import flagops  # noqa: E402
from flagops import checkpoint  # noqa: E402
from flagops.checkpoint.memory import resident  # noqa: E402
from flagops.packed import PackedExperts  # noqa: E402
from flagops.packed.arena import Arena  # noqa: E402


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return generated(tmp_path_factory.mktemp("made") / "src")[0]


def cold(folder):
    """Nothing of a folder is in the page cache."""
    for path in folder.glob("*.safetensors"):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def experts(model):
    layers = [module for module in model.modules() if isinstance(module, PackedExperts)]
    return layers, [[module.expert(i) for i in range(len(module))] for module in layers]


def with_room(model, slots):
    """The model with an arena of so many experts."""
    layers, each = experts(model)
    record = sum(x.nbytes for weight in each[0][0] for x in weight)
    model.flagops_arena = Arena(model.save_pretrained._mapped, each, slots * record)
    for index, module in enumerate(layers):
        module.arena = model.flagops_arena, index
    return model


def steps(model, count=4):
    """The logits of a prompt and of some tokens after it."""
    ids = torch.randint(2, 64, (1, 24), generator=torch.Generator().manual_seed(3))
    cache, found = None, []
    with torch.no_grad():
        for _ in range(count):
            out = model(input_ids=ids, past_key_values=cache, use_cache=True)
            cache, ids = out.past_key_values, out.logits[:, -1:].argmax(-1)
            found.append(out.logits[0])
    return torch.cat(found)


@pytest.mark.parametrize("activations", ["fp8", "none"])
def test_the_bits_are_the_same_for_every_budget(made, activations):
    expected = steps(flagops.load(made, activations=activations))
    for slots in (2, 3, 7, 20, 48, 1000):
        model = with_room(flagops.load(made, activations=activations), slots)
        cold(made)
        assert torch.equal(steps(model), expected), slots
        report = model.flagops_arena.report()
        called = {row.op for row in model.flagops.report().rows}
        assert ("moe_experts" in called) == (activations == "fp8")
        assert report.tokens == 24 + 3
        assert report.read == report.reads * report.size // min(slots, 48)
        if slots >= 48:
            assert report.reads <= 48
            assert report.hits > 0
    assert "were in the arena of" in str(report)
    assert model.flagops_arena.report().waited >= 0


def test_what_is_used_stays(made):
    """Of an arena that holds two, the one that was used last is found again."""
    layers, _ = experts(with_room(flagops.load(made), 2))
    arena = layers[0].arena[0]
    for wanted in ([3], [5], [3], [7], [3]):
        list(arena.take(0, wanted, 1))
    assert (arena.report().hits, arena.report().reads) == (2, 3)
    list(arena.take(0, [5], 1))
    assert arena.report().reads == 4


def test_stacked_experts_are_read_one_by_one(tmp_path):
    src = source(tmp_path / "src", "stacked")
    model = flagops.load(src, memory=resident() + (8 << 20))
    expected = logits(flagops.load(src, memory=resident() + (1 << 30)))
    assert torch.equal(logits(model), expected)
    assert model.flagops_arena.report().reads > 0
    model.save_pretrained(tmp_path / "same")
    for path in src.iterdir():
        assert (tmp_path / "same" / path.name).read_bytes() == path.read_bytes()


def test_a_budget_that_is_too_small(made):
    with pytest.raises(ValueError, match=r"two need \d+\.\d kB; give .* more"):
        flagops.load(made, memory="1MiB")
    with pytest.raises(ValueError, match="give one of the two"):
        flagops.load(made, memory="1GiB", pack=True)


def test_a_file_that_ends_while_a_model_runs(tmp_path):
    src, _ = generated(tmp_path / "src", n_routed_experts=4, hidden_size=256, moe_intermediate_size=256)
    model = with_room(flagops.load(src), 2)
    expected = steps(model, 1)
    stored = model.save_pretrained._mapped.source.tensors
    last = max(
        (x for x in stored.values() if ".experts." in x.name and x.name.endswith("weight")), key=lambda x: x.offset
    )
    path, whole = src / last.file, (src / last.file).read_bytes()
    os.truncate(path, last.offset + 1)  # what is mapped lies before
    every = torch.arange(4).repeat(2, 1)
    layer = experts(model)[0][int(last.name.split(".")[2])]
    with pytest.raises(checkpoint.Refused, match=f"{last.file}.*(ends at byte|has changed)"):
        layer(torch.ones(2, 256, dtype=torch.bfloat16), every, torch.ones(2, 4))
    path.write_bytes(whole)
    assert torch.equal(steps(with_room(flagops.load(src), 3), 1), expected)


CHILD = """
    import sys, torch
    import flagops
    from flagops.checkpoint import memory

    def answer(model):
        with torch.no_grad():
            return model(input_ids=torch.arange(96)[None] % 64).logits

    answer(flagops.load(sys.argv[1], memory="64GiB"))  # compiles, and imports what it needs
    before = memory.resident()
    model = flagops.load(sys.argv[2], memory=before + int(sys.argv[3]))
    answer(model)
    print(memory.peak() - before, model.flagops_arena.report().read)
"""


@pytest.mark.drawn
def test_a_process_stays_within_a_budget_that_is_smaller_than_the_checkpoint(made, tmp_path):
    """Beside the weights it takes what a forward takes of any model."""
    src, size = generated(tmp_path / "src", n_routed_experts=32, hidden_size=1024, moe_intermediate_size=1024)
    budget, margin = 32 << 20, 48 << 20
    command = [sys.executable, "-c", textwrap.dedent(CHILD), str(made), str(src), str(budget)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    peak, read = map(int, done.stdout.split())
    assert read > budget
    assert peak < budget + margin < size // 2
