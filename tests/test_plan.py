"""`flagops plan`: what a token costs, held to figures that others have counted and to sums made otherwise."""

import itertools
import json
import math
import random
import re
from collections import OrderedDict
from pathlib import Path

import pytest

from flagops.__main__ import main
from flagops.checkpoint.plan import Plan
from flagops.checkpoint.source import Source
from flagops.deepseek_v4.examples import TRAINED
from flagops.plan import checkpoint, machine, times
from flagops.plan.cost import Step, cache_held, hit, loads
from flagops.plan.machine import Machine
from flagops.plan.model import FORMATS, MODELS, Model, Role, parts

SMALL = Model(
    hidden=256, sliding=1, csa=2, hca=1, heads=4, q_rank=128, groups=2, experts=8, width=128, vocabulary=512,
    hash_layers=1, active=2, head_dim=128, o_rank=128, index_heads=8, index_dim=64, index_keys=5, window=6, hca_ratio=8,
)  # fmt: skip
HERE = Machine(
    "here", 1e10, reads={"bf16": 8e9, "f32": 9e9, "fp8": 5e9, "fp4": 4e9, "attention": 1e10, "scores": 1e10},
    rates={"bf16": 5e10, "f32": 6e10, "fp8": 4e10, "fp4": 3e10, "attention": 2e10, "scores": 1e10},
    layers={"sliding": 1e-3, "csa": 2e-3, "hca": 3e-3}, experts=1e-4, step=5e-4, process=10**8, disk=1e9, single=5e9,
)  # fmt: skip


def of_role(found, *roles):
    return [load for load in found if load.role in roles]


@pytest.mark.parametrize(("name", "billions"), [("v4-flash", 13.3), ("v4-pro", 48.9)])
def test_a_token_multiplies_with_the_parameters_that_are_active(name, billions):
    """The counts of the specification, which leave the embedding out; its cache has no parameters."""
    step = Step(1, 10**5)
    found = loads(MODELS[name], parts(MODELS[name], "checkpoint"), step)
    flops = sum(load.flops for load in found if load.kind not in ("attention", "scores"))
    assert round(flops / 2 / 1e9, 1) == billions


def test_the_bytes_of_a_token_are_those_that_others_have_counted():
    """11.2 GB of weights for a token of V4-Flash (colibri), 107 + 105 MB a layer by the operator specification."""
    found = loads(MODELS["v4-flash"], parts(MODELS["v4-flash"], "checkpoint"), Step(1, 10**5))
    weights_read = sum(load.read for load in found if load.kind not in ("attention", "scores"))
    assert round(weights_read / 1e9, 1) == 11.2
    assert round(sum(x.read for x in of_role(found, Role.ATTENTION, Role.PROJECTION)) / 43e6) == 107
    assert round(sum(x.read for x in of_role(found, Role.SHARED, Role.EXPERTS)) / 43e6) == 105


@pytest.mark.parametrize(
    ("tokens", "csa", "hca", "scores", "keys"),
    [(8 << 10, 84, 25, 34, 0.14), (64 << 10, 84, 84, 268, 1.1), (1 << 20, 84, 1091, 4295, 17.8)],
)
def test_attention_and_scores_are_those_of_the_specification(tokens, csa, hca, scores, keys):
    """Its table of one token and layer of V4-Flash after so many: MFLOP, and MB of the indexer's keys in FP4."""
    one = dict(vars(MODELS["v4-flash"])) | {"sliding": 0}
    found = {
        kind: {x.kind: x for x in loads(Model(**one | counts), [], Step(1, tokens - 1), "fp8")}
        for kind, counts in (("csa", {"csa": 1, "hca": 0}), ("hca", {"csa": 0, "hca": 1}))
    }
    assert round(found["csa"]["attention"].flops / 1e6) == csa
    assert round(found["hca"]["attention"].flops / 1e6) == hca
    assert round(found["csa"]["scores"].flops / 1e6) == scores
    assert float(f"{found['csa']['scores'].read / 1e6:.2g}") == float(f"{keys:.2g}")
    assert "scores" not in found["hca"]


@pytest.mark.parametrize(("name", "gigabytes"), [("v4-flash", 3.7), ("v4-pro", 5.3)])
def test_a_cache_of_a_million_tokens(name, gigabytes):
    assert round(cache_held(MODELS[name], 1 << 20, 1, "fp8") / 1e9, 1) == gigabytes


@pytest.mark.parametrize("step", [Step(1, 0), Step(1, 3), Step(1, 40), Step(9, 0), Step(30, 0), Step(7, 25, 3)])
def test_the_keys_of_every_query_counted_one_by_one(step):
    pairs = scored = 0
    for layer, ratio in (("sliding", 0), ("csa", 4), ("csa", 4), ("hca", 8)):
        for position in range(step.context, step.context + step.tokens):
            pairs += len(range(max(0, position - SMALL.window + 1), position + 1))
            seen = [w for w in range(position) if ratio and w * ratio + ratio - 1 <= position]
            pairs += len(seen[:5]) if layer == "csa" else len(seen)
            scored += len(seen) if layer == "csa" else 0
    found = {x.kind: x for x in loads(SMALL, [], step)}
    assert found["attention"].flops == step.sequences * 4 * 4 * 128 * pairs
    if (step.context + step.tokens) // 4 > 5:
        assert found["scores"].flops == step.sequences * 2 * 8 * 64 * scored
    else:
        assert "scores" not in found


def test_one_token_reads_each_key_that_it_sees_once():
    found = {x.kind: x for x in loads(SMALL, [], Step(1, 99))}
    assert found["attention"].read == 2 * 128 * (4 * 6 + 2 * 5 + 100 // 8)
    assert found["scores"].read == 2 * 64 * 2 * (100 // 4)


def test_tokens_hit_as_many_experts_as_all_their_choices_on_average():
    """Every choice of 2 of 4 experts by each of three tokens."""
    model = Model(**vars(SMALL) | {"experts": 4})
    choices = list(itertools.combinations(range(4), 2))
    for rows in (1, 2, 3):
        sizes = [len(set(itertools.chain(*drawn))) for drawn in itertools.product(choices, repeat=rows)]
        assert round(hit(model, rows) * len(sizes), 6) == sum(sizes)


def test_the_hits_of_a_cache_are_those_of_one_that_runs():
    """Experts chosen at random, kept in the order of their use; a share of the cache of 0.1 to 0.9."""
    model, layers = Model(**vars(SMALL) | {"experts": 64, "active": 4, "sliding": 8, "csa": 0, "hca": 0}), 8
    made = parts(model, "checkpoint")
    experts, others = (sum(x.held for x in made if (x.role == Role.EXPERTS) is which) for which in (True, False))
    draws = random.Random(1)
    for share in (0.1, 0.35, 0.6, 0.9):
        held, hits, asked = OrderedDict(), 0, 0
        for token in range(1500):
            for key in ((layer, e) for layer in range(layers) for e in draws.sample(range(64), 4)):
                hits, asked = hits + (token > 200 and key in held), asked + (token > 200)
                held[key] = None
                held.move_to_end(key)
                while len(held) > share * 64 * layers:
                    held.popitem(last=False)
        planned = times.residence(model, made, 0, others + share * experts, 1)
        assert not planned.whole
        assert abs(planned.hits - hits / asked) < 1 / 16, "less than what one step adds: 4 of 64 experts"


def test_what_fits_is_always_there_and_what_is_given_is_believed():
    made = parts(SMALL, "checkpoint")
    total = sum(part.held for part in made)
    assert times.residence(SMALL, made, 0, total, 1).hits == 1
    assert times.residence(SMALL, made, 0, None, 1).whole
    assert times.residence(SMALL, made, 1, total, 1, 0.25).hits == 0.25
    assert times.residence(SMALL, made, 0, 0, 1).room < 0


def test_a_measured_machine_adds_what_it_reads_multiplies_calls_and_waits_for():
    made, step = parts(SMALL, "checkpoint"), Step(1, 3)
    found = loads(SMALL, made, step)
    held = times.residence(SMALL, made, 0, None, 1)
    terms = {term.what: term.seconds for term in times.terms(SMALL, found, step, HERE, held, False)}
    fp4 = 3 * 256 * 128 * (17 / 32) * 4 * 2  # bytes of two experts of each of four layers
    fp8 = sum(load.read for load in found if load.kind == "fp8")
    assert round(terms["fp4"] * 4e9) == fp4
    assert round(terms["fp8"] * 5e9) == fp8
    assert terms["calls"] == 1e-3 + 2 * 2e-3 + 3e-3 + 5e-4
    assert round(terms["experts"] / 1e-4, 6) == 8
    packed = times.terms(SMALL, found, step, HERE, held, True)
    assert "experts" not in {term.what for term in packed}
    few = times.Residence(1000.0, 500.0, 0.5)
    waits = {term.what: term.seconds for term in times.terms(SMALL, found, step, HERE, few, False)}
    assert round(1e9 * waits["disk"]) == round(1e9 * (fp4 / 2 / 1e9 - terms["fp4"] / 2))


def test_rows_after_the_first_cost_their_multiplying_alone():
    assert HERE.seconds("fp4", 4e9, 2e9, 2e9) == 1
    assert HERE.seconds("fp4", 4e9, 2e9 + 3e10, 2e9) == 2
    assert HERE.seconds("bf16", 1e10, 0, 0) == 1, "an embedding is no product"
    with pytest.raises(ValueError, match="no product of w4a8 was measured, only of bf16"):
        HERE.seconds("w4a8", 1, 1, 1)


def test_published_figures_are_the_longer_of_two_limits():
    chip = machine.of_chip("h200")
    assert (chip.bandwidth, chip.rate) == (4.8e12, 989.4e12)
    assert chip.seconds("fp8", 4.8e12, 1, 1) == 1
    assert chip.seconds("fp8", 1, 2 * 989.4e12, 1) == 2
    assert machine.of_chip("MI355X", rate=2.5e15).rate == 2.5e15
    with pytest.raises(ValueError, match="the rate of MI355X was not found published; give it with --rate"):
        machine.of_chip("MI355X")
    with pytest.raises(ValueError, match=r"names .*H200.*; give one"):
        machine.of_chip("NVIDIA")


PUBLISHED = {
    "llama.cpp, EPYC 9V45, all in memory": (9.7, {"bandwidth": 186e9}),
    "mini-SGLang, 8 A100, 4 sequences": (193, {"bandwidth": 8 * 2039e9, "sequences": 4}),
    "colibri, Ryzen 5800X, 22 GB": (0.93, {"disk": 2.5e9, "memory": 22e9}),
    "deepseek-v4-in-c, 20-core laptop, 18 GB": (0.46, {"disk": 5.3e9, "memory": 18e9}),
}
"""Tokens/s of V4-Flash that others report, and the figures of their machines; sources in docs/plan.md."""
PAGE = Path(__file__).parents[1] / "docs" / "plan.md"
FAST = 1e13
"""A memory that nobody waits for."""


def limit(bandwidth=FAST, sequences=1, disk=None, memory=None, hits=None):
    """Tokens/s of V4-Flash as released, which such a machine cannot exceed, and how often experts are there."""
    model, on = MODELS["v4-flash"], Machine("published", bandwidth, 1e18, disk=disk)
    made, step = parts(model, "checkpoint"), Step(1, 1024, sequences)
    held = times.residence(model, made, 0, memory, sequences, hits)
    return sequences / times.seconds(times.terms(model, loads(model, made, step), step, on, held, True)), held.hits


@pytest.mark.parametrize("run", PUBLISHED)
def test_no_published_run_exceeds_what_is_planned(run):
    """Where experts come from a disk uniform routing is the worst: a run may have found more of them in memory, and
    how many more follows from its speed, less than all."""
    measured, figures = PUBLISHED[run]
    planned, uniform = limit(**figures)
    row = next(line for line in PAGE.read_text().splitlines() if line.startswith(f"| {run} |"))
    digits = [f"{x:.0f}" if x > 100 else f"{x:.2g}" for x in (measured, planned, measured / planned)]
    assert row.split(" | ")[1:4] == digits
    if measured > planned:
        needed = 1 - figures["disk"] / measured / (3 * 2048 * 4096 * 17 / 32 * 6 * 43)
        assert uniform < needed < 0.5
        assert limit(**figures, hits=1.0)[0] > measured


@pytest.mark.parametrize("form", FORMATS)
def test_a_checkpoint_is_counted_as_it_is_stored_and_as_convert_would_write_it(form):
    model, found = checkpoint.of_folder(TRAINED, form)
    source = Source(TRAINED)
    stored = sum(x.size for x in source.tensors.values()) if form == "checkpoint" else Plan(source, form).data
    assert sum(part.held for part in found) == stored
    assert found == parts(model, form)


def test_the_trained_models_sizes(capsys):
    model, _ = checkpoint.of_folder(TRAINED, "checkpoint")
    assert (model.sliding, model.csa, model.hca, model.experts, model.active) == (1, 2, 1, 6, 2)
    assert main(["plan", "--model", str(TRAINED), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["memory"]["weights"] == sum(x.size for x in Source(TRAINED).tensors.values())
    assert said["machine"] is None
    assert said["decode"]["tokens_per_second"] is None


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("layers.3.attn.indexer.wq_b.weight", Role.INDEXER),
        ("model.layers.3.self_attn.compressor.indexer.scorer.weights_proj.weight", Role.INDEXER),
        ("layers.3.attn.indexer.compressor.wgate.weight", Role.COMPRESSOR),
        ("model.layers.3.self_attn.compressor.indexer.kv_proj.weight", Role.COMPRESSOR),
        ("layers.3.attn.compressor.norm.weight", Role.NORMS),
        ("model.layers.3.self_attn.o_a_proj.weight_scale_inv", Role.PROJECTION),
        ("layers.3.attn.wo_b.scale", Role.PROJECTION),
        ("layers.3.attn.attn_sink", Role.ATTENTION),
        ("layers.3.hc_ffn_base", Role.HYPER),
        ("model.layers.3.attn_hc.fn", Role.HYPER),
        ("model.layers.3.mlp.experts.gate_up_proj", Role.EXPERTS),
        ("layers.3.ffn.gate.tid2eid", Role.TABLE),
        ("layers.4.ffn.gate.bias", Role.DRAFT),
        ("mtp.0.attn.wq_a.weight", Role.DRAFT),
        ("vision.patches.weight", None),
    ],
)
def test_a_tensor_is_for_what_its_name_says(name, role):
    assert checkpoint.role(name, 4) == role


def plan(capsys, *words, code=0):
    assert main(["plan", *map(str, words), "--json"]) == code
    return json.loads(capsys.readouterr().out)


def test_times_energy_and_cost(capsys, tmp_path):
    file = tmp_path / "here.json"
    file.write_text(json.dumps({"roofline": machine.written(HERE)}))
    said = plan(capsys, "--model", TRAINED, "--machine", file, "--watts", 100, "--price", 0.25, "--rent", 2)
    rate, million = said["decode"]["tokens_per_second"], said["decode"]["million"]
    assert rate == 1 / sum(term["seconds"] for term in said["decode"]["terms"])
    assert round(million["hours"] * 3600 * rate) == 1_000_000
    assert million["kWh"] == 100 * million["hours"] / 1000
    assert million["cost"] == 0.25 * million["kWh"] + 2 * million["hours"]
    assert said["machine"]["name"] == "here"
    assert main(["plan", "--model", str(TRAINED), "--machine", str(file)]) == 0
    shown = capsys.readouterr().out
    assert "Python and meeting of threads: 1 sliding of 1.00 ms, 2 csa of 2.00 ms, 1 hca of 3.00 ms" in shown
    assert "tokens a second expected" in shown


def test_experts_beyond_memory_are_read_from_disk_or_do_not_run(capsys):
    words = "--model", "v4-flash", "--bandwidth", "100GB", "--rate", 2
    assert plan(capsys, *words, "--memory", "200GiB")["fits"]
    small = plan(capsys, *words, "--memory", "24GiB", code=1)
    assert not small["fits"]
    assert small["decode"]["tokens_per_second"] is None
    read = plan(capsys, *words, "--memory", "24GiB", "--disk", "3GB")
    assert read["fits"]
    assert 0 < read["decode"]["hit_rate"] < 0.12
    given = plan(capsys, *words, "--memory", "24GiB", "--disk", "3GB", "--hit-rate", 0.5)
    assert given["decode"]["tokens_per_second"] > read["decode"]["tokens_per_second"]
    assert main(["plan", *map(str, words), "--memory", "4GiB", "--disk", "3GB"]) == 1
    assert "too much for" in capsys.readouterr().out


def test_several_sequences_share_what_they_read(capsys):
    one, many = (plan(capsys, "--model", "v4-flash", "--chip", "A100", "--batch", n)["decode"] for n in (1, 16))
    assert one["tokens_per_second"] < many["tokens_per_second"] < 16 * one["tokens_per_second"]
    assert many["flops"] == one["flops"]


FP4 = {(2048, 4096): 2 * 256 * 43, (4096, 2048): 256 * 43}
FP8 = {
    (1024, 4096): 43, (32768, 1024): 43, (512, 4096): 43, (4096, 8192): 43, (8192, 1024): 21, (2048, 4096): 2 * 43,
    (4096, 2048): 43,
}  # fmt: skip
GROUPED = 43 * 8192 * 4096
"""The matrices of V4-Flash by hand: routed experts, what else is FP8, and the elements of the grouped projection."""


@pytest.mark.parametrize(
    ("form", "size"),
    [
        ("fp8", lambda n, k: n * k + n * k / 16384),
        ("bf16", lambda n, k: 2 * n * k),
        ("int8", lambda n, k: n * k + 4 * n),
        ("w4a8", lambda n, k: n * k / 2 + 2 * n * k / 32 + 16),
    ],
)
def test_every_format_of_a_named_model(form, size, capsys):
    stored, made = (sum(part.held for part in parts(MODELS["v4-flash"], name)) for name in ("checkpoint", form))
    change = sum(count * (size(n, k) - n * k * 17 / 32) for (n, k), count in FP4.items())
    change += sum(count * (size(n, k) - n * k - n * k / 16384) for (n, k), count in FP8.items())
    change += 0 if form == "fp8" else GROUPED * (2 - 1 - 1 / 16384)
    assert made - stored == change


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--model v4-flesh", "no such folder; did you mean 'v4-flash'"),
        ("--model v4-flash --chip h201", "did you mean 'h20"),
        ("--model v4-flash --chip P800", "bandwidth of P800 was not found published"),
        ("--model v4-flash --bandwidth 100GB", "--bandwidth and --rate"),
        ("--model v4-flash --watts 100", "times need a machine"),
        ("--model v4-flash --machine {bad}", "holds no figures of a machine"),
        ("--model v4-flash --machine {here} --chip H200", "leave --chip"),
        ("--model v4-flash --machine {here} --format w4a8", "no product of w4a8 was measured"),
        ("--model v4-flash --bandwidth 100 --rate 1", "a size with its unit"),
        ("--model v4-flash --rate nan", "a number above 0"),
        ("--model v4-flash --hit-rate 1.5", "a share from 0 to 1"),
        ("--model v4-flash --context -1", "a whole number"),
        ("--model v4-flash --chip H200 --price 1", "--price counts with --watts"),
        ("--model v4-flash --chip H200 --hit-rate 0.5", "--hit-rate counts with --memory"),
        ("--model v4-flash --tp 8 --chip H200", "leave --chip out"),
        ("--model v4-flash --tp 8 --format int8", "--tp plans checkpoint, fp8, bf16"),
        ("--model {tmp} --tp 8", "--tp plans v4-flash and v4-pro"),
        ("--model {tmp}", "holds no safetensors"),
    ],
)
def test_bad_input_is_one_line_that_says_what_to_do(words, said, tmp_path, capsys):
    bad, here = tmp_path / "bad.json", tmp_path / "here.json"
    bad.write_text('{"roofline": {"name": "x", "bandwidth": 1e9}}')
    here.write_text(json.dumps({"roofline": machine.written(HERE)}))
    try:
        code = main(["plan", *words.format(tmp=tmp_path, bad=bad, here=here).split()])
    except SystemExit as end:
        code = end.code
    assert code == 2
    found = capsys.readouterr().err
    assert found.count("\n") == 1
    assert said in found


@pytest.mark.parametrize(
    "change", [{"bandwidth": 0}, {"reads": {"fp8": -1.0}}, {"layers": {"csa": 1.0}}, {"disk": "2"}, {"step": math.inf}]
)
def test_figures_that_are_none_are_refused(change, tmp_path):
    file = tmp_path / "here.json"
    file.write_text(json.dumps({"roofline": machine.written(HERE) | change}))
    with pytest.raises(ValueError, match="holds no figures"):
        machine.of_file(file)


def test_a_machine_is_read_as_it_was_written(tmp_path):
    file = tmp_path / "here.json"
    file.write_text(json.dumps({"roofline": machine.written(HERE)}))
    assert machine.of_file(file) == HERE


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_type": "qwen3"}, "plan counts deepseek_v4 alone"),
        ({"compress_ratios": [0, 4]}, "do not say what each layer is"),
        ({"hidden_size": "wide"}, "hidden_size is 'wide', expected a size"),
        ({"o_groups": 0}, "o_groups is 0"),
    ],
)
def test_a_configuration_that_says_no_sizes_is_refused(change, said, tmp_path):
    for file in TRAINED.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = tmp_path / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    with pytest.raises(ValueError, match=re.escape(said)):
        checkpoint.of_folder(tmp_path, "checkpoint")
