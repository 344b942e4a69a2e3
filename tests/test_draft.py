"""The draft layer guesses, the model decides: the tokens are those of decoding one by one, and fewer forwards."""

import contextlib
import copy
import json
import re
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

sys.path.insert(0, str(Path(__file__).parent))
import draft_data  # noqa: E402
import ranks  # noqa: E402
from draft_data import streams  # noqa: E402
from load_data import floating  # noqa: E402
from patching import BOUND  # noqa: E402

import flagops  # noqa: E402
from flagops import checkpoint  # noqa: E402
from flagops.__main__ import main  # noqa: E402
from flagops.checkpoint.memory import resident  # noqa: E402
from flagops.deepseek_v4.examples import TRAINED, held_out  # noqa: E402
from flagops.packed.command import greedy  # noqa: E402

IDS = [5, 9, 33, 2, 17, 40, 8, 8, 21, 3, 60, 12]


@pytest.fixture(scope="module")
def random(tmp_path_factory):
    return draft_data.random(tmp_path_factory.mktemp("random") / "src")


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    return draft_data.fitted(tmp_path_factory.mktemp("fitted") / "src")


@contextlib.contextmanager
def watched(model):
    """Within it, the tokens of each forward of a model."""
    read = []
    hook = model.register_forward_pre_hook(
        lambda _, args, given: read.append(given["input_ids"][0].tolist()), with_kwargs=True
    )
    yield read
    hook.remove()


def decoded(model, ids, count, drafts):
    """Tokens, held to what the forwards have read, and the report of this decoding."""
    before = model.flagops_draft.report()
    with watched(model) as read:
        found = list(model.flagops_draft.generate(ids, count, drafts))
    after = model.flagops_draft.report()
    assert read.pop(0) == ids
    at, accepted, guessed = 0, 0, 0
    for first, *guesses in read:
        assert first == found[at]
        right = 0
        while right < len(guesses) and found[at + 1 + right : at + 2 + right] == [guesses[right]]:
            right += 1
        at, accepted, guessed = at + right + 1, accepted + right, guessed + len(guesses)
        assert len(guesses) <= drafts
    assert at == len(found) - 1
    told = (after.drafted - before.drafted, after.accepted - before.accepted, after.forwards - before.forwards)
    assert told == (guessed, accepted, len(read))
    return found, accepted / guessed


def clear(model, ids, count):
    """The tokens without drafts, of logits whose two largest are never as near as float32 rounds."""
    nearest = []
    hook = model.lm_head.register_forward_hook(lambda *given: nearest.append(-given[2][0, -1].topk(2).values.diff()))
    found = list(greedy(model, ids, count))
    hook.remove()
    assert min(nearest) > 2 * BOUND
    return found


@pytest.mark.drawn
@pytest.mark.parametrize("kind", ["text", "facts"])
def test_the_text_is_that_without_drafts(fitted, kind):
    """Some guesses are right and some are not; the prompt is longer than a window."""
    model = flagops.load(fitted, draft=True, dtype="float32", activations="none")
    ids = held_out(150, kind)[0].tolist()
    expected = clear(model, ids, 32)
    for drafts in (1, 4):
        found, share = decoded(model, ids, 32, drafts)
        assert found == expected
        assert 0 < share < 1


def test_wrong_guesses_change_nothing(random):
    model = flagops.load(random, draft=True, dtype="float32", activations="none")
    expected = clear(model, IDS, 24)
    for drafts in (1, 2):
        found, share = decoded(model, IDS, 24, drafts)
        assert found == expected
        assert share < 1


def exact(folder):
    """The model and its draft layer, expanded to float64, of transformers' own modules alone: the definition."""
    tensors = dict(checkpoint.load(folder, "float32"))
    made = draft_data.model()
    draft = {name.removeprefix("mtp.0."): tensors.pop(name) for name in [*tensors] if name.startswith("mtp.0.")}
    own = copy.deepcopy(made.config)
    own.num_hidden_layers, own.layer_types, own.mlp_layer_types = 1, ["sliding_attention"], ["moe"]
    one = transformers.DeepseekV4ForCausalLM(own)
    tops = {"norm.weight", "hc_head_fn", "hc_head_base", "hc_head_scale"}
    block = {name if name in tops else f"layers.0.{name}": x for name, x in draft.items()}
    for target, found in (
        (made, tensors),
        (one, block | {key: tensors[key] for key in ("embed.weight", "head.weight")}),
    ):
        state = {name: data_of(found, name) for name in target.state_dict()}
        target.load_state_dict(state)
        target.double().set_experts_implementation("eager")
    return made.eval(), one.eval(), {name: x.double() for name, x in draft.items()}


def data_of(tensors, name):
    """A parameter of transformers' model from the tensors of an official checkpoint."""
    from flagops.train.export import official

    stem = re.sub(r"(gate_up|down)_proj$", "", official(name))
    if stem == official(name):
        return tensors[stem]
    parts = ("w2",) if name.endswith("down_proj") else ("w1", "w3")
    count = sum(key.startswith(stem) and key.endswith("w2.weight") for key in tensors)
    return torch.stack([torch.cat([tensors[f"{stem}{i}.{part}.weight"] for part in parts]) for i in range(count)])


def guesses(made, one, draft, count, dtype):
    """Logits of guesses after `IDS`, each of all tokens again and without a cache."""
    made, one = made.to(dtype), one.to(dtype)
    draft = {name: x.to(dtype) for name, x in draft.items()}
    ids = torch.tensor([IDS])
    with torch.no_grad():
        h, tokens, found = streams(made, ids), [made(input_ids=ids).logits[:, -1:].argmax(-1)], []
        for _ in range(count):
            following = torch.cat([ids[:, 1:], *tokens], 1)
            e = torch.nn.functional.rms_norm(one.model.embed_tokens(following), (256,), draft["enorm.weight"], 1e-6)
            x = torch.nn.functional.rms_norm(h, (256,), draft["hnorm.weight"], 1e-6) @ draft["h_proj.weight"].T
            x = x + (e @ draft["e_proj.weight"].T).unsqueeze(2)
            seen = []
            hook = one.model.hc_head.register_forward_pre_hook(lambda _, given: seen.append(given[0]))  # noqa: B023
            block = one.model.layers[0].register_forward_pre_hook(lambda _, given: (x, *given[1:]))  # noqa: B023
            found.append(one(inputs_embeds=e, use_cache=False).logits[0, -1])
            hook.remove()
            block.remove()
            tokens.append(found[-1].argmax()[None, None])
            h = torch.cat([h, seen[0][:, -1:]], 1)
    return torch.stack(found)


def test_guesses_are_those_of_the_definition(random):
    """As near to float64 as transformers' own float32; the layer reads no more of the prompt than its window."""
    parts = exact(random)
    wanted = guesses(*parts, 2, torch.float64)
    theirs = (guesses(*parts, 2, torch.float32) - wanted).abs().max()
    model = flagops.load(random, draft=True, dtype="float32", activations="none")
    logits = []
    hook = model.lm_head.register_forward_hook(lambda *given: logits.append(given[2][0, -1]))
    list(model.flagops_draft.generate(IDS, 4, 2))
    hook.remove()
    ours = torch.stack(logits[1:3])  # after that of the prompt
    assert (ours - wanted).abs().max() <= 4 * theirs
    assert wanted.std() > 0.1


@pytest.mark.parametrize("options", [{}, {"pack": True}, {"numerics": "official"}], ids=str)
def test_options_of_loading(random, options):
    """In bfloat16, by kernels that are batch invariant: tokens are the same however near two of them are."""
    model = flagops.load(random, draft=True, backend="numba", **options)
    with flagops.enable(backend="numba"):
        assert decoded(model, IDS, 16, 2)[0] == list(greedy(model, IDS, 16))
    assert not model.flagops.report().bypassed


def test_experts_of_the_layer_are_read_on_demand(random):
    expected = list(flagops.load(random, draft=True).flagops_draft.generate(IDS, 16, 2))
    model = flagops.load(random, draft=True, memory=resident() + (8 << 20))
    assert list(model.flagops_draft.generate(IDS, 16, 2)) == expected
    assert len(model.flagops_arena._experts) == 4
    assert model.flagops_arena.report().reads > 0


@pytest.mark.drawn
def test_two_ranks_are_one(random):
    """Divided as the model is; every rank makes the same tokens."""
    model = flagops.load(random, draft=True, dtype="float32", activations="none")
    expected = clear(model, IDS, 12)
    given = {"folder": random, "ids": IDS, "count": 12, "drafts": 2, "dtype": "float32", "activations": "none"}
    (found,) = ranks.launch(2, [("drafted", given)])
    assert decoded(model, IDS, 12, 2)[0] == expected
    assert found == [(expected, model.flagops_draft.report(), 2)] * 2


def test_it_ends_with_the_text(fitted):
    """At a token that ends it, though more were accepted behind it."""
    model = flagops.load(fitted, draft=True, dtype="float32", activations="none")
    ids = held_out(150, "facts")[0].tolist()
    whole = list(greedy(model, ids, 24))
    for last in sorted(set(whole[4:]), key=whole.index)[:4]:
        model.generation_config.eos_token_id = last
        assert list(model.flagops_draft.generate(ids, 24, 3)) == whole[: whole.index(last) + 1]
    for count in (1, 2, 3):
        model.generation_config.eos_token_id = None
        assert list(model.flagops_draft.generate(ids, count, 3)) == whole[:count]


def test_the_layer_is_saved_and_copied_with_the_model(random, tmp_path):
    model = flagops.load(random, draft=True)
    expected = list(model.flagops_draft.generate(IDS, 8, 2))
    model.save_pretrained(tmp_path / "same")
    for path in random.iterdir():
        assert (tmp_path / "same" / path.name).read_bytes() == path.read_bytes()
    again = copy.deepcopy(model)
    assert again.flagops_draft._model is again
    assert list(again.flagops_draft.generate(IDS, 8, 2)) == expected
    model.flagops.disable()
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert len(list(model.flagops_draft.generate(IDS, 8, 2))) == 8


def test_the_layer_in_transformers_names(random, tmp_path):
    """As a converter may write it, below ``model`` and by the names of transformers' modules."""
    names = {"attn.": "self_attn.", "ffn.": "mlp.", "attn_norm.": "input_layernorm.", "wq_a": "q_a_proj"}

    def rename(tensors):
        for name in [name for name in tensors if name.startswith("mtp.")]:
            found = name
            for old, new in names.items():
                found = re.sub(rf"(?<=\.){re.escape(old)}", new, found)
            tensors[f"model.{found}"] = tensors.pop(name)

    src = draft_data.random(tmp_path / "src", rename)
    expected = list(flagops.load(random, draft=True).flagops_draft.generate(IDS, 12, 2))
    assert list(flagops.load(src, draft=True).flagops_draft.generate(IDS, 12, 2)) == expected


REFUSED = [
    (lambda t: t.pop("mtp.0.enorm.weight"), {}, ["mtp.0.enorm.weight", "missing"]),
    (lambda t: t.update({"mtp.0.main_norm.weight": torch.ones(3)}), {}, ["mtp.0.main_norm.weight", "no part of"]),
    (lambda t: t.update({"mtp.1.norm.weight": torch.ones(3)}), {}, ["mtp.0 and mtp.1", "expected one"]),
    (lambda t: t.update({"mtp.0.hnorm.weight": torch.ones(3)}), {}, ["mtp.0.hnorm.weight", "[3]", "[256]"]),
    (lambda t: None, {"compress_ratios": [0, 4, 128, 4]}, ["config.json", "compress_ratios", "expected 0"]),
]  # fmt: skip


@pytest.mark.parametrize(("edit", "said", "named"), REFUSED, ids=range(len(REFUSED)))
def test_layers_that_are_refused(edit, said, named, tmp_path):
    src = draft_data.random(tmp_path / "src", edit, **said)
    with pytest.raises(checkpoint.Refused) as refusal:
        flagops.load(src, draft=True)
    for word in named:
        assert word in str(refusal.value)
    assert flagops.load(src).flagops_draft is None


def test_checkpoints_without_the_layer(tmp_path):
    with pytest.raises(checkpoint.Refused, match=r"no draft layer, no tensor mtp\.0"):
        flagops.load(TRAINED, draft=True)
    with pytest.raises(checkpoint.Refused, match="is a qwen3: only DeepSeek-V4's draft layer is known"):
        flagops.load(floating(tmp_path, "qwen3"), draft=True)


def test_numbers_that_are_refused(random):
    draft = flagops.load(random, draft=True).flagops_draft
    for drafts in (0, 3):  # a window of four
        with pytest.raises(ValueError, match=f"drafts: {drafts}, expected 1 to 2"):
            draft.generate(IDS, 4, drafts)
    for ids, count in (([], 4), (IDS, 0)):
        with pytest.raises(ValueError, match="expected tokens to go on from"):
            draft.generate(ids, count, 1)


def test_the_command(fitted, capsys):
    words = ["generate", str(fitted), "--ids", " ".join(map(str, held_out(60, "facts")[0].tolist()))]
    words += ["--dtype", "float32", "--activations", "none", "--max-new-tokens", "20"]
    assert main([*words, "--json"]) == 0
    plain = json.loads(capsys.readouterr().out)
    assert main([*words, "--json", "--draft", "2"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (plain["ids"], plain["drafts"]) == (told["ids"], None)
    made = told["drafts"]
    assert made["accepted"] + made["forwards"] + 1 == len(told["ids"])
    assert main([*words, "--draft", "2"]) == 0
    share = f"{made['accepted']} of {made['drafted']} tokens accepted"
    assert re.search(
        rf"made at \d+\.\d a second.*\ndrafts: {share} \(\d+%\), \d\.\d\d tokens a forward", capsys.readouterr().out
    )
    assert main(["generate", str(TRAINED), "--ids", "3", "--draft", "2"]) == 2
    assert "no draft layer" in capsys.readouterr().err
