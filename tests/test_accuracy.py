"""`flagops accuracy`: its statistics against closed forms, its documents, what fails and what it refuses."""

import copy
import functools
import json
import math
import os
import re
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("numba")

import flagops  # noqa: E402
from flagops import checkpoint, tables  # noqa: E402
from flagops.__main__ import main  # noqa: E402
from flagops.accuracy import measure, models, published  # noqa: E402
from flagops.accuracy.documents import Document, documents  # noqa: E402
from flagops.accuracy.models import Models  # noqa: E402
from flagops.accuracy.rows import REFERENCE, ROWS  # noqa: E402
from flagops.accuracy.statistics import BEYOND, Estimate, mean, share  # noqa: E402
from flagops.deepseek_v4.examples import random_deepseek_v4  # noqa: E402
from flagops.judge.mutants import forget  # noqa: E402
from flagops.testing import assert_near  # noqa: E402
from flagops.train.corpus import HELD, KINDS, KNOWN, LANGUAGE, RANDOM, VOCABULARY, Corpus, shipped  # noqa: E402
from flagops.train.export import export  # noqa: E402
from flagops.train.model import SIZES  # noqa: E402

PAGE = Path(__file__).parents[1] / "docs" / "accuracy.md"
SMALL = {
    "hidden_size": 128, "num_attention_heads": 2, "q_lora_rank": 128, "o_lora_rank": 64, "n_routed_experts": 4,
    "index_n_heads": 16, "index_topk": 8, "sliding_window": 16, "initializer_range": 0.1,
}  # fmt: skip
ROUNDINGS = 64  # of float64, in sums of a few dozen


@pytest.fixture(scope="module")
def corpus():
    return Corpus(shipped())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random DeepSeek-V4 in the published format, whose every kind of layer does something."""
    place = tmp_path_factory.mktemp("model") / "v4"
    export(random_deepseek_v4(0, **(SIZES | SMALL)), place, "random")
    return place


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    place = tmp_path_factory.mktemp("model") / "llama"
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, initializer_range=0.3,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.LlamaForCausalLM(config).save_pretrained(place)
    return place


@pytest.fixture(autouse=True)
def brief(monkeypatch):
    """A few words after the prompt."""
    monkeypatch.setattr(measure, "CONTINUATION", 3)


def accuracy(*words):
    return main(["accuracy", *map(str, words), "--tokens", "1", "--length", "64"])


def near(got, expected, weight=None):
    assert_near(np.float64(got), np.float64(expected), ROUNDINGS, None if weight is None else np.float64(weight))


def test_documents_of_equal_size_are_an_ordinary_sample(rng):
    sums = rng.standard_normal(50)
    found = mean(sums * 4, np.full(50, 4), ["one"] * 50)
    near(found.value, sums.mean(), 50)
    near(found.error, sums.std(ddof=1) / math.sqrt(50))


def test_more_tokens_that_say_the_same_tell_no_more(rng):
    sums, tokens = rng.integers(0, 9, 20), rng.integers(1, 9, 20)
    kinds = ["a", "b"] * 10
    once, often = mean(sums, tokens, kinds), mean(1024 * sums, 1024 * tokens, kinds)
    assert once == often
    assert once.error > 0


def test_only_what_varies_within_a_kind_is_an_error():
    assert mean([1, 3, 1, 3], [1, 1, 1, 1], ["a", "b", "a", "b"]) == Estimate(2.0, 0.0)
    assert mean([3, 1, 1, 3], [1, 1, 1, 1], ["a", "a", "b", "b"]) == Estimate(2.0, math.sqrt(8) / 4)


def test_a_constant_difference_has_no_error(rng):
    tokens = rng.integers(1, 99, 12)
    assert mean(tokens * 0.25, tokens, ["a"] * 12) == Estimate(0.25, 0.0)


def test_errors_are_as_large_as_they_say(rng):
    """Of 2000 corpora whose documents vary in size and in mean, the squares of errors in standard errors average what
    Student's do, within five of their own errors."""
    scores = []
    for _ in range(2000):
        tokens = rng.integers(50, 150, 60)
        means = rng.standard_normal(60) + np.repeat([0, 5, 9], 20)
        found = mean(tokens * means, tokens, ["a"] * 20 + ["b"] * 20 + ["c"] * 20)
        scores.append(((found.value - 14 / 3) / found.error) ** 2)
    room = 5 * np.std(scores) / math.sqrt(2000)
    assert 57 / 55 - room < np.mean(scores) < 57 / 55 + room


def test_one_document_of_a_kind_has_no_error():
    with pytest.raises(ValueError, match="one document of kind 'b'"):
        mean([1, 1, 1], [1, 1, 1], ["a", "a", "b"])


def test_no_token_has_no_mean():
    assert math.isnan(mean([0, 0], [0, 0], ["a", "a"]).value)


@pytest.mark.parametrize(
    ("estimate", "wrong"),
    [((0.5, 0), False), ((0.75, 0.125), False), ((0.75, 0.0625), True), ((-0.75, 0.0625), True), ((math.nan, 1), True)],
)
def test_beyond_is_three_errors_above_what_is_allowed_either_way(estimate, wrong):
    assert BEYOND == 3
    assert Estimate(*estimate).beyond(0.5) is wrong


def test_the_error_of_a_share():
    assert share(0.5, 64) == 0.0625
    assert share(1.0, 30) == 0.0


def test_published_scores_with_their_errors():
    """All but one are shares of as many questions as their errors are computed of."""
    odd = {
        (chip, score)
        for chip, scores in published.SCORES.items()
        for score, asked in zip(scores, published.QUESTIONS.values(), strict=True)
        if f"{100 * round(score * asked / 100) / asked:.2f}" != f"{score:.2f}"
    }
    assert odd == {("Iluvatar", 63.33)}
    rows = {row[0]: row for row in published.rows()}
    assert rows["Nvidia"][1] == "69.70 ± 3.3"
    assert rows["Kunlunxin"][2:4] == ("-8.59 ± 4.8", "-1.8")
    assert not any(abs(float(x)) > 2 for row in published.rows() for x in (row[3], row[6]) if x)


def test_documents_are_whole_rounds_of_every_kind(corpus):
    found = documents(corpus, 0, 1000, 128)
    assert [x.kind for x in found] == [*KINDS] * 2
    assert len(documents(corpus, 0, 2000, 128)) == 3 * len(KINDS)
    assert {tuple(x.ids.shape) for x in found} == {(1, 128)}
    again, other = documents(corpus, 0, 1000, 128), documents(corpus, 1, 1000, 128)
    assert all(torch.equal(x.ids, y.ids) for x, y in zip(found, again, strict=True))
    assert not any(torch.equal(x.ids, y.ids) for x, y in zip(found, other, strict=True))


class Pairs:
    """A tokenizer of two characters each, that says where they were."""

    def __call__(self, text, add_special_tokens, return_offsets_mapping):
        assert not add_special_tokens
        places = [(at, min(at + 2, len(text))) for at in range(0, len(text), 2)]
        return {"input_ids": [*range(len(places))], "offset_mapping": places}


def test_a_token_is_as_known_as_the_least_known_of_its_bytes(corpus, monkeypatch):
    codes = np.frombuffer("aé€b?".encode() + b"\xff!", np.uint8).astype(np.int64)  # 1, 2, 3, 1, 1 bytes and two
    sayable = np.array([KNOWN, KNOWN, KNOWN, LANGUAGE, LANGUAGE, KNOWN, KNOWN, KNOWN, RANDOM, KNOWN], np.int8)
    drawn = np.concatenate([[256], codes])[None], np.concatenate([[0], sayable])[None]
    monkeypatch.setattr(corpus, "batch", lambda *_, **__: drawn)
    found = documents(corpus, 0, 1, 64, Pairs())[0]
    assert found.sayable.tolist() == [KNOWN, LANGUAGE, RANDOM, KNOWN]
    assert found.ids.tolist() == [[0, 1, 2, 3]]


@pytest.mark.parametrize("chunk", [1 << 24, 4, 1])
def test_a_comparison_by_hand(monkeypatch, chunk):
    monkeypatch.setattr(measure, "_CHUNK", chunk)
    sayable = torch.tensor([RANDOM, LANGUAGE, KNOWN, RANDOM], dtype=torch.int8)
    document = Document("text", torch.tensor([[3, 0, 1, 2]]), sayable)
    even = torch.zeros(3, 4)
    skewed = torch.tensor([0.5, 0.25, 0.125, 0.125]).log().expand(3, 4)
    nats, difference, kl, agreement, right, right_difference = measure.compared(even, skewed, document)
    two = math.log(2)
    for got, expected in ((nats, 3 * two), (difference, -two), (kl, two / 2)):
        assert_near(np.float32(got), np.float32(expected), 8, np.float32(4))
    assert (agreement, right, right_difference) == (2, 0, 0)
    same = measure.compared(skewed, skewed, document)
    assert same[1:] == [0, 0, 2, 0, 0]


@pytest.mark.drawn
def test_eight_bits_enter_linear_layers_and_both_products_of_an_expert(folder, tmp_path):
    model = Models(folder, tmp_path)._wide("float32")
    eight = copy.deepcopy(model)
    models.rounded(eight, ["layers.1.ffn.experts.0.w1.weight", "layers.1.attn.wq_a.weight"])
    x = torch.randn(5, SMALL["hidden_size"])
    codes, scale = flagops.int8_quantize(x)
    own, theirs = (m.model.layers[1].self_attn.q_a_proj for m in (eight, model))
    assert torch.equal(own(x), theirs(codes * scale))
    own, theirs = (m.model.layers[1].mlp.experts for m in (eight, model))
    which, weight = torch.randint(4, (5, 2)), torch.rand(5, 2)
    gate = theirs._apply_gate
    theirs._apply_gate = lambda y: (lambda c, s: c * s)(*flagops.int8_quantize(gate(y).detach()))
    assert torch.equal(own(x, which, weight), theirs(codes * scale, which, weight))
    with pytest.raises(ValueError, match="is no weight of a linear layer"):
        models.rounded(eight, ["norm.weight"])


@pytest.mark.skipif(not PAGE.exists(), reason="not a checkout")
def test_the_page_has_what_the_source_says():
    page = PAGE.read_text(encoding="utf-8")
    assert tables.markdown(published.COLUMNS, published.rows()) in page
    for row in ROWS:
        assert f"| `{row.name}` | {row.about} | {row.allowed:g} | {row.why} |" in page


def test_every_row_says_before_what_it_may_differ_by_and_why():
    assert len({row.name for row in (REFERENCE, *ROWS)}) == len(ROWS) + 1
    assert all(row.allowed > 0 and row.why for row in ROWS)


@pytest.mark.drawn
def test_the_table_of_a_deepseek_v4(folder, tmp_path, capsys):
    """Every row that needs no naming; of one the prompt, text and picture."""
    numbers, picture, page = (tmp_path / name for name in ("numbers.json", "picture.png", "table.md"))
    code = accuracy(folder, "--json", numbers, "--plot", picture, "--markdown", page, "--greedy")
    said = capsys.readouterr().out
    found = json.loads(numbers.read_text())
    rows = {row["name"]: row for row in found["rows"]}
    assert list(rows) == ["reference", *(row.name for row in ROWS if not row.asked)]
    assert not found["left_out"]
    assert picture.read_bytes()[1:4] == b"PNG"
    assert rows["reference"]["difference"] == {"value": 0.0, "error": 0.0}
    exact = {row.name for row in ROWS if row.allowed == ROWS[0].allowed and not row.asked}
    assert not any(rows[name]["wrong"] for name in exact)
    assert all(
        rows[name]["kl"]["value"] > 1000 * rows["numba"]["kl"]["value"] for name in rows.keys() - exact - {"reference"}
    )
    assert rows["w4a8"]["kl"]["value"] > rows["int8"]["kl"]["value"]
    passed = {name: [*row["passed"]] for name, row in rows.items() if row["replaced"] not in (None, 1)}
    alone = ["grouped_output_projection"]  # its two layers, one by one
    assert passed == {"packed": alone, "fp8": alone}
    wrong = [name for name, row in rows.items() if row["wrong"]]
    assert code == (1 if wrong else 0)
    for name, row in rows.items():
        assert re.search(rf"^ *{name} ", said, re.MULTILINE)
        assert f"\n| {name} |" in page.read_text()
        assert bool(re.search(rf"^{name} differs by", said, re.MULTILINE)) == row["wrong"]
        assert set(row["kinds"]) == set(KINDS)
        nats = row["nats"]["value"]
        near(nats - rows["reference"]["nats"]["value"], row["difference"]["value"], nats)
    assert found["tokens"] == 2 * len(KINDS) * 64
    assert "Kunlunxin" in said


@pytest.fixture
def one_percent_off(monkeypatch):
    """torch's rms_norm, 1 % too large."""
    import flagops.kernels.torch.norm as home

    right = home.rms_norm

    @functools.wraps(right)
    def rms_norm(*arguments):
        right(*arguments)
        arguments[-1].mul_(1.01)

    forget()
    monkeypatch.setattr(home, "rms_norm", rms_norm)
    yield
    monkeypatch.undo()
    forget()


@pytest.mark.drawn
def test_a_kernel_that_is_off_by_one_percent_fails(folder, one_percent_off, capsys):
    assert accuracy(folder, "--row", "torch", "--row", "numba") == 1
    said = capsys.readouterr().out
    assert "torch differs by" in said
    assert "numba differs by" not in said


@pytest.mark.drawn
def test_rows_that_apply_to_another_model(llama, tmp_path, capsys):
    numbers = tmp_path / "numbers.json"
    code = accuracy(llama, "--json", numbers)
    found = json.loads(numbers.read_text())
    wrong = {row["name"] for row in found["rows"] if row["wrong"]}
    assert code == bool(wrong)
    assert wrong <= {"int8", "w4a8"}  # which random weights may not stand
    assert found["left_out"].keys() == {"official", "packed", "packed-fp8", "packed-official", "fp8"}
    assert "left out: packed, it needs weights in FP4 or FP8" in capsys.readouterr().out
    assert {"int8", "w4a8", "numba", "torch-bf16"} <= {row["name"] for row in found["rows"]}


def refused(capsys, *words):
    assert accuracy(*words) == 2
    return capsys.readouterr().err


def test_what_is_refused_and_why(folder, llama, tmp_path, capsys, monkeypatch):
    assert "no picture's name ends so" in refused(capsys, folder, "--plot", tmp_path / "x.pictures")
    short = tmp_path / "short.txt"
    short.write_text("short")
    assert "corpus has 5 bytes" in refused(capsys, folder, "--text", short)
    assert f"at least {2 * HELD * 4096}" in refused(capsys, folder, "--text", short)
    assert "no row 'fp16'" in refused(capsys, folder, "--row", "fp16")
    assert "row packed does not apply" in refused(capsys, llama, "--row", "packed")
    if os.environ.get("TRITON_INTERPRET") != "1":
        assert "row triton:" in refused(capsys, folder, "--row", "triton")
    assert main(["accuracy", str(folder), "--length", "63"]) == 2
    assert "63 tokens are too short" in capsys.readouterr().err

    def other(source, name, **changed):
        place = tmp_path / name
        place.mkdir()
        for path in source.iterdir():
            os.link(path, place / path.name)
        config = json.loads((place / "config.json").read_text())
        (place / "config.json").unlink()
        (place / "config.json").write_text(json.dumps(config | changed))
        return place

    said = refused(capsys, other(folder, "words", vocab_size=300))
    assert "a vocabulary of 300 and no tokenizer" in said
    said = refused(capsys, other(llama, "shape", intermediate_size=96))
    assert re.search(r"proj.weight has the shape \[\d+, \d+\], expected \[\d+, \d+\]", said)
    assert "lacks" in refused(capsys, other(llama, "layers", num_hidden_layers=3))
    assert "no language model of type 'nope'" in refused(capsys, other(llama, "kind", model_type="nope"))
    (tmp_path / "empty").mkdir()
    assert "empty" in refused(capsys, tmp_path / "empty")


@pytest.mark.drawn
def test_what_one_row_cannot_is_left_out_with_the_reason_unless_it_was_asked_for(llama, capsys, monkeypatch):
    def no(*_, **__):
        raise checkpoint.Refused("it holds a dragon")

    monkeypatch.setattr(checkpoint, "convert", no)
    assert accuracy(llama) == 0
    assert "left out: int8, it holds a dragon" in capsys.readouterr().out
    assert accuracy(llama, "--row", "int8") == 2
    assert "it holds a dragon" in capsys.readouterr().err


@pytest.mark.slow
def test_real_weights(capsys):
    from flagops.tools.demo import missing_weights

    if missing_weights():
        pytest.skip(missing_weights())
    assert main(["accuracy", "smollm2", "--tokens", "1", "--length", "128", "--row", "numba", "--row", "bf16"]) == 0
    assert "known, right" in capsys.readouterr().out
