"""A progress bar on standard error, for people only."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


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
def pieces(
    title: str, quiet: bool, keep: bool = False
) -> Iterator[Callable[[int, int, str], None]]:
    """Show a bar with the time left, and yield its update(done, of, what); only at a terminal.

    The bar disappears when all is done, unless `keep` is set.
    """
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[what]}"),
        TimeRemainingColumn(),
    )
    with Progress(
        *columns, console=console, transient=not keep, disable=quiet or not console.is_terminal
    ) as bar:
        task = bar.add_task(title, total=None, what="")

        def update(done: int, of: int, what: str = "") -> None:
            bar.update(task, completed=done, total=of, what=what)

        yield update


@contextmanager
def steps(title: str, quiet: bool) -> Iterator[Callable[[int, int, float | None], None]]:
    """Show a bar that stays and yield its update(step, n_steps, accuracy); only at a terminal."""
    with pieces(title, quiet, keep=True) as bar:
        yield lambda step, n_steps, accuracy: bar(
            step, n_steps, "" if accuracy is None else f"test accuracy {accuracy:.3f}"
        )
