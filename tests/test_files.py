"""Files are written whole or not at all."""

from __future__ import annotations

import os

import pytest
from PIL import Image

from infusion.errors import InfusionError
from infusion.files import write_picture, write_whole


def test_what_is_written_is_there_and_nothing_beside_it(tmp_path):
    path = write_whole(tmp_path / "a" / "page.html", "é²")
    assert path.read_bytes() == "é²".encode()
    picture = write_picture(tmp_path / "a" / "p.png", Image.new("RGB", (3, 2), "red"))
    assert Image.open(picture).getpixel((2, 1)) == (255, 0, 0)
    assert sorted(p.name for p in path.parent.iterdir()) == ["p.png", "page.html"]


@pytest.mark.parametrize("at", ["fsync", "replace"])
def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch, at):
    path = write_whole(tmp_path / "page.html", "before")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, at, full)
    with pytest.raises(InfusionError, match=r"page\.html' cannot be written \(No space left on device\)"):
        write_whole(path, "after")
    assert path.read_text() == "before"
    assert [p.name for p in tmp_path.iterdir()] == ["page.html"]
