"""The planted bugs still apply: each text occurs exactly once, and the bug is valid Python."""

import ast

import pytest

import mutations
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
