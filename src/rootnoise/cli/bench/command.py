"""`rootnoise bench`: what it costs here, beside torch and Opacus."""

from __future__ import annotations

import json as jsonlib
from pathlib import Path
from typing import Annotated

import typer

from rootnoise.cli import _options, _progress, _report


def bench(
    quick: Annotated[
        bool, typer.Option("--quick", help="Fewer sizes, rates and seeds: under 10 minutes.")
    ] = False,
    section: Annotated[
        list[str] | None, typer.Option(help="Ask only this; may be given several times.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="JSON file for the answers.")] = None,
    json: _options.Json = False,
) -> None:
    """Measure rootnoise beside torch and Opacus on this machine: processor time of one thread.

    Sections: account, noise, step, memory, factors, growth, accuracy. The page Comparison of the
    documentation has other libraries too, by `benchmarks/comparison/run.py` of the source.
    """
    from rootnoise.cli.bench import questions, tables

    chosen = section or list(questions.SECTIONS)
    with _progress.steps("asking", quiet=json) as bar:
        total = sum(len(questions.questions(name, quick)) for name in chosen)
        result = questions.ask(
            questions.own_sides(), quick, chosen, lambda r: bar.step(len(r["rows"]), total, None)
        )
    if out is not None:
        out.write_text(jsonlib.dumps(result, indent=1) + "\n")
    if json:
        print(jsonlib.dumps(result))
        return
    for made in tables.tables(result).values():
        if made.rows:
            _report.table(made.title, made.headings, made.rows)
