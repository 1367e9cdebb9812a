"""`infusion bench`: run the grid, build the page from its records."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Any

import typer

from infusion.arguments import writable
from infusion.console import progress, say
from infusion.errors import InfusionError

bench = typer.Typer(
    help="Overfitting of every method, measured on the world where the truth is known.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
Config = Annotated[
    Path | None, typer.Option("--config", help="A TOML file; its keys replace those of bench/defaults.toml.")
]
Set = Annotated[list[str] | None, typer.Option("--set", help='One setting: "methods.infusion.learning_rate=0.03".')]
Only = Annotated[list[str] | None, typer.Option("--method", help="Run these methods only; may be given several times.")]


@bench.command()
def run(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the records, one JSON a job.")],
    config: Config = None,
    overrides: Set = None,
    method: Only = None,
    subjects: Annotated[int | None, typer.Option(min=1, help="How many subjects.")] = None,
    subjects_seed: Annotated[int | None, typer.Option(help="Other subjects than the project's own.")] = None,
    workers: Annotated[int, typer.Option(help="Jobs at a time; the cores are shared among them.")] = 2,
    engine: Annotated[str, typer.Option(help="processes or ray.")] = "processes",
) -> None:
    """Run the jobs that have no record yet. Ctrl-C loses the jobs under way only; the same command goes on."""
    import sys

    with progress("Reading the grid") as told:
        from infusion.bench.grid import jobs, load_grid
        from infusion.bench.runner import pending, refuse_others, run_jobs
        from infusion.bench.trial import READING
        from infusion.world.judge import judge_digest
        from infusion.world.release import read_index

        given = {"subjects": subjects, "subjects_seed": subjects_seed}
        grid = load_grid(config, _settings(overrides or []) | {k: v for k, v in given.items() if v is not None})
        todo = jobs(grid, tuple(method or ()))
        refuse_others(out, read_index()["sha256"], judge_digest(), READING)
        left, failed = pending(todo, out), 0
        command = " ".join(["infusion", *sys.argv[1:]])
        for done, (job, result) in enumerate(run_jobs(todo, out, workers, engine, command), 1):
            if isinstance(result, Exception):
                failed += 1
                say.print(f"{job.name} failed: {type(result).__name__}: {result}", style="red", soft_wrap=True)
            told("Jobs", done, len(left), job.name)
    say.print(
        f"{len(left) - failed} jobs run, {len(todo) - len(left)} were there, {failed} failed. Records are in {out}."
    )
    say.print(f"Next: infusion bench report --records {out}")
    if failed:
        raise typer.Exit(1)


@bench.command()
def report(
    records: Annotated[Path, typer.Option("--records", help="Folder that `infusion bench run` wrote.")],
    docs: Annotated[Path, typer.Option("--docs", help="Where the page and its pictures go.")] = Path(
        "outputs/benchmark"
    ),
    page: Annotated[str, typer.Option(help="The page's name, without its ending.")] = "benchmark",
    reading: Annotated[
        Path | None, typer.Option(help="A Markdown file with what you make of it; it goes above the tables.")
    ] = None,
    pictures: Annotated[bool, typer.Option(help="With the plot and contact sheets.")] = True,
    whole: Annotated[
        bool,
        typer.Option("--whole-subjects/--all-subjects", help="Leave out subjects that not every method has learned."),
    ] = True,
) -> None:
    """Build tables, curves and contact sheets from the records."""
    with progress("Reading the records"):
        from infusion.bench.runner import read_records
        from infusion.bench.tables import write_benchmark

        told = _text(reading) if reading else ""
        writable(docs / f"{page}.md")
        path = write_benchmark(read_records(records), docs, page, told, pictures, whole)
    say.print(f"Done: {path}.")


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InfusionError(f"{str(path)!r} cannot be read ({error}); give a Markdown file.") from None


def _settings(pairs: list[str]) -> dict[str, Any]:
    """ "a.b=1" as {"a.b": 1}; values are TOML, and plain words are text."""
    found: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise InfusionError(f"--set {pair!r} is not KEY=VALUE; for example --set points=[50,200].")
        try:
            found[key] = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            found[key] = value
    return found
