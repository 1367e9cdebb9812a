"""Photos: folders, orientation, masks, cropping, and what cannot be read."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from infusion.errors import InfusionError, InfusionWarning
from infusion.photos import load_photos, mask_to_tensor, square, to_tensor


def test_a_folder_in_the_order_of_its_names(tmp_path):
    for name, color in (("b.png", "blue"), ("a.jpg", "red"), ("c.webp", "lime")):
        Image.new("RGB", (20, 10), color).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("not a picture")
    photos = load_photos(tmp_path)
    centres = [p.image.getpixel((10, 5)) for p in photos]
    assert [int(np.argmax(c)) for c in centres] == [0, 2, 1]


def test_masks_from_files_and_alpha(tmp_path):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    Image.new("L", (8, 8), 200).save(tmp_path / "a-mask.png")
    cut = Image.new("RGBA", (8, 8), (0, 255, 0, 255))
    cut.putpixel((0, 0), (0, 0, 0, 0))
    cut.save(tmp_path / "b.png")
    Image.new("RGBA", (8, 8), (0, 0, 255, 255)).save(tmp_path / "c.png")
    a, b, c = load_photos(tmp_path)
    assert a.mask.getpixel((3, 3)) == 200
    assert b.mask.getpixel((0, 0)) == 0
    assert b.mask.getpixel((3, 3)) == 255
    assert c.mask is None
    assert mask_to_tensor(a.mask, 4).shape == (4, 4)


def test_masks_are_found_whatever_the_case_of_their_names(tmp_path):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "A.JPG")
    Image.new("L", (8, 8), 200).save(tmp_path / "a-Mask.PNG")
    (photo,) = load_photos(tmp_path)
    assert photo.mask.getpixel((3, 3)) == 200
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    Image.new("L", (8, 8), 190).save(tmp_path / "a-mask.png")  # the name as it stands goes first
    assert [p.mask.getpixel((3, 3)) for p in load_photos(tmp_path)] == [200, 190]


def test_orientation_is_followed(tmp_path):
    image = Image.new("RGB", (20, 10))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert load_photos(tmp_path)[0].image.size == (10, 20)


def test_masks_follow_their_photos(tmp_path):
    image = Image.new("RGB", (20, 10))
    exif = image.getexif()
    exif[0x0112] = 6  # to be turned clockwise for show
    image.save(tmp_path / "a.jpg", exif=exif)
    stored = Image.new("L", (20, 10))
    stored.paste(255, (0, 0, 10, 10))  # the left half as stored is the upper one for show
    stored.save(tmp_path / "a-mask.png")
    Image.new("RGB", (20, 10)).save(tmp_path / "b.png")
    cut = Image.new("RGBA", (40, 20), (255, 255, 255, 0))  # white on nothing, at twice the size
    cut.paste((255, 255, 255, 255), (0, 0, 20, 20))
    cut.save(tmp_path / "b-mask.png")
    a, b = load_photos(tmp_path)
    assert a.image.size == a.mask.size == (10, 20)
    assert (a.mask.getpixel((5, 2)), a.mask.getpixel((5, 17))) == (255, 0)
    assert (b.mask.getpixel((5, 10)), b.mask.getpixel((35, 10))) == (255, 0)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (Image.new("L", (10, 20), 255), "is 10x20, its photo 20x10"),
        (Image.new("L", (20, 12), 255), "is 20x12, its photo 20x10"),
        (Image.new("L", (20, 10), 0), "has no white"),
        (Image.new("L", (20, 10), 1), "its brightest value is 1 of 255"),
        (Image.new("RGBA", (20, 10), (255, 255, 255, 0)), "has no white"),
    ],
)
def test_masks_that_cannot_be_meant(tmp_path, mask, message):
    Image.new("RGB", (20, 10)).save(tmp_path / "a.png")
    mask.save(tmp_path / "a-mask.png")
    with pytest.raises(InfusionError, match=message):
        load_photos(tmp_path)


def test_pictures_are_cropped_never_squashed():
    image = Image.new("RGB", (30, 10), "white")
    image.paste("red", (10, 0, 20, 10))
    small = np.asarray(square(image, 8))
    assert small.shape == (8, 8, 3)
    assert (small[2:6, 2:6] == (255, 0, 0)).all()
    tensor = to_tensor([Image.new("RGB", (4, 6), (255, 0, 128))])
    assert tensor.shape == (1, 3, 6, 4)
    assert tensor[0, :2, 0, 0].tolist() == [1.0, -1.0]


def test_pictures_in_memory_and_single_files_are_as_from_a_folder(tmp_path):
    image = Image.new("RGB", (20, 10))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "a.jpg", exif=exif)
    Image.new("L", (10, 20), 200).save(tmp_path / "a-mask.png")
    (folder,), (file,) = load_photos(tmp_path), load_photos([str(tmp_path / "a.jpg")])
    (memory,) = load_photos([Image.open(tmp_path / "a.jpg")])
    assert folder.image.size == file.image.size == memory.image.size == (10, 20)
    assert folder.mask.getpixel((3, 3)) == file.mask.getpixel((3, 3)) == 200
    assert folder.name == file.name == "a.jpg"
    with pytest.raises(InfusionError, match=r"b\.jpg' cannot be read as a picture"):
        load_photos([tmp_path / "b.jpg"])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("x-mask.png", "no photo is called 'x'"),
        ("venetian-Mask.jpg", "no photo is called 'venetian'"),
        ("a_mask.png", r"would be called a-mask\.png"),
        ("a-masklabel.png", r"would be called a-mask\.png"),
        ("A_MaskLabel.PNG", r"would be called A-mask\.PNG"),
    ],
)
def test_masks_by_a_wrong_name(tmp_path, name, message):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.jpg")
    Image.new("L", (8, 8), 255).save(tmp_path / name)
    with pytest.raises(InfusionError, match=message):
        load_photos(tmp_path)


def test_pictures_of_formats_that_are_not_read(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.jpg")
    (tmp_path / "a.jpg").rename(tmp_path / "a.jfif")
    for name in ("notes.txt", "A.heic", "._x.tif", ".trashed-1.png", "milo.masks.png"):
        (tmp_path / name).touch()
    assert [p.name for p in load_photos(tmp_path)] == ["a.jfif"]
    for name in ("IMG_1.HEIC", "b.tif"):
        (tmp_path / name).touch()
    with pytest.raises(InfusionError, match=r"holds 'IMG_1\.HEIC' and 1 more, of a format that is not read"):
        load_photos(tmp_path)


def test_what_other_trainers_put_beside_photos(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.jpg")
    (tmp_path / "a.txt").write_text("a dog")
    with pytest.warns(InfusionWarning, match=r"Captions such as 'a\.txt' are not used"):
        assert len(load_photos(tmp_path)) == 1
    (tmp_path / "Masks").mkdir()
    with pytest.raises(InfusionError, match=r"put them there as 1-mask\.png for 1\.png"):
        load_photos(tmp_path)


def test_errors(tmp_path):
    with pytest.raises(InfusionError, match="no folder"):
        load_photos(tmp_path / "none")
    with pytest.raises(InfusionError, match="no picture"):
        load_photos(tmp_path)
    with pytest.raises(InfusionError, match="No photos"):
        load_photos([])
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n nonsense")
    with pytest.raises(InfusionError, match=r"a\.png' cannot be read as a picture"):
        load_photos(tmp_path)


def test_sixteen_bits_are_scaled_not_cut(tmp_path):
    grey = np.tile(np.array([0, 256, 32768, 65535], np.uint16), (4, 1))
    Image.fromarray(grey).save(tmp_path / "a.png")
    for photos in (load_photos(tmp_path), load_photos([Image.fromarray(grey)])):
        assert [photos[0].image.getpixel((x, 0))[0] for x in range(4)] == [0, 1, 128, 255]
    Image.fromarray(grey).save(tmp_path / "a-mask.png")
    assert [load_photos(tmp_path)[0].mask.getpixel((x, 0)) for x in range(4)] == [0, 1, 128, 255]
    Image.fromarray(grey // 65535 * 255).save(tmp_path / "a-mask.png")  # 16 bits that hold 8
    assert load_photos(tmp_path)[0].mask.getpixel((3, 0)) == 255


def test_a_picture_of_another_kind_under_a_pictures_name(tmp_path):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.gif")
    (tmp_path / "a.gif").rename(tmp_path / "a.png")
    with pytest.raises(InfusionError, match="cannot be read as a picture"):
        load_photos(tmp_path)
