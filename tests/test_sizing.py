"""What a rank holds and sends: counted, against what streams and optimizers really hold."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from noise_cases import with_strategy
from rootnoise._check import RootnoiseError
from rootnoise.causal import Toeplitz
from rootnoise.cli import main
from rootnoise.factorization import factorize
from rootnoise.mechanism import Mechanism
from rootnoise.noise import NoiseStream, blockplan, speed
from rootnoise.participation import FixedCycle
from rootnoise.planner import Fleet, Job, Speed, plan
from rootnoise.planner.sizing import held_rows
from rootnoise.training.clip.sums import Sums
from rootnoise.training.clipping import Clip
from rootnoise.training.ranks import Ranks
from rootnoise.training.replicated import Copies
from rootnoise.workload import SGD
from training_cases import examples, initialised, make

JOB = Job(n_examples=100, batch_size=15, epochs=4, epsilon=2.0, delta=1e-5)  # 28 steps
WORK = SGD(28, momentum=0.9)


@pytest.fixture(scope="module")
def made():
    return plan(WORK, JOB)


@pytest.mark.parametrize("small", [0, 2**22])
def test_the_rows_of_every_mechanism_are_those_that_its_stream_holds(made, monkeypatch, small):
    """Blocks of a large model are not rounded up: here 10 parameters count as many, or as few."""
    monkeypatch.setattr(blockplan, "SMALL", small)
    sized = replace(made, job=replace(JOB, fleet=Fleet(n_params=10)))
    shared = set()
    for row in made.rows:
        stream = NoiseStream(made.take(row).mechanism, 10)
        size = sized.size(row)
        assert size is not None
        assert size.noise_rows == stream.memory_rows + 1, row
        assert size.noise_bytes == 4 * 10 * (stream.memory_rows + 1)
        shared.add((row.remembers_noise, stream.memory_rows > stream.block_steps))
    assert {(True, False), (False, True)} <= shared


@pytest.mark.parametrize("ranks", [1, 3, 8])
def test_columns_are_the_largest_part_of_a_rank(ranks):
    for n in (1, 7, 8, 1000, 10**9 + 1, 7 * 10**10):
        parts = [Ranks._span(_of(ranks), rank, n) for rank in range(ranks)]
        assert max(stop - start for start, stop in parts) == Fleet(n, ranks).columns


def _of(size):
    ranks = Ranks()
    ranks.size = size
    return ranks


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_a_private_step_holds_what_is_counted(monkeypatch, dtype, ranks):
    """Memory that several tensors share counts once."""
    model = initialised(nn.Linear(7, 5)).to(getattr(torch, dtype))
    monkeypatch.setattr(Ranks, "span", lambda self, n: Ranks._span(_of(ranks), 0, n))
    optimizer = make(model, bands=3)
    optimizer._place.ranks.size = ranks  # of a group that is not there: its sums stay as they are
    n = sum(p.numel() for p in model.parameters())
    seen, sent, written = [], [], []
    mean, add, write, draw = Clip.mean_, Ranks.add_, Copies.write, NoiseStream.next
    parts = Sums._parts

    def watch(self, out, units, noise, by):
        if isinstance(units, torch.Tensor):
            seen.append(units)
        mean(self, out, units, noise, by)

    def look(self, sums, vector, size):
        seen.append(vector)
        return parts(self, sums, vector, size)

    def keep(self):
        written.append([draw(self)])
        return written[-1][0]

    def remember(self, mean):
        write(self, mean)
        written[-1].append(mean)

    def count(self, total):
        sent.append(total.element_size() * total.numel())
        add(self, total)

    monkeypatch.setattr(Clip, "mean_", watch)
    monkeypatch.setattr(Sums, "_parts", look)
    monkeypatch.setattr(Ranks, "add_", count)
    monkeypatch.setattr(Copies, "write", remember)
    monkeypatch.setattr(NoiseStream, "next", keep)
    x, y = examples(7)
    x = x.to(getattr(torch, dtype))
    for batch in list(optimizer.sampler)[:2]:
        optimizer.zero_grad()
        cross_entropy(optimizer.module(x[batch]), y[batch]).backward()
        optimizer.step(batch)
    size = Fleet(n, ranks, dtype=dtype).size(18, state=2, shared=True)
    units, (noise, mean_) = seen[-1], written[-1]

    def held(*tensors):
        kept = [t.untyped_storage() for t in tensors]
        return sum({memory.data_ptr(): memory.nbytes() for memory in kept}.values())

    assert size.noise_bytes == held(optimizer.stream._memory, noise)
    assert size.sum_bytes == held(units)
    gradients = [p.grad for p in model.parameters()]
    assert size.gradient_bytes == held(noise, mean_, *gradients) - held(noise)
    inner = optimizer.optimizer.state.values()
    momentum = [state["momentum_buffer"] for state in inner]
    assert size.parameter_bytes == held(*model.parameters(), *momentum)
    assert Fleet(n, dtype=dtype).size(18, 2, shared=True).traffic == 0
    assert len(sent) == 2 * (ranks - 1)  # one rank sends nothing
    if sent:  # 2 (R - 1) / R = 1 for two
        assert Fleet(n, 2, dtype=dtype).size(18, 2, shared=True).traffic == sent[-1]


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("memory", ["look-ahead", "offload", "ring", "regenerate"])
@pytest.mark.parametrize("name", ["bsr", "banded-inverse", "blt"])
def test_a_million_parameters_in_every_memory(name, memory, ranks):
    """What the streams of all ranks allocate; an odd number of parameters has a largest part."""
    n, steps, options = 1_000_001, 96, {"blt": {"buffers": 3}}.get(name, {"bands": 5})
    who = FixedCycle(steps // 4, 4)
    split = factorize(SGD(steps, 0.9), who, name, **options)
    made = Mechanism.calibrate(split, who, noise_multiplier=1.0, delta=1e-5)
    if memory == "regenerate" and name != "banded-inverse":
        with pytest.raises(RootnoiseError, match="must have a mechanism that remembers past draws"):
            NoiseStream(made, n, memory=memory)
        return
    spans = [Ranks._span(_of(ranks), rank, n) for rank in range(ranks)]
    streams = [NoiseStream(made, n, spans=[span], memory=memory) for span in spans]
    bytes_ = max(stream._memory.nbytes + stream.next().nbytes for stream in streams)
    s, shared = split.memory_rows, name == "bsr"
    if memory in ("look-ahead", "offload"):
        assert Fleet(n, ranks).size(steps, s, shared).noise_bytes == bytes_
    else:  # what docs/noise.md says: one step ahead, or no state
        rows = held_rows(s, 1, shared=shared) if memory == "ring" else s
        assert 4 * (rows + 1) * Fleet(n, ranks).columns == bytes_


@pytest.mark.parametrize("n", [10**9, 7 * 10**10])
@pytest.mark.parametrize("ranks", [8, 64, 1024])
def test_large_fleets_by_hand(n, ranks):
    """15 rows of noise, cut; the float64 sum is whole on every rank, or in shards."""
    part = n / ranks
    copies = Fleet(n, ranks, dtype="bfloat16").size(1000, 15, shared=True)
    assert copies.noise_bytes == pytest.approx(16 * 4 * part)
    assert copies.sum_bytes == pytest.approx(8 * n)
    assert copies.total == pytest.approx(64 * part + 8 * n + (4 + 2) * n + 4 * n)
    assert copies.traffic == pytest.approx(16 * (n - part))
    shards = Fleet(n, ranks, sharded=True, dtype="bfloat16").size(1000, 15, shared=True)
    assert shards.total == pytest.approx(64 * part + 8 * part + 6 * part)
    assert shards.traffic == pytest.approx((8 + 2 * 2) * (n - part))
    assert Fleet(n, 2, sharded=True).size(9, 0, shared=True).sum_bytes == 8 * n / 2


def test_a_row_that_does_not_fit_is_not_chosen(made):
    best = made.rows[0]
    sizes = [Fleet(10**9).size(28, row.memory_rows, row.remembers_noise) for row in made.rows]
    limit = sizes[0].total - 1
    job = replace(JOB, fleet=Fleet(10**9, device_memory=limit))
    sized = replace(made, job=job)
    assert not sized.fits(best)
    chosen = sized.first()
    assert chosen is next(r for r, s in zip(made.rows, sizes, strict=True) if s.total <= limit)
    assert sized.best().mechanism.name == sized.recommended().mechanism
    assert sized.fits(made.rows[sized.place_to_take])
    assert made.first() is best
    least = min(size.total for size in sizes)
    assert replace(made, job=replace(job, fleet=Fleet(10**9, device_memory=least))).first()
    none = replace(made, job=replace(job, fleet=Fleet(10**9, device_memory=least - 1)))
    with pytest.raises(RootnoiseError, match=r"^device_memory must hold the least row, 24 GB \(mo"):
        none.best()


def test_seconds_are_those_of_the_model():
    how = Speed(draw=2e-9, multiply=1e-11, source="a test")
    fleet = Fleet(10**9, ranks=10)
    assert fleet.size(100, 15, shared=True, speed=how).seconds == pytest.approx(0.23)
    assert fleet.size(100, 0, shared=True, speed=how).seconds == pytest.approx(0.2)
    assert Speed.given(1e9).draw == 1e-9
    draw, multiply = speed.measured(size=2**12)
    assert 1e-11 < draw < 1e-4  # a second for 1e11 normals is beyond any core
    assert 0 <= multiply < 1e-5


@pytest.mark.parametrize("bands", [1, 2, 9, 64, 65, 66, 150])
def test_held_rows_below_and_above_the_longest_block(bands):
    band = 0.9 ** np.arange(bands)
    for strategy, shared in ((Toeplitz(band, 200), True), (Toeplitz(band, 200).inverse(), False)):
        stream = NoiseStream(with_strategy(strategy), 10)
        held = held_rows(bands - 1, stream.block_steps, shared=shared)
        assert held == stream.memory_rows


@pytest.mark.parametrize(
    ("make_", "line"),
    [
        (lambda: Fleet(0), "n_params must be >= 1, got 0"),
        (lambda: Fleet(1, 0), "ranks must be >= 1, got 0"),
        (lambda: Fleet(1, dtype="int8"), "dtype must be one of float32, bfloat16, .* got 'int8'"),
        (lambda: Fleet(1, device_memory=0), "device_memory must be a finite number > 0, got 0"),
        (lambda: Speed.given(0), "normals_per_second must be a finite number > 0, got 0"),
    ],
)
def test_refusals(make_, line):
    with pytest.raises(RootnoiseError, match=line):
        make_()


LINE = "plan --dataset-size 100 --batch-size 25 --epochs 3 --epsilon 6 --delta 1e-5 --memory-rows 3"


def test_the_command_shows_what_a_rank_holds(capsys, tmp_path):
    more = "--n-params 1000000000 --ranks 4 --device-memory 21 --normals-per-second 1e9"
    assert main([*LINE.split(), *more.split(), "--json", "--html", str(tmp_path / "p.html")]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["fleet"]["device_memory"] == 21e9
    assert result["speed"]["source"] == "1e+09 normals a second as given, drawing alone"
    fitting = [row["size"]["fits"] for row in result["rows"]]
    assert set(fitting) == {True, False}
    for row in result["rows"]:
        assert row["size"]["fits"] == (row["size"]["total"] <= 21e9)
        assert row["size"]["seconds"] == 0.25
    page = (tmp_path / "p.html").read_text()
    assert "1e+09 normals a second as given" in page
    take = int(page.partition("Most should take row ")[2].partition(":")[0])
    assert fitting[take - 1]
    assert main([*LINE.split(), *more.split()]) == 0
    out = capsys.readouterr().out
    assert "GB!" in out
    assert "! does not fit the device's memory: never chosen by itself." in out
    assert "activations are not counted" in out


def test_the_command_measures_where_no_speed_is_given(capsys, monkeypatch):
    monkeypatch.setattr(speed, "measured", lambda: (1e-8, 0.0))
    assert main([*LINE.split(), "--n-params", "1000", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["speed"]["source"] == "measured now on one thread of this machine"
    assert result["rows"][0]["size"]["seconds"] == pytest.approx(1e-5)


@pytest.mark.parametrize(
    ("more", "line"),
    {
        "--ranks 8": "ranks must come with --n-params, got 8 alone",
        "--sharded": "sharded must come with --n-params, got True alone",
        "--device-memory 80": "device-memory must come with --n-params, got 80.0 alone",
        "--n-params 0": "n_params must be >= 1, got 0",
    }.items(),
)
def test_the_command_refuses(capsys, more, line):
    assert main([*LINE.split(), *more.split()]) == 2
    assert capsys.readouterr().err == f"error: {line}\n"
