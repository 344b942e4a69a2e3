"""What TorchCTS said of the bare device, by suite, and the reason of each case that did not pass."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def written(path: Path, facts: dict[str, Any], found: list[dict[str, Any]]) -> None:
    path.write_text(json.dumps({"facts": facts, "cases": [x for x in found if x["verdict"] != "passed"]}, indent=1))
