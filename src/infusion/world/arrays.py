"""Memory-mapped arrays drawn once, part by part, by several processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from infusion.cores import usable_cores

Layout = Mapping[str, tuple[DTypeLike, tuple[int, ...]]]  # name -> dtype and shape of one row
_ROWS = 256  # drawn at a time by one process


def draw_arrays(
    folder: Path,
    layout: Layout,
    count: int,
    draw: Callable[[int, int], Mapping[str, np.ndarray]],
    each: int = 1,
    workers: int | None = None,
) -> Iterator[int]:
    """Draw `count` things of `each` rows into `folder`, yielding how many are done. Does nothing where they exist; where an array of theirs
    is missing, all are drawn again. draw: the rows of things (first, number of them), by name; runs in other processes."""
    whole = (folder / "done").exists() and all((folder / f"{name}.npy").exists() for name in layout)
    if whole and all(len(values) == count * each for values in load_arrays(folder, layout).values()):
        yield count
        return
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "done").unlink(missing_ok=True)
    arrays = {
        name: np.lib.format.open_memmap(folder / f"{name}.npy", mode="w+", dtype=dtype, shape=(count * each, *shape))
        for name, (dtype, shape) in layout.items()
    }
    part = max(1, _ROWS // each)
    starts = range(0, count, part)
    with ProcessPoolExecutor(workers or usable_cores()) as pool:
        chunks = pool.map(draw, starts, [min(part, count - start) for start in starts])
        for start, chunk in zip(starts, chunks, strict=True):
            for name, values in chunk.items():
                arrays[name][start * each : start * each + len(values)] = values
            yield min(count, start + part)
    for array in arrays.values():
        array.flush()
    (folder / "done").touch()


def stacked(rows: Mapping[str, Sequence[Any]], layout: Layout) -> dict[str, np.ndarray]:
    """What `draw` of `draw_arrays` gives, from each name's rows one by one."""
    return {name: np.stack([np.asarray(row, layout[name][0]) for row in rows[name]]) for name in layout}


def load_arrays(folder: Path, layout: Layout) -> dict[str, np.ndarray]:
    """The arrays of `layout` in `folder`, memory-mapped. Raises FileNotFoundError where one is missing."""
    return {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in layout}
