"""The benchmark's commands: what they hand on, and what they refuse."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from infusion.bench import runner
from infusion.bench.commands import _settings, bench
from infusion.errors import InfusionError
from tests.bench.records import FLOOR, LEAKY, record


def test_settings_are_toml_and_plain_words_text():
    found = _settings(["points=[50, 200]", "methods.infusion.learning_rate=0.03", "split=dev", "a.b=x=y"])
    assert found == {"points": [50, 200], "methods.infusion.learning_rate": 0.03, "split": "dev", "a.b": "x=y"}
    for bad in ("points", "=3"):
        with pytest.raises(InfusionError, match="is not KEY=VALUE"):
            _settings([bad])


def test_what_was_asked_for_is_run(monkeypatch, tmp_path):
    asked = []

    def run_jobs(todo, folder, workers, engine, command):
        asked.extend(todo)
        yield todo[0], tmp_path / "a.json"
        yield todo[1], ValueError("out of luck")

    monkeypatch.setattr(runner, "run_jobs", run_jobs)
    given = (
        "--subjects",
        "2",
        "--subjects-seed",
        "7",
        "--set",
        "methods.infusion.learning_rate=0.5",
        "--method",
        "infusion",
    )
    result = CliRunner().invoke(bench, ["run", "--out", str(tmp_path), *given])
    assert result.exit_code == 1  # one failed
    assert [(j.label, j.subject, j.subjects_seed, j.settings["learning_rate"]) for j in asked] == [
        ("infusion", 0, 7, 0.5), ("infusion", 1, 7, 0.5),
    ]  # fmt: skip


def test_a_page_of_records(tmp_path):
    ours = record("infusion", [{}, {"background": "city", "style": "sketch"}])
    for i, one in enumerate((FLOOR, LEAKY, ours)):
        (tmp_path / f"{i}.json").write_text(json.dumps(one))
    (tmp_path / "reading.md").write_text("## What we claim²\n", "utf-8")
    docs = tmp_path / "docs"
    common = ["report", "--records", str(tmp_path), "--docs", str(docs), "--no-pictures"]
    assert CliRunner().invoke(bench, [*common, "--reading", str(tmp_path / "reading.md")]).exit_code == 0
    assert "## What we claim²" in (docs / "benchmark.md").read_text("utf-8")
    (tmp_path / "file").touch()
    result = CliRunner().invoke(bench, [*common[:4], str(tmp_path / "file" / "docs")])
    assert isinstance(result.exception, InfusionError)
    assert "cannot be written" in str(result.exception)
