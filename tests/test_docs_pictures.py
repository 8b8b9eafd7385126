"""The numbers of docs/correlated-noise.md are those that its script computes."""

from __future__ import annotations

import importlib.util
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"


def test_the_page_quotes_what_the_script_computes():
    spec = importlib.util.spec_from_file_location("pictures", DOCS / "pictures.py")
    pictures = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pictures)
    found = pictures.numbers()
    page = (DOCS / "correlated-noise.md").read_text(encoding="utf-8")
    for row, name in {
        "sensitivity": "sensitivity",
        "noise that one step adds": "step",
        "noise in the weights after 400 steps": "last",
        "the same, averaged over the steps": "average",
    }.items():
        cells = [f"{found[f'{kind}: {name}']:.2f}" for kind in ("identity", "bsr")]
        assert f"| {row} | {' | '.join(cells)} |" in page
    assert f"averages less than {found['least']:.2f} here" in page
    noisier = found["bsr: step"] / found["identity: step"]
    quieter = found["identity: last"] / found["bsr: last"]
    assert f"by {noisier:.1f} times here, and the weights are {quieter:.1f} times" in page
    for name in pictures.PICTURES:
        assert f"(assets/{name}.png)" in page
        assert (DOCS / "assets" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
