"""The form of every measurement: raw numbers into benchmarks/results/, one JSON object as the last line."""

from __future__ import annotations

import json
import os
import platform
import time
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def finish(name: str, value: float, unit: str, target: str, ok: bool, detail: dict[str, Any]) -> int:
    """Write benchmarks/results/NAME.json, print the last line, return the exit code (0 when ok)."""
    result = {"name": name, "value": value, "unit": unit, "target": target, "ok": bool(ok), "detail": detail}
    machine = {"cpus": os.cpu_count(), "machine": platform.machine(), "python": platform.python_version()}
    RESULTS.mkdir(exist_ok=True)
    stamped = result | {"machine": machine, "date": time.strftime("%Y-%m-%d")}
    (RESULTS / f"{name}.json").write_text(json.dumps(stamped, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    print(json.dumps(result))
    return 0 if ok else 1
