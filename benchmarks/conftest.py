"""Nothing is timed unless ``--benchmark-enable`` is given."""

import pytest


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    if not config.option.benchmark_enable:
        config.option.benchmark_disable = True
