"""The planted bugs still apply, and the tool that plants them plants what it says."""

import ast
import io

import pytest
from rich.progress import Progress

import mutate
import mutations
from mutants import Mutant, mutants
from mutation_runs import Coverage, Outcome
from mutations import MUTATIONS, PACKAGE, Mutation


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.bug)
def test_every_mutation_still_applies(mutation):
    text = (PACKAGE / mutation.file).read_text()
    broken = mutation.apply(text)
    assert ast.dump(ast.parse(broken)) != ast.dump(ast.parse(text))
    for name in mutation.tests.split():
        assert (mutations.ROOT / f"tests/test_{name}.py").is_file()


def test_there_are_many_and_each_has_a_name_of_its_own():
    assert len({mutation.bug for mutation in MUTATIONS}) == len(MUTATIONS) >= 30


@pytest.mark.parametrize("text", ["", "a a"])
def test_a_source_that_has_moved_on_is_refused(text):
    with pytest.raises(ValueError, match=r"^bug: file.py holds [02] of 'a'$"):
        Mutation("bug", "file.py", "a", "b", "").apply(text)


@pytest.mark.parametrize(
    ("code", "changes"),
    [
        ("a < b", {"a < b -> (a <= b)"}),
        ("0 < a == b", {"0 < a == b -> (0 <= a == b)", "0 < a == b -> (0 < a != b)", "0 -> (1)"}),
        ("-a + b", {"-a + b -> (-a - b)", "-a -> (a)"}),
        ("a[i:, 2]", {"i -> i + 1", "2 -> (3)"}),
        ("a * 0.5", {"a * 0.5 -> (a / 0.5)", "0.5 -> (0.515)"}),
        ("a and not b", {"a and not b -> (a or not b)", "not b -> (b)"}),
        ("a if b else c", {"b -> (not b)"}),
        ("min(a, key=b)", {"min(a, key=b) -> (max(a, key=b))", "min(a, key=b) -> (min(a))"}),
        ("[a for a in b if c]", {"c -> (not c)"}),
        ("f'{a + 1}' + 'x'", set()),
    ],
)
def test_an_expression_is_changed_at_each_place(code, changes):
    found = mutants("file.py", f"x: list[3] = {code}\n")
    assert {mutant.change for mutant in found} == changes
    assert all(mutant.identity[:3] == ("file.py", "", f"x: list[3] = {code}") for mutant in found)


def test_statements_are_changed_and_errors_keep_their_words():
    text = "@d(1)\ndef f(a=2):\n    if a:\n        raise E(a + 1)\n    check(a)\n    a += 3\n"
    found = mutants("file.py", text)
    assert {(mutant.kind, mutant.change, mutant.lines) for mutant in found} == {
        ("constant", "2 -> (3)", range(3, 7)),  # a default shows wherever the function runs
        ("condition", "a -> (not a)", range(3, 4)),
        ("raise", "raise E(a + 1) -> pass", range(4, 5)),
        ("statement", "check(a) -> pass", range(5, 6)),
        ("sign", "a += 3 -> a -= 3", range(6, 7)),
        ("constant", "3 -> (4)", range(6, 7)),
    }
    assert {mutant.function for mutant in found} == {"f"}


def test_two_like_bugs_of_a_line_have_names_of_their_own():
    found = mutants("file.py", "x = a[::-1][::-1]\n")
    changes = ["-1 -> (1)", "1 -> (2)", "-1 -> (1) [2]", "1 -> (2) [2]"]
    assert [mutant.change for mutant in found] == changes


def test_what_a_mutant_is_called_survives_moves():
    before = mutants("a/file.py", "def f():\n    return 1 < 2\n")
    after = mutants("b/file.py", "import x\n\ndef f():\n    return 1 < 2\n")
    assert [m.identity for m in before] == [m.identity for m in after]
    assert [m.order(0) for m in before] == [m.order(0) for m in after]
    assert [m.order(0) for m in before] != [m.order(1) for m in before]


def test_every_mutant_that_may_live_still_exists():
    names = mutate.privacy_files()
    found = {m.identity for name in names for m in mutants(name, (PACKAGE / name).read_text())}
    assert set(mutate.allowed()) <= found | {identity[:2] for identity in found}
    assert all(len(reason) > 20 for reason in mutate.allowed().values())


def test_a_pattern_that_fits_no_file_is_refused(monkeypatch):
    monkeypatch.setattr(mutate, "PRIVACY", ["gone.py"])
    with pytest.raises(ValueError, match=r"^PRIVACY: no file fits gone.py$"):
        mutate.privacy_files()


def test_a_sample_takes_every_file_or_those_named():
    def files(*words):
        options = mutate.parser().parse_args(words)
        return {bug.file for bug in mutate.choose(options) if isinstance(bug, Mutant)}

    folders = "accounting", "integrations/hugging_face", "integrations/opacus", "training/clip"
    bare = {f"{folder}/__init__.py" for folder in folders}  # imports alone
    assert files() == set(mutate.privacy_files()) - bare
    assert files("--file", "keys.py") == {"keys.py"}


def test_each_bug_is_judged_by_its_own_runs():
    """Two at a time, each with two stages: the outcome of one is never counted to the other."""
    first, second = mutants("keys.py", (PACKAGE / "keys.py").read_text())[:2]

    class Seen(Coverage):
        def tests(self, file, lines):
            return {"tests/test_a.py::test", "tests/test_keys.py::test"}

    coverage = Seen()
    coverage.seconds = dict.fromkeys(coverage.tests("", ()), 0.1)
    campaign = mutate.Campaign(coverage, io.StringIO(), 10.0)
    with Progress(disable=True) as progress:
        near = list(campaign.runs([first, second], progress))
        assert [run.tests for run in near] == [["tests/test_keys.py::test"]] * 2
        far = [run.done(Outcome(0, "", 0.0)) for run in near]
        assert far[0].source == first.source
        assert far[1].source == second.source
        assert far[0].done(Outcome(0, "", 0.0)) is None
        assert far[1].done(Outcome(1, "tests/test_a.py::test", 0.0)) is None
    assert campaign.counts["keys.py"] == {"planted": 2, "killed": 1, "survived": 1}
    assert campaign.survivors == [str(first)]
