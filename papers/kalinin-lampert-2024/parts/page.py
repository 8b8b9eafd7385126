"""README.md from the tables in a folder: every claim with its verdict, tables and figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from parts.part import Claim, Part
from parts.tables import Tables, markdown, read

INTRO = """\
# Kalinin and Lampert (2024), reproduced

*Banded Square Root Matrix Factorization for Differentially Private Model Training*, NeurIPS 2024,
[arXiv 2405.13763](https://arxiv.org/abs/2405.13763). The program in this folder, an application of
rootnoise, computes every table here and writes this page from them. Each claim of the paper is held
against our numbers, and our numbers against values of independent code (`expected.json`, to 0.1 %).

`make paper` runs all of it in hours, `make paper QUICK=1` less of it in minutes, into `paper/`.
For one part, or for other data:

```sh
cd papers/kalinin-lampert-2024
python reproduce.py errors --out ../../paper      # or bounds, runtime, limits, accuracy
python reproduce.py accuracy --study cifar10-one-epoch --study cifar10-epochs \\
    --data-dir ~/data --out ../../paper           # the paper's data set, from your own folder
python reproduce.py accuracy --study cifar10-resnet18 --study mnist --device cuda \\
    --data-dir ~/data --out ../../paper           # and on a GPU
```

Accuracy keeps one line a finished run in `runs.jsonl` and goes on from there when run again.

"""


def write_page(out: Path, parts: Mapping[str, Part]) -> Path:
    """Write README.md about the parts whose tables are in `out`, and return its path."""
    sections = []
    verdicts = ["| claim | verdict | part |", "| :--- | :--- | :--- |"]
    for name, part in parts.items():
        if tables := load(out, name):
            claims = part.claims(tables)
            verdicts += [f"| {claim.text} | {claim.verdict} | {name} |" for claim in claims]
            sections.append(_section(part, tables, claims))
    path = out / "README.md"
    path.write_text(INTRO + "\n".join(["## Claims", "", *verdicts, ""]) + "\n".join(sections))
    return path


def load(out: Path, name: str) -> Tables:
    """Return the tables of a part in a folder, by title; empty if there are none."""
    paths = sorted(out.glob(f"{name}-*.csv"))
    return {path.stem.removeprefix(f"{name}-"): read(path) for path in paths}


def _section(part: Part, tables: Tables, claims: Sequence[Claim]) -> str:
    lines = ["", f"## {part.TITLE}", "", part.INTRO, ""]
    for claim in claims:
        lines += [f"- **{claim.text}** {claim.verdict.capitalize()}. {claim.evidence}"]
    for file, caption in part.CAPTIONS.items():
        lines += ["", f"![{caption}]({file})", "", f"*{caption}*"]
    for caption, rows in part.views(tables).items():
        if rows:
            lines += ["", f"**{caption}**", "", markdown(rows)]
    return "\n".join(lines) + "\n"
