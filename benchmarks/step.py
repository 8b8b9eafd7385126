"""What a step of private training costs, over the same step without privacy in the same rounds.

Without arguments in about fifteen minutes of an idle machine; writes docs/clipping.json, and of it
the table and words of docs/clipping.md. A round gives every candidate a turn, one after the other,
so that a busy machine slows all of them; a cell is the median over rounds of the ratio to plain. A
turn is as many steps as one block of our noise has: a block is made in one of them, which the
median of single steps would leave out. A step of Opacus that takes long is its whole turn.
Candidates: `PrivateOptimizer`, with its ledger and noise of 8 bands; Opacus's hooks, ghost clipping
and `functorch` mode, with independent float32 noise. All make one step of SGD. Accumulated: the
batch in micro-batches of 16; Opacus's through its optimizer's skipped steps, functorch's likewise.
Hooks and functorch hold the gradients of a micro-batch at once; where those exceed 4 GB they are
not run. Memory is the largest resident size of a process of its own, less its size before its model
was made (Linux).
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import os
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from rootnoise._files import write_whole
from rootnoise.cli.bench.clock import growth
from rootnoise.cli.bench.models import cnn, perceptron
from rootnoise.cli.bench.page import written
from rootnoise.cli.bench.questions import load, processor
from rootnoise.cli.bench.tables import Table
from rootnoise.cli.bench.with_opacus import private_step
from rootnoise.noise.blockplan import default_steps

MICRO = 16
STEPS = 4096  # that the noise is planned for
BATCHES = (16, 64, 256)
LARGEST = {"resnet18": 64}  # of those, by default: its 256 alone take ten minutes
WAYS = ("plain", "ours", "hooks", "ghost", "functorch")
MOST = 4e9  # bytes of gradients at once
BANDS = 8
LONG = 0.1  # seconds of a step
DOCS = Path(__file__).parents[1] / "docs"


class Residual(nn.Module):
    """Two convolutions around a shortcut, with GroupNorm."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False),
            nn.GroupNorm(8, c_out),
            nn.ReLU(),
            nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False),
            nn.GroupNorm(8, c_out),
        )
        same = stride == 1 and c_in == c_out
        self.shortcut = nn.Identity() if same else nn.Conv2d(c_in, c_out, 1, stride, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the block's output."""
        y: torch.Tensor = functional.relu(self.body(x) + self.shortcut(x))
        return y


class Encoder(nn.Module):
    """Two encoder layers over 64 tokens of a vocabulary of 1000; 9e5 parameters."""

    def __init__(self) -> None:
        super().__init__()
        from opacus.layers import DPMultiheadAttention

        self.table, layers = nn.Embedding(1000, 192), []
        for _ in range(2):
            layer = nn.TransformerEncoderLayer(192, 4, 512, batch_first=True)
            if Encoder.opacus:
                layer.self_attn = DPMultiheadAttention(192, 4, batch_first=True)
            layers.append(layer)
        self.layers, self.out = nn.Sequential(*layers), nn.Linear(192, 10)

    opacus = False

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the scores."""
        y: torch.Tensor = self.out(self.layers(self.table(ids)).mean(1))
        return y


class Recurrent(nn.Module):
    """An LSTM over 32 steps; Opacus's own layer where its modes need it."""

    opacus = False

    def __init__(self) -> None:
        super().__init__()
        from opacus.layers import DPLSTM

        self.lstm = (DPLSTM if Recurrent.opacus else nn.LSTM)(64, 128, batch_first=True)
        self.out = nn.Linear(128, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the scores."""
        y: torch.Tensor = self.out(self.lstm(x)[0][:, -1])
        return y


def resnet18() -> nn.Module:
    """Return ResNet-18 with GroupNorm for 32 x 32 pixels, 1.1e7 parameters."""
    widths = (64, 64, 64, 128, 128, 256, 256, 512, 512)
    strides = (1, 1, 2, 1, 2, 1, 2, 1)
    blocks = [Residual(*pair) for pair in zip(widths, widths[1:], strides, strict=False)]
    start = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.GroupNorm(8, 64), nn.ReLU()
    end = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10)
    return nn.Sequential(*start, *blocks, *end)


def pixels(*shape: int) -> Callable[[int], torch.Tensor]:
    """Return what draws n examples of this shape."""
    return lambda n: torch.randn(n, *shape)


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], torch.Tensor]]] = {
    "perceptron": (perceptron, pixels(784)),
    "cnn": (cnn, pixels(1, 28, 28)),
    "resnet18": (resnet18, pixels(3, 32, 32)),
    "transformer": (Encoder, lambda n: torch.randint(0, 1000, (n, 64))),
    "lstm": (Recurrent, pixels(32, 64)),
}


def loss_of(scores: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return the mean cross-entropy."""
    return functional.cross_entropy(scores, y)


def step_of(way: str, name: str, n: int, micro: int) -> Callable[[], None]:
    """Return what makes one step of a batch of n, in micro-batches."""
    Encoder.opacus = way in ("hooks", "ghost")  # torch's own layer has no sampler there
    Recurrent.opacus = way not in ("plain", "ours")
    make, draw = MODELS[name]
    model, x, y = make(), draw(n), torch.randint(0, 10, (n,))
    sgd = torch.optim.SGD(model.parameters(), lr=1e-3)
    parts = list(zip(x.split(micro), y.split(micro), strict=True))
    if way == "plain":
        return lambda: _plain(model, sgd, parts)
    if way == "ours":
        return _ours(model, sgd, parts, n)
    return private_step(way, model, parts, n, loss_of)


def _plain(model: nn.Module, sgd: Any, parts: list[Any]) -> None:
    sgd.zero_grad()
    for x, y in parts:
        (loss_of(model(x), y) / len(parts)).backward()
    sgd.step()


def _ours(model: nn.Module, sgd: Any, parts: list[Any], n: int) -> Callable[[], None]:
    """Return the whole private step: ledger, clipping, correlated noise, the optimizer's step."""
    from rootnoise import SGD, FixedCycleSampler, Mechanism, PrivateOptimizer, factorize, privatize

    sampler = FixedCycleSampler(8 * n, n, epochs=STEPS // 8, seed=0)
    split = factorize(SGD(sampler.n_steps), sampler.participation, "bsr", bands=BANDS)
    who = sampler.participation
    mechanism = Mechanism.calibrate(split, who, noise_multiplier=1.0, delta=1e-6)
    private = privatize(model)
    # A probe repeats steps 0, 1, 2, 4, 8 and so on: a cost of a run, not of a step.
    optimizer = PrivateOptimizer(sgd, private, mechanism, sampler, independence="assumed")

    def step() -> None:
        indices = torch.from_numpy(sampler.batch(optimizer.t)).split(len(parts[0][0]))
        optimizer.zero_grad()
        for i, (x, y) in enumerate(parts):
            loss_of(private(x), y).backward()
            if i < len(parts) - 1:
                optimizer.accumulate(indices[i])
        optimizer.step(indices[-1])

    return step


def too_large(way: str, name: str, micro: int) -> str | None:
    """Return how much a way would hold, if that is too much to be run."""
    if way not in ("hooks", "functorch"):
        return None
    held = micro * 4 * sum(p.numel() for p in MODELS[name][0]().parameters())
    return f"not run: {held / 1e9:.0f} GB" if held > MOST else None


def times(
    name: str, n: int, micro: int, rounds: int, budget: float
) -> tuple[dict[str, float | str], int]:
    """Return the seconds of plain and each other's time over it, or why it fails; and the rounds.

    Rounds end with the budget in seconds: one at least.
    """
    found: dict[str, float | str] = {}
    steps: dict[str, tuple[Callable[[], None], int]] = {}
    size = sum(p.numel() for p in MODELS[name][0]().parameters())
    block = default_steps(BANDS - 1, STEPS, size)
    for way in WAYS:
        reason = too_large(way, name, micro)
        if reason:
            found[way] = reason
            continue
        try:
            step = step_of(way, name, n, micro)
            step()  # also what the first step alone does
            since = time.perf_counter()
            step()
            long = time.perf_counter() - since > LONG
        except Exception as reason:  # a candidate that cannot is a cell of the table
            if way in ("plain", "ours"):
                raise
            found[way] = f"fails: {type(reason).__name__}"
        else:
            steps[way] = step, 1 if long and way not in ("plain", "ours") else block
    taken: list[dict[str, float]] = []
    start = time.perf_counter()
    while len(taken) < rounds and (not taken or time.perf_counter() - start < budget):
        taken.append({})
        for way, (step, turn) in steps.items():
            since = time.perf_counter()
            for _ in range(turn):
                step()
            taken[-1][way] = (time.perf_counter() - since) / turn
    for way in steps:
        found[way] = median(t[way] / (1 if way == "plain" else t["plain"]) for t in taken)
    return found, len(taken)


def peak(way: str, name: str, n: int, micro: int) -> float:
    """Return by how many MB this process grows while it makes two steps."""
    warnings.simplefilter("ignore")
    return growth(lambda: step_of(way, name, n, micro), calls=2)


def peaks(ways: list[str], name: str, n: int, micro: int) -> dict[str, float | None]:
    """Return the peak memory of each way, in a process of its own; None if that ended."""
    forks = multiprocessing.get_context("forkserver")  # which has imported all before it forks
    forks.set_forkserver_preload(["opacus", "rootnoise.training", "sklearn"])
    found: dict[str, float | None] = {}
    for way in ways:
        with ProcessPoolExecutor(1, mp_context=forks) as pool:
            try:
                found[way] = pool.submit(peak, way, name, n, micro).result()
            except RuntimeError:  # out of memory, or killed for it: the row keeps its times
                found[way] = None
    return found


def table(result: Mapping[str, Any]) -> Table:
    """Return the table of a result."""
    headings = ["model", "batch", "micro-batch", "plain", "rootnoise"]
    headings += [f"Opacus, {way}" for way in WAYS[2:]]
    rows = []
    for row in result["rows"]:
        taken, memory = row["time"], row["MB"]
        cells = [f"{taken['plain'] * 1e3:.1f} ms, {memory['plain'] or 0:.0f} MB"]
        for way in WAYS[1:]:
            if isinstance(taken[way], str):
                cells.append(taken[way])
                continue
            known = memory[way] and memory["plain"]
            more = f"{memory[way] / memory['plain']:.1f}" if known else "-"
            cells.append(f"{taken[way]:.2f} / {more}")
        rows.append([row["model"], str(row["batch"]), str(row["micro"]), *cells])
    return Table("A private step: time and peak memory over plain", headings, rows)


def words(result: Mapping[str, Any]) -> str:
    """Return what the table says, in sentences."""

    def best(row: Mapping[str, Any], field: str) -> float:
        ways = (row[field].get(way) for way in WAYS[2:])
        return min((v for v in ways if isinstance(v, float)), default=float("inf"))

    rows = result["rows"]
    total = len(rows)
    faster = sum(row["time"]["ours"] < best(row, "time") for row in rows)
    known = [row for row in rows if row["MB"].get("ours")]
    smaller = sum(row["MB"]["ours"] < best(row, "MB") for row in known)
    aims = sum(row["time"]["ours"] <= 1.5 for row in rows)
    before, after = result["load"]
    return (
        f"Measured by `{result['command']}` on {result['date']}: {result['machine']},"
        f" {result['threads']} threads, torch {result['torch']}, Opacus {result['opacus']}; load"
        f" {before} before, {after} after; medians of {min(r['rounds'] for r in rows)} to"
        f" {max(r['rounds'] for r in rows)} rounds.\n\n"
        f"A step of rootnoise takes less time than the quickest of Opacus's in {faster} of {total}"
        f" rows, and less memory than its smallest in {smaller} of {len(known)}. It takes at most"
        f" 1.5 times the plain step in {aims} of {total}.\n"
    )


def main() -> None:
    """Measure, and write the JSON row by row, then the page; --out writes another JSON alone."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--batches", nargs="+", type=int)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--budget", type=float, default=6.0, help="seconds of rounds a row")
    parser.add_argument("--quick", action="store_true", help="two batches, three rounds, no ResNet")
    parser.add_argument("--out", type=Path, default=DOCS / "clipping.json")
    parser.add_argument("--page", action="store_true", help="write the page again, measure nothing")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if options.quick:
        options.rounds, options.batches = 3, [16, 64]
        options.models = [m for m in options.models if m != "resnet18"]
    result: dict[str, Any] = {}
    if not options.page:
        result = {
            "command": " ".join(["python benchmarks/step.py", *sys.argv[1:]]),
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "machine": f"{processor()}, {os.cpu_count()} cores",
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "opacus": version("opacus"),
            "load": [load(), None],
            "rows": [],
        }
    start = time.monotonic()
    for name in [] if options.page else options.models:
        for n in options.batches or [b for b in BATCHES if b <= LARGEST.get(name, b)]:
            for micro in sorted({n, min(n, MICRO)}, reverse=True):
                taken, rounds = times(name, n, micro, options.rounds, options.budget)
                memory = peaks([w for w in WAYS if isinstance(taken[w], float)], name, n, micro)
                row = {"model": name, "batch": n, "micro": micro, "time": taken, "MB": memory}
                result["rows"].append({**row, "rounds": rounds})
                result["load"][1] = load()
                write_whole(options.out, (json.dumps(result, indent=1) + "\n").encode())
                last = " | ".join(table(result).rows[-1])
                print(f"{time.monotonic() - start:4.0f} s  {last}", flush=True)
    if options.out == DOCS / "clipping.json":
        result = json.loads(options.out.read_text())
        found = {"table": {"step": table(result).markdown()}, "words": {"step": words(result)}}
        page = DOCS / "clipping.md"
        page.write_text(written(page.read_text(), found))


if __name__ == "__main__":
    main()
