"""What cannot be loaded is refused in one line that names the tensor or the file, and what to do."""

import json
import shutil
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

sys.path.insert(0, str(Path(__file__).parent))
from load_data import data, floating, source  # noqa: E402

import flagops  # noqa: E402
from flagops import checkpoint  # noqa: E402

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return source(tmp_path_factory.mktemp("sound") / "src", "original")


def rewritten(folder, sound, edit):
    """The checkpoint with its tensors edited."""
    tensors = data.read_any(sound)
    edit(tensors)
    config = json.loads((sound / "config.json").read_text())
    return data.write(folder, {"model-00001-of-00001.safetensors": tensors}, config, others=False)


def without(name):
    return lambda tensors: tensors.pop(name)


def with_(name, make):
    return lambda tensors: tensors.__setitem__(name, make(tensors))


EXPERT = "layers.1.ffn.experts.2.w3"
EDITS = [
    (without("layers.1.attn_norm.weight"), ["'model.layers.1.input_layernorm.weight'", "missing", "download"]),
    (without(f"{EXPERT}.weight"), [f"{EXPERT}.scale", "model-00001", "--keep"]),
    (lambda t: (t.pop(f"{EXPERT}.weight"), t.pop(f"{EXPERT}.scale")), ["experts.2.up_proj.weight", "missing"]),
    (with_("layers.1.attn_norm.weight", lambda t: torch.ones(7)), ["layers.1.attn_norm.weight", "[7]", "[256]"]),
    (
        lambda t: t.update({f"{EXPERT}.{part}": t[f"{EXPERT}.{part}"][:64].clone() for part in ("weight", "scale")}),
        [EXPERT, "[64, 256]", "[128, 256]", "config.json"],
    ),
    (with_("layers.1.more.weight", lambda t: torch.ones(3)), ["layers.1.more.weight", "DeepseekV4", "remove"]),
    (with_("model.norm.weight", lambda t: t["norm.weight"].clone()), ["norm.weight", "both", "keep one"]),
    (
        with_("layers.1.ffn.experts.9.w1.weight", lambda t: torch.ones(128, 256)),
        ["layers.1.ffn.experts.9.w1.weight", "beyond the 4", "config.json"],
    ),
    (
        with_("layers.0.attn.wq_a.scale", lambda t: torch.full((128, 8), 127, dtype=torch.uint8)),
        ["layers.0.attn.wq_a.weight", "format", "flagops convert"],
    ),
]  # fmt: skip


@pytest.mark.parametrize(("edit", "named"), EDITS, ids=range(len(EDITS)))
def test_tensors_that_do_not_make_the_model(edit, named, sound, tmp_path):
    src = rewritten(tmp_path / "src", sound, edit)
    with pytest.raises(checkpoint.Refused) as refusal:
        flagops.load(src)
    for word in named:
        assert word in str(refusal.value)
    assert str(refusal.value).isprintable()


def test_files_that_are_damaged(sound, tmp_path):
    src = tmp_path / "src"
    shutil.copytree(sound, src)
    shard = sorted(src.glob("*.safetensors"))[0]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    with pytest.raises(checkpoint.Refused, match=rf"{shard.name} is cut short.*download"):
        flagops.load(src)
    shard.write_bytes(whole)
    config = json.loads((src / "config.json").read_text())
    (src / "config.json").write_text(json.dumps(config | {"model_type": "no_such_model"}))
    with pytest.raises(checkpoint.Refused, match=r"config\.json is of no model that transformers knows"):
        flagops.load(src)
    (src / "config.json").unlink()
    with pytest.raises(checkpoint.Refused, match=r"has no config\.json"):
        flagops.load(src)


def test_a_file_that_changes_under_the_loader(sound, tmp_path, monkeypatch):
    from flagops.packed import build

    src = tmp_path / "src"
    shutil.copytree(sound, src)

    def touched(*args):
        made = blank(*args)
        shard = sorted(src.glob("*.safetensors"))[0]
        shard.write_bytes(shard.read_bytes())
        return made

    blank = build._blank
    monkeypatch.setattr(build, "_blank", touched)
    with pytest.raises(checkpoint.Refused, match="has changed since its header was read"):
        flagops.load(src)


def test_nothing_is_unpickled(tmp_path):
    tmp_path.joinpath("pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(checkpoint.Refused, match="pickled weights can run code"):
        flagops.load(tmp_path)


def test_what_is_not_quantised_needs_no_loader(tmp_path):
    floating(tmp_path, "qwen3")
    with pytest.raises(checkpoint.Refused, match="no tensor to convert"):
        flagops.load(tmp_path / "plain")


@pytest.mark.parametrize("options", [{"activations": "fp16"}, {"dtype": "float64"}, {"numerics": "offical"}])
def test_options_are_refused_before_anything_is_read(options, tmp_path):
    (value,) = options.values()
    with pytest.raises(ValueError, match=value):
        flagops.load(tmp_path / "absent", **options)
