"""What a run says about its privacy: complete, before and after, and sealed."""

import hashlib
import json
from dataclasses import replace

import pytest

from rootnoise._check import RootnoiseError
from rootnoise.accounting import privacy_cost
from rootnoise.keys import Key
from rootnoise.mechanism import Mechanism
from rootnoise.runs import statement
from rootnoise.runs.run import run
from test_runs import PERIOD, SMALL, stopped, with_


@pytest.fixture(scope="module", params=["bsr", "dpsgd"])
def finished(request, tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    run(with_(mechanism=request.param), out)
    return out


def test_the_statement_has_all_that_an_auditor_asks_for(finished):
    stated = json.loads((finished / "privacy.json").read_text())
    mechanism = Mechanism.load(finished / "mechanism.json")
    said = stated["mechanism"]
    assert stated["private"] is True
    assert stated["claim"] == mechanism.claim()
    assert stated["independence"].startswith("That each example's gradient depends on no other")
    assert (said["name"], said["fingerprint"]) == (mechanism.name, mechanism.fingerprint)
    assert said["unit"] == "one record"
    poisson = mechanism.name == "identity"
    assert said["relation"] == ("add-or-remove" if poisson else "zero-out")
    assert said["participation"]["type"] == ("cyclic-poisson" if poisson else "fixed-cycle")
    assert said["clip_norm"] == mechanism.clip_norm
    assert said["noise_multiplier"] == mechanism.noise_multiplier
    assert said["noise_std"] == mechanism.noise_std
    assert said["sensitivity"]["value"] == mechanism.sensitivity.value
    assert said["n_steps"] == stated["steps_made"] == 3 * PERIOD
    assert stated["sampler"] == {
        "type": "CyclicPoissonSampler" if poisson else "FixedCycleSampler",
        "n_examples": 1442,
        "batch_size": 200,
        "n_steps": 3 * PERIOD,
    }
    assert [cost["delta"] for cost in said["privacy"]] == pytest.approx([1e-3, 1e-5, 1e-7])
    for cost in said["privacy"]:
        delta = cost["delta"]
        again = privacy_cost(
            mechanism.participation, mechanism.n_steps, mechanism.noise_multiplier, delta
        )
        assert (cost["epsilon"], cost["exact"]) == (again.epsilon, again.exact)
    assert said["error"]["gap"] == said["error"]["rmse"] / said["error"]["lower_bound"] - 1
    assert {"rootnoise", "python", "numpy", "torch", "opacus"} < set(stated["versions"])


def test_it_vouches_for_every_other_file(finished):
    stated = json.loads((finished / "privacy.json").read_text())
    files = {file.name for file in finished.iterdir()} - {"privacy.json", "privacy.md"}
    assert set(stated["files"]) == files
    for name, digest in stated["files"].items():
        assert hashlib.sha256((finished / name).read_bytes()).hexdigest() == digest
    assert "ledger.bin" in files


def test_people_read_the_same(finished):
    stated, text = (finished / "privacy.json"), (finished / "privacy.md").read_text()
    content = json.loads(stated.read_text())
    assert content["claim"] in text
    assert content["independence"] in text
    assert f"Seal: {content['seal']}" in text
    assert f"{content['mechanism']['noise_std']:.9g}" in text
    assert content["key_id"] in text
    assert "`ledger.bin` is for the auditor." in text
    for cost in content["mechanism"]["privacy"]:
        assert f"| {cost['delta']:.6g} | {cost['epsilon']:.9g} |" in text


def test_it_is_there_before_the_first_step_and_never_holds_the_key(tmp_path):
    stopped(tmp_path, step=1)
    early = statement.read(tmp_path / "privacy.json")
    assert early["steps_made"] == 0
    assert "ledger" not in early
    key = Key.load(tmp_path / "noise.key")
    assert early["key_id"] == key.id
    secret = key.secret.hex()
    run(SMALL, tmp_path, resume=True)
    late = statement.read(tmp_path / "privacy.json")
    assert {k: late[k] for k in ("mechanism", "key_id", "claim")} == {
        k: early[k] for k in ("mechanism", "key_id", "claim")
    }
    for file in tmp_path.iterdir():
        assert secret.encode() not in file.read_bytes()
        assert key.secret not in file.read_bytes()


def test_a_run_without_privacy_says_so(tmp_path):
    run(with_(mechanism="none", epsilon=None, epochs=1), tmp_path / "none")
    run(with_(epochs=1, insecure_noise_seed=3), tmp_path / "insecure")
    for name in ("none", "insecure"):
        stated = statement.read(tmp_path / name / "privacy.json")
        assert stated["private"] is False
        assert stated["claim"].startswith("No privacy is claimed")
        assert stated["steps_made"] == PERIOD
        assert "No privacy is claimed" in (tmp_path / name / "privacy.md").read_text()
    assert "mechanism" not in statement.read(tmp_path / "none/privacy.json")


def test_the_bound_is_left_out_where_it_takes_long(monkeypatch, finished):
    mechanism = Mechanism.load(finished / "mechanism.json")
    monkeypatch.setattr(statement, "MOST_STEPS", mechanism.n_steps - 1)
    left = {"rmse": mechanism.rmse, "lower_bound": None, "gap": None}
    assert statement.described(mechanism)["error"] == left


def test_a_delta_of_one_or_more_is_not_stated(finished):
    mechanism = replace(Mechanism.load(finished / "mechanism.json"), delta=0.02)
    deltas = [cost["delta"] for cost in statement.described(mechanism)["privacy"]]
    assert deltas == pytest.approx([0.02, 0.0002])


def test_the_seal_breaks_with_any_field(finished, tmp_path):
    stated = statement.read(finished / "privacy.json")
    for name in stated:
        path = tmp_path / "privacy.json"
        path.write_bytes(statement.as_json(stated | {name: "other"}))
        with pytest.raises(RootnoiseError, match=r"^privacy.json must be as it was sealed, got an"):
            statement.read(path)
