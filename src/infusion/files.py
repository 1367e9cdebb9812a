"""Files that are written whole or not at all."""

from __future__ import annotations

import io
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from infusion.errors import InfusionError

if TYPE_CHECKING:
    from PIL import Image


def write_whole(path: Path, content: bytes | str) -> Path:
    """Write `content`, text as UTF-8, and return the path: to a temporary file in the same folder, flushed to disk, renamed over `path`, the
    folder flushed too. What was there before stays if anything fails. Raises InfusionError where nothing can be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temp = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content.encode() if isinstance(content, str) else content)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temp, 0o644)
            os.replace(temp, path)
        except BaseException:
            os.unlink(temp)
            raise
        _flush_folder(path.parent)
    except OSError as error:
        raise InfusionError(
            f"{str(path)!r} cannot be written ({error.strerror}); choose a folder that you may write to."
        ) from None
    return path


def write_picture(path: Path, picture: Image.Image) -> Path:
    """`write_whole` for a picture, as PNG."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return write_whole(path, buffer.getvalue())


def _flush_folder(folder: Path) -> None:
    if os.name != "posix":  # other systems cannot open folders
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
