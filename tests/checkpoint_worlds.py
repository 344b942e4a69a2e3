"""A plugin of pytest with `trio`: a source, its conversion and an interrupted one, for a test to spoil."""

import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import checkpoint_data as data
from checkpoint_crash import convert, interrupted


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """A source, its conversion, and one that could not write the manifest."""
    folder = tmp_path_factory.mktemp("trust")
    src, _ = data.experts(folder / "src", rows=128, columns=128, shards=2)
    convert(src, folder / "finished")
    interrupted(convert, src, folder / "stopped")
    return src, folder / "finished", folder / "stopped"


@pytest.fixture
def trio(originals, tmp_path):
    """Folders `src`, `finished` and `stopped`, with the times that they were planned with."""
    for name, folder in zip(("src", "finished", "stopped"), originals, strict=True):
        shutil.copytree(folder, tmp_path / name)
    return tmp_path
