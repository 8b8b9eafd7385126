"""Ask rootnoise and its rivals, write docs/comparison.json, and the tables of docs/comparison.md.

`python benchmarks/comparison/install.py` makes the rivals' environments; one that is not there has
the column "not installed". `--page` writes the tables again, from the JSON as it is.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from pictures import draw

from rootnoise._files import write_whole
from rootnoise.cli.bench.clock import Side
from rootnoise.cli.bench.page import fill
from rootnoise.cli.bench.questions import SECTIONS, Result, ask, own_sides

ROOT = Path(__file__).parents[2]
JSON, PAGE = ROOT / "docs/comparison.json", ROOT / "docs/comparison.md"
RIVALS = (("JAX-Privacy", "jax"), ("opake", "opake"), ("fastDP", "fastdp"))


def sides(limit: float) -> list[Side]:
    """Return all sides; rivals run in environments of their own."""
    found = own_sides(limit)
    for name, short in RIVALS:
        python = ROOT / f".venv-rivals-{short}/bin/python"
        script = Path(__file__).parent / f"{short}_side.py"
        command = [str(python), str(script)] if python.exists() else None
        found.append(Side(name, command, limit))
    return found


def wrong() -> dict[str, list[dict[str, Any]]]:
    """Return what wrong.py finds, in each environment that is there."""
    pythons = {"Opacus": ("opacus", Path(sys.executable))}
    for name, short in RIVALS:
        pythons[name] = short, ROOT / f".venv-rivals-{short}/bin/python"
    found = {}
    for name, (short, python) in pythons.items():
        if python.exists():
            command = [python, Path(__file__).parent / "wrong.py", short]
            try:
                done = subprocess.run(command, capture_output=True, check=True, timeout=120)
            except subprocess.SubprocessError as reason:
                print(f"wrong.py {short}: {reason}")
                continue
            found[name] = json.loads(done.stdout)
    return found


def merged(old: Result, new: Result, sections: list[str]) -> Result:
    """Return the new rows, and the old ones of the sections that were not asked."""
    kept = [row for row in old.get("rows", []) if row["section"] not in sections]
    rows = sorted([*kept, *new["rows"]], key=lambda row: SECTIONS.index(row["section"]))
    return {**old, **new, "rows": rows}


def write(path: Path, result: Result) -> None:
    """Write a result, whole or not at all."""
    write_whole(path, (json.dumps(result, indent=1) + "\n").encode())


def progress(result: Result) -> str:
    """Return a line on the last question: seconds since the start, and those of each side."""
    row = result["rows"][-1]
    asked = " ".join(str(value) for value in row["question"].values())
    spent = ", ".join(f"{name} {taken:.1f}" for name, taken in row["spent"].items() if taken)
    return f"{result['seconds']:4} s  {row['section']}: {asked}; seconds: {spent}"


def main() -> None:
    """Measure, and write both files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer sizes, rates and seeds")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--limit", type=float, default=60.0, help="seconds for one answer")
    parser.add_argument("--json", type=Path, default=JSON)
    parser.add_argument("--page", action="store_true", help="write the tables again, ask nobody")
    options = parser.parse_args()
    old: Result = json.loads(options.json.read_text()) if options.json.exists() else {}
    if not options.page:

        def keep(result: Result) -> None:
            write(options.json, merged(old, result | {"command": command}, options.only))
            print(progress(result), flush=True)

        command = " ".join(["python benchmarks/comparison/run.py", *sys.argv[1:]])
        found = ask(sides(options.limit), options.quick, options.only, keep)
        whole = merged(old, found | {"command": command}, options.only)
        write(options.json, whole | {"wrong": wrong()})
    if options.json == JSON:
        result = json.loads(JSON.read_text())
        PAGE.write_text(fill(PAGE.read_text(), result))
        draw(result, PAGE.parent / "assets")


if __name__ == "__main__":
    main()
