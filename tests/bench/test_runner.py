"""Jobs run once each, in processes or on a real local Ray; what fails is told, what is finished is kept."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time

import pytest

from infusion.bench.grid import Job, jobs, load_grid
from infusion.bench.runner import pending, read_records, record_path, refuse_others, run_jobs, write_record
from infusion.errors import InfusionError

GRID = load_grid(None, {"subjects": 3, "methods": {"infusion": {}, "dreambooth": {}}})


def fake(job: Job, threads: int) -> dict:
    if job.label == "dreambooth" and job.subject == 1:
        raise ValueError("out of luck")
    return {"subject": job.subject, "pid": os.getpid(), "threads": threads, "omp": os.environ.get("OMP_NUM_THREADS")}


def test_interrupted_runs_go_on(tmp_path):
    todo = jobs(GRID)
    running = run_jobs(todo, tmp_path, 1, one=fake, command="infusion bench run")
    job, path = next(running)
    running.close()  # as Ctrl-C does
    assert path == record_path(tmp_path, job)
    before = path.read_bytes()
    left = pending(todo, tmp_path)
    assert 0 < len(left) < len(todo)
    results = {job.name: result for job, result in run_jobs(todo, tmp_path, 2, one=fake)}
    assert job.name not in results
    assert path.read_bytes() == before
    failed = [r for r in results.values() if isinstance(r, Exception)]
    assert [str(f) for f in failed] == ["out of luck"]
    assert len(read_records(tmp_path)) == 5
    assert len(pending(todo, tmp_path)) == 1  # a failed job is tried again
    record = json.loads(path.read_text())
    assert record["command"] == "infusion bench run"
    assert record["omp"] == str(record["threads"])
    assert record["pid"] != os.getpid()


def slow_after_the_first(job: Job, threads: int) -> dict:
    if job.subject:
        time.sleep(60)
    return {"subject": job.subject}


def test_an_interrupted_run_does_not_wait_for_the_jobs_under_way(tmp_path):
    todo = jobs(load_grid(None, {"subjects": 3, "methods": {"infusion": {}}}))
    others = {*multiprocessing.active_children()}
    running = run_jobs(todo, tmp_path, 2, one=slow_after_the_first)
    next(running)
    workers = {*multiprocessing.active_children()} - others
    running.close()
    assert workers
    until = (
        time.monotonic() + 20
    )  # not join(): the pool's own thread reaps them too, and whoever comes second is told "alive"
    while any(worker.is_alive() for worker in workers) and time.monotonic() < until:
        time.sleep(0.1)
    assert not any(worker.is_alive() for worker in workers)
    assert len(list(tmp_path.iterdir())) == 1


def killed_once(job: Job, threads: int) -> dict:
    if job.label == "dreambooth" and job.subject == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return {"subject": job.subject}


def test_a_worker_that_is_killed_ends_its_own_job_alone(tmp_path):
    todo = jobs(GRID)
    results = {job.name: result for job, result in run_jobs(todo, tmp_path, 1, one=killed_once)}
    (failed,) = [(name, r) for name, r in results.items() if isinstance(r, Exception)]
    assert failed[0].startswith("dreambooth-test0-001")
    assert "was killed, perhaps for memory" in str(failed[1])
    assert len(results) == 6
    assert len(read_records(tmp_path)) == 5


def test_records_where_there_are_no_hard_links(tmp_path, monkeypatch):
    def refused(*_):
        raise PermissionError("Operation not permitted")

    monkeypatch.setattr("infusion.bench.runner.os.link", refused)
    path = write_record(tmp_path / "a.json", {"x": 1})
    assert read_records(tmp_path)[0]["x"] == 1
    with pytest.raises(InfusionError, match="never changed"):
        write_record(path, {"x": 2})
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
    assert read_records(tmp_path)[0]["x"] == 1


def test_a_real_local_ray(tmp_path):
    pytest.importorskip("ray")
    todo = jobs(GRID)
    results = list(run_jobs(todo, tmp_path, 2, engine="ray", one=fake))
    assert len(results) == 6
    failed = [r for _, r in results if isinstance(r, Exception)]
    assert len(failed) == 1
    assert "out of luck" in str(failed[0])
    assert {r["engine"] for r in read_records(tmp_path)} == {"ray"}


def test_records_are_never_changed(tmp_path):
    path = write_record(tmp_path / "a.json", {"x": 1})
    with pytest.raises(InfusionError, match="never changed"):
        write_record(path, {"x": 2})
    assert read_records(tmp_path)[0]["x"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
    for content, message in ((b"{", "is damaged"), (b"\xff", "is damaged"), (b"[1]", "is no record of the benchmark")):
        path.write_bytes(content)
        with pytest.raises(InfusionError, match=message):
            read_records(tmp_path)


def diverging(job: Job, threads: int) -> dict:
    return {"loss": float("nan") if job.label == "dreambooth" else 0.0}


def test_a_record_that_cannot_be_written_ends_no_other_job(tmp_path):
    results = [result for _, result in run_jobs(jobs(GRID), tmp_path, 2, one=diverging)]
    failed = [r for r in results if isinstance(r, Exception)]
    assert len(results) == 6
    assert len(failed) == 3
    assert all("it diverged; lower its learning rate" in str(f) for f in failed)
    assert len(list(tmp_path.iterdir())) == 3


def test_records_of_another_base_do_not_pass_for_done(tmp_path):
    (tmp_path / "read").mkdir()
    refuse_others(tmp_path, "abc", "judge", 2)
    write_record(tmp_path / "a.json", {"base": "abc"})
    refuse_others(tmp_path, "abc", "judge", 1)
    with pytest.raises(InfusionError, match=r"another base \(abc, here def\)"):
        refuse_others(tmp_path, "def", "judge", 1)
    write_record(tmp_path / "b.json", {"base": "abc", "judge": "old"})
    with pytest.raises(InfusionError, match=r"another judge \(old, here judge\)"):
        refuse_others(tmp_path, "abc", "judge", 1)
    write_record(tmp_path / "read" / "c.json", {"base": "abc", "judge": "judge", "reading": 1})
    with pytest.raises(InfusionError, match=r"another reading \(1, here 2\)"):
        refuse_others(tmp_path / "read", "abc", "judge", 2)


def test_bad_calls(tmp_path):
    with pytest.raises(InfusionError, match="holds no records"):
        read_records(tmp_path)
    with pytest.raises(InfusionError, match="'slurm' is no engine"):
        list(run_jobs([], tmp_path, 1, engine="slurm"))
    with pytest.raises(InfusionError, match="at least 1"):
        list(run_jobs([], tmp_path, 0))
    (tmp_path / "file").touch()
    with pytest.raises(InfusionError, match="cannot be made"):
        list(run_jobs([], tmp_path / "file" / "sub", 1))
