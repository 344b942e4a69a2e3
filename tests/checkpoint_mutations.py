"""Damage done to a checkpoint, to what a conversion left and to the file system, each to a small world of its own."""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from flagops.checkpoint.source import CONFIG, INDEX, JOURNAL, MANIFEST

ACCEPT, REFUSE, EITHER = "accept", "refuse", "either"
DEEP = json.loads("[" * 500 + "]" * 500)
NASTY = [
    None, True, False, 0, -1, 1, 2, 127, 1 << 31, 1 << 53, (1 << 63) - 1, 1 << 63, 10**30, 10**400, 1.5, -0.0, 1e308,
    "", "text", "BF16", "F8_E4M3", "F4", "\0", "\n", "\ud800", "é" * 300, "../x", "/etc/passwd", "a" * 5000, [], {},
    [[]], [0], [1, 2], [10**30, 0], [0] * 40, [1] * 33, [1 << 55, 0, 128], [1 << 40] * 1000, {"x": 1}, DEEP,
]  # fmt: skip
NAMES = ["", "a\nb", "é", "../x", "x" * 3000, "\0", "\x1b[31m", "x.weight", "x.scale", "\ud800"]
DTYPES = ["I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0", "BF16", "F16", "I16", "U16", "F32"]
RAW = [
    b"", b"{", b"[" * 200_000, b'{"a":' * 200_000, b"null", b"[]", b"{}", b"1e999", b"NaN", b'{"a": 1, "a": 2}',
    b"\xff\xfe",
    b"\xef\xbb\xbf{}", b"\0" * 100, b"9" * 5000, b'{"a": 1e999}', b'{"a": Infinity}', b'"text"', b'{"x": 1}\n',
]  # fmt: skip


@dataclass
class World:
    """Folders that a mutation may change. `outside` is nobody's business; `names` must be in a refusal, one of them."""

    src: Path
    dst: Path
    outside: Path
    rng: random.Random
    base: Base
    names: tuple[str, ...] = ()
    meant: bool = True  # whether the source may mean something else now
    during: list = field(default_factory=list)  # what happens at a chosen read of a conversion

    def shard(self, folder=None):
        return self.rng.choice(sorted((folder or self.src).glob("*.safetensors")))


@dataclass
class Base:
    """What worlds are copied from."""

    src: Path
    finished: Path
    stopped: Path
    reference: dict[str, bytes]


# Changes to JSON


def places(value, path=()):
    """Every place of parsed JSON: the holder and the key."""
    keys = value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in list(keys):
        yield value, key
        yield from places(value[key], (*path, key))


def changed(value, rng):
    """Parsed JSON with something nasty at a random place."""
    value = copy.deepcopy(value)
    holder, key = rng.choice(list(places(value)))
    how = rng.randrange(4 if isinstance(holder, dict) else 3)
    if how == 0:
        del holder[key]
    elif how == 3:
        holder[rng.choice(["", "x", "\0", "é", "../x", "dtype", "shape", "identity", "quantization_config"])] = (
            holder.pop(key)
        )
    else:
        holder[key] = rng.choice(NASTY)
    return value


def flipped(raw, rng):
    """Bytes with one changed, left out, doubled or put in."""
    raw, at = bytearray(raw), rng.randrange(len(raw))
    how = rng.randrange(4)
    if how == 0:
        raw[at] ^= 1 << rng.randrange(8)
    elif how == 1:
        del raw[at : at + rng.choice([1, 1, 9])]
    elif how == 2:
        raw[at:at] = raw[at : at + 20]
    else:
        raw[at:at] = rng.choice([b'"', b"{", b"}", b"[", b",", b"\0", b"9" * 400, b"-", b"\\ud800", b" "])
    return bytes(raw)


def rewritten(raw, rng):
    """A document changed as JSON or as bytes."""
    if rng.random() < 0.2:
        return rng.choice(RAW)
    if rng.random() < 0.3:
        return flipped(raw, rng)
    return json.dumps(changed(json.loads(raw), rng)).encode()


def respelt(raw, rng):
    """The same JSON, otherwise written."""
    value = json.loads(raw)
    items = list(value.items())
    rng.shuffle(items)
    return json.dumps(dict(items), indent=rng.choice([None, 1, 8]), ensure_ascii=rng.random() < 0.5).encode() + b" " * 9


def reheaded(path, change):
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    text = change(raw[8 : 8 + length])
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


def header(world):
    shard = world.shard()
    reheaded(shard, lambda raw: rewritten(raw, world.rng))
    return EITHER


def header_respelt(world):
    reheaded(world.shard(), lambda raw: respelt(raw, world.rng))
    return ACCEPT


def agreed(world):
    """A tensor renamed, reshaped, retyped or taken for another of its size, in the header and the index alike."""
    shard, rng = world.shard(), world.rng
    weights = json.loads((world.src / INDEX).read_text())

    def change(raw):
        found = json.loads(raw)
        name = rng.choice([name for name in found if name != "__metadata__"])
        facts, how = found[name], rng.randrange(4)
        if how == 0:
            other = rng.choice([*NAMES, f"{name}_scale_inv"])
            found[other] = found.pop(name)
            weights["weight_map"][other] = weights["weight_map"].pop(name)
        elif how == 1:
            shape = facts["shape"]
            facts["shape"] = rng.choice([[*shape, 1], [1, *shape], shape[::-1], [0, 1 << 50], []])
        elif how == 2:
            facts["dtype"] = rng.choice(DTYPES)
        else:
            sizes = {key: x["data_offsets"][1] - x["data_offsets"][0] for key, x in found.items() if "dtype" in x}
            other = found[rng.choice([key for key, size in sizes.items() if size == sizes[name]])]
            facts["data_offsets"], other["data_offsets"] = other["data_offsets"], facts["data_offsets"]
        return json.dumps(found).encode()

    reheaded(shard, change)
    (world.src / INDEX).write_text(json.dumps(weights))
    return EITHER


def header_length(world):
    shard = world.shard()
    raw = shard.read_bytes()
    number = world.rng.choice([0, 1, 2, 7, len(raw) - 8, len(raw), 1 << 31, (1 << 63) - 1, (1 << 64) - 1])
    shard.write_bytes(number.to_bytes(8, "little") + raw[8:])
    world.names = (shard.name,)
    return REFUSE


def index(world):
    (world.src / INDEX).write_bytes(rewritten((world.src / INDEX).read_bytes(), world.rng))
    return EITHER


def index_respelt(world):
    found = json.loads(respelt((world.src / INDEX).read_bytes(), world.rng))
    found["metadata"] = world.rng.choice([*NASTY[:20], {"total_size": 1 << 62}, {"total_size": "1"}, {}])
    (world.src / INDEX).write_text(json.dumps(found))
    return ACCEPT


def config(world):
    (world.src / CONFIG).write_bytes(rewritten((world.src / CONFIG).read_bytes(), world.rng))
    return EITHER


def config_respelt(world):
    found = json.loads(respelt((world.src / CONFIG).read_bytes(), world.rng))
    more = [x for x in NASTY if x not in ("\ud800", "F4", "F8_E4M3") and x is not DEEP]
    found[world.rng.choice(["size", "vision", "é", "", "\n"])] = world.rng.choice(more)
    (world.src / CONFIG).write_text(json.dumps(found))
    return ACCEPT


def shard_size(world):
    shard = world.shard()
    raw = shard.read_bytes()
    shard.write_bytes(world.rng.choice([raw[: world.rng.randrange(len(raw))], raw + b"x" * world.rng.randrange(1, 99)]))
    world.names = (shard.name, "tensor")
    return REFUSE


# Changes to what a conversion left


def stopped(world):
    shutil.copytree(world.base.stopped, world.dst)
    return world.dst / JOURNAL


def journal_line(world):
    path = stopped(world)
    lines = path.read_bytes().splitlines(keepends=True)
    at = world.rng.randrange(len(lines))
    lines[at] = rewritten(lines[at], world.rng) + b"\n"
    path.write_bytes(b"".join(lines))
    return ACCEPT if at else EITHER


def journal_torn(world):
    path = stopped(world)
    raw = path.read_bytes()
    first = len(raw.splitlines(keepends=True)[0])
    path.write_bytes(raw[: world.rng.randrange(first, len(raw))] + world.rng.choice([b"", *RAW]))
    return ACCEPT


def journal_names(world):
    path = stopped(world)
    lines = path.read_bytes().splitlines(keepends=True)
    at = world.rng.randrange(1, len(lines))
    record = json.loads(lines[at])
    record["file"] = world.rng.choice(
        ["ghost", "../ghost", "/ghost", "", "a\0b", record["file"] + "x", *world.base.reference]
    )
    lines[at] = json.dumps(record).encode() + b"\n"
    path.write_bytes(b"".join(lines))
    return ACCEPT


def left_file(world):
    stopped(world)
    path = world.dst / world.rng.choice([name for name in world.base.reference if (world.dst / name).exists()])
    raw = path.read_bytes()
    path.unlink()
    if world.rng.random() < 0.7:
        path.write_bytes(flipped(raw, world.rng))
    return ACCEPT


def manifest(world):
    shutil.copytree(world.base.finished, world.dst)
    (world.dst / MANIFEST).write_bytes(rewritten((world.dst / MANIFEST).read_bytes(), world.rng))
    return EITHER


def finished_file(world):
    shutil.copytree(world.base.finished, world.dst)
    path = world.dst / world.rng.choice([name for name in world.base.reference if name != MANIFEST])
    raw = path.read_bytes()
    path.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    world.names = (path.name,)
    return REFUSE


# Changes to the file system


def odd(world, path):
    """Something that is no regular file, in the place of one."""
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    how = world.rng.randrange(6)
    if how == 0:
        os.mkfifo(path)
    elif how == 1:
        path.mkdir()
        (path / "file").write_text("")
    else:
        path.symlink_to([path.name, "/nowhere", world.outside / "file", world.outside, "/dev/zero"][how - 2 or how - 1])
    world.names = (path.name,)


def source_odd(world):
    path = world.rng.choice([world.src / CONFIG, world.src / INDEX, world.src / "tokenizer.json", world.shard()])
    odd(world, path)
    if path.is_dir() and not path.is_symlink() and path.name == "tokenizer.json":
        return ACCEPT  # a folder of such a name
    return REFUSE


def output_odd(world):
    if world.rng.random() < 0.5:
        stopped(world)
        name = world.rng.choice([JOURNAL, MANIFEST, *world.base.reference])
    else:
        shutil.copytree(world.base.finished, world.dst)
        name = world.rng.choice(list(world.base.reference))
    odd(world, world.dst / (name + world.rng.choice(["", "", ".partial"]) if name != JOURNAL else name))
    finished = (world.dst / INDEX).exists() and (world.dst / MANIFEST).is_file()
    return EITHER if finished else REFUSE


def output_link(world):
    stopped(world)
    shutil.rmtree(world.dst / "encoding")
    (world.dst / "encoding").symlink_to(world.outside)
    world.names = ("encoding",)
    return REFUSE


def partial(world):
    stopped(world)
    name = world.rng.choice(list(world.base.reference))
    (world.dst / f"{name}.partial").parent.mkdir(exist_ok=True)
    if world.rng.random() < 0.5:
        os.link(world.outside / "file", world.dst / f"{name}.partial")
    else:
        (world.dst / f"{name}.partial").write_bytes(b"half")
    return ACCEPT


def strange_partial(world):
    stopped(world)
    name = world.rng.choice(["thesis.partial", "encoding/thesis.partial", ".partial", "model.safetensors.partial"])
    os.link(world.outside / "file", world.dst / name)
    return ACCEPT


def stranger(world):
    world.dst.mkdir()
    (world.dst / "thesis.txt").write_text("text")
    world.names = ("thesis.txt",)
    return REFUSE


def deep(world):
    depth = world.rng.choice([1, 10, 64, 65, 100, 1200])
    here = os.getcwd()
    os.chdir(world.src)
    for _ in range(depth):
        os.mkdir("d")
        os.chdir("d")
    os.chdir(here)
    world.names = ("d/d",)
    return ACCEPT if depth <= 64 else REFUSE


def named(world):
    name = world.rng.choice(
        [b"a\nb.txt", b"\xff.txt", b"\x1b[31m.txt", "é.txt".encode(), b"a b", b"-x", b"a" * 240, b"~"]
    )
    with open(os.fsencode(world.src) + b"/" + name, "wb") as file:
        file.write(b"text")
    return ACCEPT


def long_name(world):
    name = "é" * 120 + "x" * world.rng.randrange(1, 15)
    (world.src / name).write_text("text")
    world.names = ("éé",)
    return REFUSE


def hidden(world):
    (world.src / ".cache").mkdir()
    os.mkfifo(world.src / ".cache" / "pipe")
    shutil.copyfile(world.shard(), world.src / "left-out.safetensors")
    return ACCEPT


def rewritten_in_place(path, change):
    """As by a program that puts the times back."""
    facts = path.stat()
    with open(path, "r+b") as file:
        text = change(file.read())
        file.seek(0)
        file.write(text)
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))


def inverted(raw):
    """The data of a shard, or a text, as nobody wrote it; the header stays."""
    start = 8 + int.from_bytes(raw[:8], "little")
    return raw[:start] + bytes(x ^ 1 for x in raw[start:]) if start < len(raw) else bytes(x ^ 1 for x in raw)


def while_read(world):
    path = world.rng.choice([*sorted(world.src.glob("*.safetensors")), world.src / "tokenizer.json"])
    world.during.append((world.rng.randrange(1, 16), lambda: rewritten_in_place(path, inverted)))
    world.names, world.meant = (path.name,), False
    return EITHER


def while_verified(world):
    while_read(world)
    shutil.copytree(world.base.finished, world.dst)
    world.names = (f"src/{world.names[0]}",)
    return EITHER


def touched(world):
    """Written again as it was, between two runs."""
    stopped(world)
    rewritten_in_place(world.shard(), lambda raw: raw)
    return ACCEPT


def between(world):
    """Changed between two runs, with sizes and times as they were."""
    stopped(world)
    path = world.rng.choice([*sorted(world.src.glob("*.safetensors")), world.src / "tokenizer.json"])
    rewritten_in_place(path, inverted)
    world.names = (path.name, ".safetensors")
    return REFUSE


MEANT = (header, agreed, index, config)  # after these a source may mean something else
WEIGHTS = dict.fromkeys((
    header_length, header_respelt, index_respelt, shard_size, journal_torn, left_file, finished_file, output_link,
    partial, strange_partial, stranger, deep, named, long_name, hidden, touched, between,
), 1) | {
    header: 6, agreed: 4, index: 4, config: 4, journal_line: 4, manifest: 4, source_odd: 3, output_odd: 3,
    while_read: 3, while_verified: 2, config_respelt: 2, journal_names: 2,
}  # fmt: skip
