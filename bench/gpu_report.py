# SPDX-License-Identifier: Apache-2.0
"""Puts the stages of gpu_check.sh into one JSON: gpu_report.py STAGES_FOLDER OUTPUT REPOSITORY.

It adds no judgement: return codes, seconds, ends of logs, and the JSON files that the stages themselves wrote.
"""

import json
import os
import sys
import tempfile
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

TAIL = 6000  # characters of a log


def text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace").strip() if path.exists() else ""


def last_line_json(log: str) -> Any:
    """What a stage printed as JSON on its last line, or None."""
    try:
        return json.loads(log.splitlines()[-1])
    except (IndexError, ValueError):
        return None


def stage(folder: Path, hidden: dict[str, str]) -> dict[str, Any]:
    """One stage. No return code: it did not run to its end, or not at all."""
    log, code, seconds = text(folder / "log"), text(folder / "rc"), text(folder / "seconds")
    measured = last_line_json(log) if code == "0" else None
    for path, short in hidden.items():
        log = log.replace(path, short)
    record: dict[str, Any] = {
        "stage": folder.name.partition("-")[2],
        "command": text(folder / "command"),
        "rc": int(code) if code else None,
        "seconds": int(seconds) if seconds else None,
        "skipped": text(folder / "skipped") or None,
        "tail": log[-TAIL:],
    }
    for path, short in hidden.items():
        record["command"] = record["command"].replace(path, short)
    if isinstance(measured, dict):
        record["measured"] = measured
    results = [json.loads(text(path)) for path in sorted(folder.glob("results/*.json"))]
    return record | ({"results": results} if results else {})


def gpu() -> list[str] | None:
    """The cards that torch can use; None where there is none (or no torch)."""
    try:
        import torch
    except ImportError:
        return None
    if not torch.cuda.is_available():
        return None
    return [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]


def main() -> int:
    stages, output, repository = (Path(word).resolve() for word in sys.argv[1:4])
    hidden = {str(stages.parent): "WORK", str(repository): ".", sys.prefix: "PYTHON"}
    records = [stage(folder, hidden) for folder in sorted(stages.iterdir())]
    report = {
        "check": "gpu_check",
        "date": f"{datetime.now(timezone.utc):%Y-%m-%dT%H:%M:%SZ}",
        "commit": text(stages.parent / "commit") or None,
        "gpu": gpu(),
        "failed": [record["stage"] for record in records if record["rc"] != 0 and not record["skipped"]],
        "skipped": [record["stage"] for record in records if record["skipped"]],
        "passed": [record["stage"] for record in records if record["rc"] == 0],
        "stages": records,
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    descriptor, unfinished = tempfile.mkstemp(dir=output.parent, prefix=".")
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        json.dump(report, file, indent=1, ensure_ascii=False)
        file.write("\n")
    os.chmod(unfinished, 0o644)
    os.replace(unfinished, output)
    for record in records:
        outcome = f"skipped: {record['skipped']}" if record["skipped"] else f"rc {record['rc']}, {record['seconds']} s"
        print(f"{record['stage']:12} {outcome}")
    print(f"GPU: {'; '.join(report['gpu']) if report['gpu'] else 'none, so nothing here says anything about one'}")
    print(f"written to {output.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
