"""What the processes of test_runs_torchrun run; a child can import it, a test module it cannot."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch._C._distributed_c10d import TCPStore

from parallel_runs import join
from processes import die, start
from rootnoise._check import RootnoiseError
from rootnoise.cli import main
from rootnoise.runs import curves
from rootnoise.runs import run as whole_run
from rootnoise.runs.config import RunConfig
from rootnoise.runs.data import Dataset
from rootnoise.runs.folder import DIGEST_SIZE, RunFolder
from rootnoise.runs.release import Trained
from rootnoise.runs.trainer import Trainer
from rootnoise.training.ranks import Ranks

DATA = "torchrun_runs:examples"


def examples(seed: int = 0) -> Dataset:
    """62 images of four patterns, in batches of 10 at most; of 3 ranks some get nothing."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 4, (93,), generator=generator)
    images = torch.randn(93, 1, 8, 8, generator=generator) / 2
    images[torch.arange(93), 0, 2 * labels] += 1
    return Dataset("four", images[:62], labels[:62], images[62:], labels[62:], 4)


def other_on_rank_1() -> Dataset:
    return examples(int(os.environ["RANK"]))


def command(
    rank: int,
    size: int,
    port: int,
    out: Path,
    arguments: Sequence[str],
    spoil: Callable[[int], object] | None = None,
) -> None:
    """Run `rootnoise train` as torchrun would, and note what is printed, and what is written."""
    where = {"RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    where["TORCHELASTIC_USE_AGENT_STORE"] = True
    if size > 1:
        os.environ |= {name: str(value) for name, value in where.items()}
    curves.learning_curves = lambda *_: None  # pictures take longest
    Trained._report = lambda *_: None  # type: ignore[method-assign]
    torch.set_num_threads(1)
    written: list[str] = []

    def audit(event: str, found: tuple[Any, ...]) -> None:
        writes = event == "open" and isinstance(found[2], int) and found[2] & 3
        if (writes or event in {"os.mkdir", "os.rename", "os.remove"}) and str(found[0]).startswith(
            str(out / "run")
        ):
            written.append(f"{event} {found[0]}")

    sys.addaudithook(audit)
    if spoil is not None:
        spoil(rank)
    with (
        (out / f"{rank}.out").open("a") as printed,
        (out / f"{rank}.err").open("a") as errors,
        contextlib.redirect_stdout(printed),
        contextlib.redirect_stderr(errors),
    ):
        status = main([*arguments, "--out", str(out / "run")])
    (out / f"{rank}.written").write_text("\n".join(written))
    sys.exit(status)


def told(rank: int, size: int, out: Path) -> None:
    """Rank 0 is slow to write: what another rank is told of is on disk all the same."""
    group, config = join(rank, size, out), RunConfig(dataset=DATA, mechanism="bsr", epsilon=8.0)
    config = dataclasses.replace(config, model="logistic", epochs=2, batch_size=31)
    curves.learning_curves = lambda *_: None
    write = RunFolder.save_checkpoint

    def slow(self: RunFolder, state: Mapping[str, Any]) -> None:
        time.sleep(0.5)
        write(self, state)

    RunFolder.save_checkpoint = slow  # type: ignore[method-assign]
    found = []

    def look(trainer: Trainer) -> None:
        content = io.BytesIO((out / "run" / "checkpoint.pt").read_bytes()[:-DIGEST_SIZE])
        saved = torch.load(content, weights_only=True)["run"]
        found.append((saved["optimizer"]["t"], trainer.t))

    whole_run.run(config, out / "run", on_checkpoint=look, ranks=Ranks(group))
    assert found == [(2, 2), (4, 4)], f"rank {rank} was told {found}"


def launched(
    size: int,
    out: Path,
    arguments: Sequence[str] | Callable[[int], Sequence[str]],
    spoil: Callable[[int], object] | None = None,
) -> list[int]:
    """Return how `size` processes end; none may wait for one that has ended.

    The store where they meet is here, as it is in torchrun.
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    each = arguments if callable(arguments) else lambda rank: arguments
    ranks = [start(command, r, size, store.port, out, each(r), spoil) for r in range(size)]
    try:
        for process in ranks:
            process.join(60)
        assert all(process.exitcode is not None for process in ranks), "a process waits"
    finally:
        for process in ranks:
            process.kill()
    return [int(process.exitcode or 0) for process in ranks]


def at_step(rank: int, step: int, action: Callable[[], object]) -> Callable[[int], None]:
    """Make one rank act when it has made a step."""
    return _AtStep(rank, step, action)


class _AtStep:
    """See `at_step`; it can be sent to a process."""

    def __init__(self, rank: int, step: int, action: Callable[[], object]) -> None:
        self.rank, self.step, self.action = rank, step, action

    def __call__(self, rank: int) -> None:
        if rank != self.rank:
            return
        real = Trainer._step

        def step(trainer: Trainer) -> None:
            real(trainer)
            if trainer.t == self.step:
                self.action()

        Trainer._step = step  # type: ignore[method-assign, assignment]


def killed() -> None:
    die()


def fails() -> None:
    raise RootnoiseError("weights must be kept, got none")


def interrupted() -> None:
    raise KeyboardInterrupt


def breaks() -> None:
    raise ZeroDivisionError("of one rank")
