"""Any edit of a run's folder is found: by the seal, or, if consistent, by recomputing."""

import hashlib
import json
import shutil
from typing import Any

import numpy as np
import pytest

from rootnoise._check import RootnoiseError
from rootnoise.auditing import recompute
from rootnoise.bounds.optimality import Optimality
from rootnoise.cli import main
from rootnoise.mechanism import Mechanism
from rootnoise.participation.ledger_file import Journal, pack, unpack
from rootnoise.runs import audit as audit_module
from rootnoise.runs import inference, report, statement
from rootnoise.runs.audit import audit
from rootnoise.runs.folder import RunFolder, as_json
from rootnoise.runs.run import run, stored
from test_runs import stopped, with_


@pytest.fixture(scope="module", params=["bsr", "dpsgd"])
def finished(request, tmp_path_factory):
    out = tmp_path_factory.mktemp("audited") / request.param
    run(with_(mechanism=request.param), out)
    return out


@pytest.fixture
def copy(finished, tmp_path):
    out = tmp_path / finished.name
    shutil.copytree(finished, out)
    return out


def failures(out, seal=None):
    return [check.name for check in audit(out, seal) if not check.held]


def first_failure(out):
    """The name of the first check that fails, or None; later ones are not computed."""
    return next((check.name for check in audit_module.checks(out) if not check.held), None)


def test_an_untouched_run_holds(finished):
    checks = audit(finished)
    assert [check.name for check in checks if not check.held] == []
    names = {check.name for check in checks}
    assert {"seal", "sensitivity", "noise_std", "rmse", "lower bound", "gap"} < names
    assert {"epsilon at delta 0.001", "epsilon at delta 1e-05", "epsilon at delta 1e-07"} < names
    assert failures(finished, statement.read(finished / "privacy.json")["seal"]) == []


def test_a_run_without_privacy_is_audited_too(tmp_path):
    for name, config in {
        "none": with_(mechanism="none", epsilon=None, epochs=1),
        "insecure": with_(epochs=1, insecure_noise_seed=3),
    }.items():
        run(config, tmp_path / name)
        assert failures(tmp_path / name) == []


def test_an_unfinished_run_does_not_hold(tmp_path, capsys):
    out = stopped(tmp_path)
    found = failures(tmp_path)
    assert {"steps made", "secrets are gone"} < set(found)
    assert {"finished", "steps made", "secrets are gone"} == set(found)
    assert main(["audit", str(out)]) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    line = "unfinished, 8 steps are saved; go on by rootnoise train --resume --out"
    assert last == f"{line} {out}"


def test_an_edit_of_an_unfinished_run_is_found(tmp_path):
    change(stopped(tmp_path), "config.json", "epsilon", 8.0)
    assert "config.json" in failures(tmp_path)
    (tmp_path / "checkpoint.pt").write_bytes(b"x")
    assert {"finished", "checkpoint.pt"} < set(failures(tmp_path))


# ---------------------------------------------------------------------------------- careless edits


def leaves(tree, path=()):
    if isinstance(tree, dict | list):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from leaves(value, (*path, key))
    else:
        yield path


def edited(tree, path):
    key, rest = path[0], path[1:]
    value = tree[key]
    if rest:
        edited(value, rest)
    elif isinstance(value, bool) or value is None:
        tree[key] = not value
    elif isinstance(value, int | float):
        tree[key] = value + (value or 1) * (1 if isinstance(value, int) else 1e-6)
    else:
        tree[key] = value + "0"


def test_an_edit_of_any_leaf_of_any_json_file_is_found(copy):
    count = 0
    for name in ("config.json", "mechanism.json", "privacy.json", "result.json"):
        path = copy / name
        whole = path.read_bytes()
        for leaf in leaves(json.loads(whole)):
            tree = json.loads(whole)
            edited(tree, leaf)
            path.write_text(json.dumps(tree))
            assert first_failure(copy) in ("seal", name), (name, leaf)
            count += 1
        path.write_bytes(whole)
    assert count > 80
    assert first_failure(copy) is None


def test_an_edit_of_any_byte_of_any_file_is_found(copy):
    for path in sorted(copy.iterdir()):
        whole = path.read_bytes()
        for at in sorted({*range(0, len(whole), max(1, len(whole) // 40)), len(whole) - 1}):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
            assert first_failure(copy) is not None, (path.name, at)
        for other in (b"", whole[:-1], whole + b"\n"):
            path.write_bytes(other)
            assert first_failure(copy) is not None, (path.name, len(other))
        path.unlink()
        assert first_failure(copy) is not None, path.name
        path.write_bytes(whole)
    (copy / "noise.txt").touch()
    assert first_failure(copy) == "noise.txt"


# -------------------------------------------------------------------------------- consistent edits


def reseal(out):
    """What a forger does: hash and seal everything anew, and write the page to match."""
    stated = json.loads((out / "privacy.json").read_text())
    for name in stated["files"]:
        content = (out / name).read_bytes()
        stated["files"][name] = hashlib.sha256(content).hexdigest()
    stated = statement.sealed(stated)
    (out / "privacy.json").write_bytes(statement.as_json(stated))
    (out / "privacy.md").write_bytes(statement.as_markdown(stated))


def change(out, name, *path_and_value):
    *path, last, value = path_and_value
    tree = json.loads((out / name).read_text())
    node = tree
    for key in path:
        node = node[key]
    node[last] = value(node[last]) if callable(value) else value
    (out / name).write_text(json.dumps(tree))


FORGERIES: dict[str, tuple[list[Any], str]] = {
    "epsilon": (["privacy.json", "mechanism", "privacy", 1, "epsilon", lambda e: e - 0.05], "eps"),
    "bound called exact": (["privacy.json", "mechanism", "sensitivity", "exact", 1], "privacy.js"),
    "noise": (["privacy.json", "mechanism", "noise_std", lambda s: s * 1.01], "privacy.json"),
    "relation": (["privacy.json", "mechanism", "relation", "none"], "privacy.json follows"),
    "unit": (["privacy.json", "mechanism", "unit", "one person"], "privacy.json follows"),
    "claim": (["privacy.json", "claim", "(0.1, 1e-9)-differential privacy"], "claim"),
    "steps": (["privacy.json", "steps_made", 7], "steps made"),
    "gap": (["privacy.json", "mechanism", "error", "gap", 0.0], "gap"),
    "lower bound": (
        ["privacy.json", "mechanism", "error", "lower_bound", lambda x: x * 1.01],
        "lower bound",
    ),
    "rmse": (["privacy.json", "mechanism", "error", "rmse", lambda x: x * 0.99], "rmse"),
    "private": (["privacy.json", "private", False], "private"),
    "independence": (["privacy.json", "independence", "proved for every loss"], "independence"),
    "ledger's digest": (["privacy.json", "ledger", "00" * 32], "ledger.bin is this run's"),
    "people": (["privacy.json", "sampler", "n_examples", 99999], "ledger.bin is this run's"),
    "budget": (["config.json", "epsilon", 0.5], "budget"),
    "clip": (["config.json", "clip_norm", 0.5], "config.json agrees"),
    "batch": (["config.json", "batch_size", 100], "config.json agrees"),
    "result": (["result.json", "epsilon", 0.1], "result.json agrees"),
    "sigma": (["mechanism.json", "definition", "noise_multiplier", 9.0], "readable"),
}


@pytest.mark.parametrize("finished", ["bsr"], indirect=True)
@pytest.mark.parametrize("case", FORGERIES)
def test_a_forged_claim_is_refuted_by_recomputing(copy, case):
    edit, name = FORGERIES[case]
    change(copy, *edit)
    reseal(copy)
    found = failures(copy)
    assert any(check.startswith(name) for check in found), found


# Edits that no number contradicts, because nothing but them says it.
BESIDE: dict[str, tuple[list[list[Any]], str]] = {
    "bound left out": (
        [
            ["privacy.json", "mechanism", "error", "lower_bound", None],
            ["privacy.json", "mechanism", "error", "gap", 0.0],
        ],
        "lower bound",
    ),
    "error": ([["privacy.json", "mechanism", "error", "epsilon", 0.1]], "privacy.json follows"),
    "entry": ([["privacy.json", "epsilon", 0.1]], "entries of privacy.json"),
    "schema": ([["privacy.json", "schema", 3]], "entries of privacy.json"),
    "key": ([["privacy.json", "key_id", "0 |\n\n# Epsilon is 0.1"]], "entries of privacy.json"),
    "version": ([["privacy.json", "versions", "torch", "2 |\n\n# Epsilon"]], "entries of privacy"),
    "package": ([["privacy.json", "versions", "epsilon", "0.1"]], "entries of privacy.json"),
    "result's error": ([["result.json", "rmse", 0.1]], "result.json agrees"),
    "result's bands": ([["result.json", "bands", 99]], "result.json agrees"),
    "result's entry": ([["result.json", "epsilon_amplified", 0.1]], "result.json agrees"),
}


@pytest.mark.parametrize("finished", ["bsr"], indirect=True)
@pytest.mark.parametrize("case", BESIDE)
def test_what_is_said_beside_the_claim_is_refuted(copy, case):
    edits, name = BESIDE[case]
    for edit in edits:
        change(copy, *edit)
    reseal(copy)
    found = failures(copy)
    assert any(check.startswith(name) for check in found), found


@pytest.mark.parametrize("finished", ["bsr"], indirect=True)
def test_a_better_bound_in_the_mechanisms_file_is_refuted(copy):
    mechanism = Mechanism.load(copy / "mechanism.json")
    vars(mechanism)["optimality"] = Optimality(mechanism.rmse, mechanism.rmse)
    (copy / "mechanism.json").write_bytes(as_json(mechanism.to_dict()))
    reseal(copy)
    assert failures(copy) == ["optimality in mechanism.json"]
    del vars(mechanism)["optimality"]
    (copy / "mechanism.json").write_bytes(as_json(mechanism.certify().to_dict()))
    reseal(copy)
    assert failures(copy) == []


def test_a_run_without_privacy_can_claim_none(tmp_path, finished):
    out = tmp_path / "plain"
    run(with_(mechanism="none", epsilon=None, epochs=1), out)
    assert failures(out) == []
    edits: list[tuple[list[Any], list[str]]] = [
        (["privacy.json", "private", True], ["private", "result.json agrees"]),
        (["privacy.json", "independence", "proved"], ["entries of privacy.json"]),
        (["result.json", "epsilon", 0.1], ["result.json agrees"]),
        (["result.json", "private", True], ["result.json agrees"]),
        (["result.json", "claim", "(0.1, 1e-9)-differential privacy"], ["result.json agrees"]),
    ]
    for edit, expected in edits:
        whole = (out / edit[0]).read_bytes()
        change(out, *edit)
        reseal(out)
        assert failures(out) == expected, edit
        (out / edit[0]).write_bytes(whole)
    (out / "claim.txt").write_text("(0.1, 1e-9)-differential privacy\n")
    shutil.copy(finished / "mechanism.json", out)
    change(out, "privacy.json", "files", lambda files: files | {"mechanism.json": ""})
    reseal(out)
    assert failures(out) == ["claim.txt", "no mechanism"]


def test_beyond_the_steps_of_a_bound_none_may_be_stated(copy, monkeypatch):
    """And the error is that of the streamed rows."""
    monkeypatch.setattr(statement, "MOST_STEPS", 8)
    monkeypatch.setattr(recompute, "DENSE", 8)
    assert failures(copy) == ["lower bound"]
    for name in ("lower_bound", "gap"):
        change(copy, "privacy.json", "mechanism", "error", name, None)
    reseal(copy)
    assert failures(copy) == []
    change(copy, "privacy.json", "mechanism", "error", "gap", 0.0)
    change(copy, "privacy.json", "mechanism", "error", "rmse", lambda x: x * 0.999)
    reseal(copy)
    assert failures(copy) == ["rmse", "gap"]


def test_a_forged_probability_is_refuted(finished, copy):
    if finished.name == "bsr":
        change(copy, "privacy.json", "sampler", "batch_size", 100)
        reseal(copy)
        assert "config.json agrees" in failures(copy)
        return
    for file in ("privacy.json", "config.json"):
        change(copy, file, *(["sampler"] if file == "privacy.json" else []), "batch_size", 100)
    reseal(copy)
    assert "participation follows from config.json" in failures(copy)


def forge_ledger(out, batches):
    """Write another history, with its digest, as the forger of the whole folder would."""
    path = out / "ledger.bin"
    line = path.read_bytes().split(b"\n")[0] + b"\n"
    salt = bytes.fromhex(json.loads(line)["salt"])
    digest = hashlib.blake2b(line, key=salt, digest_size=32).digest()
    records = [pack(batch) for batch in batches]
    for record in records:
        digest = hashlib.blake2b(digest + record, key=salt, digest_size=32).digest()
    path.write_bytes(line + b"".join(records))
    change(out, "privacy.json", "ledger", digest.hex())
    reseal(out)


def test_a_history_that_breaks_the_participation_is_refuted(finished, copy):
    batches = [unpack(record) for record in Journal(copy / "ledger.bin").records()]
    forge_ledger(copy, batches)
    assert failures(copy) == []
    if finished.name == "bsr":
        someone = batches[0][0]
        batches[1] = np.sort(np.append(batches[1], someone))
    else:  # everybody, at every step: the accountant was told q = 0.14
        batches = [np.arange(1442)] * len(batches)
    forge_ledger(copy, batches)
    seed = ["seed"] if finished.name == "bsr" else []  # elsewhere it is a secret
    assert failures(copy) == [*seed, "ledger keeps the participation"]


def test_a_shorter_history_is_refuted(copy):
    batches = [unpack(record) for record in Journal(copy / "ledger.bin").records()]
    forge_ledger(copy, batches[:-1])
    assert "ledger.bin is this run's" in failures(copy)


def test_only_the_seal_finds_a_run_that_was_replaced_whole(copy, tmp_path):
    seal = statement.read(copy / "privacy.json")["seal"]
    run(with_(mechanism="bsr", epsilon=8.0), tmp_path / "other")
    assert failures(tmp_path / "other") == []
    assert failures(tmp_path / "other", seal) == ["seal"]


def test_a_ledger_that_others_can_read_is_found(copy):
    (copy / "ledger.bin").chmod(0o644)
    assert failures(copy) == ["ledger's mode"]


def test_the_mechanism_of_the_file_is_the_one_that_is_recomputed(copy, monkeypatch):
    # A first route that is wrong by 2 % is found by the second: here sensitivity and epsilon.
    load = Mechanism.load

    def wrong(path):
        mechanism = load(path)
        small = type(mechanism.sensitivity)(mechanism.sensitivity.value * 0.98, True, "wrong")
        object.__setattr__(mechanism, "sensitivity", small)
        return mechanism

    monkeypatch.setattr(Mechanism, "load", wrong)
    assert "sensitivity" in failures(copy)


# ----------------------------------------------------------------------------------------- command


def test_the_command_exits_with_0_only_if_all_holds(copy, capsys):
    assert main(["audit", str(copy), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["held"] is True
    assert {"name", "held", "stated", "found"} == set(result["checks"][0])
    change(copy, "result.json", "epsilon", 0.1)
    assert main(["audit", str(copy)]) == 1
    out = capsys.readouterr().out
    assert "checks do not hold" in out
    assert "result.json" in out


def test_the_command_can_attack_too(copy, capsys):
    assert main(["audit", str(copy), "--empirical", "--canaries", "500", "--json"]) == 0
    checks = {check["name"]: check for check in json.loads(capsys.readouterr().out)["checks"]}
    for name in (
        "noise variance",
        "noise correlation",
        "attack: distinguishing",
        "attack: one run",
    ):
        assert checks[name]["held"]
    assert checks["attack: one run"]["found"].startswith("epsilon > ")


def test_a_missing_page_is_named(copy):
    (copy / "privacy.md").unlink()
    found = [check for check in audit(copy) if not check.held]
    assert [(check.name, check.found) for check in found] == [("privacy.md", "missing")]


def test_what_is_no_folder_is_refused(tmp_path, capsys):
    with pytest.raises(RootnoiseError, match=r"^run must be a folder, got .*none$"):
        audit(tmp_path / "none")
    assert main(["audit", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.startswith("error: run must be a folder, got ")
    assert failures(tmp_path) == ["seal"]


@pytest.mark.parametrize(
    ("sampling", "bands", "kind"),
    [
        ("balls-in-bins", {}, "balls-in-bins"),
        ("poisson", {"groups": 4}, "cyclic-poisson"),
        ("min-sep-poisson", {"separation": 4}, "min-sep-poisson"),
    ],
)
def test_amplified_runs_resume_and_pass(tmp_path, sampling, bands, kind):
    out, config = tmp_path / "run", with_(sampling=sampling, epochs=2, **bands)
    stopped(out, config)
    result = run(config, out, resume=True)
    assert result.sampling == sampling
    assert result.epsilon is not None
    assert 3.7 < result.epsilon <= 4
    assert Mechanism.load(out / "mechanism.json").participation.type == kind
    assert failures(out) == []


@pytest.mark.parametrize(
    ("sampling", "bands"), [("poisson", {"groups": 4}), ("min-sep-poisson", {"separation": 4})]
)
def test_a_folder_from_before_the_separation_had_a_name_goes_on(tmp_path, sampling, bands):
    """Its config.json says `groups` for both."""
    out = tmp_path / "run"
    config = with_(sampling=sampling, epochs=1, **bands)
    stopped(out, config, step=3)
    today = json.loads((out / "config.json").read_bytes())
    old = {n: v for n, v in today.items() if n != "separation"} | {"groups": 4}
    (out / "config.json").write_bytes(as_json(old))
    bound = RunFolder(out)
    state = bound.checkpoint()
    bound._bound = bound._hashes()
    bound.save_checkpoint(state)
    with RunFolder(out) as folder:
        folder.reopen(today)
        assert folder.config() == today
    run(stored(out, bands), out, resume=True)
    assert failures(out) == []
    assert inference.settings(out) == config
    assert "--" + "".join(bands) + " 4" in report.page(report.read(out))
