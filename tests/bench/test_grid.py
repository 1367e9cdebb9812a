"""The grid is read strictly, and its jobs are named by everything that decides them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from infusion.bench.grid import REFERENCES, jobs, load_grid
from infusion.bench.subjects import PHOTOS, case, requests
from infusion.errors import InfusionError
from infusion.methods import METHODS
from infusion.world.scenes import few_modalities, render
from infusion.world.vocabulary import BACKGROUNDS, CLASSES


def test_the_defaults_hold_every_method():
    grid = load_grid()
    todo = jobs(grid)
    assert len(todo) == 20 * len(grid.methods)
    assert len({job.name for job in todo}) == len(todo)
    assert {job.label for job in todo if job.strengths == (0.5,)} == {"dreambooth-lora", "custom-diffusion"}
    assert {job.label for job in todo if job.strengths == (1.0, 0.5)} == {"infusion-published"}
    assert {job.label for job in todo if job.strengths == (1.0, 0.7)} == {"infusion"}
    assert {job.subject for job in todo[: len(grid.methods)]} == {0}  # whole subjects first
    assert {job.method for job in todo} == {*METHODS, *REFERENCES} - {"key-value"}  # an ablation, not in the grid
    single = next(job for job in todo if job.label == "single-stream")
    assert (single.method, single.settings["two_streams"], single.prior) == ("infusion", False, 0)
    assert next(job for job in todo if job.label == "custom-diffusion").prior == 32


def test_a_job_tells_all_that_decides_it(tmp_path):
    """Another default, another method or another setting is another job; a label may hold a dot."""
    (tmp_path / "own.toml").write_text('[methods.dreambooth]\n[methods."infusion 0.06"]\nmethod = "infusion"\n')
    grid = load_grid(tmp_path / "own.toml", {"methods.infusion 0.06.strengths": [1, 0.4]})
    by_label = {job.label: job for job in jobs(grid) if job.subject == 0}
    assert by_label["infusion 0.06"].strengths == (1.0, 0.4)
    tuned = by_label["dreambooth"]
    assert tuned.settings == {"learning_rate": 1e-4, "identifier": "", "prior_weight": 1.0}
    names = {
        tuned.name,
        replace(tuned, method="dreambooth-lora").name,
        replace(tuned, settings={**tuned.settings, "prior_weight": 2.0}).name,
        replace(tuned, strengths=(0.5,)).name,
        next(job.name for job in jobs(load_grid(tmp_path / "own.toml", {"methods.dreambooth.max_timestep": 650}))),
    }
    assert len(names) == 5


def test_subjects_by_their_numbers():
    some, first = (jobs(load_grid(None, {"subjects": given}), ("infusion",)) for given in ([5, 2], 6))
    assert [job.subject for job in some] == [5, 2]
    assert [job.name for job in some] == [first[5].name, first[2].name]


def test_a_file_and_overrides(tmp_path):
    (tmp_path / "own.toml").write_text("subjects = 3\nseeds = [0, 1]\n[methods.infusion]\nlearning_rate = 0.01\n")
    grid = load_grid(tmp_path / "own.toml", {"points": [5, 10], "methods.infusion.masked": False})
    assert grid.methods == {"infusion": {"learning_rate": 0.01, "masked": False}}
    todo = jobs(grid)
    assert len(todo) == 6
    other = jobs(load_grid(tmp_path / "own.toml", {"points": [5, 10], "methods.infusion.masked": True}))
    assert todo[0].name != other[0].name


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"methods.infusion.prior": 32}, "preserves no prior"),
        ({"subjects.x": 1}, "'subjects' has no keys"),
        ({"modalities.style": "sketch"}, "'modalities' has no keys"),
        ({"subject": 3}, "There is no setting 'subject'; use one of split, subjects_seed"),
        *(
            ({"subjects": bad}, "'subjects' is .*: give how many, from 1 on, or the numbers")
            for bad in (0, [], [1, 1], [-1], ["0"], 2.0, True)
        ),
        ({"subjects_seed": -1}, "greater than or equal to 0"),
        ({"seeds": [0, 1, 0]}, "0 is there twice; give each once"),
        ({"methods.dreambooth.prior": "32"}, "prior is '32'; give a whole number of pictures, 0 for none"),
        ({"methods.dreambooth.max_timestep": 0}, "dreambooth: max_timestep is 0; give a whole number of at least 1"),
        ({"methods.lora 1/2": {"method": "dreambooth-lora"}}, "'lora 1/2' would be part of file names"),
        ({"methods.perfusion.max_timestep": 650}, "perfusion has no setting 'max_timestep'"),
        ({"points": [5, 5]}, r"'points' is \[5, 5\]: give steps that rise from 1 on"),
        ({"methods.dreambooht": {}}, "'dreambooht' is no method; use one of class-word"),
        ({"methods.infusion.lr": 0.1}, "infusion has no setting 'lr'; use one of"),
        ({"methods.class-word.strengths": [0.5]}, "class-word learns nothing and has no setting 'strengths'"),
        ({"methods.textual-inversion.strengths": [0.5]}, "textual-inversion is drawn at its whole strength only"),
        *(
            ({"methods.infusion.strengths": bad}, "give different numbers above 0")
            for bad in (0.5, [], [1, 1.0], [0.0], ["half"], [True])
        ),
        ({"split": "train"}, "'dev' or 'test'"),
        ({"modalities": [{"position": "above"}]}, "'above': use one of left, center, right"),
        ({"modalities": [{"style": "oil"}]}, "'modalities.0.style' is 'oil': use one of photo"),
        ({"modalities": [{"background": "moon"}]}, "'moon': use one of beach"),
        ({"modalities": [{"facing": "up"}]}, "'modalities.0.facing' is 'up': use one of left, right"),
        ({"modalities": [{"place": "left"}]}, "There is no setting 'modalities.0.place'"),
    ],
)
def test_nonsense_is_named(overrides, message):
    with pytest.raises(InfusionError, match=message):
        load_grid(None, overrides)


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "bad.toml").write_text("subjects = ")
    with pytest.raises(InfusionError, match="is not TOML"):
        load_grid(tmp_path / "bad.toml")
    with pytest.raises(InfusionError, match="cannot be read"):
        load_grid(tmp_path / "none.toml")
    with pytest.raises(InfusionError, match="no method 'lora'"):
        jobs(load_grid(), ("lora",))


def test_subjects_take_turns_and_depend_on_split_and_seed():
    cases = [case("test", 0, i, None, "photo", "center") for i in range(20)]
    assert {c.subject.kind for c in cases} == set(CLASSES)
    assert len({(c.subject.kind, c.background) for c in cases}) == 20
    assert case("test", 0, 7, None, "photo", "center") == cases[7]
    assert case("dev", 0, 7, None, "photo", "center").subject != cases[7].subject
    assert case("test", 1, 7, None, "photo", "center").subject != cases[7].subject
    assert case("test", 0, 7, "space", "photo", "center").background == "space"
    photos = cases[3].photos()
    assert len(photos) == PHOTOS
    first = few_modalities(cases[3].subject, 1, cases[3].seed, cases[3].background)[0]
    assert (render(first).pixels == photos[0].image).all()


def test_photos_that_face_one_way():
    """They are other jobs; jobs without a facing are those of before it could be given."""
    plain, facing = (jobs(load_grid(None, {"modalities": [m]}), ("infusion",))[0] for m in ({}, {"facing": "left"}))
    assert plain.modality == {"background": None, "style": "photo", "position": "center"}
    assert facing.modality == plain.modality | {"facing": "left"}
    assert facing.name == plain.name.replace("photo-center", "photo-center-facing_left")
    one_way, either = (case("test", 0, 0, **job.modality) for job in (facing, plain))
    assert one_way.trained == either.trained | {"facing": "left"}
    assert one_way.subject == either.subject
    with pytest.raises(InfusionError, match="Subject 4 is a teddy bear, which faces neither way"):
        case("test", 0, 4, **facing.modality)
    pixels = [[np.asarray(photo.image) for photo in c.photos()] for c in (one_way, either)]
    assert not all((a == b).all() for a, b in zip(*pixels, strict=True))


def test_every_prompt_asks_for_another_background():
    chosen = case("test", 0, 0, "beach", "photo", "center")
    found = requests(chosen, "test")
    assert len(found) == 14
    assert {r.background for r in found} == set(BACKGROUNDS) - {"beach"}
    assert sum(r.style != "photo" for r in found) == 7
    assert sum(r.subjects[0].position in ("left", "right") for r in found) == 9
    assert not any(r.subjects[0].position == "center" for r in found)
    assert all(r.prompt.count("{}") == 1 for r in found)
    assert {r.prompt for r in found}.isdisjoint(r.prompt for r in requests(chosen, "dev"))
    for r in found:
        assert (r.subjects[0].color1 is None) == (r.style in ("sketch", "sepia"))
        assert r.subjects[0].accessory == chosen.subject.accessory
