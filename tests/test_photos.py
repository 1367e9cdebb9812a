"""Photos: folders, orientation, masks, cropping, and what cannot be read."""

from __future__ import annotations

import struct
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, ImageCms, PngImagePlugin

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
    for name in ("IMG_1.HEIC", "b.tif", "c.nef"):
        (tmp_path / name).touch()
    with pytest.raises(
        InfusionError, match=r"holds 'IMG_1\.HEIC' and 2 more, of a format that is not read; .*install pillow-heif"
    ):
        load_photos(tmp_path)


def test_what_other_trainers_put_beside_photos(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.jpg")
    (tmp_path / "a.txt").write_text("a dog")
    with pytest.warns(InfusionWarning, match=r"Captions such as 'a\.txt' are not used"):
        assert len(load_photos(tmp_path)) == 1
    (tmp_path / "Masks").mkdir()
    with pytest.raises(InfusionError, match=r"put them there as 1-mask\.png for 1\.png"):
        load_photos(tmp_path)


# Display P3's primaries as profiles hold them, under D50 light.
P3 = np.array([[0.5151, 0.2919, 0.1572], [0.2412, 0.6922, 0.0666], [-0.0011, 0.0419, 0.7841]])
SRGB = np.array([[0.4361, 0.3851, 0.1431], [0.2225, 0.7169, 0.0606], [0.0139, 0.0971, 0.7142]])


def profile(primaries: np.ndarray, name: bytes = b"wide") -> bytes:
    """A profile of sRGB's curve with other primaries."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    for i in range(int.from_bytes(data[128:132], "big")):
        tag, offset, _ = struct.unpack(">4sII", data[132 + 12 * i : 144 + 12 * i])
        if tag in (b"rXYZ", b"gXYZ", b"bXYZ"):
            column = primaries[:, b"rgb".index(tag[:1])]
            struct.pack_into(">3i", data, offset + 8, *(round(65536 * float(v)) for v in column))
    return bytes(data).replace("sRGB".encode("utf-16-be"), name.decode().encode("utf-16-be"))


def in_srgb(colour: tuple[int, ...]) -> np.ndarray:
    """The sRGB of a colour of Display P3, by the standard's curve."""
    v = np.array(colour) / 255
    linear = np.linalg.inv(SRGB) @ P3 @ np.where(v > 0.04045, ((v + 0.055) / 1.055) ** 2.4, v / 12.92)
    linear = linear.clip(0, 1)
    return 255 * np.where(linear > 0.0031308, 1.055 * linear ** (1 / 2.4) - 0.055, 12.92 * linear)


@pytest.mark.parametrize("colour", [(200, 100, 50), (90, 160, 80), (128, 128, 128)])
def test_colours_are_brought_to_srgb_by_a_photos_own_profile(tmp_path, colour):
    expected = in_srgb(colour)
    Image.new("RGB", (8, 8), colour).save(tmp_path / "a.png", icc_profile=profile(P3))
    clear = Image.new("RGBA", (8, 8), (*colour, 255))
    clear.putpixel((0, 0), (*colour, 0))
    clear.save(tmp_path / "b.png", icc_profile=profile(P3))
    clear.quantize(4).save(tmp_path / "c.png", icc_profile=profile(P3))
    Image.new("RGB", (8, 8), colour).save(tmp_path / "d.png", icc_profile=profile(P3, b"sRGB"))  # by its name it is
    photos = [*load_photos(tmp_path), *load_photos([Image.open(tmp_path / "a.png")])]
    for photo in (*photos[:3], photos[4]):
        assert np.abs(np.array(photo.image.getpixel((4, 4))) - expected).max() <= 1.5
    assert photos[3].image.getpixel((4, 4)) == colour
    assert [p.mask is not None for p in photos] == [False, True, True, False, False]
    assert photos[1].mask.getpixel((0, 0)) == 0


def test_grey_photos_with_profiles_and_masks_with_them(tmp_path):
    Image.new("L", (8, 8), 100).save(tmp_path / "a.png", icc_profile=profile(P3))
    Image.new("L", (8, 8), 200).save(tmp_path / "a-mask.png", icc_profile=b"nonsense")
    (photo,) = load_photos(tmp_path)
    assert photo.image.getpixel((0, 0)) == (100, 100, 100)
    assert photo.mask.getpixel((0, 0)) == 200


@pytest.mark.parametrize(
    ("mode", "data", "reason"),
    [
        ("RGB", b"nonsense", "cannot open profile"),
        ("RGB", profile(P3)[:200], "."),
        ("RGB", ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes(), "it is of Lab, the picture of RGB"),
        ("CMYK", profile(P3), "it is of RGB, the picture of CMYK"),
    ],
)
def test_profiles_that_cannot_be_used(tmp_path, mode, data, reason):
    image = Image.new(mode, (8, 8), (10, 120, 200, 0)[: len(mode)])
    image.save(tmp_path / "a.jpg", icc_profile=data, quality=100)
    plain = Image.open(tmp_path / "a.jpg").convert("RGB")
    with pytest.warns(
        InfusionWarning, match=rf"'a\.jpg' has a colour profile that cannot be used \(.*{reason}"
    ) as told:
        (photo,) = load_photos(tmp_path)
    assert len(told) == 1
    assert photo.image.getpixel((4, 4)) == plain.getpixel((4, 4))


@pytest.fixture
def heif(monkeypatch):
    """pillow-heif as it is to Pillow: a module that, asked to, registers an opener. Here of PNGs."""

    def register():
        Image.init()
        monkeypatch.setitem(Image.OPEN, "HEIF", (PngImagePlugin.PngImageFile, lambda start: start[:4] == b"\x89PNG"))
        monkeypatch.setitem(Image.EXTENSION, ".heic", "HEIF")

    monkeypatch.setitem(sys.modules, "pillow_heif", SimpleNamespace(register_heif_opener=register))


def test_what_phones_write_is_read_where_pillow_can(tmp_path, heif):
    for name, colour in (("b", "red"), ("a", "blue"), ("c", "lime")):
        Image.new("RGB", (8, 8), colour).save(tmp_path / f"{name}.png")
    for name in ("a.HEIC", "c.heic"):
        (tmp_path / f"{name[0]}.png").rename(tmp_path / name)
    Image.new("RGB", (8, 8)).save(tmp_path / "c.jpg")  # what c.heic was turned into
    assert [p.name for p in load_photos(tmp_path)] == ["a.HEIC", "b.png", "c.jpg"]
    (single,) = load_photos([tmp_path / "c.heic"])
    assert single.image.getpixel((0, 0)) == (0, 255, 0)
    (tmp_path / "d.heic").write_bytes(b"nonsense")
    with pytest.raises(InfusionError, match=r"d\.heic' cannot be read as a picture"):
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
