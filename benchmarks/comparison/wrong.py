"""Inputs on which a rival is wrong: `python wrong.py opacus|jax|opake|fastdp`, in its environment.

Prints a JSON list of {input, right, found, wrong}: what should come out, what does, and whether it
is wrong. A case that is right again on a later version says so.
"""

from __future__ import annotations

import json
import os
import sys
from itertools import combinations, pairwise
from typing import Any

Case = dict[str, Any]


def opacus() -> list[Case]:
    """Return the cases of Opacus."""
    import torch
    from opacus import GradSampleModule, PrivacyEngine
    from opacus.grad_sample.grad_sample_module_fast_gradient_clipping import (
        GradSampleModuleFastGradientClipping as Ghost,
    )
    from torch import nn
    from torch.utils.data import DataLoader, TensorDataset

    from rootnoise import FixedCycle, privacy_cost

    def tokens(seed: int, apart: float, dtype: torch.dtype) -> tuple[float, float]:
        """Return the ghost norm of 8 tokens that nearly cancel, and the true one."""
        draw = torch.Generator().manual_seed(seed)
        x, g = torch.randn(2, 1, 8, 16, generator=draw)
        x[:, 4:] = x[:, :4]
        g[:, 4:] = apart * torch.randn(1, 4, 16, generator=draw) - g[:, :4]
        x, g = x.to(dtype), g.to(dtype)
        true = torch.einsum("bti,btj->bij", g.double(), x.double()).norm()
        ghost = Ghost(nn.Linear(16, 16, bias=False).to(dtype), max_grad_norm=1.0)
        (ghost(x) * g).sum().backward()
        return float(ghost.get_norm_sample()[0]), float(true)

    low = [tokens(seed, 1e-2, torch.bfloat16) for seed in range(20)]
    none, nan = sum(found == 0 for found, _ in low), sum(found != found for found, _ in low)
    ratios = [found / true for found, true in (tokens(s, 1e-3, torch.float32) for s in range(20))]

    table = nn.Embedding(4, 3, padding_idx=0)
    GradSampleModule(table)(torch.tensor([[0, 1]])).sum().backward()
    padding = float(table.weight.grad_sample[0, 0].abs().sum())

    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.always, self.first = nn.Linear(2, 1, bias=False), nn.Linear(2, 1, bias=False)

        def forward(self, x: torch.Tensor, both: bool) -> torch.Tensor:
            y: torch.Tensor = self.always(x)
            return y + self.first(x) if both else y

    branch = Ghost(Branch(), max_grad_norm=1.0)
    branch(torch.tensor([[300.0, 400.0]]), both=True).sum().backward()
    branch.zero_grad()
    branch(torch.tensor([[3.0, 4.0]]), both=False).sum().backward()
    stale = float(branch.get_norm_sample()[0])

    spent = []
    for poisson in (True, False):
        net, engine = nn.Linear(2, 1), PrivacyEngine()
        _, optimizer, loader = engine.make_private(
            module=net,
            optimizer=torch.optim.SGD(net.parameters(), lr=0.1),
            data_loader=DataLoader(TensorDataset(torch.ones(100, 2)), batch_size=10),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
            poisson_sampling=poisson,
        )
        engine.accountant.history = [(1.0, optimizer.expected_batch_size / 100, 10 * len(loader))]
        spent.append(engine.get_epsilon(1e-5))

    # Ten times in the same batch: one Gaussian mechanism of sensitivity sqrt(10).
    exact = privacy_cost(FixedCycle(10, 10), 100, 10**-0.5, 1e-5).epsilon

    return [
        {
            "input": "ghost norm in bfloat16: Linear(16, 16), 8 tokens, the last 4 the first 4 with"
            " opposite gradients up to 1 %; 20 draws",
            "right": f"the norm, at least {min(true for _, true in low):.2g} in each",
            "found": f"0 in {none} of 20: those examples are not clipped; NaN in {nan}",
            "wrong": none + nan > 0,
        },
        {
            "input": "ghost norm in float32: the same, up to 0.1 %; 20 draws",
            "right": "the norm",
            "found": f"{min(ratios):.3f} to {max(ratios):.3f} of it",
            "wrong": min(ratios) < 0.999,
        },
        {
            "input": "ghost norm: a layer used in one step (norm 500) and not in the next (norm 5)",
            "right": "5 in the second step",
            "found": f"{stale:.1f}"
            + (": too large, so clipped too much, which is private" if stale > 5.1 else ""),
            "wrong": abs(stale - 5) > 0.1,
        },
        {
            "input": "hooks: Embedding(4, 3, padding_idx=0) on the ids 0 and 1",
            "right": "gradient 0 in the padding row, as torch has it",
            "found": f"{padding:.0f}, summed" + (": the padding row is trained" * (padding > 0)),
            "wrong": padding > 0,
        },
        {
            "input": "`make_private(..., poisson_sampling=False)`, noise multiplier 1, 10 of 100"
            " records a step, 100 steps, delta 1e-5",
            "right": f"without amplification, ten participations: epsilon {exact:.2f}",
            "found": f"epsilon {spent[1]:.2f}, that of Poisson sampling ({spent[0]:.2f}); its"
            " docstring says that this is an approximation",
            "wrong": bool(spent[1] < 0.999 * exact),
        },
    ]


STEPS, APART, TIMES = 12, 3, 4  # of the runs whose every pattern is tried


def overlooked(strategies: list[tuple[Any, float]]) -> Case:
    """Return the case of sensitivities, each of a strategy's coefficients, against all patterns."""
    import numpy as np

    patterns = [
        list(p)
        for k in range(1, TIMES + 1)
        for p in combinations(range(STEPS), k)
        if all(y - x >= APART for x, y in pairwise(p))
    ]
    worst = 0.0
    for coefficients, sensitivity in strategies:
        c = np.zeros(STEPS)
        c[: len(coefficients)] = coefficients
        i, j = np.indices((STEPS, STEPS))
        matrix = np.where(i >= j, c[i - j], 0)
        worst = max(worst, *(np.linalg.norm(matrix[:, p].sum(1)) / sensitivity for p in patterns))
    return {
        "right": "the largest over all patterns",
        "found": f"right: the true one is at most {worst:.6f} of it"
        if worst < 1.00001
        else f"the true one is {worst:.6f} of it",
        "wrong": bool(worst >= 1.00001),
    }


def jax() -> list[Case]:
    """Return what was tried on JAX-Privacy: its sensitivities against every pattern."""
    from jax_privacy.matrix_factorization import toeplitz

    strategies = []
    for p in (1, 3, 8):
        for c in (
            toeplitz.optimal_max_error_strategy_coefs(STEPS)[:p],
            toeplitz.optimize_banded_toeplitz(STEPS, p),
        ):
            squared = toeplitz.minsep_sensitivity_squared(c, APART, TIMES, STEPS)
            strategies.append((c, float(squared) ** 0.5))
    about = "sensitivity of BSR and banded Toeplitz, 12 steps, 4 participations 3 apart"
    return [{"input": about, **overlooked(strategies)}]


def opake() -> list[Case]:
    """Return what was tried on opake: its sensitivities against every pattern."""
    from opake import dpftrl

    recipes: list[Any] = [
        *(dpftrl.bsr_strategy(bandwidth=p, alpha=1.0, beta=0.5) for p in (1, 3, 8)),
        *(dpftrl.band_mf_strategy(bands=p) for p in (1, 3, 8)),
        dpftrl.blt_strategy(),
    ]
    how = {"n_steps": STEPS, "min_sep": APART, "max_participations": TIMES}
    strategies = [(r.coefficients(**how).numpy(), r.sensitivity(**how)) for r in recipes]
    about = "sensitivity of BSR, BandMF and BLT, 12 steps, 4 participations 3 apart"
    return [{"input": about, **overlooked(strategies)}]


def fastdp() -> list[Case]:
    """Return the cases of fastDP."""
    import torch
    from fastDP import PrivacyEngine
    from torch import nn

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
            self.second.weight = self.first.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.second(torch.relu(self.first(x)))
            return y

    net = Tied()
    start = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    net.first.weight.data.copy_(start)
    options: dict[str, Any] = {"noise_multiplier": 0.0, "max_grad_norm": 1.0, "epochs": 1}
    engine = PrivacyEngine(net, batch_size=1, sample_size=100, clipping_fn="Abadi", **options)
    sgd = torch.optim.SGD(net.parameters(), lr=1.0)
    engine.attach(sgd)
    net(torch.tensor([[1000.0, 0.0]])).sum().backward()
    sgd.step()
    moved = float((net.first.weight.detach() - start).norm())
    return [
        {
            "input": "two Linear(2, 2) that share the weight [[1, 0], [-1, 0]], a ReLU between; one"
            " record (1000, 0), loss the sum of outputs, clip norm 1, rate 1, no noise",
            "right": "the weight moves by at most 1",
            "found": f"it moves by {moved:.0f}"
            + (": the norm of one use overwrites that of the other" if moved > 1.001 else ""),
            "wrong": moved > 1.001,
        }
    ]


if __name__ == "__main__":
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what they print of their own goes astray
    print(
        json.dumps({"opacus": opacus, "jax": jax, "opake": opake, "fastdp": fastdp}[sys.argv[1]]()),
        file=out,
    )
