"""Writes a small set of images and labels in the format of the MNIST files."""

import struct
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]


def write_small_fashion_mnist(folder: Path) -> dict[str, tuple[Bytes, Bytes]]:
    """Write and return 60 training and 10 test images of noise, which no checksum refuses, where torchvision looks."""
    draw = partial(np.random.default_rng(0).integers, 0, dtype=np.uint8)
    written = {prefix: (draw(256, (n, 28, 28)), draw(10, n)) for prefix, n in (("train", 60), ("t10k", 10))}
    raw = folder / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for prefix, (images, labels) in written.items():
        header = struct.pack(">iiii", 2051, *images.shape)
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(struct.pack(">ii", 2049, len(labels)) + labels.tobytes())
    return written
