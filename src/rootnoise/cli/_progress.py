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
    """Show a line and yield its update(tried, least error or name); silent but at a terminal."""
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
def steps(title: str, quiet: bool) -> Iterator[Callable[[int, int, float | None], None]]:
    """Show a bar and yield its update(step, n_steps, accuracy); silent unless at a terminal."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[accuracy]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=quiet or not console.is_terminal) as bar:
        task = bar.add_task(title, total=None, accuracy="")

        def update(step: int, n_steps: int, accuracy: float | None) -> None:
            shown = "" if accuracy is None else f"test accuracy {accuracy:.3f}"
            bar.update(task, completed=step, total=n_steps, accuracy=shown)

        yield update
