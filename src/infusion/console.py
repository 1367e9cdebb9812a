"""What the command line says while it works: one console, one progress display."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from rich.console import Console

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress

say = Console(stderr=True, highlight=False, markup=False)  # paths and names may hold brackets


@contextlib.contextmanager
def progress(first: str) -> Iterator[Any]:
    """A progress line at once; yields told(label, done, of, note), which starts a new bar for a new label."""
    import warnings

    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    from infusion.errors import InfusionWarning

    warnings.filterwarnings("ignore")
    warnings.simplefilter("default", InfusionWarning)
    warnings.showwarning = lambda message, *_: say.print("Warning:", message, style="yellow", soft_wrap=True)
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    with Progress(*columns, console=say, transient=False) as bar:
        tasks = {first: bar.add_task(first, total=1, note="")}
        if not say.is_terminal:
            say.print(f"{first} ...")

        def told(label: str, done: int, of: int, note: str = "") -> None:
            if label not in tasks:
                _finish(bar, tasks)
                tasks[label] = bar.add_task(label, total=max(of, 1), note=note)
                if not say.is_terminal:
                    say.print(f"{label} ...")
            bar.update(tasks[label], completed=done, note=note)

        _quiet_libraries()
        yield told
        _finish(bar, tasks)


def _finish(bar: RichProgress, tasks: dict[str, Any]) -> None:
    """Complete the bars that count nothing."""
    for task in bar.tasks:
        if task.id in tasks.values() and task.total == 1:
            bar.update(task.id, completed=1)


def _quiet_libraries() -> None:
    import logging
    import os

    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    logging.getLogger("transformers").setLevel(logging.ERROR)
