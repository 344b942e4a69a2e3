"""A checkpoint that runs as it is stored: its packed products are those of the references, the whole is the model."""

import copy
import json
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

sys.path.insert(0, str(Path(__file__).parent))
from load_data import MODELS, data, floating, generated, held, logits, quantised_by_transformers, source  # noqa: E402

import flagops  # noqa: E402
from flagops import checkpoint, testing  # noqa: E402
from flagops.__main__ import main  # noqa: E402
from flagops.packed import PackedExperts, PackedLinear, StackedExperts  # noqa: E402


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    return source(tmp_path_factory.mktemp("official") / "src", "original")


@pytest.fixture(scope="module")
def expanded(official, tmp_path_factory):
    """The converted checkpoint: BF16 holds FP4 and FP8 times powers of two exactly."""
    folder = tmp_path_factory.mktemp("expanded") / "dst"
    checkpoint.convert(official, folder)
    return folder


def wide(folder, dtype):
    made = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager")
    made.set_experts_implementation("eager")  # the only one that takes float64
    return made.eval()


@pytest.mark.drawn
@pytest.mark.parametrize("activations", ["fp8", "none"])
@pytest.mark.parametrize("naming", ["original", "transformers", "stacked"])
def test_every_packed_product_of_a_model_is_within_the_bound_of_its_reference(
    naming, activations, tmp_path, monkeypatch
):
    model = flagops.load(source(tmp_path / "src", naming), activations=activations)
    with_references = held(monkeypatch)
    answer = logits(model, 12)
    assert torch.isfinite(answer).all()
    assert answer.dtype is torch.bfloat16
    stacked = naming == "stacked" and activations == "fp8"
    expected = {"fp8_matmul"} | ({"moe_experts"} if stacked else {"fp4_matmul"})
    expected |= {"fp8_quantize", "grouped_output_projection"} if activations == "fp8" else set()
    assert with_references.calls.keys() == expected
    assert not model.flagops.report().bypassed


@pytest.mark.drawn
@pytest.mark.parametrize("pack", [False, True])
def test_unquantised_activations_in_float32_are_the_expanded_model(official, expanded, pack):
    """As near to float64 as transformers' own float32: weights and scales are exact in both, sums are not."""
    exact = logits(wide(expanded, torch.float64))
    theirs = (logits(wide(expanded, torch.float32)) - exact).abs().max()
    ours = logits(flagops.load(official, dtype="float32", activations="none", pack=pack))
    assert ours.dtype is torch.float32
    assert (ours - exact).abs().max() <= 4 * theirs


@pytest.mark.parametrize("name", MODELS)
def test_models_of_floating_scales(name, tmp_path, monkeypatch):
    src = floating(tmp_path, name)
    packed = flagops.load(src, activations="none", dtype="float32")
    wanted = transformers.AutoModelForCausalLM.from_config(MODELS[name](), dtype=torch.float64)
    state = dict(checkpoint.load(src, "float32"))
    exact_names = wanted.state_dict().keys()
    for layer in {key.rpartition(".experts.")[0] for key in exact_names if ".experts." in key}:
        each = [
            [state.pop(f"{layer}.experts.{i}.{part}_proj.weight") for part in ("gate", "up", "down")] for i in range(4)
        ]
        state[f"{layer}.experts.gate_up_proj"] = torch.stack([torch.cat(expert[:2]) for expert in each])
        state[f"{layer}.experts.down_proj"] = torch.stack([expert[2] for expert in each])
    wanted.set_experts_implementation("eager")
    wanted.load_state_dict(state, strict=name != "qwen3")
    wanted.tie_weights()
    exact = logits(wanted.eval())
    theirs = (logits(wanted.float()) - exact).abs().max()
    assert (logits(packed) - exact).abs().max() <= 4 * theirs
    with_references = held(monkeypatch)
    assert torch.isfinite(logits(flagops.load(src), 12)).all()
    assert with_references.calls.keys() == {"fp8_matmul", "fp8_quantize"}


def test_experts_apart_are_those_of_the_operator(official):
    apart = next(m for m in flagops.load(official).modules() if isinstance(m, PackedExperts))
    stacked = next(m for m in flagops.load(official, pack=True).modules() if isinstance(m, StackedExperts))
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(9, 256, generator=generator).bfloat16()
    indices = torch.randint(0, 4, (9, 2), generator=generator)  # some of them twice
    weights = torch.rand(9, 2, generator=generator)
    for module in (apart, stacked):
        got = module(x, indices, weights)
        testing.assert_of("moe_experts", got, x, weights, indices, *stacked.stacked, apart.limit)


@pytest.mark.parametrize("name", ["v4", "qwen3", "qwen3-moe"])
def test_what_transformers_loads_quantised_is_patched_to_the_same_kernels(name, official, tmp_path):
    src = official if name == "v4" else floating(tmp_path, name)
    loaded = flagops.load(src, pack=True)
    theirs = quantised_by_transformers(src, loaded.state_dict())
    handle = flagops.patch(theirs)
    assert torch.equal(logits(theirs), logits(loaded))
    report = handle.report()
    assert not report.bypassed
    assert {row.op for row in report.rows if row.passed} == set()
    handle.disable()
    assert not any("forward" in module.__dict__ for module in theirs.modules())


def test_the_head_gets_a_token_as_it_was_made(official):
    """With a slice's strides torch takes the product in bfloat16 for one of batches: forty times slower."""
    model, seen = flagops.load(official), []
    model.lm_head.register_forward_pre_hook(lambda head, args: seen.append(args[0]))
    with torch.no_grad():
        model(torch.arange(20)[None], logits_to_keep=1)
    (x,) = seen
    assert x.shape[:2] == (1, 1)
    assert x.stride() == torch.empty(x.shape).stride()


def test_a_model_generates(official):
    model = flagops.load(official)
    ids = torch.randint(2, 64, (1, 12), generator=torch.Generator().manual_seed(0))
    once = model.generate(ids, max_new_tokens=6, do_sample=False)
    assert once.shape == (1, 18)
    assert torch.equal(once, flagops.load(official).generate(ids, max_new_tokens=6, do_sample=False))


def test_the_command_generates_the_models_own_tokens(official, tmp_path, capsys):
    tokenizers = pytest.importorskip("tokenizers")
    src = tmp_path / "src"
    shutil.copytree(official, src)
    words = {f"w{i}": i for i in range(64)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "w0"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.save(str(src / "tokenizer.json"))
    (src / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    ids = torch.tensor([[5, 9, 33, 2]])
    expected = flagops.load(src).generate(ids, max_new_tokens=5, do_sample=False)[0, 4:].tolist()
    found = []
    for words in (["--prompt", "w5 w9 w33 w2"], ["--ids", "5 9 33 2", "--memory", "64GiB"]):
        assert main(["generate", str(src), "--max-new-tokens", "5", "--json", *words]) == 0
        found.append(json.loads(capsys.readouterr().out))
        assert found[-1]["ids"] == expected
    assert found[0]["text"].split() == [f"w{i}" for i in expected]
    assert found[0]["experts"] is None
    assert found[1]["experts"]["reads"] > 0
    assert main(["generate", str(src), "--prompt", "w5 w9", "--memory", "64GiB", "--max-new-tokens", "2"]) == 0
    said = capsys.readouterr().out
    assert "loaded in" in said
    assert "were in the arena" in said


def test_disabling_leaves_packed_layers(official, expanded):
    """What remains is transformers' own code around them: as near as in the model that is expanded."""
    exact = logits(wide(expanded, torch.float64))
    model = flagops.load(official, dtype="float32", activations="none")
    model.flagops.disable()
    theirs = (logits(wide(expanded, torch.float32)) - exact).abs().max()
    assert (logits(model) - exact).abs().max() <= 4 * theirs
    assert any(isinstance(module, PackedLinear) for module in model.modules())


def test_copies_and_casts_keep_the_codes(official):
    model = flagops.load(official)
    answer = logits(model)
    assert torch.equal(logits(copy.deepcopy(model)), answer)
    state = {name: x.clone() for name, x in model.state_dict().items()}
    for name, x in model.half().state_dict().items():
        if x.dtype.itemsize == 1:
            assert torch.equal(x.view(torch.uint8), state[name].view(torch.uint8)), name
        else:
            assert x.dtype in (torch.float16, torch.int64), name


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("naming", ["original", "stacked"])
def test_saving_writes_the_checkpoint_back(naming, pack, tmp_path):
    src = source(tmp_path / "src", naming)
    model = flagops.load(src, pack=pack)
    model.save_pretrained(tmp_path / "same")
    files = {path.name: path.read_bytes() for path in src.iterdir()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "same").iterdir()} == files
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight.mul_(2)
        model.lm_head.weight[3] = 0
    model.save_pretrained(tmp_path / "changed")
    before, after = data.read_any(src), data.read_any(tmp_path / "changed")
    differing = {key for key, x in before.items() if not torch.equal(x.view(torch.uint8), after[key].view(torch.uint8))}
    names = {"layers.1.attn_norm.weight", "head.weight"}
    if naming == "stacked":
        names = {"model.layers.1.input_layernorm.weight", "lm_head.weight"}
    assert differing == names
    assert torch.equal(logits(flagops.load(tmp_path / "changed", pack=pack)), logits(model))


CHILD = """
    import sys, torch
    import flagops
    from flagops.checkpoint import memory

    def answer(model):
        with torch.no_grad():
            return model(input_ids=torch.arange(96)[None] % 64).logits

    answer(flagops.load(sys.argv[1]))  # compiles, and imports what it needs
    before = memory.resident()
    model = flagops.load(sys.argv[2])
    loaded = memory.resident()
    answer(model)
    print(loaded - before, memory.peak() - before)
"""
BUDGET = 64 << 20


@pytest.mark.drawn
def test_a_process_stays_within_the_checkpoint_and_a_budget(official, tmp_path):
    """Loading takes next to nothing, a forward through every expert what is stored; expanded it would be four times."""
    src, size = generated(tmp_path / "src", n_routed_experts=32, hidden_size=1024, moe_intermediate_size=1024)
    assert size > 2 * BUDGET
    command = [sys.executable, "-c", textwrap.dedent(CHILD), str(official), str(src)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    loaded, peak = map(int, done.stdout.split())
    assert loaded < BUDGET
    assert peak < size + BUDGET
