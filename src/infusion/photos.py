"""Photos of one subject: folder -> square pictures, and masks from files where they are given."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageChops, ImageCms, ImageOps, UnidentifiedImageError
from torch import Tensor

from infusion.errors import InfusionError, InfusionWarning

SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp")
HEIF = (".heic", ".heif")  # read where pillow-heif is installed
RAW = (".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2")  # as cameras store them
UNREAD = (".avif", ".jxl", ".tif", ".tiff", ".gif", *RAW)  # pictures too, but not among FORMATS
FORMATS = ("PNG", "JPEG", "WEBP", "BMP")  # whatever the name says: EPS, for one, would start Ghostscript
OVERLAYS = ".masks.png"  # how a file ends that shows what was taken for the subject; no photo
MASK_SUFFIX = "-mask"  # milo1.png has its mask in milo1-mask.png
OTHERS_MASKS = ("_mask", "-masklabel", "_masklabel")  # as other trainers name them


@dataclass(frozen=True)
class Photo:
    """One picture and, where the user gave one, its mask (white = subject). name: its file's, for what is said of it."""

    image: Image.Image
    mask: Image.Image | None = None
    name: str = ""


def load_photos(source: str | Path | Sequence[Image.Image | Photo | str | Path]) -> list[Photo]:
    """The photos of a folder in the order of their names, or single ones: files, or pictures already in memory.

    A mask is taken from `<name>-mask.png` beside `<name>.png`, or from a picture's own alpha channel.
    Colours are brought to sRGB by a picture's own profile; one that is broken warns, and the colours stay as they are.
    Raises InfusionError for a folder that is missing or empty, for a picture that cannot be read, for a mask of another shape than its
    photo or without white, for one whose name belongs to no photo, and for a folder with pictures of formats that are not read or with
    masks in a folder of their own. Hidden files are left alone; captions in files warn that they are not used.
    """
    if not isinstance(source, str | Path):
        photos = [_given(p) for p in source]
        if not photos:
            raise InfusionError("No photos were given; give 3 to 6 pictures of one subject.")
        return photos
    folder = Path(source)
    if not folder.is_dir():
        raise InfusionError(f"There is no folder {str(folder)!r}; give a folder with 3 to 6 pictures of one subject.")
    # A phone's ".trashed-1.png" is no photo.
    entries = [p for p in folder.iterdir() if not p.name.startswith(".") and not p.name.endswith(OVERLAYS)]
    pictures = [p for p in entries if p.suffix.lower() in SUFFIXES]
    read = {p.stem.lower() for p in pictures}  # a phone's picture beside what it was turned into is no loss
    others = sorted(p for p in entries if p.suffix.lower() in (*HEIF, *UNREAD) and p.stem.lower() not in read)
    phones = [p for p in others if p.suffix.lower() in HEIF]
    if phones and _heif_is_read():
        pictures, others = [*pictures, *phones], [p for p in others if p not in phones]
        read |= {p.stem.lower() for p in phones}
    pictures.sort()
    if others:
        more = f" and {len(others) - 1} more" if others[1:] else ""
        install = ", install pillow-heif" if others[0] in phones else ""
        raise InfusionError(
            f"{str(folder)!r} holds {others[0].name!r}{more}, of a format that is not read; turn it into PNG or JPEG{install}, or move it away."
        )
    if apart := [p for p in entries if p.is_dir() and p.name.lower() in ("mask", "masks")]:
        raise InfusionError(
            f"{str(apart[0])!r} looks like a folder of masks, which are read beside their photos; put them there as 1{MASK_SUFFIX}.png for 1.png, or move the folder away."
        )
    files = [p for p in pictures if not p.stem.lower().endswith(MASK_SUFFIX)]
    _check_masks(pictures, {p.stem.lower() for p in files})
    if not files:
        raise InfusionError(
            f"There is no picture in {str(folder)!r}; put 3 to 6 pictures ({', '.join(SUFFIXES)}) of one subject there."
        )
    if told := sorted(p.name for p in entries if p.suffix.lower() in (".txt", ".caption") and p.stem.lower() in read):
        warnings.warn(
            f"Captions such as {told[0]!r} are not used; photos are learned under short ones of their own.",
            InfusionWarning,
            stacklevel=2,
        )
    beside = {p.name.lower(): p for p in sorted(entries, reverse=True)}  # cameras write .JPG, editors .png
    return [_load(path, beside) for path in files]


def _given(photo: Image.Image | Photo | str | Path) -> Photo:
    if isinstance(photo, Photo):
        return photo
    if isinstance(photo, str | Path):
        return _load(Path(photo), {})
    return _with_alpha(_in_srgb(ImageOps.exif_transpose(photo), "A photo"))


def _check_masks(pictures: Sequence[Path], photos: Set[str]) -> None:
    """Raise InfusionError for what would be taken for a mask or a photo and is perhaps the other. photos: their names, small, no ending."""
    for path in pictures:
        stem = path.stem.lower()
        if stem.endswith(MASK_SUFFIX) and stem.removesuffix(MASK_SUFFIX) not in photos:
            raise InfusionError(
                f"{str(path)!r} is a mask by its name, but no photo is called {path.stem[: -len(MASK_SUFFIX)]!r}; give it its photo's name and {MASK_SUFFIX}, or, if it is a photo, another name."
            )
        for ending in OTHERS_MASKS:
            if stem.endswith(ending) and stem.removesuffix(ending) in photos:
                raise InfusionError(
                    f"{str(path)!r} looks like a mask, which would be called {path.stem[: -len(ending)]}{MASK_SUFFIX}{path.suffix}; rename it, or, if it is a photo, give it another name."
                )


def _load(path: Path, beside: Mapping[str, Path]) -> Photo:
    photo = _with_alpha(_in_srgb(_open(path), repr(path.name)))
    names = [path.stem + MASK_SUFFIX + s for s in SUFFIXES]
    masks = [m for n in names if (m := path.with_name(n)).exists()] or [
        beside[n.lower()] for n in names if n.lower() in beside
    ]
    mask = _mask(masks[0], path, photo.image.size) if masks else photo.mask
    return Photo(photo.image, mask, path.name)


def _mask(path: Path, photo: Path, size: tuple[int, int]) -> Image.Image:
    """The mask of a photo of `size`. One that was drawn on the photo as the camera stored it is turned as the photo is."""
    mask = _eight_bits(_open(path))
    with Image.open(photo) as stored:
        orientation = stored.getexif().get(ExifTags.Base.Orientation, 1)
        if stored.size != size and mask.size == stored.size:
            mask.getexif()[ExifTags.Base.Orientation] = orientation
            mask = ImageOps.exif_transpose(mask)
    if abs(mask.width * size[1] - mask.height * size[0]) > max(*mask.size, *size):  # a pixel off, at either's scale
        raise InfusionError(
            f"{str(path)!r} is {mask.width}x{mask.height}, its photo {size[0]}x{size[1]}; give a mask of the photo's shape."
        )
    with_alpha = _with_alpha(mask)
    white = mask.convert("LA").getchannel("L") if with_alpha.mask is None else with_alpha.image.convert("L")
    if with_alpha.mask is not None:  # white on nothing
        white = ImageChops.multiply(white, with_alpha.mask)
    if (brightest := int(np.asarray(white).max())) < 128:
        raise InfusionError(
            f"{str(path)!r} has no white (its brightest value is {brightest} of 255); paint the subject white, or remove the mask."
        )
    return white


def _open(path: Path) -> Image.Image:
    try:
        formats = (*FORMATS, "HEIF") if path.suffix.lower() in HEIF and _heif_is_read() else FORMATS
        with Image.open(path, formats=formats) as image:
            turned = ImageOps.exif_transpose(image)
            turned.load()
            return turned
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError, SyntaxError, ValueError) as error:
        raise InfusionError(f"{str(path)!r} cannot be read as a picture ({error}); replace or remove it.") from None


def _heif_is_read() -> bool:
    """Whether Pillow opens what phones write: by pillow-heif, where that is installed."""
    if HEIF[0] not in Image.registered_extensions():
        with suppress(ImportError):
            importlib.import_module("pillow_heif").register_heif_opener()
    return HEIF[0] in Image.registered_extensions()


def _in_srgb(image: Image.Image, name: str) -> Image.Image:
    """The picture in 8 bits, its colours brought to sRGB by its own profile. Warns, and keeps them, where that is broken."""
    profile = image.info.get("icc_profile")
    image = _eight_bits(image)
    if not profile:
        return image
    try:
        own = ImageCms.getOpenProfile(BytesIO(profile))
        if ImageCms.getProfileDescription(own).lower().startswith("srgb"):
            return image
        return _converted(image, own)
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError) as error:
        warnings.warn(
            f"{name} has a colour profile that cannot be used ({error}); its colours are taken for sRGB.",
            InfusionWarning,
            stacklevel=4,
        )
        return image


_MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}  # by the colours of a profile


def _converted(image: Image.Image, profile: ImageCms.ImageCmsProfile) -> Image.Image:
    """The picture's colours in sRGB, what is clear kept. Raises ValueError for a profile of other colours than the picture's."""
    if image.mode in ("P", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
    alpha = image.getchannel("A") if image.mode in ("RGBA", "LA") else None
    colours = profile.profile.xcolor_space.strip()
    mode = _MODES.get(colours)
    grey = image.mode in ("1", "L", "LA")
    fits = (mode == "RGB" and (grey or image.mode in ("RGB", "RGBA"))) or (mode == "L" and grey) or mode == image.mode
    if mode is None or not fits:
        raise ValueError(f"it is of {colours}, the picture of {image.mode}")
    result = ImageCms.profileToProfile(image.convert(mode), profile, ImageCms.createProfile("sRGB"), outputMode="RGB")
    assert result is not None  # as it is where a picture is changed in place
    if alpha is not None:
        result.putalpha(alpha)
    return result


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey of more than 8 bits scaled to 8, which converting would cut at 255."""
    if not image.mode.startswith("I") or (values := np.asarray(image)).max() < 256:
        return image
    clear = image.info.get("transparency")
    grey = Image.fromarray((values >> 8).astype(np.uint8))
    if clear is not None:
        grey.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    return grey


def _with_alpha(image: Image.Image) -> Photo:
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        alpha = rgba.getchannel("A")
        if np.asarray(alpha).min() < 255:
            return Photo(rgba.convert("RGB"), alpha)
    return Photo(image.convert("RGB"))


def square(image: Image.Image, side: int) -> Image.Image:
    """Centre-cropped (never squashed) to `side` x `side`."""
    return ImageOps.fit(image, (side, side), Image.Resampling.LANCZOS)


def to_tensor(images: Sequence[Image.Image]) -> Tensor:
    """RGB pictures of one size -> (n, 3, h, w) float32 in [-1, 1]."""
    pixels = np.stack([np.asarray(i.convert("RGB"), np.float32) for i in images])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1


def mask_to_tensor(mask: Image.Image, side: int) -> Tensor:
    """A mask -> (side, side) float32 in [0, 1], cropped as its photo is."""
    return torch.from_numpy(
        np.asarray(ImageOps.fit(mask.convert("L"), (side, side), Image.Resampling.BOX), np.float32) / 255
    )
