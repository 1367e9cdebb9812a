"""Run a grid's jobs in a bounded pool of processes or on Ray; every finished job is one file that is never changed."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from infusion.bench.grid import Job
from infusion.cores import usable_cores
from infusion.errors import InfusionError

ENGINES = ("processes", "ray")
RunOne = Callable[[Job, int], dict[str, Any]]


def pending(todo: Sequence[Job], folder: Path) -> list[Job]:
    """The jobs that have no record in `folder` yet."""
    return [job for job in todo if not record_path(folder, job).exists()]


def refuse_others(folder: Path, base: str, judge: str, reading: int) -> None:
    """Raise InfusionError where `folder` holds records of another base, judge or way of reading: its jobs would pass for done."""
    records = read_records(folder) if any(folder.glob("*.json")) else []
    for what, here in (("base", base), ("judge", judge), ("reading", reading)):
        if others := {r.get(what) for r in records} - {here, None}:
            raise InfusionError(
                f"{str(folder)!r} holds records of another {what} ({str(min(others))[:12]}, here {str(here)[:12]}); give a new folder."
            )


def record_path(folder: Path, job: Job) -> Path:
    """Where a job's record lies."""
    return folder / f"{job.name}.json"


def run_jobs(
    todo: Sequence[Job], folder: Path, workers: int, engine: str = "processes", command: str = "",
    one: RunOne | None = None,
) -> Iterator[tuple[Job, Path | Exception]]:  # fmt: skip
    """Run what is pending, yielding each job with its record's path, or the error that ended it; other jobs go on.

    An interrupted run goes on where it was: what is finished is not run again. Raises InfusionError for an engine
    that is not there or a folder that cannot be written.
    """
    if workers < 1:
        raise InfusionError(f"workers is {workers}; it must be at least 1.")
    if engine not in ENGINES:
        raise InfusionError(f"{engine!r} is no engine; use one of {', '.join(ENGINES)}.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InfusionError(f"{str(folder)!r} cannot be made ({error.strerror}); choose another folder.") from None
    threads = max(1, usable_cores() // workers)
    runs = _on_ray if engine == "ray" else _in_processes
    for job, result in runs(pending(todo, folder), workers, threads, one or _run_job):
        try:
            if not isinstance(result, Exception):
                result = write_record(record_path(folder, job), {**result, "command": command, "engine": engine})
        except (InfusionError, OSError, ValueError) as error:
            result = error
        yield job, result


def write_record(path: Path, record: dict[str, Any]) -> Path:
    """Write a record once: to a temporary file, synced, then linked to its name, which must be free."""
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    stamped = {**record, "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    try:
        text = json.dumps(stamped, separators=(",", ":"), allow_nan=False)
    except ValueError:
        raise InfusionError(
            f"{path.stem} gave a figure that is not finite: it diverged; lower its learning rate."
        ) from None
    try:
        with temporary.open("w") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        _named(temporary, path)
    except FileExistsError:
        raise InfusionError(
            f"{str(path)!r} exists; records are never changed. Move it away to run the job again."
        ) from None
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _named(temporary: Path, path: Path) -> None:
    """Give the file its name, which must be free. Raises FileExistsError."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        temporary.replace(path)


def read_records(folder: Path) -> list[dict[str, Any]]:
    """All records of a folder, by name. Raises InfusionError where there are none or one is damaged."""
    paths = sorted(folder.glob("*.json"))
    if not paths:
        raise InfusionError(f"{str(folder)!r} holds no records; run `infusion bench run --out {folder}` first.")
    records = []
    for path in paths:
        try:
            record = json.loads(path.read_text())
        except ValueError as error:  # no JSON, or no text
            raise InfusionError(f"{str(path)!r} is damaged ({error}); move it away and run its job again.") from None
        if not isinstance(record, dict):
            raise InfusionError(f"{str(path)!r} is no record of the benchmark; move it away.")
        records.append(record)
    return records


def _run_job(job: Job, threads: int) -> dict[str, Any]:
    from infusion.bench.trial import run_job

    return run_job(job, threads)


def _in_processes(
    todo: Sequence[Job], workers: int, threads: int, one: RunOne
) -> Iterator[tuple[Job, dict[str, Any] | Exception]]:
    # Spawned, not forked: a forked child inherits torch's thread pools in an unknown state.
    context, others = multiprocessing.get_context("spawn"), {*multiprocessing.active_children()}
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = str(threads)  # children read it as they start, before they import torch
    left = list(todo)
    try:
        while left:
            started, left = left, []
            with ProcessPoolExecutor(workers, mp_context=context) as pool:
                running = {pool.submit(one, job, threads): job for job in started}
                try:
                    for done in as_completed(running):
                        job, error = running.pop(done), done.exception()
                        if isinstance(error, BrokenProcessPool):  # a worker was killed, and with it all that
                            left.append(job)  # were under way or waiting
                        else:
                            yield job, error if isinstance(error, Exception) else done.result()
                except BaseException:  # interrupted: the jobs under way are lost, and would only be waited for
                    pool.shutdown(wait=False, cancel_futures=True)
                    for worker in {*multiprocessing.active_children()} - others:
                        worker.terminate()
                    raise
            if left:  # one of those under way is to blame: the first of them is not tried again
                left.sort(key=started.index)
                yield (
                    left.pop(0),
                    InfusionError("its worker was killed, perhaps for memory; run it with fewer --workers."),
                )
    finally:
        if before is None:
            os.environ.pop("OMP_NUM_THREADS", None)
        else:
            os.environ["OMP_NUM_THREADS"] = before


def _on_ray(
    todo: Sequence[Job], workers: int, threads: int, one: RunOne
) -> Iterator[tuple[Job, dict[str, Any] | Exception]]:
    if find_spec("ray") is None:
        raise InfusionError("The engine 'ray' needs ray; pip install ray, or use --engine processes.")
    import ray

    started = not ray.is_initialized()
    if started:  # on the cluster that RAY_ADDRESS names, else on one of its own, whatever else runs here
        cluster = os.environ.get("RAY_ADDRESS")
        local = {} if cluster else {"num_cpus": workers, "include_dashboard": False}
        ray.init(cluster or "local", logging_level="ERROR", **local)
    try:
        remote = ray.remote(num_cpus=1, max_retries=0)(one)
        left, running = list(todo), {}
        while left or running:
            while left and len(running) < workers:
                job = left.pop(0)
                running[remote.remote(job, threads)] = job
            (done, *_), _ = ray.wait(list(running), num_returns=1)
            job = running.pop(done)
            try:
                yield job, ray.get(done)
            except ray.exceptions.RayError as error:
                yield job, error
    finally:
        if started:
            ray.shutdown()
