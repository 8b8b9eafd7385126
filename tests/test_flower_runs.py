"""Flower's whole runs: kills, a simulation by ray, `flwr run`; see test_flower."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("flwr")

import federated_runs as runs
import flower_runs as flower
from processes import outcome

ROOT = Path(__file__).parents[1]
EXAMPLES, DOCS = ROOT / "examples", ROOT / "docs" / "federated.md"
KILLED = -signal.SIGKILL


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    assert outcome(flower.whole, folder / "out", folder / "log") == 0
    return folder


def assert_same(folder, whole):
    """One hash a round, and the same files; node ids were dealt anew in every life."""
    shown = {}
    for log in (folder, whole):
        lines = (log / "log").read_text().splitlines()
        shown[log] = set(lines)
        assert len({line.split()[0] for line in lines}) == len(shown[log]) == runs.ROUNDS + 1
    assert shown[folder] == shown[whole]
    for name in ("model.pt", "clients.jsonl", "cohorts.bin"):
        ours, theirs = ((path / "out" / name).read_bytes() for path in (folder, whole))
        if name != "model.pt":  # but for the salt in the first line
            ours, theirs = (content.split(b"\n", 1)[1] for content in (ours, theirs))
        assert ours == theirs


def test_kills_at_random_lines_leave_no_trace(tmp_path, whole):
    """Between and inside rounds, until a life reaches the end."""
    rng, kills, reach = np.random.default_rng(5), 0, 900
    while True:
        fuse = int(rng.integers(reach))
        status = outcome(flower.killed_at_line, tmp_path / "out", tmp_path / "log", fuse, kills)
        if status == 0:
            break
        assert status == KILLED
        kills += 1
        reach = reach * 21 // 20
    assert kills >= 10
    assert_same(tmp_path, whole)


@pytest.mark.parametrize("how", ["between", "inside"])
def test_kills_at_changes_of_the_folder_leave_no_trace(tmp_path, whole, how):
    target = {"between": flower.killed_at_state, "inside": flower.killed_inside_write}[how]
    kills = 0
    for fuse in [0, 2, 4, 6, 8, 10, 5, 7]:
        status = outcome(target, tmp_path / "out", tmp_path / "log", fuse, kills)
        assert status in (0, KILLED)
        kills += status == KILLED
    assert kills >= 4
    assert outcome(flower.whole, tmp_path / "out", tmp_path / "log") == 0
    assert_same(tmp_path, whole)


def test_the_server_app_of_the_docs_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"^```text\n(from flwr.*?)^```$", DOCS.read_text(), re.M | re.S)
    namespace: dict[str, Any] = {"model": torch.nn.Linear(3, 2)}
    exec(compile(block, "docs/federated.md", "exec"), namespace)  # noqa: S102 - what a reader runs

    def answer(grid, name, message):
        return [flower.reply(message, message.content.array_records["arrays"])]

    namespace["main"](flower.Phones([f"phone {i}" for i in range(100)], answer), None)
    assert torch.load("run/model.pt", weights_only=True)["t"] == 40
    assert not Path("run/noise.key").exists()


def test_a_simulation_by_ray_trains_what_our_own_loop_trains(tmp_path):
    """The two examples on ten people, to the last bit: real server app, client app and engine."""
    options = ["--data", "digits", "--people", "10", "--cohort", "3", "--rounds", "4"]
    for script in ("federated", "federated_loop"):
        out = ["--out", str(tmp_path / script)]
        done = subprocess.run(
            [sys.executable, EXAMPLES / f"{script}.py", *options, *out],
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        assert "epsilon 8, each person" in done.stdout
    simulated, plain = (
        torch.load(tmp_path / script / "model.pt", weights_only=True)
        for script in ("federated", "federated_loop")
    )
    assert simulated["t"] == plain["t"] == 4
    assert all(torch.equal(w, simulated["weights"][n]) for n, w in plain["weights"].items())


@pytest.fixture
def flwr_run(tmp_path):
    """Return `flwr run` on the example app, against a SuperLink of the test's own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    home = tmp_path / "flwr"
    home.mkdir()
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "own"\n[superlink.own]\naddress = "{address}"\ninsecure = true\n'
    )
    env = os.environ | {
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "UV_OFFLINE": "1",  # that the app asks no index for its dependencies
    }
    port = address.partition(":")[2]
    with (tmp_path / "superlink.log").open("w") as log:
        superlink = subprocess.Popen(
            ["flower-superlink", "--insecure", "--simulation", "--port", port],  # noqa: S607
            env=env,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        for _ in range(300):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://{address}/health", timeout=1).close()
                break
            assert superlink.poll() is None, (tmp_path / "superlink.log").read_text()
            time.sleep(0.2)

        def run(config: str, nodes: int) -> str:
            federation = f"num-supernodes={nodes} client-resources-num-cpus=1 init-args-num-cpus=1"
            options = ["--stream", "--run-config", config, "--federation-config", federation]
            done = subprocess.run(
                ["flwr", "run", EXAMPLES / "flower_app", *options],  # noqa: S607
                env=env,
                capture_output=True,
                text=True,
                timeout=300,
                check=False,
            )
            assert done.returncode == 0, done.stderr[-2000:]
            return done.stdout + done.stderr

        yield run
    finally:
        os.killpg(superlink.pid, signal.SIGTERM)
        superlink.wait(30)


def test_flwr_run_trains_what_our_own_loop_trains(tmp_path, flwr_run):
    """The example app on eight people, to the last bit, its copy of the loop included."""
    config = 'rounds=4 people=8 cohort=2 data="digits"'
    assert "people must be the 2 SuperNodes, got 8: add" in flwr_run(config, nodes=2)
    refused = flwr_run(f'{config} out="here"', nodes=8)
    assert re.search(r"out must be an absolute path, .* got 'here'", refused)
    shown = flwr_run(f'{config} out="{tmp_path / "app"}"', nodes=8)
    assert "round 4: accuracy" in shown
    assert "(8, 0.0001)-differential privacy for one user" in shown
    options = ["--data", "digits", "--people", "8", "--cohort", "2", "--rounds", "4"]
    loop = [sys.executable, EXAMPLES / "federated_loop.py", *options, "--out", tmp_path / "loop"]
    subprocess.run(loop, check=True, capture_output=True)
    simulated, plain = (
        torch.load(tmp_path / name / "model.pt", weights_only=True) for name in ("app", "loop")
    )
    assert simulated["t"] == plain["t"] == 4
    assert all(torch.equal(w, simulated["weights"][n]) for n, w in plain["weights"].items())
