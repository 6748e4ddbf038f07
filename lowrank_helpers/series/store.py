"""Trained networks on disk: each made once, under a key of everything that determines it.

One safetensors file a network: its weights, and in the file's header its history, the format's version and a
checksum. Nothing is ever unpickled.
"""

import ast
import hashlib
import inspect
import json
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import cache
from pathlib import Path
from threading import Event
from types import ModuleType

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from lowrank_helpers import data, models, training
from lowrank_helpers.data import Dataset, checksum
from lowrank_helpers.training import History, Recipe, fit

FORMAT = "1"
TEMPORARY = ".tmp"  # ending of files being written; a killed process leaves them behind


class Store:
    """A folder of trained networks.

    Parameters
    ----------
    folder : Path
        Made when the first network is saved.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def trained(
        self,
        model: nn.Module,
        data: Dataset,
        recipe: Recipe,
        *,
        others: Mapping[str, Dataset] | None = None,
        label: str = "training",
        stop: Event | None = None,
        wait: bool = True,
    ) -> History:
        """Train a network in place as :func:`fit` does, or load what that training gave if it has been done.

        Where another process is at the same training, its end is waited for.

        The key is made of the network's structure and weights before training, the data, the recipe, the code
        that trains, PyTorch's version and the kind of device. So whatever start a network was given (random,
        spectral, another network's factors), the same training happens once.

        Returns
        -------
        History
            Of the training, whenever it ran.

        Raises
        ------
        BusyError
            Another process is at the same training, and ``wait`` is false.
        """
        key = _key(model, data, recipe, others or {})
        file = self.folder / f"{key}.safetensors"
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = self.folder / f".{key}.lock{TEMPORARY}"
        try:
            with FileLock(lock, timeout=-1 if wait else 0):
                history = _stored(file, key, model)
                if not history:
                    history = fit(model, data, recipe, others=others, label=label, stop=stop)
                    _save(file, key, model, history)
                lock.unlink(missing_ok=True)  # who waited for it finds the network, and may have removed it
                return history
        except Timeout as error:
            raise BusyError(f"another process is training {key}") from error


class BusyError(Exception):
    """Another process is at the same training."""


class UnusableError(Exception):
    """A stored file is damaged or not this project's; the message says how, to be read after the file's name."""


def _key(model: nn.Module, data: Dataset, recipe: Recipe, others: Mapping[str, Dataset]) -> str:
    digest = hashlib.sha256()
    parts = {
        "structure": repr(model),
        "trainable": [name for name, parameter in model.named_parameters() if parameter.requires_grad],
        "data": data.fingerprint(),
        "others": {name: other.fingerprint() for name, other in others.items()},
        "recipe": asdict(recipe),
        "code": _code_version(model),
        "torch": torch.__version__,
        "device": data.train_images.device.type,
    }
    digest.update(json.dumps(parts, sort_keys=True).encode())
    digest.update(checksum(model.state_dict()).encode())
    return digest.hexdigest()[:32]


def _code_version(model: nn.Module) -> str:
    """Hash the code that decides what a training gives; PyTorch's layers are covered by its version.

    Of the module ``data`` that is the order of the samples: the data themselves are hashed.
    """
    defining = {type(layer).__module__ for layer in model.modules()}
    ours = {name for name in defining if name.startswith("lowrank_helpers.")}
    modules = [sys.modules[name] for name in sorted(ours | {models.__name__, training.__name__})]
    sources = map(_source, [data.batches, data.epoch_generator, *modules])
    return hashlib.sha256("".join(sources).encode()).hexdigest()


@cache  # what was imported, even if the file changes under a running kernel
def _source(code: Callable | ModuleType) -> str:
    """Return what code does, without what it says: better words make no other network."""
    tree = ast.parse(inspect.getsource(code))
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    return ast.dump(tree)


def _save(file: Path, key: str, model: nn.Module, history: History) -> None:
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    header = {"format": FORMAT, "key": key, "history": json.dumps(asdict(history))}
    write_atomically(file, save(tensors, metadata=header | {"seal": _seal(header, tensors)}))


def _seal(header: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """Hash all that a file says, so that no part of it can change unseen."""
    said = json.dumps({**header, "weights": checksum(tensors)}, sort_keys=True)
    return hashlib.sha256(said.encode()).hexdigest()


def _stored(file: Path, key: str, model: nn.Module) -> History | None:
    """Load a network if the store has it, undamaged."""
    if not file.exists():
        return None
    try:
        return _load(file, key, model)
    except UnusableError as error:
        warnings.warn(f"{file.name} in the store of networks {error}; trained again", stacklevel=4)
        return None


def _load(file: Path, key: str, model: nn.Module) -> History:
    """Put a stored network's weights into the model and return its history."""
    try:
        with safe_open(file, framework="pt") as stored:
            header = stored.metadata() or {}
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError) as error:
        raise UnusableError(f"cannot be read ({error})") from error
    if header.get("format") != FORMAT:
        raise UnusableError(f"has format {header.get('format')!r}, not {FORMAT!r}")
    if header.get("key") != key or header.pop("seal", None) != _seal(header, tensors):
        raise UnusableError("does not match its key and checksum")
    model.load_state_dict(tensors)
    return History(**json.loads(header["history"]))


def write_atomically(file: Path, content: bytes) -> None:
    """Write a file so that its name never shows half of it, whatever stops the writing.

    Raises
    ------
    OSError
        The folder is write-protected or the disk is full; nothing is left behind.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.", suffix=TEMPORARY)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(file)
    except BaseException:
        Path(temporary).unlink()
        raise
