"""IDX files, the format of MNIST: read whole, and refused unless header, length and labels all agree.

Format: LeCun, Cortes & Burges, "The MNIST database of handwritten digits".
"""

import gzip
import struct
import zlib
from math import prod
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from mechsub.errors import RecipeError

PARTS = ("train-images", "train-labels", "t10k-images", "t10k-labels")
_MAGIC = {"images": 2051, "labels": 2049}
_GZIP = 0x1F8B
_MEANS = {2051: "images (three dimensions of bytes)", 2049: "labels (one dimension of bytes)"}


def find_idx_files(folder: Path) -> dict[str, Path]:
    """The four files of a folder by their part, gzipped or not.

    Raises:
        RecipeError: no such folder, or which of the files is missing and under which names it was looked for.
    """
    if not folder.is_dir():
        raise RecipeError(f"`data.path`: there is no folder {folder}; give the one that holds MNIST's four IDX files")
    found = {}
    for part in PARTS:
        suffix = f"idx{3 if part.endswith('images') else 1}-ubyte"
        names = [f"{part}{joint}{suffix}{end}" for joint in "-." for end in ("", ".gz")]
        path = next((folder / name for name in names if (folder / name).is_file()), None)
        if path is None:
            raise RecipeError(f"`data.path`: {folder} lacks MNIST's {part}; looked for {', '.join(names)}")
        found[part] = path
    return found


def read_idx_shape(path: Path, part: str) -> tuple[int, ...]:
    """The shape that a file's header states: (images, rows, columns) or (labels,).

    Raises:
        RecipeError: unreadable, or the magic number of something else.
    """
    kind = part.rpartition("-")[2]
    num_dims = 3 if kind == "images" else 1
    header = _read_bytes(path, 4 + 4 * num_dims)
    if len(header) < 4 + 4 * num_dims:
        raise RecipeError(f"{path} is truncated: {len(header)} bytes, its header alone has {4 + 4 * num_dims}; fetch it again")
    magic, *shape = struct.unpack(f">{1 + num_dims}I", header)
    if magic != _MAGIC[kind]:
        holds = f"which means {_MEANS[magic]}" if magic in _MEANS else "which is not IDX of bytes"
        if magic >> 16 == _GZIP:
            holds = "which is gzip's: give its name the ending .gz"
        raise RecipeError(f"{path} should hold {part}: magic number {_MAGIC[kind]}, found {magic}, {holds}; is it misnamed?")
    return tuple(shape)


def read_idx(path: Path, part: str) -> UInt8[np.ndarray, "..."]:
    """A whole file as an array of the shape that its header states.

    Raises:
        RecipeError: unreadable, or its length is not what its header states.
    """
    shape = read_idx_shape(path, part)
    content = _read_bytes(path, -1)[4 + 4 * len(shape) :]
    if len(content) != prod(shape):
        what = "truncated" if len(content) < prod(shape) else "too long"
        stated = f"its header states {' × '.join(map(str, shape))} = {prod(shape)} bytes of data"
        raise RecipeError(f"{path} is {what}: {stated}, it holds {len(content)}; fetch it again")
    return np.frombuffer(content, dtype=np.uint8).reshape(shape)


def _read_bytes(path: Path, count: int) -> bytes:
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            content: bytes = file.read(count)
            return content
    except (OSError, EOFError, ValueError, zlib.error) as error:  # gzip tells of a cut file with an EOFError
        raise RecipeError(f"{path} cannot be read ({error}); it is damaged or truncated: fetch it again") from None
