"""What `factorize` and `plan` are told to factorize: options, files, and every refusal of them."""

from __future__ import annotations

import inspect
import json
import re
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, ExponentialLR, LambdaLR, LinearLR, StepLR

import commands
import oracle
from rootnoise import _limits
from rootnoise._check import RootnoiseError
from rootnoise.cli._options import Split
from rootnoise.cli._workload import Options
from rootnoise.factorization.base import _BUILDERS
from rootnoise.factorization.symmetric import ablation, offline_factorization
from rootnoise.mechanism import Mechanism
from rootnoise.participation import MinSeparation
from rootnoise.workload import SGD, ScheduledSGD, ToeplitzWorkload, learning_rates

WAVES = np.sin(np.add.outer(np.arange(12) ** 2, 7 * np.arange(12)))  # in no order
LOWER = np.tril(WAVES, -1) + np.diag(1.5 + 0.5 * WAVES[0])
GRAM = 0.9 ** np.abs(np.subtract.outer(np.arange(32.0), np.arange(32.0)))


@pytest.fixture
def call(call_in_folder):
    return call_in_folder


def answer(call, line, *more):
    status, out, err = call(*line.split(), *more, "--json")
    assert (status, err) == (0, "")
    return json.loads(out)


def refused(call, line):
    return commands.refused(call, *line.split()).removeprefix("error: ")


# ------------------------------------------------------------------------------------ schedules


SCHEDULERS = {
    "cosine": lambda o, t, f: CosineAnnealingLR(o, t, eta_min=f),
    "linear": lambda o, t, f: LinearLR(o, 1.0, f, t),
    "exponential": lambda o, t, f: ExponentialLR(o, f ** (1 / t)),
    "step": lambda o, t, f: StepLR(o, t // 3, f**0.5),
}


@pytest.mark.parametrize("final", [0.01, 0.2, 1.0])
@pytest.mark.parametrize("schedule", SCHEDULERS)
def test_schedules_are_those_of_torch(schedule, final):
    n = 30
    sgd = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = SCHEDULERS[schedule](sgd, n, final)
    rates = []
    for _ in range(n):
        rates.append(sgd.param_groups[0]["lr"])
        sgd.step()
        scheduler.step()
    np.testing.assert_allclose(learning_rates(schedule, n, final=final), rates, atol=1e-12)
    warm = learning_rates(schedule, n + 4, warmup=4, final=final)
    np.testing.assert_allclose(warm, [0.2, 0.4, 0.6, 0.8, *rates], atol=1e-12)


def test_schedules_end_where_they_are_told_to_by_default():
    assert learning_rates("cosine", 1000)[-1] < 1e-5
    assert learning_rates("linear", 1000)[-1] == pytest.approx(0.001)
    assert learning_rates("step", 9).tolist() == pytest.approx([1] * 3 + [0.1] * 3 + [0.01] * 3)
    assert learning_rates("exponential", 1000)[-1] == pytest.approx(0.01, rel=0.01)


# -------------------------------------------------------------------------------------- options


def test_plain_options_are_sgd():
    assert Options().value(5) == SGD(5)
    assert Options(momentum=0.9, decay=0.99).value(5) == SGD(5, 0.9, 0.99)


def test_schedules_make_scheduled_sgd():
    made = Options(schedule="cosine", warmup=2, momentum=0.5, decay=0.9, lr=3.0).value(10)
    expected = ScheduledSGD(3 * learning_rates("cosine", 10, 2), 0.5, decay=0.9)
    np.testing.assert_array_equal(made.matrix.dense(), expected.matrix.dense())


def way(optimizer, parameters, gradients, scheduler=None):
    """Return how far down the real optimizer has moved, and the parameter, after every step."""
    made = optimizer(parameters)
    rates = scheduler(made) if scheduler else None
    steps = []
    for gradient in gradients:
        parameters[0].grad = torch.full_like(parameters[0], gradient)
        made.step()
        if rates:
            rates.step()
        steps.append(-parameters[0].item())
    return np.array(steps)


@pytest.mark.parametrize("schedule", [None, "linear"])
@pytest.mark.parametrize(
    "settings",
    [
        {"momentum": 0.9, "weight_decay": 0.1, "lr": 0.2},
        {"momentum": 0.9, "nesterov": True, "lr": 0.2},
        {"momentum": 0.5, "dampening": 0.25, "weight_decay": 0.3},
        {},
    ],
    ids=str,
)
def test_torch_sgd_is_what_torch_does(settings, schedule):
    rng = np.random.default_rng(7)
    n, gradients = 20, rng.normal(size=20)
    work = Options(optimizer="sgd", schedule=schedule, **settings).value(n)
    parameter = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    rates = learning_rates("linear", n)

    def scheduler(made):
        return LambdaLR(made, lambda t: rates[min(t, n - 1)])

    moved = way(
        lambda p: torch.optim.SGD(p, **settings),
        [parameter],
        gradients,
        scheduler if schedule else None,
    )
    np.testing.assert_allclose(work.matrix.apply(gradients), moved, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("name", "kind"), [("adam", "Adam"), ("adamw", "AdamW")])
def test_adam_is_its_first_moment(name, kind):
    rng = np.random.default_rng(7)
    n, gradients = 15, rng.normal(size=15)
    work = Options(optimizer=name, momentum=0.8, lr=0.1, weight_decay=0.2).value(n)
    parameter = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    big = 1e9  # a constant denominator
    decay = 0.2 * big if name == "adam" else 0.2

    def optimizer(p):
        return getattr(torch.optim, kind)(
            p, lr=0.1, betas=(0.8, 0.999), eps=big, weight_decay=decay
        )

    moved = way(optimizer, [parameter], gradients) * big
    np.testing.assert_allclose(work.matrix.apply(gradients), moved, rtol=1e-6)


def test_defaults_of_torch_optimizers_are_those_of_torch():
    default = Options(optimizer="adamw").value(8).matrix.dense()
    spelled = Options(optimizer="adamw", lr=1e-3, weight_decay=0.01, momentum=0.9).value(8)
    np.testing.assert_array_equal(default, spelled.matrix.dense())


# ---------------------------------------------------------------------------------------- files


def write(name, array):
    if name.endswith(".npy"):
        np.save(name, array)
    elif name.endswith(".npz"):
        np.savez(name, array)
    elif name.endswith(".csv"):
        np.savetxt(name, array, delimiter=",")
    else:
        Path(name).write_text(json.dumps(array.tolist()))


@pytest.mark.parametrize("kind", ["npy", "npz", "csv", "json"])
def test_files_of_every_format(call, kind):
    write(f"a.{kind}", LOWER)
    result = answer(call, f"factorize --workload a.{kind} --mechanism square-root --effort none")
    root = oracle.square_root(LOWER)
    sens = np.linalg.norm(root, axis=0).max()
    assert result["rmse"] == pytest.approx(sens * np.linalg.norm(root) / 12**0.5, rel=1e-6)
    assert (result["n_steps"], result["coefficients"]) == (12, None)
    write(f"c.{kind}", np.array([1.0, 0.5, 0.25]))
    result = answer(call, f"factorize --workload c.{kind} --steps 3 --mechanism identity")
    assert result["rmse"] == pytest.approx(((3 + 2 * 0.25 + 0.0625) / 3) ** 0.5)


def test_a_toeplitz_matrix_is_recognised(call):
    np.save("a.npy", SGD(9, 0.5).matrix.dense())
    assert isinstance(Options(workload=Path("a.npy")).value(None), ToeplitzWorkload)
    result = answer(call, "factorize --workload a.npy --mechanism bsr --bands 3")
    assert result["coefficients"] == pytest.approx(SGD(9, 0.5).square_root(3).tolist())


@pytest.mark.parametrize(
    "work",
    [SGD(6, 0.5, 0.9), ToeplitzWorkload([1.0, 0.2, 0.1]), ScheduledSGD([1.0, 0.5, 0.2], 0.5)],
    ids=lambda work: type(work).__name__,
)
def test_described_workloads_come_back(call, work):
    Path("w.json").write_text(json.dumps(work.to_dict()))
    made = Options(workload=Path("w.json")).value(None)
    assert made.to_dict() == work.to_dict()
    answer(call, "factorize --workload w.json --mechanism identity")


def test_a_schedule_from_a_file(call):
    rng = np.random.default_rng(7)
    rates = rng.uniform(size=10)
    np.savetxt("rates.csv", rates)
    result = answer(call, "factorize --schedule rates.csv --momentum 0.5 --mechanism identity")
    a = ScheduledSGD(rates, 0.5).matrix.dense()
    assert result["rmse"] == pytest.approx(np.linalg.norm(a) / 10**0.5)


# ------------------------------------------------------------------------------------- offline


@pytest.mark.parametrize(("flag", "most"), [("--offline", 2048), ("--ablation", 512)])
def test_symmetric_workloads_of_many_minutes_are_refused(call, tmp_path, flag, most):
    np.save(tmp_path / "g.npy", np.eye(most + 1))
    flags = dict.fromkeys(["--offline", flag])
    status, _, error = call("factorize", "--workload", str(tmp_path / "g.npy"), *flags)
    assert status == 2
    assert f"n_steps of {flag} must be in [1, {most}], got {most + 1}" in error


def test_symmetric_workloads_are_factorized_offline(call):
    np.save("g.npy", GRAM)
    result = answer(call, "factorize --workload g.npy --offline")
    values, vectors = np.linalg.eigh(GRAM)
    root = vectors * np.sqrt(values) @ vectors.T
    sens = np.linalg.norm(root, axis=0).max()
    assert result["sensitivity"] == pytest.approx(sens)
    assert result["rmse"] == pytest.approx(sens * np.linalg.norm(root) / 32**0.5)
    assert result["gap"] == pytest.approx(0, abs=1e-12)  # a constant diagonal
    assert result["max_error_gap"] == pytest.approx(0, abs=1e-12)  # always: Cauchy-Schwarz
    banded = answer(call, "factorize --workload g.npy --offline --bands 4")
    assert banded["rmse"] == pytest.approx(offline_factorization(GRAM, 4).rmse)
    assert set(result) == set(answer(call, "factorize --steps 5"))


def test_ablation_breaks_one_property_at_a_time(call):
    np.save("g.npy", GRAM)
    rows = answer(call, "factorize --workload g.npy --offline --ablation")["ablation"]
    expected = ablation(GRAM, [1, 2, 4, 8, 16])
    assert [row["label"] for row in rows] == [row.label for row in expected]
    assert [row["refused"] is None for row in rows] == [row.rmse is not None for row in expected]
    assert sum(row["refused"] is not None for row in rows) == 3
    status, table, _ = call("factorize", "--workload", "g.npy", "--offline", "--ablation")
    assert (status, "no upper triangle" in table) == (0, True)


# ------------------------------------------------------------------------ what else it writes


def test_it_saves_a_calibrated_mechanism(call):
    line = "factorize --steps 20 --momentum 0.9 --min-sep 5 --bands 3 --epsilon 2 --delta 1e-6"
    result = answer(call, line + " --save m.json")
    made = Mechanism.load("m.json")
    assert made.participation == MinSeparation(5, 4)
    assert made.epsilon <= 2
    assert (made.noise_multiplier, made.claim()) == (result["noise_multiplier"], result["claim"])
    assert "path must not exist yet" in refused(call, line + " --save m.json")


@pytest.mark.parametrize("more", ["--steps 1", "--steps 30 --schedule cosine --mechanism tree"])
def test_it_draws(call, more):
    assert answer(call, f"factorize {more} --plot a.png")["plot"] == "a.png"
    assert Path("a.png").read_bytes().startswith(b"\x89PNG")


# --------------------------------------------------------------------------- mechanism options


def test_every_option_of_every_mechanism_can_be_given():
    taken = {name for build in _BUILDERS.values() for name in inspect.signature(build).parameters}
    own = taken - {"workload", "participation", "progress"}
    assert {f.name for f in fields(Split)} == own | {"contraction"}


@pytest.mark.parametrize(
    ("options", "key", "value"),
    [
        ("--mechanism bsr-gamma --gamma 1", "coefficients", [1.0] * 8),
        ("--mechanism lambda-cgd --lam 0.5", "coefficients", [0.5**j for j in range(8)]),
        ("--mechanism blt --buffers 2", "memory_rows", 2),
    ],
)
def test_options_reach_their_mechanism(call, options, key, value):
    result = answer(call, "factorize --steps 40 --effort none " + options)
    assert result[key] == pytest.approx(value)


def test_bases_and_estimators_reach_their_mechanism(call):
    line = "factorize --steps 64 --min-sep 16 --effort none --mechanism "
    errors = [
        answer(call, line + more)["rmse"]
        for more in (
            "epoch-scaled",
            "epoch-scaled --base banded",
            "tree --estimator naive",
            "tree --estimator full",
        )
    ]
    assert errors[1] < errors[0]
    assert errors[3] < errors[2]
    assert answer(call, line + "dense --tolerance 0.5")["rmse"] > 0


# ------------------------------------------------------------------------------------ refusals


@pytest.fixture
def files(call):
    """Return `call` in a folder of bad files."""
    singular, nan = LOWER.copy(), LOWER.copy()
    singular[3, 3], nan[5, 1] = 0, np.nan
    arrays = {
        "singular.npy": singular,
        "nan.npy": nan,
        "upper.npy": LOWER.T + LOWER @ LOWER.T,
        "wide.npy": LOWER[:5],
        "negative.npy": -LOWER,
        "cube.npy": np.ones((2, 2, 2)),
        "complex.npy": LOWER + 1j,
        "words.npy": np.array(["a", "b"]),
        "objects.npy": np.array([None, 1]),
        "zeros.csv": np.zeros(4),
        "empty.npy": np.zeros((0, 0)),
        "rates.npy": np.array([1.0, -1.0]),
        "gram.npy": GRAM,
        "indefinite.npy": GRAM - 0.5 * np.eye(32),
        "good.npy": LOWER,
    }
    arrays["upper.npy"][0, 1] += 1
    for name, array in arrays.items():
        write(name, array)
    np.savez("two.npz", LOWER, LOWER)
    for name, text in {
        "text.npy": "not an array",
        "text.csv": "a,b\nc,d",
        "ragged.json": "[[1], [1, 2]]",
        "broken.json": "[[1",
        "strange.json": '{"type": "strange"}',
        "a.txt": "1",
    }.items():
        Path(name).write_text(text)
    return call


@pytest.mark.filterwarnings("ignore:loadtxt")
@pytest.mark.parametrize(
    ("options", "line"),
    {
        "--workload singular.npy": "matrix must be invertible, got 0.0 at (3, 3)",
        "--workload nan.npy": "matrix must be finite, got 1 NaN or infinite entries",
        "--workload upper.npy": "matrix must be lower-triangular (causal), got",
        "--workload gram.npy": "workload must be lower-triangular, got a symmetric one in gram.npy",
        "--workload wide.npy": "matrix must be square, got shape (5, 12)",
        "--workload negative.npy": "matrix must have a positive diagonal",
        "--workload cube.npy": "matrix must be a non-empty 2-D array, got shape (2, 2, 2)",
        "--workload empty.npy": "matrix must be a non-empty 2-D array, got shape (0, 0)",
        "--workload complex.npy": "file must hold real numbers, got complex128 in complex.npy",
        "--workload words.npy": "file must hold real numbers, got <U1 in words.npy",
        "--workload objects.npy": "file must hold numbers, got objects.npy: Object arrays cannot",
        "--workload zeros.csv": "coefficients must start with a non-zero one, got 0.0",
        "--workload two.npz": "file must hold numbers, got two.npz: 2 arrays instead of one",
        "--workload text.npy": "file must hold numbers, got text.npy:",
        "--workload text.csv": "file must hold numbers, got text.csv: could not convert",
        "--workload ragged.json": "file must hold real numbers, got object in ragged.json",
        "--workload broken.json": "file must hold numbers, got broken.json:",
        "--workload strange.json": "workload must be of a known type",
        "--workload a.txt": "file must be .npy, .npz, .csv or .json, got a.txt",
        "--workload none.npy": "file must be readable, got none.npy: No such file",
        "--workload good.npy --steps 10": "steps must be 12, as many as good.npy has, got 10",
        "--workload good.npy --momentum 0.5": "momentum must be left out with --workload, got 0.5",
        "--workload good.npy --nesterov": "nesterov must be left out with --workload, got True",
        "--workload good.npy --mechanism blt": "workload must be Toeplitz, or SGD with a schedule",
        "--workload good.npy --bands 13": "bands must be in [1, n_steps=12], got 13",
        "--workload good.npy --min-sep 6 --participations 3": "max_participations must be in [1, ",
        "": "steps must be given unless a file says how many, got none",
        "--schedule cosine": "steps must be given unless a file says how many, got none",
        "--schedule rates.npy": "learning_rates must be a finite number >= 0, got -1.0",
        "--schedule good.npy": "schedule must be a list of learning rates, got shape (12, 12)",
        "--schedule rates.npy --steps 5": "steps must be 2, as many as rates.npy has, got 5",
        "--schedule rates.npy --warmup 1": "warmup must be left out with a schedule from a file",
        "--steps 9 --schedule wavy": "schedule must be one of cosine, linear, exponential, step",
        "--steps 9 --schedule step --warmup 9": "warmup must be in [0, n_steps-1=8], got 9",
        "--steps 9 --schedule step --final 0": "final must be a finite number > 0 and <= 1, got 0",
        "--steps 9 --schedule cosine --final 2": "final must be a finite number >= 0 and <= 1, got",
        "--steps 9 --schedule cosine --lr 0": "lr must be a finite number > 0, got 0.0",
        "--steps 9 --warmup 3": "warmup must be left out without --schedule, got 3",
        "--steps 9 --lr 3": "lr must be left out without --optimizer or --schedule, got 3.0",
        "--steps 9 --weight-decay 3": "weight-decay must be left out without --optimizer, got 3.0",
        "--steps 9 --optimizer lion": "optimizer must be one of sgd, adam, adamw, got 'lion'",
        "--steps 9 --optimizer sgd --decay 0.9": "decay must be left out with --optimizer",
        "--steps 9 --optimizer adam --nesterov": "nesterov must be left out with --optimizer adam",
        "--steps 9 --optimizer sgd --nesterov": "optimizer must take a list of 1-D parameters, got",
        "--steps 9 --gamma 0.5": "gamma must be left out for mechanism 'bsr', got 0.5",
        "--steps 9 --mechanism bsr-gamma --gamma 2": "gamma must be a finite number",
        "--steps 9 --mechanism tree --estimator best": "estimator must be one of full, online",
        "--steps 9 --save m.json": "epsilon must come with --save, got None and m.json",
        "--steps 9 --epsilon 3": "epsilon must come with --save, got 3.0 and None",
        "--steps 9 --plot no/a.png": "plot must be a picture that can be written, got no/a.png",
        "--steps 9 --plot a.magic": "plot must be a picture that can be written, got a.magic",
        "--steps 9 --ablation": "ablation must come with --offline, got it alone",
        "--offline": "workload must be given with --offline, got none",
        "--offline --workload gram.npy --mechanism bsr": "mechanism must be left out with",
        "--offline --workload gram.npy --steps 32": "steps must be left out with --offline, got 32",
        "--offline --workload gram.npy --bands 0": "bands must be in [1, n=32], got 0",
        "--offline --workload gram.npy --bands auto": "bands must be an integer with --offline",
        "--offline --workload good.npy": "workload must be symmetric to be factorized offline",
        "--offline --workload indefinite.npy": "workload must be lower-triangular or symmetric pos",
        "--offline --workload nan.npy": "workload must be finite, got 1 NaN or infinite entries",
    }.items(),
)
def test_refusals(files, options, line):
    assert refused(files, "factorize " + options).startswith(line)
    assert not Path("m.json").exists()


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("wavy", 5), "schedule must be one of cosine, linear, exponential, step, got 'wavy'"),
        (("cosine", 0), "n_steps must be >= 1, got 0"),
        (("cosine", 5, -1), r"warmup must be in \[0, n_steps-1=4\], got -1"),
        (("linear", 5, 0, -0.1), "final must be a finite number >= 0 and <= 1, got -0.1"),
    ],
)
def test_refusals_of_schedules(arguments, line):
    with pytest.raises(RootnoiseError, match=line):
        learning_rates(*arguments)


@pytest.mark.parametrize("name", ["a.npy", "a.npz", "a.csv", "a.json"])
def test_a_file_that_does_not_fit_is_refused_before_it_is_read(call, monkeypatch, name):
    write = {"a.npy": np.save, "a.npz": np.savez}.get(name)
    if write is not None:
        write(name, np.ones((100, 100), np.int8))
    else:
        Path(name).write_text("[" + "0," * 9999 + "0]")
    monkeypatch.setattr(_limits, "_free", lambda: 80_000.0)
    monkeypatch.setattr("rootnoise.cli._number_files._READERS", {})  # nothing is read
    monkeypatch.setattr("json.loads", None)
    line = refused(call, f"factorize --workload {name}")
    assert line.startswith(f"memory must hold the numbers of {name}, ")
    assert line.endswith("GB (a smaller file needs less), got 8e-05 GB free\n")


@pytest.mark.parametrize("more", [[], ["--offline"]])
def test_a_matrix_that_takes_too_long_is_refused(call, monkeypatch, more):
    monkeypatch.setattr(_limits, "MOST_DENSE", 4)
    root = np.tril(np.arange(1.0, 26.0).reshape(5, 5))
    np.save("a.npy", root @ root.T if more else root)
    status, out, err = call("factorize", "--workload", "a.npy", *more)
    assert (status, out) == (2, "")
    line = r"n_steps must be in \[1, 4\] for a matrix that is not Toeplitz \(minutes; .*, got 5\n$"
    assert re.match("error: " + line, err)
    np.save("a.npy", np.tril(np.ones((5, 5))))  # Toeplitz: quick at any size
    assert call("factorize", "--workload", "a.npy", "--json")[0] == 0


def test_a_described_workload_of_too_many_steps_is_refused(call):
    Path("a.json").write_text(json.dumps(SGD(10**8).to_dict()))
    status, _, err = call("factorize", "--workload", "a.json")
    assert (status, err) == (2, "error: n_steps must be in [1, 10000000], got 100000000\n")
