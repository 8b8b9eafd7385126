"""What a step of correlated noise costs, over `torch.randn` of the same size in the same rounds.

A round times every candidate once, one after the other, so that a busy machine slows all of them;
a cell is the median over rounds of the ratio. Blocks are timed whole: the time of a step is that of
m steps over m. Candidates: this engine in two memory modes; the usual implementation, which rolls
and concatenates p - 1 buffers and multiplies with `tensordot`; a ring of p - 1 buffers, added up
one by one; and the copy of one row, which bounds them all. JAX-Privacy, where the interpreter given
has it (`--jax PYTHON`), is timed beside, in a process of its own. `--train` times a step of private
training instead, with Opacus and its independent noise. (opake: benchmarks/comparison.)
"""

from __future__ import annotations

import argparse
import subprocess
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from statistics import median

import numpy as np
import torch
from torch import nn

from rootnoise import SGD, FixedCycle, Key, Mechanism, NoiseStream, SingleParticipation, factorize
from rootnoise.participation.samplers import FixedCycleSampler
from rootnoise.training import PrivateOptimizer, privatize

BYTES = 16e9  # of buffers that a machine of 24 GB can spare

JAX = """
import sys, time, jax, jax.numpy as jnp, numpy as np
from jax_privacy import noise_addition
from jax_privacy.matrix_factorization import toeplitz
d, steps, *c = [float(x) for x in sys.argv[1:]]
matrix = toeplitz.inverse_as_streaming_matrix(jnp.array(c))
privatizer = noise_addition.matrix_factorization_privatizer(matrix, stddev=1.0, prng_key=0)
zero = jnp.zeros(int(d))
state, update = privatizer.init(zero), jax.jit(privatizer.update, donate_argnums=1)
noise, state = update(zero, state)
times = []
for _ in range(int(steps)):
    start = time.perf_counter()
    noise, state = update(zero, state)
    noise.block_until_ready()
    times.append(time.perf_counter() - start)
print(np.median(times))
"""


def mechanism(bands: int) -> Mechanism:
    """Return BSR with p bands."""
    who = SingleParticipation()
    split = factorize(SGD(10_000, momentum=0.9), who, "bsr", bands=bands)
    return Mechanism.calibrate(split, who, noise_multiplier=1.0, delta=1e-5)


def rolled(c: torch.Tensor, d: int) -> Iterator[torch.Tensor]:
    """C^-1 Z as it is usually streamed: the last p - 1 noises in one array, newest first."""
    buffers = torch.zeros(len(c) - 1, d)
    while True:
        noise = (torch.randn(d) - torch.tensordot(c[1:], buffers, dims=1)) / c[0]
        buffers = torch.cat([noise[None], buffers[:-1]])
        yield noise


def ring(c: torch.Tensor, d: int) -> Iterator[torch.Tensor]:
    """C^-1 Z with the oldest of p - 1 buffers overwritten by the newest."""
    buffers, t = torch.zeros(len(c) - 1, d), 0
    while True:
        noise = torch.randn(d)
        for j in range(1, len(c)):
            noise.sub_(buffers[(t - j) % len(buffers)], alpha=float(c[j]))
        buffers[t % len(buffers)] = noise.div_(float(c[0]))
        t += 1
        yield noise


def seconds(call: Callable[[], object], times: int) -> float:
    """Return the mean wall time of `times` calls."""
    start = time.perf_counter()
    for _ in range(times):
        call()
    return (time.perf_counter() - start) / times


def row(d: int, bands: int, rounds: int) -> dict[str, float]:
    """Return the median time of torch.randn in ns a value, and of each candidate over it."""
    m = mechanism(bands)
    coefficients = m.strategy.coefficients
    if coefficients is None:
        raise TypeError("BSR is Toeplitz")
    c = torch.tensor(coefficients, dtype=torch.float32)
    source, target = torch.randn(d), torch.empty(d)
    ahead, single = NoiseStream(m, d), NoiseStream(m, d, memory="ring")
    usual, simple = rolled(c, d), ring(c, d)
    calls: dict[str, tuple[Callable[[], object], int]] = {
        "randn": (lambda: torch.randn(d), 4),
        "look-ahead": (ahead.next, ahead.block_steps),
        "ring mode": (single.next, 1),
        "roll": (lambda: next(usual), 1),
        "simple ring": (lambda: next(simple), 1),
        "copy": (lambda: target.copy_(source), 4),
    }
    for call, times in calls.values():
        seconds(call, times)
    taken = [{name: seconds(*call) for name, call in calls.items()} for _ in range(rounds)]
    ratios = {name: median(t[name] / t["randn"] for t in taken) for name in calls}
    return ratios | {"randn": median(t["randn"] for t in taken) / d * 1e9}


def jax_step(python: str, d: int, bands: int) -> float:
    """Return the median seconds of a step of JAX-Privacy, in another interpreter."""
    coefficients = mechanism(bands).strategy.coefficients
    arguments = [str(x) for x in (d, 5, *(() if coefficients is None else coefficients))]
    done = subprocess.run([python, "-c", JAX, *arguments], capture_output=True, check=True)
    return float(done.stdout)


def training(bands: int, rounds: int) -> tuple[float, float]:
    """Return the ms of a private step with p bands and with Opacus's own independent noise."""
    from opacus import GradSampleModule
    from opacus.optimizers import DPOptimizer

    n, batch = 2048, 64
    sampler = FixedCycleSampler(n_examples=n, batch_size=batch, epochs=64, seed=0)
    x, y = torch.randn(n, 784), torch.randint(10, (n,))

    def model() -> nn.Module:
        sizes = (784, 1024, 192, 10)  # 1,002,634 parameters
        layers = [nn.Linear(a, b) for a, b in pairwise(sizes)]
        return nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])

    who = FixedCycle(n // batch, 64)
    split = factorize(SGD(sampler.n_steps, momentum=0.9), who, "bsr", bands=bands)
    ours = privatize(model())
    sgd = torch.optim.SGD(ours.parameters(), lr=0.1, momentum=0.9)
    calibrated = Mechanism.calibrate(split, who, noise_multiplier=1.0, delta=1e-5)
    optimizer = PrivateOptimizer(sgd, ours, calibrated, sampler, Key.fresh())
    theirs = GradSampleModule(model())
    sgd = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9)
    other = DPOptimizer(sgd, noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=batch)
    batches = iter(sampler)

    def correlated() -> None:
        indices = next(batches)
        optimizer.zero_grad()
        nn.functional.cross_entropy(ours(x[indices]), y[indices]).backward()
        optimizer.step(indices)

    def independent() -> None:
        indices = torch.randint(n, (batch,))
        other.zero_grad()
        nn.functional.cross_entropy(theirs(x[indices]), y[indices]).backward()
        other.step()

    correlated(), independent()  # warm
    steps = optimizer.stream.block_steps  # from here on they hold one block each time
    pairs = [(seconds(correlated, steps), seconds(independent, steps)) for _ in range(rounds)]
    return median(a for a, _ in pairs) * 1e3, median(b for _, b in pairs) * 1e3


def main() -> None:
    """Print one line a size and number of bands, or the time of training steps."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sizes", type=float, nargs="+", default=[1e6, 1e7])
    parser.add_argument("--bands", type=int, nargs="+", default=[4, 16, 64])
    parser.add_argument("--jax", help="an interpreter that has JAX-Privacy")
    parser.add_argument("--train", action="store_true")
    args = parser.parse_args()
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, numpy {np.__version__}")
    if args.train:
        ours, theirs = training(64, args.rounds)
        print(f"p = 64: {ours:.1f} ms a step; Opacus, independent: {theirs:.1f} ms")
        print(f"ratio {ours / theirs:.3f}")
        return
    for d in (int(size) for size in args.sizes):
        for bands in args.bands:
            if 4 * d * 4 * bands > BYTES:
                print(f"{d:>10} {bands:>4} skipped: the buffers of all candidates need more memory")
                continue
            cells = row(d, bands, args.rounds)
            line = " ".join(f"{name} {value:.2f}" for name, value in cells.items())
            if args.jax:
                taken = jax_step(args.jax, d, bands) / d * 1e9
                line += f" jax-privacy {taken / cells['randn']:.2f}"
            print(f"{d:>10} {bands:>4} {line}", flush=True)


if __name__ == "__main__":
    main()
