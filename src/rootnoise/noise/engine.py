"""Blocks of noise, made chunk by chunk on the threads of a CPU or beside the work of a GPU."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache

import numpy as np
import torch
from threadpoolctl import ThreadpoolController

from rootnoise._check import integer
from rootnoise.noise.blockplan import BlockPlan, Moves
from rootnoise.noise.sources import NoiseSource, Rows

# Rows of z that a CPU draws at once, of one chunk or of several: what its source handles in one go.
ROWS_AT_ONCE = 16

Pieces = list[tuple[int, int, int]]
"""Of one chunk: the first position held, the one after the last, and the first one's column."""

_one_stream = threading.Lock()


class Engine:
    """Runs the blocks of one stream over the chunks that its spans touch.

    A chunk is drawn and multiplied whole, in a product of one shape, so that the bits of a position
    depend neither on the spans nor on the threads. Memory has a column for each position held.

    Args:
        sources: one for each thread; a GPU takes one.
        spans: ascending, disjoint (start, stop) within the vector.
        n_parameters: length of the whole vector.
        device: of the memory and the sources.

    Raises:
        RootnoiseError: spans that overlap, descend, or leave the vector.
    """

    def __init__(
        self,
        sources: Sequence[NoiseSource],
        spans: Sequence[tuple[int, int]],
        n_parameters: int,
        device: torch.device,
    ) -> None:
        self._pieces = _cut(spans, n_parameters, sources[0].chunk)
        self._chunks = list(self._pieces)
        self.size = sum(b - a for pieces in self._pieces.values() for a, b, _ in pieces)
        self.device = device
        # A GPU makes noise beside forward and backward, on a stream of its own.
        self.stream: torch.cuda.Stream | None = None
        if device.type != "cpu":
            self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._workers = [_Worker(source, device) for source in sources]

    def run(self, memory: torch.Tensor, plan: BlockPlan, moves: Moves, t: int) -> None:
        """Make the m steps from t on, in the rows of memory, shape (rows, size), of `moves`."""
        drawn = plan.m + (plan.s if plan.regenerates else 0)
        height = max(1, ROWS_AT_ONCE // drawn) if self.stream is None else 1
        starts = range(0, len(self._chunks), height)
        left = iter(starts)  # shared: each thread takes the next group
        rows = memory.numpy() if self.stream is None else memory

        def work(worker: _Worker) -> None:
            for i in left:
                group = {chunk: self._pieces[chunk] for chunk in self._chunks[i : i + height]}
                worker.run(rows, plan, moves, t, group)

        workers = self._workers[: len(starts)]
        with _one_blas_thread() if self.stream is None else _beside(self.stream, memory):
            if len(workers) < 2:
                list(map(work, workers))
            else:
                with ThreadPoolExecutor(len(workers)) as pool:
                    list(pool.map(work, workers))

    def wait(self) -> None:
        """Make later work of the GPU wait for the block; on the CPU there is none to wait for."""
        if self.stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self.stream)


class _Worker:
    """A source with its work space: [state; z] of a group of chunks, and the rows computed."""

    def __init__(self, source: NoiseSource, device: torch.device) -> None:
        self._source, self._device = source, device
        self._inputs = self._outputs = self._space(0, 0)

    def _space(self, n_chunks: int, n_rows: int) -> Rows:
        # Zeros: columns that are not held are multiplied too, and should not be NaN.
        shape = (n_chunks, n_rows, self._source.chunk)
        space = torch.zeros(shape, dtype=torch.float32, device=self._device)
        return space.numpy() if self._device.type == "cpu" else space

    def run(
        self, memory: Rows, plan: BlockPlan, moves: Moves, t: int, group: dict[int, Pieces]
    ) -> None:
        n, s, m = len(group), plan.s, plan.m
        if self._inputs.shape[:2] != (n, s + m) or self._outputs.shape[1] != len(plan.rows):
            self._inputs, self._outputs = self._space(n, s + m), self._space(n, len(plan.rows))
        inputs, outputs = self._inputs, self._outputs
        places = [(i, *piece) for i, pieces in enumerate(group.values()) for piece in pieces]
        for i, a, b, at in places:
            for there, row, k in moves.reads:
                inputs[i, there : there + k, a:b] = memory[row : row + k, at : at + b - a]
        past = min(s, t) if plan.regenerates else 0
        if plan.regenerates:
            inputs[:, : s - past] = 0
        self._source.fill(t - past, list(group), inputs[:, s - past :])
        if isinstance(memory, torch.Tensor):
            torch.matmul(torch.from_numpy(plan.rows).to(self._device), inputs, out=outputs)
        else:
            np.matmul(plan.rows, inputs, out=outputs)
        for i, a, b, at in places:
            for space, runs in ((inputs, moves.keeps), (outputs, moves.writes)):
                for there, row, k in runs:
                    memory[row : row + k, at : at + b - a] = space[i, there : there + k, a:b]


@cache
def _blas() -> ThreadpoolController:
    """Return the one controller: to look for the libraries takes 2 ms, to limit them 20 us."""
    return ThreadpoolController()


@contextmanager
def _one_blas_thread() -> Iterator[None]:
    """Multiply on one thread, since OpenBLAS rounds differently on two.

    One stream at a time, because the limit holds for the whole process.
    """
    with _one_stream, _blas().limit(limits=1, user_api="blas"):
        yield


@contextmanager
def _beside(stream: torch.cuda.Stream, memory: torch.Tensor) -> Iterator[None]:
    """Launch on the stream, after all work queued so far that reads the memory."""
    stream.wait_stream(torch.cuda.current_stream(memory.device))
    memory.record_stream(stream)
    with torch.cuda.stream(stream), full_precision():
        yield


@contextmanager
def full_precision() -> Iterator[None]:
    """Multiply float32 as float32: TF32, which a user may have allowed, keeps 10 bits."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _cut(spans: Sequence[tuple[int, int]], n_parameters: int, chunk: int) -> dict[int, Pieces]:
    """Return the pieces of each chunk touched, or refuse what is not ascending and disjoint."""
    pieces: dict[int, Pieces] = {}
    column = last = 0
    for start, stop in spans:
        low = integer("span's start", start, last, n_parameters, high_name="n_parameters")
        last = integer("span's stop", stop, low, n_parameters, high_name="n_parameters")
        while low < last:
            c, a = divmod(low, chunk)
            b = min(chunk, a + last - low)
            pieces.setdefault(c, []).append((a, b, column))
            column, low = column + b - a, low + b - a
    return pieces
