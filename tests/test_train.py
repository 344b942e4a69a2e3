"""`flagops train`: its documents, its objective, its formats, and that an interruption changes no bit."""

import copy
import itertools
import json
import re

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import flagops  # noqa: E402
from flagops import checkpoint  # noqa: E402
from flagops.__main__ import main  # noqa: E402
from flagops.deepseek_v4.examples import random_deepseek_v4  # noqa: E402
from flagops.deepseek_v4.weights import AttentionWeights  # noqa: E402
from flagops.train import ablation, grid, loop, narrow, objective  # noqa: E402
from flagops.train.corpus import HELD, KNOWN, Corpus, shipped  # noqa: E402
from flagops.train.export import configuration, export, tensors  # noqa: E402
from flagops.train.model import SIZES, build, csa_layers  # noqa: E402

SMALL = {
    "hidden_size": 128, "num_attention_heads": 2, "q_lora_rank": 128, "o_lora_rank": 64, "n_routed_experts": 4,
    "index_n_heads": 16, "index_topk": 8, "sliding_window": 16,
}  # fmt: skip
LENGTH = 300
BOUND = 1e-4  # of float32 that is summed in another order, as `flagops.patch` promises of logits


@pytest.fixture(scope="module")
def corpus():
    return Corpus(shipped())


def random_model(seed=0):
    """Nothing is at zero or one."""
    return random_deepseek_v4(seed, **(SIZES | SMALL | {"initializer_range": 0.1}))


def tokens(corpus, kind="text", seed=0, count=2):
    return torch.from_numpy(corpus.batch(seed, 0, count, LENGTH, (kind,))[0])


def document(corpus, kind, seed):
    ids, sayable = corpus.batch(seed, 0, 1, 2048, (kind,))
    assert ids[0, 0] == 256
    return bytes(ids[0, 1:].tolist()), sayable[0, 1:] == KNOWN


@pytest.mark.parametrize("kind", ["recall", "table", "facts"])
@pytest.mark.parametrize("seed", range(3))
def test_what_a_memory_knows_was_said_before(corpus, kind, seed):
    text, known = document(corpus, kind, seed)
    rule = {
        "recall": rb"(\w+)(=)(\w+)\n",
        "table": rb"(\d\d)[:?]( )(\w+)\n",
        "facts": rb"\nThe code of (\w+)( is )(\w+)\.",
    }
    said = {}
    for found in re.finditer(rule[kind], text):
        key, _, value = found.groups()
        assert known[found.start(3) : found.end(3)].all() == (key in said)
        assert said.setdefault(key, value) == value
    assert known.sum() > 0


def test_a_copy_repeats_its_first_block(corpus):
    text, known = document(corpus, "copy", 1)
    block = text.index(b"|") + 1
    assert not known[:block].any()
    assert known[block:].all()
    assert text[block:] == (text[:block] * 200)[: len(text) - block]


def test_a_batch_is_a_function_of_seed_and_step(corpus):
    first = corpus.batch(1, 2, 4, 512)
    assert all(np.array_equal(x, y) for x, y in zip(first, Corpus(shipped()).batch(1, 2, 4, 512), strict=True))
    for other in ((1, 3), (2, 2)):
        assert not np.array_equal(first[0], corpus.batch(*other, 4, 512)[0])


def test_held_out_text_is_in_no_training_document():
    rng = np.random.default_rng(0)
    text = rng.integers(0, 256, 40 * 4096, dtype=np.uint8).tobytes()
    corpus = Corpus(text)
    held, train = (
        {bytes(corpus.batch(0, step, 1, 512, ("text",), held=h)[0][0, 1:].tolist()) for step in range(40)}
        for h in (True, False)
    )
    places = {h: {text.index(x) // 4096 % HELD for x in found} for h, found in ((True, held), (False, train))}
    assert places[True] == {HELD - 1}
    assert HELD - 1 not in places[False]


def test_a_corpus_too_short():
    with pytest.raises(ValueError, match="has 100 bytes, expected at least"):
        Corpus(b"x" * 100)


def test_the_indexer_learns_what_transformers_attends_to(corpus):
    """Both sides of its loss, against what transformers' own modules compute for every query."""
    model, ids = random_model(), tokens(corpus)
    scores, weights, hooks = {}, {}, []
    for layer in csa_layers(model):
        indexer = layer.compressor.indexer
        indexer.index_topk = LENGTH
        hooks.append(layer.register_forward_hook(lambda module, args, output: weights.update({module: output[1]})))
        hooks.append(indexer.scorer.register_forward_hook(lambda module, args, output: scores.update({module: output})))
    with torch.no_grad(), objective.watching(model) as seen:
        model(input_ids=ids)
    for hook in hooks:
        hook.remove()
    positions = torch.arange(4, LENGTH)
    for layer in csa_layers(model):
        visible = torch.arange(LENGTH // 4) < ((positions + 1) // 4)[:, None]
        expected = weights[layer][:, :, 4:, LENGTH:].sum(1)
        expected = expected / expected.sum(-1, keepdim=True)
        found = objective.attended(layer, seen[layer], positions)
        assert float((found - expected).abs().max()) < BOUND
        theirs = scores[layer.compressor.indexer.scorer][:, 4:].masked_fill(~visible, -1e30).log_softmax(-1)
        ours = objective.scored(layer, seen[layer], positions).detach()
        assert float((ours - theirs)[:, visible].abs().max()) < BOUND
        loss = objective.index_loss(layer, seen[layer], positions)
        kl = torch.nn.functional.kl_div(theirs, expected, reduction="none").sum(-1).mean()
        assert abs(float(loss.detach()) - float(kl)) < BOUND * (LENGTH // 4)  # a sum over so many entries


def test_the_indexers_loss_moves_the_indexer_alone(corpus):
    model = random_model()
    with objective.watching(model) as seen:
        model(input_ids=tokens(corpus))
    layer = csa_layers(model)[0]
    objective.index_loss(layer, seen[layer], torch.arange(4, 60)).backward()
    moved = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    own = {name for name, p in model.named_parameters() if ".layers.1." in name and ".indexer." in name}
    assert moved == own


def test_a_bias_moves_towards_who_got_less(corpus):
    model, ids = random_model(), tokens(corpus)
    with torch.no_grad(), objective.watching(model) as seen:
        model(input_ids=ids)
    for layer in model.model.layers:
        block = layer.mlp
        got = objective.loads(block, seen[block], ids)
        assert int(got.sum()) == ids.numel() * 2
        if not block.is_hash:
            before = block.gate.e_score_correction_bias.clone()
            objective.balance(block, seen[block], ids, 0.25)
            moved = block.gate.e_score_correction_bias - before
            assert torch.equal(moved.sign(), (got.float().mean() - got).sign())


@pytest.mark.drawn
def test_an_interrupted_run_ends_with_the_same_bits(corpus, tmp_path):
    """Through longer documents, the indexer's selection and narrow weights."""
    options = loop.Options(steps=6, seed=3, tokens=2048)
    whole, parts = (loop.Training(corpus, options, **SMALL) for _ in range(2))
    list(whole.run(3))
    parts.load(whole.save(tmp_path))
    assert list(parts.run()) == list(whole.run())
    assert whole.step == parts.step == 6
    assert whole.save(tmp_path).read_bytes() == parts.save(tmp_path).read_bytes()
    assert len(loop.checkpoints(tmp_path)) == 2
    other = loop.Training(corpus, loop.Options(steps=7, seed=3, tokens=2048), **SMALL)
    with pytest.raises(ValueError, match="another run: steps 6 instead of 7"):
        other.load(loop.checkpoints(tmp_path)[-1])


def test_a_checkpoint_of_other_sizes_is_refused(corpus, tmp_path):
    options = loop.Options(steps=6, tokens=2048)
    path = loop.Training(corpus, options, **SMALL).save(tmp_path)
    with pytest.raises(ValueError, match=r"another run: sizes .*'index_topk': 8.* instead of .*'index_topk': 9"):
        loop.Training(corpus, options, **(SMALL | {"index_topk": 9})).load(path)


def test_straight_through(corpus):
    model, ids = build(1, **SMALL), tokens(corpus)
    before = copy.deepcopy(model.state_dict())
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for name, p in twin.named_parameters():
            p.copy_(narrow.narrowed(name, p))
    loop.losses(twin, ids)[0].mean().backward()
    with narrow.straight_through(model):
        assert not torch.equal(
            model.model.layers[1].mlp.experts.down_proj, before["model.layers.1.mlp.experts.down_proj"]
        )
        loop.losses(model, ids)[0].mean().backward()
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, before[name]), name
        assert (p.grad is None) == (q.grad is None), name
        assert p.grad is None or torch.equal(p.grad, q.grad), name


def test_the_export_is_the_model(corpus, tmp_path):
    """transformers reads it, and what `convert` makes of it, as the very values that the narrow weights had."""
    pytest.importorskip("accelerate")
    model = build(2, **SMALL).eval()
    size = export(model, tmp_path / "model", "about")
    assert size == checkpoint_bytes(tmp_path / "model")
    checkpoint.convert(tmp_path / "model", tmp_path / "bf16")
    ids = tokens(corpus)
    with torch.no_grad(), narrow.straight_through(model):
        expected = model(input_ids=ids).logits
    for folder in ("model", "bf16"):
        found, info = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / folder, output_loading_info=True, attn_implementation="eager", dtype=torch.bfloat16
        )
        assert not any(info.values()), info
        for name, x in found.float().state_dict().items():
            assert torch.equal(x, narrow.narrowed(name, model.state_dict()[name])), name
        with torch.no_grad():
            assert torch.equal(found.eval()(input_ids=ids).logits, expected)
    with pytest.raises(ValueError, match="compressors of 4 and 128"):
        configuration(build(0, compress_rate_hca=8, **SMALL).config)


def checkpoint_bytes(folder):
    from safetensors.torch import load_file

    return sum(x.nbytes for x in load_file(folder / "model-00001-of-00001.safetensors").values())


def test_the_names_and_dtypes_are_those_that_were_published():
    """As many tensors as the published files have for such layers, and attention that reads them as its own."""
    model = build(1, **SMALL)
    found = dict(tensors(model))
    experts = SMALL["n_routed_experts"]
    assert len(found) == 6 + 4 * (29 + 6 * experts) + 2 * 11 + 4
    for layer, kind in enumerate(("sliding", "csa", "hca", "csa")):
        weights = AttentionWeights.of_checkpoint(found, f"layers.{layer}.attn.", kind)
        assert weights.wq_b.dtype == torch.float8_e4m3fn
        assert weights.wq_b_scale.dtype == torch.float8_e8m0fnu
        assert list(weights.wo_b_scale.shape) == [1, 1]
        for part, dtype in (("attn_sink", torch.float32), ("kv_norm", torch.bfloat16)):
            assert getattr(weights, part).dtype == dtype
        expert = f"layers.{layer}.ffn.experts.{experts - 1}.w1"
        assert found[f"{expert}.weight"].dtype == torch.int8
        assert list(found[f"{expert}.weight"].shape) == [128, 64]
        assert list(found[f"{expert}.scale"].shape) == [128, 4]
        assert (f"layers.{layer}.ffn.gate.tid2eid" in found) == (layer == 0)
        assert (f"layers.{layer}.ffn.gate.bias" in found) == (layer > 0)
    assert found["layers.0.ffn.gate.tid2eid"].dtype == torch.int64
    assert found["embed.weight"].dtype == found["head.weight"].dtype == torch.bfloat16
    assert found["layers.3.hc_attn_fn"].dtype == found["layers.1.attn.compressor.ape"].dtype == torch.float32


def test_the_small_model_is_small(tmp_path):
    model = build(0)
    assert sum(p.numel() for p in model.parameters()) < 8e6
    export(model, tmp_path, "")
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 5e6


@pytest.mark.parametrize("part", ablation.PARTS)
def test_each_part_taken_away_changes_what_is_predicted_and_comes_back(corpus, part):
    model, ids = random_model(), tokens(corpus, count=1)
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad(), flagops.patch(model):
        whole = model(input_ids=ids).logits
        with ablation.PARTS[part](model):
            without = model(input_ids=ids).logits
        again = model(input_ids=ids).logits
    assert float((without - whole).abs().max()) > 1e-3
    assert torch.equal(again, whole)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


def test_the_entropy_of_experts(corpus, monkeypatch):
    monkeypatch.setattr(ablation, "LENGTH", LENGTH)
    model = random_model()
    even = ablation.entropies(model, corpus, 1)
    assert len(even) == 4
    assert all(0 < x <= 1 for x in even)
    for layer in model.model.layers[1:]:
        layer.mlp.gate.e_score_correction_bias.copy_(torch.tensor([100.0, 100.0, 0.0, 0.0]))
    assert all(abs(x - 0.5) < 2**-20 for x in ablation.entropies(model, corpus, 1)[1:]), "two of four, in float32"


@pytest.fixture
def small(monkeypatch):
    """The command at sizes of a test, with one length of documents."""
    for name, value in SMALL.items():
        monkeypatch.setitem(SIZES, name, value)
    for module in (loop, ablation):
        monkeypatch.setattr(module, "LENGTH", LENGTH)
    monkeypatch.setattr(loop, "STAGES", ((0.0, LENGTH, True),))
    monkeypatch.setattr(grid, "RATES", (1e-3,))


def train(*words):
    return main(["train", *map(str, words), "--steps", "3", "--tokens", str(LENGTH)])


def log(folder):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{name: x for name, x in line.items() if name != "seconds"} for line in lines]


@pytest.mark.drawn
def test_the_command_goes_on_where_it_was_interrupted(small, tmp_path, monkeypatch, capsys):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train(whole, "--every", 2) == 0
    once, taken = loop.Training._once, itertools.count(1)

    def interrupted(self, seen):
        if next(taken) == 3:
            raise KeyboardInterrupt
        return once(self, seen)

    monkeypatch.setattr(loop.Training, "_once", interrupted)
    capsys.readouterr()
    assert train(parts, "--every", 2) == 2
    assert capsys.readouterr().err.endswith("flagops: interrupted\n")
    assert len(log(parts)) == 3
    assert train(parts, "--every", 2) == 0
    assert "has taken 2 of 3 steps" in capsys.readouterr().out
    assert log(parts) == log(whole)
    assert [line["step"] for line in log(whole)] == [1, 2, 2, 3, 3]
    for name in ("checkpoint-0000003.safetensors", "model/model-00001-of-00001.safetensors", "model/config.json"):
        assert (parts / name).read_bytes() == (whole / name).read_bytes(), name
    assert (parts / "curve.png").read_bytes()[1:4] == b"PNG"


@pytest.mark.drawn
def test_what_a_run_is_asked_for_afterwards(small, tmp_path, capsys):
    run, other = tmp_path / "run", tmp_path / "other"
    assert train(run, "--ablate") == 2
    assert "no checkpoint" in capsys.readouterr().err
    assert train(run) == 0
    assert train(run, "--export", other) == 0
    for path in (run / "model").iterdir():
        assert (other / path.name).read_bytes() == path.read_bytes()
    assert train(run, "--ablate") == 0
    said = capsys.readouterr().out
    assert all(part.partition(":")[0] in said for part in ablation.PARTS)
    assert "entropy of the experts' shares" in said
    assert train(run, "--seed", 5) == 2
    assert "another run: seed 0 instead of 5" in capsys.readouterr().err


@pytest.mark.drawn
def test_a_grid_runs_each_cell_once(small, tmp_path, monkeypatch, capsys):
    assert train(tmp_path, "--grid") == 0
    table = capsys.readouterr().out
    assert "muon" in table
    assert "adamw" in table
    monkeypatch.delattr(loop.Training, "_once")
    assert train(tmp_path, "--grid") == 0
    assert capsys.readouterr().out == table
    assert train(tmp_path, "--grid", "--seed", 1) == 2
    assert "of another grid" in capsys.readouterr().err


@pytest.mark.slow
def test_the_loss_follows_transformers_for_200_steps(corpus):
    """No further than transformers' own from weights that one float32 rounding each has moved, four times over."""

    def losses(patched, moved=False):
        training = loop.Training(corpus, loop.Options(steps=2000, tokens=512, patched=patched), **SMALL)
        if moved:
            with torch.no_grad():
                for p in training.model.parameters():
                    p.mul_(1 + 2**-23)
        return np.array([x["loss"] for x in itertools.islice(training.run(), 200)])

    theirs = losses(False)
    bound = np.maximum.accumulate(np.abs(losses(False, moved=True) - theirs))
    apart = np.abs(losses(True) - theirs)
    assert theirs[:10].mean() - theirs[-10:].mean() > 1
    assert (apart <= 4 * bound + 1e-5).all(), (apart.max(), bound.max(), int(np.argmax(apart > 4 * bound + 1e-5)))
