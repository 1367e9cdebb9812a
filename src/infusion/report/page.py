"""Render a report: tables of pictures with labels, in one HTML file."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from jinja2 import Environment, PackageLoader, select_autoescape
from PIL import Image

from infusion.files import write_whole


@dataclass(frozen=True)
class Row:
    """A row of pictures: its label and a sentence on what it shows. captions: a few words under each picture, if any."""

    label: str
    note: str
    images: Sequence[Image.Image]
    captions: Sequence[str] = ()


@dataclass(frozen=True)
class Grid:
    """Pictures side by side: columns are named once, `highlight` rows are set off."""

    title: str
    text: str
    columns: Sequence[str]
    rows: Sequence[Row]
    highlight: str = ""


@dataclass(frozen=True)
class Page:
    """A whole report. facts: (name, value) pairs, shown as a table; charts: SVGs of ours, from `curve.line_chart`."""

    title: str
    lead: str
    grids: Sequence[Grid]
    facts: Sequence[tuple[str, str]] = field(default_factory=tuple)
    closing: Sequence[str] = field(default_factory=tuple)
    charts: Sequence[str] = field(default_factory=tuple)


def write_page(page: Page, path: Path) -> Path:
    """Write the page as one HTML file and return its path. Raises InfusionError where it cannot be written."""
    environment = Environment(
        loader=PackageLoader("infusion.report", "."),
        autoescape=select_autoescape(["j2"]),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["inline"] = inline
    html = environment.get_template("page.html.j2").render(page=page)
    return write_whole(path, html)


def inline(image: Image.Image) -> str:
    """A picture as a data URL."""
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
