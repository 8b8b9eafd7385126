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

from rootnoise.cli.bench.clock import Side
from rootnoise.cli.bench.questions import SECTIONS, Result, ask, own_sides
from rootnoise.cli.bench.tables import fill

ROOT = Path(__file__).parents[2]
JSON, PAGE = ROOT / "docs/comparison.json", ROOT / "docs/comparison.md"
RIVALS = (("JAX-Privacy", "jax"), ("opake", "opake"), ("fastDP", "fastdp"))


def sides() -> list[Side]:
    """Return all sides; rivals run in environments of their own."""
    found = own_sides()
    for name, short in RIVALS:
        python = ROOT / f".venv-rivals-{short}/bin/python"
        script = Path(__file__).parent / f"{short}_side.py"
        found.append(Side(name, [str(python), str(script)] if python.exists() else None))
    return found


def wrong() -> dict[str, list[dict[str, Any]]]:
    """Return what wrong.py finds, in each environment that is there."""
    pythons = {"Opacus": ("opacus", Path(sys.executable))}
    for name, short in RIVALS:
        pythons[name] = short, ROOT / f".venv-rivals-{short}/bin/python"
    found = {}
    for name, (short, python) in pythons.items():
        if name != "JAX-Privacy" and python.exists():
            command = [python, Path(__file__).parent / "wrong.py", short]
            done = subprocess.run(command, capture_output=True, check=True)
            found[name] = json.loads(done.stdout)
    return found


def merged(old: Result, new: Result, sections: list[str]) -> Result:
    """Return the new rows, and the old ones of the sections that were not asked."""
    kept = [row for row in old.get("rows", []) if row["section"] not in sections]
    rows = sorted([*kept, *new["rows"]], key=lambda row: SECTIONS.index(row["section"]))
    return {**old, **new, "rows": rows}


def main() -> None:
    """Measure, and write both files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer sizes, rates and seeds")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--json", type=Path, default=JSON)
    parser.add_argument("--page", action="store_true", help="write the tables again, ask nobody")
    options = parser.parse_args()
    old: Result = json.loads(options.json.read_text()) if options.json.exists() else {}
    if not options.page:

        def keep(result: Result) -> None:
            whole = merged(old, result, options.only)
            options.json.write_text(json.dumps(whole, indent=1) + "\n")
            print(len(result["rows"]), result["rows"][-1]["question"], flush=True)

        ask(sides(), options.quick, options.only, keep)
        whole = json.loads(options.json.read_text()) | {"wrong": wrong()}
        options.json.write_text(json.dumps(whole, indent=1) + "\n")
    if options.json == JSON:
        PAGE.write_text(fill(PAGE.read_text(), json.loads(JSON.read_text())))


if __name__ == "__main__":
    main()
