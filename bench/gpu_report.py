# SPDX-License-Identifier: Apache-2.0
"""What gpu_check.sh has found so far, as one JSON: gpu_report.py FOLDER reads what lies there and writes report.json.

--goals prints what came of the goals of gpu_goals.py, too. It adds no other judgement, and needs nothing but Python, so
that it can be run around every stage, and by hand on what a killed run left. A stage that began and did not end is
called unfinished.
"""

import json
import os
import re
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import gpu_goals

ROOT = Path(__file__).resolve().parents[1]
TAIL = 3000  # characters of a stage's output
LINES = {
    "plan": re.compile(r"plan (?P<plan>\w+): (?P<about>.*)"),
    "begin": re.compile(r"begin (?P<stage>\w+): limit (?P<limit>\d+) s, at (?P<at>\d+) s"),
    "end": re.compile(r"end (?P<stage>\w+): (?P<state>\w+), rc (?P<rc>\d+), (?P<seconds>\d+) s"),
    "skipped": re.compile(r"skipped (?P<stage>\w+): (?P<reason>.*)"),
}
STATES = ("passed", "failed", "cut", "skipped", "unfinished")


def text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def stages(log: str) -> tuple[list[str], list[dict[str, Any]]]:
    """What each plan said when it began, and the stages in their order, with the lines that they wrote to the log."""
    plans: list[str] = []
    found: list[dict[str, Any]] = []
    plan, running = "", None
    for line in log.splitlines():
        kind, match = next(
            ((kind, match) for kind, form in LINES.items() if (match := form.fullmatch(line.removeprefix("== ")))),
            (None, None),
        )
        if not line.startswith("== ") or not match:
            if running is not None:
                running["output"] += line + "\n"
            continue
        facts = {key: int(value) if value.isdigit() else value for key, value in match.groupdict().items()}
        if kind == "plan":
            plan, running = facts["plan"], None
            plans.append(f"{plan}: {facts['about']}")
        elif kind == "end" and running is not None:
            running |= facts
            running = None
        elif kind in ("begin", "skipped"):
            state = "skipped" if kind == "skipped" else "unfinished"
            found.append({"plan": plan, "state": state, **facts, "output": ""})
            running = found[-1] if kind == "begin" else None
    return plans, found


def outputs(folder: Path) -> dict[str, list[str]]:
    """By stage: what it wrote into a text of its own or of several, each time it ran."""
    found: dict[str, list[str]] = {}
    for path in sorted(folder.glob("*.txt")):
        if path.name != "log.txt":
            for part in re.split(r"^== begin ", text(path), flags=re.MULTILINE)[1:]:
                name, _, output = part.partition("\n")
                found.setdefault(name, []).append(output)
    return found


def results(folder: Path) -> list[dict[str, Any]]:
    """The lines of results.jsonl; one that was cut in its middle is left out."""
    found = []
    for line in text(folder / "results.jsonl").splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return [line for line in found if isinstance(line, dict)]


def report(folder: Path) -> dict[str, Any]:
    plans, found = stages(text(folder / "log.txt"))
    written = outputs(folder)
    for stage in found:
        if "limit" in stage and written.get(stage["stage"]):
            stage["output"] = written[stage["stage"]].pop(0)
        stage["output"] = stage["output"][-TAIL:]
    lines = results(folder)
    cases = [line for line in lines if "case" in line]
    wrong = [line["case"] for line in cases if line["benchmark"] == "smoke" and not line["case"].get("ok")]
    machine = next((line["machine"] for line in reversed(lines) if line.get("stage") == "machine"), None)
    return {
        "check": "gpu_check",
        "plans": plans,
        "gpu": (machine or {}).get("gpu"),
        "machine": machine,
        **{state: [stage["stage"] for stage in found if stage["state"] == state] for state in STATES},
        "cases": dict(Counter(line["benchmark"] for line in cases)),
        "failed_checks": wrong,
        "goals": gpu_goals.judged(lines),
        "stages": found,
    }


def main() -> int:
    folder = Path(sys.argv[1]).resolve()
    found = report(folder)
    content = json.dumps(found, indent=1, ensure_ascii=False)
    places = ((str(folder), "FOLDER"), (str(ROOT), "."), (sys.prefix, "PYTHON"), (str(Path.home()), "HOME"))
    for place, short in places:  # where things lay is nobody's business
        if place not in ("/", "/usr", "/usr/local"):
            content = content.replace(json.dumps(place, ensure_ascii=False)[1:-1], short)
    descriptor, unfinished = tempfile.mkstemp(dir=folder, prefix=".")
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(content + "\n")
    os.chmod(unfinished, 0o644)
    os.replace(unfinished, folder / "report.json")
    if "--goals" in sys.argv[2:]:
        print(gpu_goals.table(found["goals"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
