"""`flagops verify`: a conversion made again and compared; the first thing that is not right is named."""

import json
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

sys.path.insert(0, str(Path(__file__).parent))
import checkpoint_data as data  # noqa: E402
from checkpoint_crash import tree  # noqa: E402

from flagops import checkpoint  # noqa: E402
from flagops.checkpoint.source import JOURNAL, MANIFEST  # noqa: E402


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("converted")
    src, expected = data.mixed(folder / "src")
    checkpoint.convert(src, folder / "dst", shard_size=100_000)
    return src, folder / "dst", expected


@pytest.fixture
def copied(converted, tmp_path):
    src, dst, expected = converted
    for name, text in tree(dst).items():
        (tmp_path / "dst" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "dst" / name).write_bytes(text)
    return src, tmp_path / "dst", expected


@pytest.mark.parametrize("sample", [1.0, 0.05])
def test_verify_names_the_tensor(copied, sample):
    src, dst, expected = copied
    name = "layers.0.ffn.experts.3.w1.weight"
    assert expected[name].shape == (256, 512)
    data.changed(dst, name, 512 * 17 + 5)
    with pytest.raises(checkpoint.Difference, match=rf"'{name}'.*differs at element \[17, 5\]"):
        checkpoint.verify(src, dst, sample=sample, seed=0)


def test_verify_names_the_first_of_several(copied):
    src, dst, _ = copied
    index = json.loads((dst / data.INDEX).read_text())["weight_map"]
    names = sorted((shard, name) for name, shard in index.items() if ".experts.3." in name or ".p4." in name)
    for _, name in names:
        data.changed(dst, name, 0)
    assert names[0][0] < names[-1][0]
    for _ in range(5):
        with pytest.raises(checkpoint.Difference, match=names[0][1]):
            checkpoint.verify(src, dst, workers=3)


@pytest.mark.parametrize("name", ["config.json", data.INDEX, "tokenizer.json", "encoding/example.txt", MANIFEST])
@pytest.mark.parametrize("how", ["changed", "missing"])
def test_verify_names_the_file(copied, name, how):
    src, dst, _ = copied
    if how == "missing":
        (dst / name).unlink()
    else:
        (dst / name).write_bytes((dst / name).read_bytes().replace(b"e", b"f", 1))
    with pytest.raises((checkpoint.Difference, checkpoint.Refused), match=name if how == "changed" else f"{name}|man"):
        checkpoint.verify(src, dst)


def shard_edit(change):
    def edit(dst):
        shard = sorted(dst.glob("*.safetensors"))[1]
        change(shard)

    return edit


def swap_manifest_hash(dst):
    manifest = json.loads((dst / MANIFEST).read_text())
    name = sorted(n for n in manifest["files"] if n.endswith(".safetensors"))[1]
    manifest["files"][name]["sha256"] = "0" * 64
    (dst / MANIFEST).write_text(json.dumps(manifest))


def drop_from_manifest(dst):
    manifest = json.loads((dst / MANIFEST).read_text())
    del manifest["files"]["tokenizer.json"]
    (dst / MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (shard_edit(lambda p: p.unlink()), "model-00002.*is missing"),
        (shard_edit(lambda p: p.write_bytes(p.read_bytes()[:-1])), "tensor .*model-00002.*ends inside"),
        (shard_edit(lambda p: p.write_bytes(p.read_bytes() + b"x")), "model-00002.*bytes after"),
        (shard_edit(lambda p: p.write_bytes(p.read_bytes().replace(b'"pt"', b'"np"'))), "header of .*model-00002"),
        (swap_manifest_hash, "another hash"),
        (drop_from_manifest, r"tokenizer\.json is missing"),
        (lambda dst: (dst / JOURNAL).write_text(""), "not finished"),
        (lambda dst: (dst / MANIFEST).rename(dst / JOURNAL), "is not finished"),
    ],
)
def test_verify_sees(copied, edit, said):
    src, dst, _ = copied
    edit(dst)
    with pytest.raises(checkpoint.Difference, match=said):
        checkpoint.verify(src, dst)


def test_verify_of_another_source(copied, tmp_path):
    _, dst, _ = copied
    other, _ = data.mixed(tmp_path / "other", seed=1)
    with pytest.raises(checkpoint.Difference, match="was not made of"):
        checkpoint.verify(other, dst)


def test_verify_mentions_strangers(copied):
    src, dst, _ = copied
    (dst / "more.txt").write_text("")
    assert any("more.txt" in note for note in checkpoint.verify(src, dst).notes)
    with pytest.raises(checkpoint.Refused, match="sample"):
        checkpoint.verify(src, dst, sample=0)
