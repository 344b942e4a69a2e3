"""Profiles, and the choice of backends. Without a GPU, Triton kernels run under Triton's interpreter."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch is imported: test processes share the processors

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile(
    "default",
    max_examples=100,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.register_profile("nightly", settings.get_profile("default"), max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


def pytest_addoption(parser):
    parser.addoption("--mutants", default="2", help="edits tried of each kernel file, drawn anew each run, or all")
    parser.addoption("--backend", action="append", help="hold only these backends to the parity suite")
    parser.addoption(
        "--device", default="cpu", help="where the ranks of distributed tests compute: cpu, or cuda with NCCL"
    )


def pytest_generate_tests(metafunc):
    """``kernel``: every (operator, backend) that has a kernel; a backend that cannot run here is named, not hidden."""
    from flagops import registry

    if "kernel" in metafunc.fixturenames:
        backends = metafunc.config.getoption("--backend") or registry.backend_names()
        marker = metafunc.definition.get_closest_marker("operators")
        pairs = []
        for name in backends:
            reason = registry.backend(name).unavailable()
            for op in marker.args if marker else registry.operators():
                if registry.written(op, name):
                    marks = [pytest.mark.skip(reason=f"{name}: {reason}")] if reason else []
                    pairs.append(pytest.param((op, name), id=f"{op}-{name}", marks=marks))
        metafunc.parametrize("kernel", pairs)
