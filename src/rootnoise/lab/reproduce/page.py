"""One page from the tables in a folder: every claim with its verdict, then tables and figures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rootnoise.lab.reproduce.part import Part, Tables, markdown, read

INTRO = """\
# Kalinin and Lampert (2024), reproduced

*Banded Square Root Matrix Factorization for Differentially Private Model Training*, NeurIPS 2024,
[arXiv 2405.13763](https://arxiv.org/abs/2405.13763). This page is written by `rootnoise reproduce`
from the CSV files beside it. The tables of the paper are images that were not at hand: its claims
are held against our numbers, and our numbers against values computed by independent code
(`expected.json`, to 0.1 %).

```sh
rootnoise reproduce --quick --out paper     # everything, smaller, in minutes
rootnoise reproduce errors --out paper      # or bounds, runtime, limits, accuracy
rootnoise reproduce accuracy --study cifar10-one-epoch --study cifar10-epochs \\
    --data-dir ~/data --out paper           # the paper's data set, from your own folder
rootnoise reproduce accuracy --study cifar10-resnet18 --study mnist --device cuda \\
    --data-dir ~/data --out paper           # and on a GPU
```

Accuracy keeps one line a finished run in `runs.jsonl` and goes on from there when run again.

"""


def write_page(out: Path, parts: Sequence[Part]) -> Path:
    """Write README.md about the parts whose tables are in `out`, and return its path."""
    found = {part.name: tables for part in parts if (tables := load(out, part.name))}
    sections = [_section(part, found[part.name]) for part in parts if part.name in found]
    verdicts = ["| claim | verdict | part |", "| :--- | :--- | :--- |"]
    for part in parts:
        for claim in part.claims(found[part.name]) if part.name in found else []:
            verdicts.append(f"| {claim.text} | {claim.verdict} | {part.name} |")
    path = out / "README.md"
    path.write_text(INTRO + "\n".join(["## Claims", "", *verdicts, ""]) + "\n".join(sections))
    return path


def load(out: Path, name: str) -> Tables:
    """Return the tables that a part has left in a folder, by title; empty if none."""
    paths = sorted(out.glob(f"{name}-*.csv"))
    return {path.stem.removeprefix(f"{name}-"): read(path) for path in paths}


def _section(part: Part, tables: Tables) -> str:
    lines = ["", f"## {part.title}", "", part.intro, ""]
    for claim in part.claims(tables):
        lines += [f"- **{claim.text}** {claim.verdict.capitalize()}. {claim.evidence}"]
    for file, caption in part.captions.items():
        lines += ["", f"![{caption}]({file})", "", f"*{caption}*"]
    for caption, rows in part.views(tables).items():
        if rows:
            lines += ["", f"**{caption}**", "", markdown(rows)]
    return "\n".join(lines) + "\n"
