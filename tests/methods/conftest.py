"""A lesson of noise for every method."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from infusion.lesson import prepare_lesson
from infusion.photos import Photo


@pytest.fixture
def lesson(pipe):
    rng = np.random.default_rng(0)
    photos = [Photo(Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8))) for _ in range(3)]
    return prepare_lesson(pipe, photos, "dog", "milo", masked=False)
