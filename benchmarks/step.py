"""What a step of private training costs, over the same step without privacy in the same rounds.

A round times every candidate once, one after the other, so that a busy machine slows all of them;
a cell is the median over rounds of the ratio to plain. Candidates: `PrivateOptimizer`, with its
ledger and noise of 8 bands; Opacus's hooks, ghost clipping and `functorch` mode, with independent
float32 noise. All make one step of SGD. Accumulated: the batch in micro-batches of 16; Opacus's
through its optimizer's skipped steps, functorch's likewise. Memory is the largest resident size of
a process of its own, less its size before its model was made (Linux).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from rootnoise.cli.bench.models import cnn, perceptron

MICRO = 16
STEPS = 4096  # that the noise is planned for
BATCHES = (16, 64, 256)
WAYS = ("plain", "ours", "hooks", "ghost", "functorch")


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
    """An LSTM over 32 steps; Opacus's layer wherever gradients are private."""

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
    Recurrent.opacus = way != "plain"
    make, draw = MODELS[name]
    model, x, y = make(), draw(n), torch.randint(0, 10, (n,))
    sgd = torch.optim.SGD(model.parameters(), lr=1e-3)
    parts = list(zip(x.split(micro), y.split(micro), strict=True))
    if way == "plain":
        return lambda: _plain(model, sgd, parts)
    if way == "ours":
        return _ours(model, sgd, parts, n)
    return _opacus(way, model, sgd, parts, n)


def _plain(model: nn.Module, sgd: Any, parts: list[Any]) -> None:
    sgd.zero_grad()
    for x, y in parts:
        (loss_of(model(x), y) / len(parts)).backward()
    sgd.step()


def _ours(model: nn.Module, sgd: Any, parts: list[Any], n: int) -> Callable[[], None]:
    """Return the whole private step: ledger, clipping, correlated noise, the optimizer's step."""
    from rootnoise import SGD, FixedCycleSampler, Mechanism, PrivateOptimizer, factorize, privatize

    sampler = FixedCycleSampler(8 * n, n, epochs=STEPS // 8, seed=0)
    split = factorize(SGD(sampler.n_steps), sampler.participation, "bsr", bands=8)
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


def _opacus(way: str, model: nn.Module, sgd: Any, parts: list[Any], n: int) -> Callable[[], None]:
    from opacus import GradSampleModule
    from opacus.grad_sample.grad_sample_module_fast_gradient_clipping import (
        GradSampleModuleFastGradientClipping as Ghost,
    )
    from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
    from opacus.utils.fast_gradient_clipping_utils import (
        DPLossFastGradientClipping,
    )

    options: dict[str, Any] = {
        "noise_multiplier": 1.0,
        "max_grad_norm": 1.0,
        "expected_batch_size": n,
    }
    if way == "ghost":
        ghost = Ghost(model, max_grad_norm=1.0, use_ghost_clipping=True)
        inner = DPOptimizerFastGradientClipping(sgd, **options)
        loss = DPLossFastGradientClipping(ghost, inner, nn.CrossEntropyLoss())
        wrapped, optimizer, criterion = ghost, inner, loss
    else:
        wrapped = GradSampleModule(model, force_functorch=way == "functorch", strict=False)
        optimizer, criterion = DPOptimizer(sgd, **options), loss_of

    def step() -> None:
        for i, (x, y) in enumerate(parts):
            optimizer.zero_grad()
            optimizer.signal_skip_step(i < len(parts) - 1)
            criterion(wrapped(x), y).backward()
            optimizer.step()

    return step


def times(name: str, n: int, micro: int, rounds: int) -> dict[str, float | str]:
    """Return the seconds of plain and each other's time over it, or why it fails."""
    found: dict[str, float | str] = {}
    steps: dict[str, Callable[[], None]] = {}
    for way in WAYS:
        try:
            steps[way] = step_of(way, name, n, micro)
            steps[way]()  # also what the first step alone does
            steps[way]()
        except Exception as reason:  # a candidate that cannot is a cell of the table
            if way in ("plain", "ours"):
                raise
            steps.pop(way, None)
            found[way] = type(reason).__name__
    taken: list[dict[str, float]] = []
    for _ in range(rounds):
        taken.append({})
        for way, step in steps.items():
            start = time.perf_counter()
            step()
            taken[-1][way] = time.perf_counter() - start
    for way in steps:
        found[way] = median(t[way] / (1 if way == "plain" else t["plain"]) for t in taken)
    return found


def peak(way: str, name: str, n: int, micro: int) -> float | None:
    """Return the peak memory of three steps in a process of its own, in MB; None if it fails."""
    arguments = [sys.executable, __file__, "--peak", way, name, str(n), str(micro)]
    done = subprocess.run(arguments, capture_output=True, check=False, text=True)
    return float(done.stdout.split()[-1]) if done.returncode == 0 else None


def print_peak(way: str, name: str, n: int, micro: int) -> None:
    """Print by how many MB this process grows while it makes three steps."""
    import opacus  # noqa: F401 - so that all start from the same size

    import rootnoise.training.clip  # noqa: F401

    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of the imports (Linux)
    before = _status("VmRSS")
    step = step_of(way, name, n, micro)
    for _ in range(3):
        step()
    print((_status("VmHWM") - before) / 1024)


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def main() -> None:
    """Print one table, or with --json one object a line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--batches", nargs="+", type=int, default=BATCHES)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="two batches, three rounds, no ResNet")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--peak", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if options.peak:
        way, name, n, micro = options.peak
        print_peak(way, name, int(n), int(micro))
        return
    if options.quick:
        options.rounds, options.batches = 3, [16, 64]
        options.models = [m for m in options.models if m != "resnet18"]
    if not options.json:
        print(f"{torch.get_num_threads()} threads; time over plain / peak over plain\n")
        print(f"| model | batch | micro | plain | {' | '.join(WAYS[1:])} |")
        print("|---" * (4 + len(WAYS[1:])) + "|")
    for name in options.models:
        for n in options.batches:
            for micro in sorted({n, min(n, MICRO)}, reverse=True):
                taken = times(name, n, micro, options.rounds)
                memory = {w: peak(w, name, n, micro) for w in WAYS if isinstance(taken[w], float)}
                row = {"model": name, "batch": n, "micro": micro, "time": taken, "MB": memory}
                print(json.dumps(row) if options.json else _line(row), flush=True)


def _line(row: dict[str, Any]) -> str:
    taken, memory = row["time"], row["MB"]
    cells = [f"{taken['plain'] * 1e3:.1f} ms, {memory['plain']:.0f} MB"]
    for way in WAYS[1:]:
        if isinstance(taken[way], str):
            cells.append(taken[way])
        else:
            more = f"{memory[way] / memory['plain']:.1f}" if memory[way] else "-"
            cells.append(f"{taken[way]:.2f} / {more}")
    return f"| {row['model']} | {row['batch']} | {row['micro']} | {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
