"""Mutations drawn from the run's seed: no traceback, no hang, nothing accepted or refused that should not be."""

import itertools
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")

JUDGE = [sys.executable, str(Path(__file__).with_name("checkpoint_judge.py"))]


def mutations(seed, count, processes=3):
    """Mutations of a seed tried in several processes; what they counted together."""
    bounds = [count * i // processes for i in range(processes + 1)]
    running = [
        subprocess.Popen([*JUDGE, str(seed), str(a), str(b)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for a, b in itertools.pairwise(bounds)
    ]
    counts = {}
    for process in running:
        found, faults = process.communicate()
        assert process.returncode == 0, faults
        for kind, number in json.loads(found)["counts"].items():
            counts[kind] = counts.get(kind, 0) + number
    return counts


@pytest.mark.drawn
@pytest.mark.parametrize("count", [200, pytest.param(5000, marks=pytest.mark.slow)])
def test_mutations_meet_no_traceback_hang_wrong_accept_or_wrong_refusal(count):
    assert mutations(random.randrange(1 << 31), count) == {"right": count}
