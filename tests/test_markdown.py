"""The examples of the README and of every page of docs/ run.

The Python blocks of a page run in order, in one namespace and in an empty folder. What a reader has
at hand already stands before a block as a comment that no browser shows: `<!-- given` ... `-->`.
A message in a text fence is raised by the code of the comment before it, `<!-- raises` ... `-->`.
In shell blocks each `rootnoise` command runs; what takes long or reads files that are not here is
parsed, so that no option in it is made up. The targets of `make` and the extras of `pip` exist.
"""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path

import pytest
import torch
import typer

from rootnoise import RootnoiseError
from rootnoise.cli import app, main

ROOT = Path(__file__).parents[1]
PAGES = {page.name: page for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]}
# A block in a fence or a given one: its language and its text.
BLOCK = re.compile(r"^(?:```(?P<language>\w*)|<!-- given)\n(?P<text>.*?)^(?:```|-->)$", re.M | re.S)
# Code that is refused, and the line that refuses it, wherever the page breaks it.
RAISES = re.compile(r"^<!-- raises\n(?P<code>.*?)^-->\n```text\n(?P<line>.*?)^```$", re.M | re.S)
# Too slow to run here, or in need of a folder that no page makes: tested elsewhere, parsed here.
PARSED = {"audit", "bench", "demo", "epoch-scaled", "plan", "reproduce", "tune"}
# Shows as much in less time: of two equal options the last one counts.
SHORTER = {"train": ["--epochs", "1"], "factorize": ["--effort", "none"]}


def blocks(page: str, *languages: str) -> list[str]:
    """Return the text of the blocks in any of `languages`; a given block is in Python."""
    found = BLOCK.finditer(PAGES[page].read_text(encoding="utf-8"))
    return [match["text"] for match in found if (match["language"] or "python") in languages]


def commands(block: str) -> list[list[str]]:
    """Return the words of each command of a shell block."""
    lines = block.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def parse(words: list[str]) -> None:
    """Refuse options that the command does not have, and values of a wrong type."""
    group = typer.main.get_command(app)
    with group.make_context("rootnoise", list(words)) as context:
        name, command, rest = group.resolve_command(context, words)  # type: ignore[attr-defined]
        command.make_context(name, rest, parent=context).close()


def check_rootnoise(words: list[str]) -> None:
    if PARSED & set(words) or (words[0] == "train" and "digits" not in words):
        parse(words)
    else:
        assert main([*words, *SHORTER.get(words[0], [])]) == 0


def check_make(targets: list[str]) -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in targets:
        assert "=" in target or re.search(rf"^{target}:", makefile, re.M), f"make {target}"


def check_pip(words: list[str]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert words[0] == "install"
    for extra in re.findall(r"(?:rootnoise|\.)\[(.*)\]", " ".join(words[1:])):
        assert set(extra.split(",")) <= set(project["optional-dependencies"])


def check_torchrun(words: list[str]) -> None:
    start = words.index("rootnoise")
    assert words[start - 1] == "-m"
    parse(words[start + 1 :])


CHECKS = {
    "torchrun": check_torchrun,
    "rootnoise": check_rootnoise,
    "make": check_make,
    "pip": check_pip,
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder to run in; the process groups that a page makes end with it."""
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng():
        torch.random.manual_seed(0)
        yield tmp_path
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")])
def test_python_blocks_run_in_order(page, folder):
    namespace: dict[str, object] = {"__name__": "__main__"}
    for block in blocks(page, "python"):
        exec(compile(block, page, "exec"), namespace)  # noqa: S102 - what a reader would run


def test_messages_are_raised_as_they_are_quoted(folder):
    text = PAGES["faq.md"].read_text(encoding="utf-8")
    (given,) = blocks("faq.md", "python")
    quoted = list(RAISES.finditer(text))
    assert len(quoted) == text.count("```text") >= 20
    for match in quoted:
        namespace: dict[str, object] = {}
        exec(compile(given, "faq.md", "exec"), namespace)  # noqa: S102
        line = " ".join(match["line"].split())
        with pytest.raises(RootnoiseError, match=f"^{re.escape(line)}$"):
            exec(compile(match["code"], "faq.md", "exec"), namespace)  # noqa: S102


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "sh")])
def test_shell_blocks_run(page, folder):
    for block in blocks(page, "sh"):
        for name, *words in commands(block):
            CHECKS[name.removeprefix(".venv/bin/")](words)


@pytest.mark.parametrize("page", PAGES)
def test_no_block_escapes_for_want_of_a_language(page):
    text = PAGES[page].read_text(encoding="utf-8")
    fences = re.findall(r"^ *(?:```|~~~)(.*)$", text, re.M)
    assert fences[1::2] == [""] * (len(fences) // 2), "a fence is not closed"
    assert set(fences[::2]) <= {"python", "sh", "json", "text"}
    indented = re.findall(r"^ {4,}(?:\.venv/bin/)?(?:rootnoise|python|pip|make) .*$", text, re.M)
    fenced = "".join(blocks(page, "python", "sh", "json", "text"))
    assert [line for line in indented if line not in fenced] == []


def test_there_is_something_to_run():
    assert len(blocks("README.md", "python")) >= 1
    lines = [words for block in blocks("README.md", "sh") for words in commands(block)]
    assert sum(name == ".venv/bin/rootnoise" for name, *_ in lines) >= 10


@pytest.mark.parametrize("words", ["train --magic 1", "audit", "demo --seed x --out y", "magic"])
def test_a_command_that_does_not_exist_is_found(words):
    with pytest.raises(Exception, match=r"(?i)no such|missing|valid integer"):
        parse(words.split())


@pytest.mark.parametrize("page", PAGES.values(), ids=PAGES.keys())
def test_no_line_begins_with_a_comparison(page):
    """Markdown would make a quotation of it."""
    assert not [line for line in page.read_text().splitlines() if line.startswith((">=", "> ="))]
