"""The command line: factorize and account, for people and machines, and every refusal."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys

import pytest

import oracle
import rootnoise
from rootnoise.accounting import Trials, tuned_noise_multiplier, tuned_privacy_cost
from rootnoise.cli import main
from rootnoise.cli._report import text
from rootnoise.factorization import factorize, mechanisms
from rootnoise.mechanism import Mechanism
from rootnoise.participation import FixedCycle, SingleParticipation
from rootnoise.workload import prefix_sum

COMMANDS = ("plan", "factorize", "account", "diagnose", "train", "tune", "audit", "demo")


def run(capsys, *arguments):
    """Return (exit status, standard output, standard error) of one command."""
    status = main(list(arguments))
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_factorize_agrees_with_dense_algebra(capsys):
    arguments = "factorize --steps 60 --momentum 0.9 --decay 0.99 --bands 8 --json"
    status, out, err = run(capsys, *arguments.split(), "--min-sep", "10", "--participations", "6")
    assert (status, err) == (0, "")
    result = json.loads(out)
    a = oracle.sgd_matrix(60, 0.9, 0.99)
    c = oracle.banded(oracle.square_root(a), 8)
    b = oracle.decoder(a, c)
    sens = (c[:, ::10].sum(1) ** 2).sum() ** 0.5
    assert result["sensitivity"] == pytest.approx(sens, rel=1e-9)
    assert result["rmse"] == pytest.approx(sens * (b**2).sum() ** 0.5 / 60**0.5, rel=1e-9)
    assert result["max_error"] == pytest.approx(sens * (b**2).sum(1).max() ** 0.5, rel=1e-9)
    assert result["coefficients"] == pytest.approx(c[:8, 0].tolist(), rel=1e-9)
    assert (result["bands"], result["memory_rows"], result["n_steps"]) == (8, 7, 60)
    assert result["sensitivity_exact"] is True


@pytest.mark.parametrize("mechanism", mechanisms())
@pytest.mark.parametrize(
    "who",
    [
        [],
        ["--min-sep", "20"],
        ["--participation", "fixed-cycle", "--min-sep", "20", "--participations", "5"],
        ["--participation", "single"],
    ],
    ids=["default", "min-sep", "fixed-cycle", "single"],
)
def test_factorize_prints_tables_and_json(capsys, mechanism, who):
    arguments = ["factorize", "--steps", "100", "--mechanism", mechanism, *who]
    status, table, _ = run(capsys, *arguments)
    assert status == 0
    assert "rmse" in table
    status, out, _ = run(capsys, *arguments, "--json")
    assert status == 0
    assert out.count("\n") == 1
    assert json.loads(out)["mechanism"] == mechanism


def test_factorize_prints_the_gap(capsys):
    arguments = (
        "factorize --steps 64 --participation fixed-cycle --min-sep 16 --json --effort tight"
    )
    _, out, _ = run(capsys, *arguments.split(), "--mechanism", "dense")
    result = json.loads(out)
    assert result["rmse"] == pytest.approx(4.407853385292173, rel=1e-3)
    assert 0 <= result["gap"] < 1e-3
    assert result["gap"] == pytest.approx(result["rmse"] / result["lower_bound"] - 1)
    _, out, _ = run(capsys, *arguments.replace("tight", "none").split())
    assert json.loads(out)["lower_bound"] is None


def test_factorize_chooses_bands(capsys):
    arguments = ("factorize", "--steps", "1000", "--min-sep", "10", "--effort", "none", "--json")
    errors = {}
    for bands in ("10", "auto"):
        _, out, _ = run(capsys, *arguments, "--bands", bands)
        errors[bands] = json.loads(out)["rmse"]
    assert errors["auto"] < errors["10"]


def test_account_converts_both_ways(capsys):
    _, out, _ = run(capsys, "account", "--epsilon", "8", "--delta", "1e-5", "--json")
    there = json.loads(out)
    sigma = str(there["noise_multiplier"])
    _, out, _ = run(capsys, "account", "--noise-multiplier", sigma, "--delta", "1e-5", "--json")
    back = json.loads(out)
    assert back["epsilon"] == pytest.approx(8, rel=1e-9)
    assert back["epsilon_exact"] is True
    assert back["epsilon_lower_bound"] == back["epsilon"]
    assert "(8, 1e-05)-differential privacy" in back["claim"]


def test_account_with_sampling(capsys):
    arguments = "account --noise-multiplier 1 --delta 1e-5 --sampling-probability 0.01 --steps 2000"
    status, out, _ = run(capsys, *arguments.split(), "--json")
    result = json.loads(out)
    assert status == 0
    assert result["epsilon"] == pytest.approx(2.5838, rel=1e-3)
    assert result["epsilon_exact"] is False
    assert result["epsilon_lower_bound"] is None
    assert "an upper bound" in result["claim"]


def account(capsys, *arguments):
    status, out, _ = run(capsys, "account", "--delta", "1e-5", *arguments, "--json")
    assert status == 0
    return json.loads(out)


def test_account_to_rho_and_mu(capsys):
    rho = account(capsys, "--rho", "0.125")
    assert (rho["noise_multiplier"], rho["mu"]) == (2.0, 0.5)
    assert account(capsys, "--mu", "0.5") == rho
    assert account(capsys, "--noise-multiplier", "2")["rho"] == 0.125


def test_account_of_the_best_of_several_trials(capsys, tmp_path):
    """A file of a tuning brings its trials along: its price cannot be left out."""
    for shape, words in ((1.0, ()), (math.inf, ("--trials-shape", "poisson"))):
        trials = Trials(10, shape)
        few = ("--trials", "10", *words)
        found = account(capsys, "--noise-multiplier", "2", *few)
        whole = tuned_privacy_cost(SingleParticipation(), 1, 2.0, 1e-5, trials)
        assert (found["epsilon"], found["method"]) == (whole.epsilon, whole.method)
        assert (found["epsilon_exact"], found["mu"], found["rho"]) == (False, None, None)
        assert ", of the best of several trials and nothing else; noise" in found["claim"]
        back = account(capsys, "--epsilon", "3", *few)
        assert back["noise_multiplier"] == tuned_noise_multiplier(
            SingleParticipation(), 1, 3.0, 1e-5, trials
        )
        cycle = FixedCycle(6, 4)
        split = factorize(prefix_sum(24), cycle, "bsr")
        made = Mechanism.calibrate(split, cycle, epsilon=3, delta=1e-5, trials=trials)
        path = tmp_path / f"{shape}.json"
        made.save(path)
        sigma = f"{made.noise_multiplier!r}"
        for flags in ((), few):
            own = ("--noise-multiplier", sigma, "--mechanism-file", str(path), *flags)
            assert account(capsys, *own)["epsilon"] == made.epsilon
        line = f"{ACCOUNT} --epsilon 1 --mechanism-file {path} --trials 9"
        status, _, err = run(capsys, *line.split())
        assert status == 2
        assert err.startswith(f"error: trials must be the file's, {trials}, or left out, got trunc")
    plain = account(capsys, "--noise-multiplier", "2")
    assert "trials" not in plain["claim"]


def test_account_of_random_steps_takes_a_strategy_from_a_file(capsys, tmp_path):
    cycle = FixedCycle(6, 4)
    bsr = factorize(prefix_sum(24), cycle, "bsr")
    mechanism = Mechanism.calibrate(bsr, cycle, noise_multiplier=1.2, delta=1e-5)
    path = str(tmp_path / "mechanism.json")
    mechanism.save(path)
    plain = account(capsys, "--noise-multiplier", "1.2", "--mechanism-file", path)
    assert plain["epsilon"] == mechanism.epsilon
    few = ["--samples", "20000", "--mc-seed", "3"]
    bins = account(
        capsys, "--noise-multiplier", "1.2", "--mechanism-file", path, "--bins", "6", *few
    )
    assert bins["epsilon"] < plain["epsilon"]
    assert "20000 samples from seed 3" in bins["claim"]
    alone = account(capsys, "--noise-multiplier", "1.2", "--bins", "6", "--steps", "24", *few)
    assert alone["epsilon"] < bins["epsilon"]  # columns of independent noise do not overlap
    back = account(capsys, "--epsilon", "2", "--bins", "6", "--steps", "24", *few)
    assert 1.9 < back["epsilon"] <= 2
    renewal = ["--sampling-probability", "0.1", "--min-sep", "6", "--mechanism-file", path, *few]
    assert account(capsys, "--noise-multiplier", "1.2", *renewal)["rho"] is None
    status, _, err = run(
        capsys, "account", "--delta", "1e-5", "--epsilon", "1", *renewal, "--steps", "9"
    )
    assert (status, err) == (2, "error: steps must be the file's 24 or left out, got 9\n")


FACTORIZE, ACCOUNT = "factorize --steps 100 ", "account --delta 1e-5 "
REFUSALS = {
    "factorize": "steps must be given unless a file says how many, got none",
    "factorize --steps 0": "steps must be in [1, 10000000], got 0",
    "factorize --steps x": "Invalid value for '--steps'",
    FACTORIZE + "--bands 0": "bands must be in [1, n_steps=100], got 0",
    FACTORIZE + "--bands many": "bands must be an integer or auto, got 'many'",
    FACTORIZE + "--effort some": "effort must be none, fast or tight, got 'some'",
    FACTORIZE + "--mechanism blt --buffers 0": "buffers must be in [1, 16], got 0",
    FACTORIZE + "--buffers 2": "buffers must be left out for mechanism 'bsr', got 2",
    FACTORIZE + "--bands 101": "bands must be in [1, n_steps=100], got 101",
    FACTORIZE + "--momentum 1": "momentum must be a finite number >= 0 and < 1, got 1.0",
    FACTORIZE + "--momentum nan": "momentum must be a finite number >= 0 and < 1, got nan",
    FACTORIZE + "--decay 1.1": "decay must be a finite number > 0 and <= 1, got 1.1",
    FACTORIZE + "--mechanism magic": "mechanism must be one of",
    FACTORIZE + "--mechanism identity --bands 3": "bands must be left out for mechanism 'identity'",
    FACTORIZE + "--min-sep 10 --participations 11": "max_participations must be in [1,",
    FACTORIZE + "--min-sep 0": "min-sep must be >= 1, got 0",
    FACTORIZE + "--min-sep 10 --participations 0": "max_participations must be >= 1, got 0",
    FACTORIZE + "--participations 2": "min-sep must be given for participation min-sep, got none",
    FACTORIZE
    + "--participation fixed-cycle": "min-sep must be given for participation fixed-cycle",
    FACTORIZE + "--participation fixed-cycle --min-sep 10 --participations 5": "n_steps must be in",
    FACTORIZE + "--participation single --min-sep 10": "min-sep must be left out for single",
    FACTORIZE + "--participation often": "Invalid value for '--participation'",
    "account --epsilon 1": "Missing option '--delta'.",
    ACCOUNT: "give exactly one of --epsilon, --noise-multiplier, --rho and --mu, got none",
    ACCOUNT + "--epsilon 1 --noise-multiplier 2": "give exactly one of --epsilon, --noise-",
    ACCOUNT + "--rho 1 --bins 2 --steps 4": "participation must not be random for mu and rho, got",
    ACCOUNT + "--epsilon 1 --bins 5": "steps must be given with --bins, got none",
    ACCOUNT + "--epsilon 1 --bins 5 --steps 4": "bins must be in [1, steps=4], got 5",
    ACCOUNT + "--epsilon 1 --bins 2 --steps 0": "steps must be >= 1, got 0",
    ACCOUNT
    + "--epsilon 1 --bins 2 --sampling-probability 0.1 --steps 4": "bins must be left out with",
    ACCOUNT + "--epsilon 1 --min-sep 2": "min-sep must be 1 without --sampling-probability, got 2",
    ACCOUNT
    + "--epsilon 1 --min-sep 2 --groups 2 --sampling-probability 0.1 --steps 4": "groups must be 1",
    ACCOUNT + "--epsilon 1 --bins 2 --steps 4 --samples 10": "samples must be >= 1000, got 10",
    ACCOUNT + "--epsilon 1 --mechanism-file /none": "path must be readable, got /none",
    ACCOUNT + "--epsilon 1 --trials 0": "trials: mean must be a finite number >= 1.01",
    ACCOUNT + "--epsilon 1 --trials 2 --trials-shape x": "trials: shape must be a number, got 'x'",
    ACCOUNT + "--epsilon 1 --trials-shape 1": "trials-shape must come with --trials, got 1 alone",
    ACCOUNT + "--mu 1 --trials 2": "rho and mu must be left out with trials, which have neither",
    ACCOUNT + "--rho 1 --trials 2": "rho and mu must be left out with trials, which have neither",
    ACCOUNT
    + "--epsilon 1 --trials 2 --bins 2 --steps 4": "participation must have steps that are not ran",
    ACCOUNT + "--epsilon -1": "epsilon must be a finite number > 0, got -1.0",
    ACCOUNT + "--epsilon nan": "epsilon must be a finite number > 0, got nan",
    ACCOUNT + "--noise-multiplier 0": "noise_multiplier must be a finite number > 0, got 0.0",
    "account --delta 1 --epsilon 1": "delta must be a finite number > 0 and < 1, got 1.0",
    ACCOUNT + "--epsilon 1 --sampling-probability 0.1": "steps must be given with",
    ACCOUNT
    + "--epsilon 1 --sampling-probability 2 --steps 9": "probability must be a finite number",
    ACCOUNT + "--epsilon 1 --groups 2": "groups must be 1 without --sampling-probability, got 2",
    "magic": "No such command 'magic'.",
    FACTORIZE + "--magic": "No such option: --magic",
}


@pytest.mark.parametrize(("arguments", "line"), REFUSALS.items(), ids=REFUSALS.keys())
def test_bad_input_is_one_line_and_status_2(capsys, arguments, line):
    status, out, err = run(capsys, *arguments.split())
    assert (status, out) == (2, "")
    assert err.startswith("error: " + line)
    assert err.count("\n") == 1


def test_help_is_help(capsys):
    for command in ("factorize", "account", "train", "demo"):
        status, out, _ = run(capsys, command, "--help")
        assert status == 0
        assert "--help" in out


def test_flags_are_shown_without_a_type(capsys):
    for command in COMMANDS:
        _, out, _ = run(capsys, command, "--help")
        assert "<bool>" not in out
        assert "BOOLEAN" not in out


def test_version(capsys):
    assert run(capsys, "--version") == (0, f"rootnoise {rootnoise.__version__}\n", "")


@pytest.mark.parametrize(
    ("arguments", "completing", "answer"),
    [
        (["--version"], {}, f"rootnoise {rootnoise.__version__}"),
        ([], {"_ROOTNOISE_COMPLETE": "complete_bash", "COMP_WORDS": "rootnoise pl"}, "plan"),
    ],
)
def test_it_is_a_module_and_completes_words(arguments, completing, answer):
    command = [sys.executable, "-m", "rootnoise", *arguments]
    environment = {**os.environ, **completing, "COMP_CWORD": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == answer


def test_the_gap_is_a_per_cent_for_people_and_a_fraction_for_machines(capsys):
    line = ["factorize", "--steps", "60", "--mechanism", "identity"]
    gap = json.loads(run(capsys, *line, "--json")[1])["gap"]
    rows = [row.split("│")[1:3] for row in run(capsys, *line)[1].splitlines() if row.count("│") > 2]
    assert {name.strip(): value.strip() for name, value in rows}["gap"] == f"{100 * gap:.1f}%"


def test_an_unforeseen_exception_is_not_hidden(capsys, monkeypatch):
    def fail(*_, **__):
        raise LookupError("a bug")

    monkeypatch.setattr("rootnoise.accounting.privacy_cost", fail)
    with pytest.raises(LookupError, match="a bug"):
        main(["account", "--noise-multiplier", "1", "--delta", "1e-5"])


def test_cells_of_tables():
    assert [text(value) for value in (None, float("inf"), False, 2, "x")] == [
        "-",
        "-",
        "no",
        "2",
        "x",
    ]


INTERRUPTED = """
import os, runpy, signal, sys

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == sys.argv[1]:
            os.kill(os.getpid(), signal.SIGINT)

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have started us without
sys.meta_path.insert(0, Finder())
runpy.run_module("rootnoise", run_name="__main__")
"""


@pytest.mark.parametrize("name", ["rootnoise.cli", "numpy", "typer", "rootnoise.cli.train"])
def test_an_interrupt_while_python_imports_is_one_line(name):
    """Ctrl-C, at the moment when a module is looked for."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, name],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    line = "stopped: before the command began, nothing is kept\n"
    assert (done.returncode, done.stdout, done.stderr) == (130, "", line)
