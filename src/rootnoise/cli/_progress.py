"""A progress bar on standard error, for people only."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

# From this many columns on there is room for a bar and its title beside what it says.
WIDE = 70


@contextmanager
def search(title: str, quiet: bool) -> Iterator[Callable[[int, float | str], None]]:
    """Show a line and yield its update(tried, least error or name); only at a terminal."""
    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(
        *columns, console=console, transient=True, disable=quiet or not console.is_terminal
    ) as line:
        task = line.add_task(title)

        def update(tried: int, value: float | str) -> None:
            now = value if isinstance(value, str) else f"{value:.6g}"
            line.update(task, description=f"{title}: {tried} tried, {now}")

        yield update


@contextmanager
def busy(title: str, quiet: bool) -> Iterator[None]:
    """Show a line with the elapsed time, for work of unknown length; only at a terminal."""
    with search(title, quiet):
        yield


@contextmanager
def waiting(title: str, quiet: bool) -> Iterator[None]:
    """Show that something goes on, but neither for how long nor how far; only at a terminal."""
    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"))
    with Progress(
        *columns, console=console, transient=True, disable=quiet or not console.is_terminal
    ) as line:
        line.add_task(title)
        yield


@contextmanager
def pieces(
    title: str, quiet: bool, keep: bool = False
) -> Iterator[Callable[[int, int, str], None]]:
    """Show a bar with the time left, and yield its update(done, of, what); only at a terminal.

    The bar disappears when all is done, unless `keep` is set.
    """
    console = Console(stderr=True)
    columns: tuple[ProgressColumn, ...] = (
        MofNCompleteColumn(),
        TextColumn("{task.fields[what]}"),
        TimeRemainingColumn(compact=True),
    )
    if console.width >= WIDE:
        columns = (TextColumn("{task.description}"), BarColumn(), *columns)
    with Progress(
        *columns, console=console, transient=not keep, disable=quiet or not console.is_terminal
    ) as bar:
        task = bar.add_task(title, total=None, what="")

        def update(done: int, of: int, what: str = "") -> None:
            bar.update(task, completed=done, total=of, what=what)

        yield update


class Steps:
    """A bar of a run's steps that stays, with what was last said of the run."""

    def __init__(self, bar: Callable[[int, int, str], None], shown: bool) -> None:
        self._bar, self.shown = bar, shown
        self._said, self._at = "", (0, 1)

    def step(self, step: int, n_steps: int, accuracy: float | None) -> None:
        """Take one step; the accuracy is shown where nothing else was said."""
        known = "" if accuracy is None else f"accuracy {accuracy:.3f}"
        self._at = step, n_steps
        self._bar(*self._at, self._said or known)

    def say(self, text: str) -> None:
        """Show this from now on."""
        self._said = text
        self._bar(*self._at, text)


@contextmanager
def steps(title: str, quiet: bool) -> Iterator[Steps]:
    """Show a bar of steps; `shown` is whether anybody sees it: only at a terminal."""
    with pieces(title, quiet, keep=True) as bar:
        yield Steps(bar, shown=not quiet and Console(stderr=True).is_terminal)
