"""Contact sheets: pictures in a labelled grid."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont, ImageOps

_INK, _PAPER = (40, 40, 48), (255, 255, 255)


def contact_sheet(
    rows: Sequence[Sequence[Image.Image]],
    row_labels: Sequence[str] = (),
    column_labels: Sequence[str] = (),
    cell: int = 128,
) -> Image.Image:
    """A grid of pictures, each `cell` pixels wide, with labels left of the rows and above the columns.

    Small pictures are enlarged pixel by pixel, so that what is seen is what was drawn.
    """
    font = ImageFont.load_default(size=max(10, cell // 10))
    gap, line = max(2, cell // 40), max(12, cell // 8)
    wrapped = [_wrap(label, font, cell - gap) for label in column_labels]
    top = max((len(w) for w in wrapped), default=0) * line + (gap if wrapped else 0)
    left = max((int(font.getlength(label)) for label in row_labels), default=0) + (2 * gap if row_labels else 0)
    columns = max(len(row) for row in rows)
    sheet = Image.new("RGB", (left + columns * (cell + gap), top + len(rows) * (cell + gap)), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for x, lines in enumerate(wrapped):
        for i, text in enumerate(lines):
            draw.text((left + x * (cell + gap), i * line), text, fill=_INK, font=font)
    for y, row in enumerate(rows):
        if y < len(row_labels):
            draw.text((gap, top + y * (cell + gap) + cell // 2 - line // 2), row_labels[y], fill=_INK, font=font)
        for x, image in enumerate(row):
            sheet.paste(enlarged(image, cell), (left + x * (cell + gap), top + y * (cell + gap)))
    return sheet


def enlarged(image: Image.Image, side: int) -> Image.Image:
    """The picture at `side` pixels: whole multiples pixel by pixel, everything else smoothly; on paper where it is no square."""
    if image.width != image.height:
        return ImageOps.pad(image.convert("RGB"), (side, side), Image.Resampling.LANCZOS, _PAPER)
    exact = side % image.width == 0 and image.width < side
    return image.convert("RGB").resize((side, side), Image.Resampling.NEAREST if exact else Image.Resampling.LANCZOS)


def square_grid(images: Sequence[Image.Image], cell: int = 128) -> Image.Image:
    """Pictures without labels, as near to a square as they go."""
    columns = max(1, round(len(images) ** 0.5 + 0.499))
    return contact_sheet([images[i : i + columns] for i in range(0, len(images), columns)], cell=cell)


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines
