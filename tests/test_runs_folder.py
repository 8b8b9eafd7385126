"""A run's folder is one whole: whatever is edited, deleted or swapped, no step is made."""

from __future__ import annotations

import hashlib
import json
import math
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rootnoise._check import RootnoiseError
from rootnoise.keys import Key
from rootnoise.participation.ledger_file import Journal
from rootnoise.runs import folder, statement
from rootnoise.runs import run as run_module
from rootnoise.runs.config import make_mechanism, make_sampler
from rootnoise.runs.data import load
from rootnoise.runs.folder import RunFolder
from rootnoise.runs.run import run
from rootnoise.runs.trainer import Trainer
from test_runs import PERIOD, stopped, with_
from test_runs_audit import edited, leaves

CONFIG = with_(insecure_noise_seed=5)
JSON = ("config.json", "mechanism.json", "privacy.json")
BYTES = (
    "run.toml",
    "claim.txt",
    "privacy.md",
    "metrics.jsonl",
    "checkpoint.pt",
    "noise.key",
    "ledger.bin",
)


def files(out):
    return {file.name: file.read_bytes() for file in out.iterdir() if file.name != ".lock"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders of two stopped runs, by name: alike but for their privacy, and with the same key."""
    whole = {}
    for name, fields in {"a": {}, "b": {"epsilon": 8.0}, "none": {}}.items():
        config = with_(**({"insecure_noise_seed": 5} | fields))
        if name == "none":
            config = with_(mechanism="none", epsilon=None)
        whole[name] = files(stopped(tmp_path_factory.mktemp("whole") / name, config))
    return whole


@pytest.fixture(scope="module")
def part(runs, tmp_path_factory):
    """A stopped run that each example may change: `put` restores it."""
    return tmp_path_factory.mktemp("part")


def put(out, content):
    for file in out.iterdir():
        file.unlink()
    for name, text in content.items():
        (out / name).write_bytes(text)


@pytest.fixture(autouse=True)
def no_step(monkeypatch):
    """Nothing here may come as far as a step."""

    def step(*_):
        raise AssertionError("a step was made")

    monkeypatch.setattr(Trainer, "_step", step)


@pytest.fixture(scope="module", autouse=True)
def quick(runs):
    """Data and model are not what is edited: they are made once."""
    patch, digits = pytest.MonkeyPatch(), load("digits")
    patch.setattr(run_module, "load", lambda *_: digits)
    yield
    patch.undo()


def refusal(out, config=CONFIG):
    with pytest.raises(RootnoiseError, match=r" (must|of) .*") as refused:
        run(config, out, resume=True)
    line = str(refused.value)
    assert "\n" not in line
    return line


def test_an_untouched_run_goes_on(runs, part):
    put(part, runs["a"])
    with pytest.raises(AssertionError, match="a step was made"):
        run(CONFIG, part, resume=True)


@pytest.mark.parametrize("name", JSON)
def test_an_edit_of_any_leaf_is_refused_by_the_name_of_its_file(runs, part, name):
    count = 0
    for leaf in leaves(json.loads(runs["a"][name])):
        tree = json.loads(runs["a"][name])
        edited(tree, leaf)
        content = json.dumps(tree, indent=1).encode() + b"\n" * (name == "privacy.json")
        put(part, runs["a"] | {name: content})
        assert refusal(part).startswith(f"{name} must be"), leaf
        count += 1
    assert count >= {"config.json": 25, "mechanism.json": 10, "privacy.json": 30}[name]


def test_a_statement_that_is_sealed_anew_is_refused(runs, part):
    for leaf in leaves(json.loads(runs["a"]["privacy.json"])):
        tree = json.loads(runs["a"]["privacy.json"])
        edited(tree, leaf)
        stated = statement.sealed(tree)
        if leaf == ("seal",):
            continue
        forged = {
            "privacy.json": statement.as_json(stated),
            "privacy.md": statement.as_markdown(stated),
        }
        put(part, runs["a"] | forged)
        line = refusal(part)
        if leaf == ("steps_made",):  # as the end of the run writes it
            assert line.startswith("privacy.json must not be of a run that has ended")
        else:
            assert line.startswith("privacy.json must be as when the run began"), leaf


@settings(max_examples=40)
@given(data=st.data())
@pytest.mark.parametrize("name", BYTES)
def test_an_edit_of_any_byte_is_refused_by_the_name_of_its_file(runs, part, name, data):
    whole = runs["a"][name]
    end = len(whole) - (name == "noise.key")  # its line may end anyhow
    at = data.draw(st.integers(0, end - 1))
    mask = data.draw(st.integers(1, 255))
    edit = whole[:at] + bytes([whole[at] ^ mask]) + whole[at + 1 :]
    if name == "noise.key" and edit.lower() == whole:
        return  # the same digits
    put(part, runs["a"] | {name: edit})
    if name == "ledger.bin" and is_torn(whole, edit, part):
        return  # as a crash leaves it: the steps that are missing are made anew, with their batches
    line = refusal(part)
    assert name in line.replace("ledger file", "ledger.bin"), line


def is_torn(whole, edit, part):
    """Whether the ledger still has all the steps of the checkpoint, and then whole ones only."""
    before, after = (list(records(content, part)) for content in (whole, edit))
    first = edit.split(b"\n")[0] == whole.split(b"\n")[0]
    return first and len(after) >= PERIOD and before[: len(after)] == after


def records(content, part):
    (part / "ledger.bin").write_bytes(content)
    return Journal(part / "ledger.bin").records()


@pytest.mark.parametrize("name", sorted({*JSON, *BYTES}))
def test_a_file_that_is_deleted_or_emptied_or_cut_is_refused(runs, part, name):
    whole = runs["a"]
    put(part, {other: text for other, text in whole.items() if other != name})
    assert name in refusal(part).replace("ledger file", "ledger.bin")
    for content in (b"", whole[name][: len(whole[name]) // 2], whole[name] + b"x"):
        if content != whole[name]:
            put(part, whole | {name: content})
            torn = name == "ledger.bin" and content[:-1] == whole[name]
            behind = name == "metrics.jsonl" and not content  # its only line is of the checkpoint
            if torn or behind:  # as a crash leaves it
                continue
            assert name in refusal(part).replace("ledger file", "ledger.bin"), len(content)


def test_any_files_of_another_run_with_the_same_key_are_refused(runs, part):
    """Each file, and each pair of files, of a run of twice the epsilon."""
    names = sorted(name for name in runs["a"] if runs["a"][name] != runs["b"][name])
    assert set(names) >= {"config.json", "mechanism.json", "checkpoint.pt", "ledger.bin"}
    weaker = with_(insecure_noise_seed=5, epsilon=8.0)
    for i, one in enumerate(names):
        for other in names[i:]:
            swapped = {name: runs["b"][name] for name in (one, other)}
            for config in (CONFIG, weaker):
                put(part, runs["a"] | swapped)
                with pytest.raises(RootnoiseError, match=r" must \S+ "):
                    run(config, part, resume=True)


def test_all_settings_of_another_run_with_the_same_key_are_refused(runs, part):
    """Everything that is written at the start; only the checkpoint is the run's own."""
    start = {name: runs["b"][name] for name in (*JSON, "claim.txt", "privacy.md")}
    put(part, runs["a"] | start)
    line = refusal(part, with_(insecure_noise_seed=5, epsilon=8.0))
    assert line.startswith("claim.txt must be as when the run began, got an edited one in")


def test_a_run_without_privacy_is_bound_too(runs, part):
    """Else the settings of a private run could become none, under the claim of privacy."""
    plain = with_(mechanism="none", epsilon=None)
    put(part, runs["none"])
    with pytest.raises(AssertionError, match="a step was made"):
        run(plain, part, resume=True)
    put(part, runs["a"] | {"config.json": runs["none"]["config.json"]})
    assert refusal(part, plain).startswith("config.json must be as when the run began")
    put(part, runs["none"] | {"mechanism.json": runs["a"]["mechanism.json"]})
    assert refusal(part, plain).startswith("mechanism.json must be as when the run began")
    put(part, runs["none"] | {"noise.key": runs["a"]["noise.key"]})
    assert refusal(part, plain).startswith("checkpoint.pt must be as a run wrote it, under the")


def test_an_insecure_seed_cannot_be_taken_back(runs, part):
    tree = json.loads(runs["a"]["config.json"]) | {"insecure_noise_seed": None}
    put(part, runs["a"] | {"config.json": folder.as_json(tree)})
    assert refusal(part, with_()).startswith("config.json must be as when the run began")


# ------------------------------------------------------------------------- whoever holds the key


def rebind(out, **names):
    """What a forger with the key does: hash everything anew, into the checkpoint."""
    folder = RunFolder(out)
    state = folder.checkpoint()
    folder._bound = folder._hashes()
    folder.save_checkpoint(state | names)


def forge(out, change):
    tree = json.loads((out / "privacy.json").read_text())
    change(tree)
    stated = statement.sealed(tree)
    (out / "privacy.json").write_bytes(statement.as_json(stated))
    (out / "privacy.md").write_bytes(statement.as_markdown(stated))
    rebind(out)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda tree: tree.update(claim="(0.1, 1e-9)-differential privacy"), "claim"),
        (lambda tree: tree.update(private=True), "private"),
        (lambda tree: tree["sampler"].update(n_examples=10**6), "sampler"),
        (lambda tree: tree.update(key_id="0" * 16), "key_id"),
    ],
    ids=["claim", "private", "sampler", "key_id"],
)
def test_a_statement_of_other_parts_is_refused_though_it_is_bound(runs, part, change, name):
    put(part, runs["a"])
    forge(part, change)
    assert refusal(part).startswith(f"privacy.json must state the {name} of the run")


def test_a_mechanism_of_less_noise_is_refused_though_it_is_bound(runs, part):
    """Sigma / 10, with the checkpoint, the claim and the statement to match."""
    put(part, runs["a"])
    weak = with_(epsilon=81.0, insecure_noise_seed=5)
    sampler = make_sampler(weak, 1442)
    mechanism = make_mechanism(weak, sampler)
    mechanism.save(part / "mechanism.json", overwrite=True)
    state = RunFolder(part).checkpoint()
    state["optimizer"]["noise"]["fingerprint"] = mechanism.fingerprint
    rebind(part, optimizer=state["optimizer"])
    assert refusal(part).startswith("privacy.json must state the claim of the run")
    stated = statement.statement(CONFIG, sampler, mechanism, Key.from_seed(5))
    old = json.loads(runs["a"]["privacy.json"])
    forge(part, lambda tree: tree.update(stated | {"mechanism": old["mechanism"]}))
    assert refusal(part).startswith("privacy.json must describe mechanism.json")
    forge(part, lambda tree: tree.update(stated))
    line = refusal(part)
    assert line.startswith("mechanism.json must keep epsilon <= 4, delta 1e-05 and clip norm 1 of")


def test_a_statement_of_the_end_is_refused_before_the_end(runs, part):
    """An honest one, of the same run: its steps are not made."""
    put(part, runs["a"])
    stated = json.loads(runs["a"]["privacy.json"])
    done = statement.completed(stated, None, {})
    (part / "privacy.json").write_bytes(statement.as_json(done))
    (part / "privacy.md").write_bytes(statement.as_markdown(done))
    assert refusal(part).startswith("privacy.json must not be of a run that has ended")


def test_an_older_checkpoint_is_refused_by_the_ledger_too(tmp_path, monkeypatch):
    """Even where its evaluations are taken back: the ledger reaches into the next epoch."""
    monkeypatch.undo()
    out = stopped(tmp_path, CONFIG, step=PERIOD - 1)
    older = {name: (out / name).read_bytes() for name in ("checkpoint.pt", "metrics.jsonl")}

    def on_step(t, n_steps, accuracy):
        if t == PERIOD + 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(CONFIG, out, resume=True, on_step=on_step)
    for name, content in older.items():
        (out / name).write_bytes(content)
    line = refusal(out)
    assert line.startswith("checkpoint.pt must be the last one of the run, got step 0 where ledger")


def test_other_batches_past_the_checkpoint_are_refused(runs, part):
    """Before the first step, not when their step comes."""
    put(part, runs["a"])
    journal = Journal(part / "ledger.bin")
    made = list(journal.records())
    assert len(made) > PERIOD + 1
    head = journal.first_line()
    (part / "ledger.bin").write_bytes(head + b"".join([*made[:PERIOD], made[1]]))
    assert refusal(part).startswith("ledger.bin must hold the run's own batches, got others")


# ------------------------------------------------------------------------------------------ secrets


SECRET = {
    "dpsgd": {"mechanism": "dpsgd"},
    "cyclic": {"mechanism": "banded", "sampling": "poisson", "groups": 2},
    "min-sep": {"mechanism": "banded", "sampling": "min-sep-poisson", "separation": 2},
    "bins": {"mechanism": "banded", "sampling": "balls-in-bins"},
}


@pytest.mark.parametrize("kind", SECRET)
def test_the_seed_of_secret_batches_is_128_bits_of_entropy(monkeypatch, kind):
    config, asked = with_(**SECRET[kind]), []

    def randbits(bits):
        asked.append(bits)
        return 2**bits - 1 - len(asked)

    monkeypatch.setattr("rootnoise.participation.samplers.secrets.randbits", randbits)
    seeds = [make_sampler(config, 1442).seed for _ in range(2)]
    assert asked == [128, 128]
    assert seeds == [2**128 - 2, 2**128 - 3]
    assert make_sampler(with_(**SECRET[kind], seed=7), 1442).seed == 2**128 - 4
    insecure = make_sampler(with_(**SECRET[kind], insecure_noise_seed=7), 1442)
    assert (insecure.seed, len(asked)) == (7, 3)


@pytest.mark.parametrize("kind", ["dpsgd", "bins"])
def test_the_seed_of_secret_batches_is_in_the_checkpoint_alone(tmp_path, monkeypatch, kind):
    monkeypatch.undo()
    out = stopped(tmp_path / "run", with_(**SECRET[kind]))
    seed = RunFolder(out).checkpoint()["optimizer"]["sampler"]["seed"]
    assert seed.bit_length() > 64  # of 128 bits, all but once in 2**64
    texts = [str(seed).encode(), f"{seed:x}".encode(), seed.to_bytes(16, "little")]
    holders = [name for name, content in files(out).items() if any(t in content for t in texts)]
    assert set(holders) <= {"checkpoint.pt"}
    copy = shutil.copytree(out, tmp_path / "copy")
    run(with_(**SECRET[kind]), copy, resume=True)
    assert not [name for name, content in files(copy).items() if any(t in content for t in texts)]


def test_json_never_holds_what_is_no_number():
    for value in (math.nan, math.inf):
        for write in (folder.as_json, statement.as_json, statement.sealed):
            with pytest.raises(ValueError, match="not JSON compliant"):
                write({"x": value})


def test_the_digest_of_a_checkpoint_needs_the_key():
    """No other digest of its content, and no other use of the key, gives it."""
    key, content = Key.from_seed(1), b"content"
    secret = key.derive("folder of the run").secret
    expected = hashlib.blake2b(content, key=secret, digest_size=32).digest()
    assert folder._digest(content, key) == expected
    assert folder._digest(content, Key.from_seed(2)) != expected
