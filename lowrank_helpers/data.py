"""Four sets of 28×28 images, each kept whole as one float tensor on the device."""

import hashlib
import math
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from http.client import HTTPException
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lowrank_helpers import PROJECT
from lowrank_helpers.hashing import checksum

IMAGE_SIDE = 28
N_PIXELS = IMAGE_SIDE**2
N_CLASSES = 10
TORCHVISION_SETS = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST", "kmnist": "KMNIST"}
DATASETS = ("auto", *TORCHVISION_SETS, "digits")
SPLITS = ("train", "validation", "test")
DOWNLOAD_TIMEOUT = 20  # seconds without an answer

# MNIST's uncompressed files with the published MD5; the other sets' files have the same names. torchvision checks only
# what it downloads: here a truncated or altered MNIST on disk is refused, too.
MNIST_MD5 = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}


class DatasetError(ValueError):
    """A dataset cannot be had, or its files are not what they should be."""


class DatasetMissingError(DatasetError):
    """A dataset is not on this machine and could not be downloaded."""


@dataclass(frozen=True)
class Dataset:
    """Standardised images, or a text, and the labels: for training, for choosing (validation) and for reporting (test).

    Attributes
    ----------
    name : str
        As :func:`load` gives it, one of ``DATASETS`` but ``auto``.
    train_images, validation_images, test_images : Tensor of float32, shape (n, n_inputs)
        Pixels less the mean of all training pixels, over their standard deviation; :func:`load` gives 784 an image.
        Validation images are those that :meth:`hold_out` sets aside, none before. Of a text, characters (int64).
    train_labels, validation_labels, test_labels : Tensor of int64, shape (n,)
        Classes from 0 on; of a text the next characters, (n, n_inputs). Training labels may also be float32
        probabilities of the classes, (n, n_classes), such as another network's outputs (Hinton, Vinyals & Dean 2015,
        arXiv 1503.02531).
    mean, std : float
        Those of all training pixels, on a scale from 0 to 1: pixel = image·std + mean.
    """

    name: str
    train_images: Tensor
    train_labels: Tensor
    validation_images: Tensor
    validation_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    mean: float
    std: float

    def to(self, device: torch.device | str) -> "Dataset":
        """Return the same data on another device."""
        return replace(self, **{name: tensor.to(device) for name, tensor in self._tensors().items()})

    def hold_out(self) -> "Dataset":
        """Return the data with a sixth of the training images, always the same ones, set aside for validation."""
        n = len(self.train_labels)
        order = torch.randperm(n, generator=torch.Generator().manual_seed(0)).to(self.train_labels.device)
        held_out, kept = (part.sort().values for part in order.split([n // 6, n - n // 6]))
        images, labels = self.train_images[held_out], self.train_labels[held_out]
        return replace(self.select(train=kept), validation_images=images, validation_labels=labels)

    def select(self, **wanted: Tensor) -> "Dataset":
        """Return part of the data.

        Parameters
        ----------
        train, validation, test : Tensor, optional
            Indices (int64) of the samples to keep, or a mask (bool); a split that is not named stays whole.
        """
        tensors = self._tensors()
        names = [(split, f"{split}_{kind}") for split in wanted for kind in ("images", "labels")]
        return replace(self, **{name: tensors[name][wanted[split]] for split, name in names})

    def splits(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Return ``{"train": (images, labels), …}``, with ``validation`` where there is one, and ``test``."""
        pairs = {split: (getattr(self, f"{split}_images"), getattr(self, f"{split}_labels")) for split in SPLITS}
        return {split: (images, labels) for split, (images, labels) in pairs.items() if len(labels)}

    def fingerprint(self) -> str:
        """Return the SHA-256 of all images and labels as they are now, in 0.2 s for MNIST's 220 MB.

        An earlier hash may no longer hold: NumPy can change a tensor without PyTorch's knowledge.
        """
        return checksum(self._tensors())

    def _tensors(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}


def load(name: str = "auto", data_dir: str | Path = "") -> Dataset:
    """Load a dataset by name, in memory, on the CPU.

    Parameters
    ----------
    name : {"auto", "mnist", "fashion_mnist", "kmnist", "digits"}
        ``digits`` is scikit-learn's 8×8 set, resampled, and needs no network. ``auto`` takes MNIST where it can be had
        and ``digits`` elsewhere; the result's ``name`` says which.
    data_dir : str or Path, optional
        The folder that holds torchvision's layout (``MNIST/raw/…``). Empty: ``LOWRANK_DATA_DIR``, then the
        project's ``data/``. Where none of them has the set, it is downloaded into ``data_dir`` or ``data/``.

    Raises
    ------
    DatasetError
        The name is unknown, the set cannot be had, or a file of it is not the published one.
    """
    if name not in DATASETS:
        raise DatasetError(f"dataset {name!r} is unknown; allowed: {', '.join(DATASETS)}")
    if name == "auto":
        name = resolve(name, data_dir)
    if name == "digits":
        return _load_digits()
    # Not by torchvision, whose import takes longer than all of the reading.
    raw = _provide(name, data_dir) / TORCHVISION_SETS[name] / "raw"
    return _from_raw(name, *(_read_idx(raw / file) for file in MNIST_MD5))


def resolve(name: str, data_dir: str | Path = "") -> str:
    """Return what a name stands for here, once its set is at hand: download it if need be, or raise as :func:`load`."""
    if name != "digits":
        try:
            _provide("mnist" if name == "auto" else name, data_dir)
        except DatasetMissingError:
            if name != "auto":
                raise
            return "digits"
    return "mnist" if name == "auto" else name


def torchvision_set(name: str, data_dir: str | Path = "", *, train: bool, transform: Any = None) -> Any:
    """Open a set as torchvision's own ``Dataset``, for textbook loaders; see :func:`load` for the rest."""
    return _torchvision_class(name)(_provide(name, data_dir), train=train, transform=transform)


def _torchvision_class(name: str) -> Any:
    from torchvision import datasets  # here, not above: the import takes two seconds, in every kernel

    return getattr(datasets, TORCHVISION_SETS[name])


def _provide(name: str, data_dir: str | Path) -> Path:
    """Return the folder that holds a torchvision set, its files checked; download it into the last if none does."""
    places = folders(data_dir)
    for folder in places:
        raw = folder / TORCHVISION_SETS[name] / "raw"
        there = [raw / file for file in MNIST_MD5 if (raw / file).is_file()]
        for file in there if name == "mnist" else ():
            _check(file)
        if len(there) == len(MNIST_MD5):
            return folder
    try:
        with ExitStack() as at_end:  # torchvision opens a socket without a timeout
            at_end.callback(socket.setdefaulttimeout, socket.getdefaulttimeout())
            socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)
            _torchvision_class(name)(places[-1], download=True)
    except (RuntimeError, OSError, HTTPException) as error:
        raise DatasetMissingError(
            f"dataset {name!r} is not on this machine and could not be downloaded ({' '.join(str(error).split())}). "
            f"Looked in {' and '.join(map(str, places))} for {TORCHVISION_SETS[name]}/raw/ with "
            f"{', '.join(MNIST_MD5)}. Ways to provide it: set LOWRANK_DATA_DIR or the parameter data_dir to a folder "
            "that holds these files; connect to a network; or choose dataset 'digits', which needs none"
        ) from error
    return places[-1]


def folders(data_dir: str | Path = "") -> list[Path]:
    """Return where data are looked for; into the last one they are downloaded."""
    named = [data_dir] if data_dir else [os.environ.get("LOWRANK_DATA_DIR"), PROJECT / "data"]
    return [Path(folder) for folder in named if folder]


def _check(file: Path) -> None:
    """Refuse a file that is not the published MNIST's."""
    content, expected = file.read_bytes(), MNIST_MD5[file.name]
    found = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if found != expected:
        raise DatasetError(
            f"{file} is not the published MNIST file: expected MD5 {expected}, found {found} "
            f"({len(content):,} bytes). Replace or remove it"
        )


def _read_idx(file: Path) -> Tensor:
    """Read images or labels: a header of big-endian integers (2,048 plus the number of axes, the shape), then uint8."""
    n_axes = int(file.name[-len("3-ubyte")])
    kind, *shape = np.fromfile(file, ">i4", 1 + n_axes).tolist() or [0]
    content = np.fromfile(file, np.uint8)[4 * (1 + n_axes) :]
    if kind != 2048 + n_axes or content.size != math.prod(shape):
        raise DatasetError(
            f"the files in {file.parent} are damaged: {file.name} ({file.stat().st_size:,} bytes) does not hold what "
            "its header says. Replace or remove them"
        )
    return torch.from_numpy(content).reshape(shape)


def batches(n: int, batch_size: int, *, seed: int, epoch: int, device: torch.device | str = "cpu") -> Iterator[Tensor]:
    """Yield the index tensors of one epoch's shuffled batches, on a device; the last may be smaller.

    The order depends on ``seed`` and ``epoch`` alone, so no epoch depends on what was drawn before it.
    """
    return iter(torch.randperm(n, generator=epoch_generator(seed, epoch)).to(device).split(batch_size))


def epoch_generator(seed: int, epoch: int) -> torch.Generator:
    """Return the generator that shuffles one epoch: the same for the loader here and for a ``DataLoader``."""
    return torch.Generator().manual_seed(1_000_003 * seed + epoch)


def _load_digits() -> Dataset:
    """Scikit-learn's 1,797 digits of 8×8, resampled bilinearly to 28×28; a fifth of each class for testing."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch = load_digits()
    small = torch.from_numpy(bunch.images).float()[:, None]  # grey levels 0 to 16
    large = F.interpolate(small, size=(IMAGE_SIDE, IMAGE_SIDE), mode="bilinear")[:, 0]
    images = large.mul(255 / 16).round().to(torch.uint8)
    labels = torch.from_numpy(bunch.target)
    train, test = train_test_split(range(len(labels)), test_size=0.2, random_state=0, stratify=labels)
    return _from_raw("digits", images[train], labels[train], images[test], labels[test])


def _from_raw(name: str, train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor) -> Dataset:
    """Turn uint8 images (n, 28, 28) into float32 rows (n, 784), standardised by all training pixels."""
    std, mean = (moment.item() / 255 for moment in torch.std_mean(train.float()))
    images, test_images = (part.flatten(1).float().div_(255).sub_(mean).div_(std) for part in (train, test))
    labels = train_labels.long()
    return Dataset(name, images, labels, images[:0], labels[:0], test_images, test_labels.long(), mean, std)
