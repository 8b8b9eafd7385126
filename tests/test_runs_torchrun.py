"""`torchrun -m rootnoise train`: the run of one process, one writer, one line, one end."""

import json
import os
import subprocess
import sys

import pytest
import torch

import torchrun_runs
from processes import launch
from rootnoise._check import RootnoiseError
from rootnoise.cli import main
from rootnoise.keys import Key
from rootnoise.noise import NoiseStream
from rootnoise.participation.ledger_file import Journal
from rootnoise.runs.folder import SECRETS, RunFolder
from rootnoise.runs.processes import local_device
from rootnoise.training.ranks import Ranks
from torchrun_runs import DATA, at_step, launched

BASE = ["train", "--dataset", DATA, "--batch-size", "10", "--epochs", "2", "--lr", "0.1", "--json"]
PRIVATE = [*BASE, "--epsilon", "8", "--insecure-noise-seed", "5", "--model", "mlp"]
N_STEPS = 14
KILLED = -9


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Return the folder of a run of one process."""
    made = {}

    def run(arguments):
        name = " ".join(arguments)
        if name not in made:
            made[name] = tmp_path_factory.mktemp("alone")
            assert launched(1, made[name], arguments) == [0]
        return made[name]

    return run


def weights(out):
    return torch.load(out / "run" / "model.pt", weights_only=True)


def printed(out, size, kind="err"):
    return [(out / f"{rank}.{kind}").read_text() for rank in range(size)]


def assert_same_run(out, one, size):
    """Files and lines of one writer; weights to rounding; who took part, to the bit."""
    ours, theirs = weights(out), weights(one)
    assert ours.keys() == theirs.keys()
    for name, w in theirs.items():
        torch.testing.assert_close(ours[name], w, rtol=1e-5, atol=1e-5 * float(w.abs().max()))
    files = {f.name for f in (one / "run").iterdir()}
    assert {f.name for f in (out / "run").iterdir()} == files
    for name in files & {"claim.txt", "mechanism.json"}:
        assert (out / "run" / name).read_bytes() == (one / "run" / name).read_bytes(), name
    if "ledger.bin" in files:
        batches, others = (Journal(path / "run" / "ledger.bin").records() for path in (out, one))
        assert list(batches) == list(others)
    assert not files & set(SECRETS)
    found = [json.loads((path / "run" / "result.json").read_text()) for path in (out, one)]
    for result in found:
        del result["seconds"], result["out"]
    assert found[0] == found[1]
    lines = printed(out, size, "out")
    assert json.loads(lines[0])["accuracy"] == found[0]["accuracy"]  # one line and no other
    assert lines[1:] == [""] * (size - 1)
    assert printed(out, size, "written")[1:] == [""] * (size - 1)
    assert "metrics.jsonl" in printed(out, size, "written")[0]
    epochs = (out / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in epochs] == [1, 2]


@pytest.mark.parametrize(
    ("size", "arguments"),
    [
        (2, PRIVATE),
        (2, [*PRIVATE, "--fsdp"]),
        (3, [*PRIVATE, "--micro-batch-size", "2"]),
        (2, [*BASE, "--model", "mlp", "--mechanism", "none"]),
        (2, [*BASE, "--model", "mlp", "--mechanism", "none", "--fsdp"]),
        (2, [*PRIVATE, "--average", "0.6"]),  # 8 of 14 iterates, with an evaluation in between
        (2, [*PRIVATE, "--average", "0.6", "--fsdp"]),
    ],
    ids=["ddp", "fsdp", "micro-batches", "no privacy", "no privacy, fsdp", "mean", "mean, fsdp"],
)
def test_a_run_under_torchrun_is_the_run_of_one_process(tmp_path, alone, size, arguments):
    one = [a for a in arguments if a != "--fsdp"]
    assert launched(size, tmp_path, arguments) == [0] * size
    assert printed(tmp_path, size) == [""] * size
    assert_same_run(tmp_path, alone(one), size)


def test_shards_of_another_model_with_parts_of_nobody(tmp_path, alone):
    """Of 5 records, on average, on 3 ranks: some parts are empty."""
    base = ["train", "--dataset", DATA, "--model", "cnn", "--lr", "0.1", "--json"]
    base += ["--mechanism", "dpsgd", "--batch-size", "5", "--epochs", "2", "--epsilon", "8"]
    base += ["--insecure-noise-seed", "5"]
    assert launched(3, tmp_path, [*base, "--fsdp", "--micro-batch-size", "1"]) == [0] * 3
    assert_same_run(tmp_path, alone(base), 3)


MOVES = [(2, [], 1, []), (1, [], 2, []), (2, ["--fsdp"], 3, ["--fsdp"]), (2, ["--fsdp"], 1, [])]


@pytest.mark.parametrize(("size", "how", "next_size", "then"), MOVES)
def test_a_killed_run_goes_on_with_other_ranks(tmp_path, alone, size, how, next_size, then):
    """The last rank dies in step 9 of 14, of which 8 are on disk."""
    every = ["--checkpoint-every", "1"]
    killed = at_step(size - 1, 9, torchrun_runs.killed)
    status = launched(size, tmp_path, [*PRIVATE, *how, *every], killed)
    assert status == [2] * (size - 1) + [KILLED]
    if size > 1:
        resume = f"rootnoise train --resume --out {tmp_path / 'run'} goes on"
        rule = (
            "error: processes of a run must all go on to its end, got one that has ended or hangs"
        )
        assert printed(tmp_path, size) == [f"{rule}; {resume}\n", ""]
        assert printed(tmp_path, size, "out") == ["", ""]
    folder = RunFolder(tmp_path / "run")
    saved = folder.checkpoint()["optimizer"]
    assert saved["t"] == 8
    noise, mechanism = saved["noise"], folder.mechanism()
    stream = NoiseStream(mechanism, noise["n_parameters"], Key.from_seed(5))
    for _ in range(8):
        stream.next()
    expected = stream.state_dict()
    assert noise.keys() == expected.keys()
    for name, value in expected.items():  # the noise of every step to come, bit by bit
        found = noise[name]
        assert torch.equal(found, value) if isinstance(value, torch.Tensor) else found == value
    resumed = launched(next_size, tmp_path, ["train", "--resume", "--json", *then])
    assert resumed == [0] * next_size
    assert "the run goes on in torch" in printed(tmp_path, 1)[0]
    assert_same_run(tmp_path, alone(PRIVATE), next_size)


@pytest.mark.parametrize(("size", "how", "next_size", "then"), MOVES[1:])
def test_an_average_goes_on_with_other_ranks(tmp_path, alone, size, how, next_size, then):
    """The last rank dies in step 9 of 14; of the 8 iterates of the mean, 2 are on disk."""
    averaged = [*PRIVATE, "--average", "0.6"]
    killed = at_step(size - 1, 9, torchrun_runs.killed)
    launched(size, tmp_path, [*averaged, *how, "--checkpoint-every", "1"], killed)
    saved = RunFolder(tmp_path / "run").checkpoint()
    shapes = {name: w.shape for name, w in saved["model"].items()}
    assert {name: x.shape for name, x in saved["average"].items()} == shapes
    resumed = launched(next_size, tmp_path, ["train", "--resume", "--json", *then])
    assert resumed == [0] * next_size
    assert_same_run(tmp_path, alone(averaged), next_size)


def test_no_rank_is_told_before_the_checkpoint_is_on_disk(tmp_path):
    launch(2, torchrun_runs.told, tmp_path)


@pytest.mark.parametrize(
    ("action", "status", "line"),
    [
        (torchrun_runs.fails, 2, "error: weights must be kept, got none\n"),
        (torchrun_runs.interrupted, 130, "stopped: rootnoise train --resume --out RUN goes on\n"),
    ],
)
def test_an_error_of_one_rank_ends_all_with_its_line(tmp_path, action, status, line):
    found = launched(3, tmp_path, PRIVATE, at_step(1, 3, action))
    assert found == [2, status, 2]
    text = line.replace("RUN", str(tmp_path / "run"))
    assert printed(tmp_path, 3) == ["", text, ""]
    assert (tmp_path / "run" / "checkpoint.pt").exists()


def one_line(out, size, status=2):
    """Return the only line that the processes have printed."""
    lines = "".join(printed(out, size))
    assert lines.count("\n") == 1, lines
    assert "".join(printed(out, size, "out")) == ""
    return lines


def test_other_arguments_and_other_data_are_refused(tmp_path):
    def on_rank_1(*arguments):
        return lambda rank: [*PRIVATE, *(arguments if rank == 1 else ())]

    for name, arguments in {
        "lr": on_rank_1("--lr", "0.3"),
        "seed": on_rank_1("--seed", "3"),
        "fsdp": on_rank_1("--fsdp"),
        "checkpoint_every": on_rank_1("--checkpoint-every", "2"),
        "resume": on_rank_1("--resume"),
        "training set": [*PRIVATE, "--dataset", "torchrun_runs:other_on_rank_1"],
    }.items():
        out = tmp_path / name.replace(" ", "-")
        out.mkdir()
        assert launched(2, out, arguments) == [2, 2]
        rule = f"error: {name} must be rank 0's on all ranks, got others on [1]\n"
        assert one_line(out, 2) == rule
        assert not (out / "run").exists()


def test_what_rank_0_refuses_is_said_once(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "other.txt").write_text("other")
    assert launched(2, tmp_path, PRIVATE) == [2, 2]
    assert "out must be new or empty" in one_line(tmp_path, 2)


def test_what_all_refuse_is_said_once(tmp_path):
    assert launched(2, tmp_path, [*PRIVATE, "--fsdp", "--micro-batch-size", "0"]) == [2, 2]
    assert "micro_batch_size must be >= 1, got 0" in one_line(tmp_path, 2)


def test_shards_need_torchrun(tmp_path, capsys):
    arguments = ["train", "--dataset", "digits", "--model", "mlp", "--epsilon", "8", "--fsdp"]
    assert main([*arguments, "--out", str(tmp_path / "run")]) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: fsdp must be of processes that torchrun has started, got one")
    assert not (tmp_path / "run").exists()


def test_each_process_has_its_own_gpu(monkeypatch):
    ranks = Ranks()
    assert [local_device(name, ranks) for name in ("cpu", "cuda:1")] == ["cpu", "cuda:1"]
    ranks.rank, ranks.size = 5, 8
    assert [local_device(name, ranks) for name in ("cpu", "cuda")] == ["cpu", "cuda:5"]
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert local_device("cuda", ranks) == "cuda:1"
    rule = (
        r"^device must be cpu or cuda in several processes \(each takes its own GPU\), got cuda:1$"
    )
    with pytest.raises(RootnoiseError, match=rule):
        local_device("cuda:1", ranks)


def test_torchrun_itself(tmp_path, alone):
    """The command of the documentation."""
    place = {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", "2", "-m", "rootnoise", *PRIVATE, "--out", tmp_path / "run"),
        ],
        env=os.environ | place,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout)["n_steps"] == N_STEPS
    ours, theirs = weights(tmp_path), weights(alone(PRIVATE))
    for name, w in theirs.items():
        torch.testing.assert_close(ours[name], w, rtol=1e-5, atol=1e-5 * float(w.abs().max()))
    assert {"curves.png", "report.html"} <= {file.name for file in (tmp_path / "run").iterdir()}
