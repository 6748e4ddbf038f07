"""Trained networks on disk: each made once, under a key of everything that determines it.

One safetensors file a network: its weights, and in the file's header its history and a checksum. Nothing is ever
unpickled.
"""

import copy
import json
import os
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any

import torch
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from lowrank_helpers.data import Dataset
from lowrank_helpers.hashing import checksum
from lowrank_helpers.series import digest
from lowrank_helpers.training import History, Recipe, cross_entropy, fit, products_in, rounded

FORMAT = 2  # of the files
PROBED = 8  # images to which a network answers for its key
KNOWN = ("torch", "lowrank_helpers")  # whose layers have the code that their versions say
TEMPORARY = ".tmp"  # ending of files being written; a killed process leaves them behind


class UnknownError(Exception):
    """Something that decides a training cannot be known; the message names it."""


def trained(
    folder: Path,
    model: nn.Module,
    data: Dataset,
    recipe: Recipe,
    *,
    others: Mapping[str, Dataset] | None = None,
    label: str = "training",
    stop: Event | None = None,
) -> History:
    """Train a network in place as :func:`fit` does, or load what that training gave if a folder has it.

    A training that another process or thread is at is not done twice: this one waits for it. A network is trained and
    not kept, with a warning, where something that decides its training cannot be known.
    """
    train = partial(fit, model, data, recipe, others=others, label=label, stop=stop)
    try:
        key = digest.of_json(determinants(model, data, recipe, others or {}))[:32]
    except UnknownError as error:
        warnings.warn(f"{label}: the network is trained and not kept, as {error}", stacklevel=2)
        return train()
    file, lock = folder / f"{key}.safetensors", folder / f".{key}.lock{TEMPORARY}"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(lock):
        history = _load(file, model)
        if not history:
            history = train()
            _save(file, model, history)
        lock.unlink(missing_ok=True)  # who waited for it finds the network, and may have removed it
    return history


def determinants(model: nn.Module, data: Dataset, recipe: Recipe, others: Mapping[str, Dataset]) -> dict[str, Any]:
    """Return all that decides a training, by name: two trainings are the same if these are.

    A network is known by its layers, all of PyTorch's or of this package, by its weights, and by its first answers.
    What a notebook replaces in PyTorch or in this package is seen only where it changes these answers or gradients.

    Raises
    ------
    UnknownError
        The training depends on something that cannot be known.
    """
    modules = {type(layer).__module__ for layer in model.modules()}
    return {
        "layers": _layers(model),
        "answers": _first_answers(model, data, recipe),
        "weights": checksum({**dict(model.named_parameters()), **dict(model.named_buffers())}),
        "trained": [name for name, parameter in model.named_parameters() if parameter.requires_grad],
        "data": data.fingerprint(),
        "others": {name: other.fingerprint() for name, other in others.items()},
        "recipe": asdict(recipe),
        "code": digest.of_modules({fit.__module__, *(modules & digest.SOURCES.keys())}),
        "torch": torch.__version__,
        "numbers": str(torch.get_default_dtype()),
        "device": data.train_images.device.type,
        "format": FORMAT,
    }


def _layers(model: nn.Module) -> list[str]:
    """Return the name, class and settings of each layer; refuse code that may change while all versions stay."""
    described = []
    for name, layer in model.named_modules():
        parts = [layer, *filter(None, [vars(layer).get("forward")])]
        parts += [hook for attribute, of in vars(layer).items() if attribute.endswith("_hooks") for hook in of.values()]
        for parameter in layer.parameters(recurse=False):
            hooks = parameter._backward_hooks, getattr(parameter, "_post_accumulate_grad_hooks", None)
            parts += [hook for of in hooks for hook in (of or {}).values()]
        for part in parts:
            if type(part).__module__.partition(".")[0] not in KNOWN:
                code = getattr(part, "__qualname__", type(part).__qualname__)
                raise UnknownError(f"the code of {code} is neither PyTorch's nor this package's")
        described.append(f"{name}: {type(layer).__module__}.{type(layer).__qualname__}({layer.extra_repr()})")
    return described


def _first_answers(model: nn.Module, data: Dataset, recipe: Recipe) -> str:
    """Return a digest of what a network in training mode answers to a few images, and of the gradients.

    They tell of much that neither its code nor its attributes do, such as the random numbers that it draws from
    PyTorch. All is done to a copy, and PyTorch's generators are left as they were.
    """
    # Tensors that a module has computed, as torch.nn.utils.prune's do, cannot be copied with the rest.
    computed = [value for layer in model.modules() for value in vars(layer).values() if isinstance(value, Tensor)]
    device = data.train_images.device
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []), products_in(recipe.precision, device):
            probed = copy.deepcopy(model, {id(value): value.detach().clone() for value in computed}).train()
            answers = probed(rounded(data.train_images[:PROBED], recipe.precision).clone())
            loss = cross_entropy(answers.float(), data.train_labels[:PROBED])
            trained = [weight for weight in probed.parameters() if weight.requires_grad]
            gradients = torch.autograd.grad(loss, trained, allow_unused=True)  # none is left on a weight
        return checksum({str(i): value for i, value in enumerate([answers, *gradients]) if value is not None})
    except Exception as error:
        raise UnknownError(f"a copy of it does not answer ({type(error).__name__}: {error})") from error


def _save(file: Path, model: nn.Module, history: History) -> None:
    # Copies, as the format has no way to say that two names share a tensor.
    tensors = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in model.state_dict().items()}
    written = json.dumps(asdict(history))
    write_atomically(file, save(tensors, {"history": written, "seal": _seal(file, written, tensors)}))


def _seal(file: Path, history: str, tensors: Mapping[str, Tensor]) -> str:
    """Hash all that a file says, and its name, so that no part of it can change unseen."""
    return digest.of_json([file.name, history, checksum(tensors)])


def _load(file: Path, model: nn.Module) -> History | None:
    """Put a stored network's weights into the model and return its history, if the store has it, undamaged."""
    if not file.exists():
        return None
    try:
        with safe_open(file, framework="pt") as stored:
            header = stored.metadata()
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 (no mapping)
        intact = header["seal"] == _seal(file, header["history"], tensors)
    except (SafetensorError, OSError, TypeError, KeyError):
        intact = False
    if not intact:
        warnings.warn(f"{file.name} in the store of networks is damaged; trained again", stacklevel=3)
        return None
    model.load_state_dict(tensors)
    return History(**json.loads(header["history"]))


def write_atomically(file: Path, content: bytes) -> None:
    """Write a file so that its name never shows half of it, whatever stops the writing; an error leaves no trace."""
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
