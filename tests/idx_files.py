"""Writes images and labels in the format of the MNIST files, and a small set of them."""

import struct
from pathlib import Path

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]


def write_idx(raw: Path, prefix: str, images: Bytes, labels: Bytes) -> None:
    raw.mkdir(parents=True, exist_ok=True)
    header = struct.pack(">iiii", 2051, *images.shape)
    (raw / f"{prefix}-images-idx3-ubyte").write_bytes(header + images.tobytes())
    (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(struct.pack(">ii", 2049, len(labels)) + labels.tobytes())


def write_small_fashion_mnist(folder: Path) -> None:
    """Write 60 training and 10 test images of noise, which no checksum refuses, where torchvision looks for the set."""
    rng = np.random.default_rng(0)
    for prefix, n in (("train", 60), ("t10k", 10)):
        images = rng.integers(0, 256, (n, 28, 28), dtype=np.uint8)
        write_idx(folder / "FashionMNIST" / "raw", prefix, images, rng.integers(0, 10, n, dtype=np.uint8))
