"""Requests are unseen combinations in plain words, and answers hold a reading to them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from infusion.world.judge import Reading, SubjectReading
from infusion.world.questions import answers, asked, both, in_words, shown
from infusion.world.requests import Request, Wanted, phrase, unseen_requests
from infusion.world.scenes import never_seen
from infusion.world.tokenizer import MAX_LENGTH, build_tokenizer
from infusion.world.truth import COLORED


def reading(kind="dog", color1="red", x=0.2, found=0.9, **more):
    values = {"color2": "blue", "pattern": "plain", "accessory": "none"} | more
    return SubjectReading(kind=kind, color1=color1, x=x, y=0.6, found=found, embedding=torch.ones(48), **values)


@pytest.mark.parametrize("subjects", [1, 2])
def test_requests_are_unseen_and_fit_the_tokenizer(subjects):
    found = unseen_requests(60, seed=3, subjects=subjects)
    assert found == unseen_requests(60, seed=3, subjects=subjects)
    assert found != unseen_requests(60, seed=4, subjects=subjects)
    assert len({r.prompt for r in found}) > 50
    for request in found:
        assert len(request.subjects) == subjects == len({s.kind for s in request.subjects})
        words = [(s.kind, s.color1, request.background, request.style) for s in request.subjects]
        assert any(never_seen(*said) for said in words)  # by what the prompt says, not by a colour that it leaves open
        if request.style not in COLORED:
            assert all(s.color1 is None and s.color2 is None for s in request.subjects)
        assert len(build_tokenizer()(request.prompt)["input_ids"]) <= MAX_LENGTH


def test_a_request_in_words():
    assert phrase(Wanted("dog", "purple", "yellow", "spotted", "hat", "left")) == (
        "a spotted purple and yellow dog with a hat on the left"
    )
    assert phrase(Wanted("mug", "orange")) == "an orange mug"


def test_what_cannot_be_told_is_wrong_and_what_is_not_asked_does_not_count():
    request = Request("", "beach", "photo", (Wanted("dog", "red", None, "spotted", None, "left"),))
    sure = Reading("beach", "sketch", (reading(), reading("cat", found=0.5)))
    assert answers(request, sure) == {
        "background": True, "style": False, "kind": True, "color1": True, "pattern": False, "position": True,
    }  # fmt: skip
    unsure = Reading("beach", "photo", (reading(), reading(None, "blue", 0.8, found=0.5)))
    assert answers(request, unsure)["kind"] is True  # the surest, not the one whose class cannot be told
    assert shown(unsure, "cat")["color1"] == "red"
    pair = Reading("beach", "photo", (reading("car", "blue", found=0.9), reading("dog", "red", found=0.7)))
    assert (shown(pair)["color1"], shown(pair, "dog")["color1"]) == ("blue", "red")
    nothing = Reading("beach", "photo", ())
    assert answers(request, nothing)["kind"] is False
    assert shown(nothing)["color1"] is None
    assert asked(replace(request, style="sepia"))["color1"] is None


def test_a_reading_in_words():
    two = Reading("beach", None, (reading(accessory="hat"), reading("car", None, 0.8, color2=None, pattern=None)))
    assert in_words(two) == "dog red blue plain hat, left; car, right; beach"
    assert in_words(Reading(None, None, ())) == ""


def test_two_subjects_each_with_its_own_color():
    request = Request("", "beach", "photo", (Wanted("dog", "red"), Wanted("car", "blue")))
    right = Reading("beach", "photo", (reading("car", "blue", 0.8), reading("dog", "red")))
    assert both(request, right) == {"both": True, "own colors": True}
    swapped = Reading("beach", "photo", (reading("car", "red", 0.8), reading("dog", "blue")))
    assert both(request, swapped) == {"both": True, "own colors": False}
    alone = Reading("beach", "photo", (reading("dog", "red"),))
    assert both(request, alone) == {"both": False, "own colors": False}
    assert "own colors" not in both(replace(request, subjects=(Wanted("dog"), Wanted("car"))), right)
