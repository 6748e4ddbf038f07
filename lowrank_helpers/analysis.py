"""The ranks of somebody else's network: every matrix of a file of weights, or of a model, by every measure.

Files are mapped and measured a tensor at a time, so that a file may be larger than memory. No code of a file is ever
executed: safetensors hold none, and in PyTorch's files an empty object stands for each that is no tensor.
"""

import json
import math
import pkgutil
import re
import sys
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from safetensors import safe_open
from torch import Tensor, nn
from tqdm.auto import tqdm

from lowrank_helpers import rank
from lowrank_helpers.models import LowRankLayer
from lowrank_helpers.unfold import Unfolded, unfold

OPTIMISER = "an optimiser's state, no weight"
MOMENTS = re.compile(r"\b(exp_avg|exp_avg_sq|momentum_buffer)\b")  # PyTorch's names, where its mapping is taken apart
OF_MODULES = ("_parameters", "_buffers", "_modules")  # attributes of a pickled model, not in the names of its tensors
ROUNDING = 1e-9  # by which five equal directions may measure as more than five
BEYOND = "beyond Marchenko–Pastur"  # the column of directions beyond the edge


class AnalysisError(ValueError):
    """A source cannot be analysed; the message says why, in one line."""


class Weight(NamedTuple):
    """A tensor of a network."""

    name: str
    read: Callable[[], Tensor]  # a file is read, and a product computed, only then
    shape: tuple[int, ...]
    layer: nn.Module | None = None  # that the tensor belongs to, if known
    unwanted: str = ""  # why the tensor is not measured
    n_stored: int = 0  # numbers in the parameters that it is computed from; 0 if the tensor itself is stored

    @property
    def is_free(self) -> bool:
        """Whether it may be a part of a weight that is computed."""
        return len(self.shape) > 1 and not self.unwanted and not self.n_stored


@dataclass(frozen=True)
class Analysis:
    """What the matrices of a network measure.

    Attributes
    ----------
    table : DataFrame
        One row a matrix (index ``matrix``), in the network's order. ``unfolded``: how the axes of the tensor became
        rows and columns; ``remark``: what else to know of that; ``dtype``, as stored; ``rows``, ``columns``;
        ``parameters``, the numbers that are stored for it; the names of ``rank.MEASURES``, the numerical rank by the
        stored dtype; ``beyond Marchenko–Pastur``, the directions beyond the edge of a random matrix whose entries have
        the same standard deviation; ``saved``, the parameters that factors at the effective rank, rounded up, would
        save, 0 where they would cost more.
    """

    source: str  # as it was given
    table: pd.DataFrame
    skipped: dict[str, str]  # by name, why a tensor was not measured

    @property
    def n_parameters(self) -> int:
        """How many numbers the measured matrices are stored as."""
        return int(self.table["parameters"].sum())

    @property
    def n_saved(self) -> int:
        """How many of them factors at the effective ranks would save."""
        return int(self.table["saved"].sum())


def analyze(source: str) -> Analysis:
    """Measure every matrix of a network.

    Parameters
    ----------
    source : str
        - A file of safetensors or of PyTorch's (``.pt``, ``.pth``, ``.bin``, ``.ckpt``, ``.pth.tar``): a
          ``state_dict``, a checkpoint or a whole model.
        - The ``index.json`` of a network in several such files, or their folder; or one with ``model.safetensors`` or
          an adapter, of which ΔW is measured.
        - ``package.module:name``, as of :func:`imported`, of a ``nn.Module`` or what returns one.

    Raises
    ------
    AnalysisError
        The source does not exist, is damaged, is of another kind, or has no matrix.

    Examples
    --------
    >>> from tempfile import TemporaryDirectory
    >>> from safetensors.torch import save_file
    >>> with TemporaryDirectory() as folder:
    ...     save_file({"fc.weight": torch.ones(4, 3), "fc.bias": torch.ones(4)}, f"{folder}/net.safetensors")
    ...     found = analyze(f"{folder}/net.safetensors")
    >>> int(found.table.loc["fc", "numerical rank"]), found.skipped
    (1, {'fc.bias': 'a vector or a number'})
    """
    weights = _weights(source)
    rows: dict[str, dict[str, Any]] = {}
    skipped: dict[str, str] = {}
    for weight in tqdm(weights.values(), desc="measuring", unit="tensor"):
        try:
            for name, row in _measured(weight, weights).items():
                rows[_unused(name, rows)] = row
        except ValueError as reason:
            skipped[weight.name] = str(reason)
        except (RuntimeError, MemoryError) as error:  # PyTorch says "can't allocate memory" by a RuntimeError
            skipped[weight.name] = f"could not be measured: {_one_line(error)}"
    if not rows:
        reasons = [f"{name} ({reason})" for name, reason in skipped.items()]
        said = ", ".join(reasons[:3] + ["…"] * (len(reasons) > 3)) or "it holds no tensors"
        raise AnalysisError(f"{source} has no matrix to measure: {said}")
    return Analysis(source, pd.DataFrame.from_dict(rows, orient="index").rename_axis("matrix"), skipped)


@torch.no_grad()
def _measured(weight: Weight, weights: Mapping[str, Weight]) -> dict[str, dict[str, Any]]:
    """Return a row of the table for each matrix of a tensor, or raise a ``ValueError`` that says why there is none."""
    bias = weights.get(f"{weight.name.removesuffix('weight')}bias")
    tensor = weight.read()
    if reason := weight.unwanted or _no_matrix(weight, tensor, bias):
        raise ValueError(reason)
    parts = unfold(weight.name, tensor, weight.layer)
    n_parameters = (weight.n_stored or tensor.numel()) // len(parts)
    return {name: _row(part, n_parameters) for name, part in parts.items()}


def _no_matrix(weight: Weight, tensor: Tensor, bias: Weight | None) -> str:
    """Return why a tensor is no matrix, by its type, shape, name or values; empty if it is one."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    if not tensor.is_floating_point() or tensor.dtype.itemsize == 1:
        return f"of type {dtype}: no plain real numbers"
    if sum(size != 1 for size in tensor.shape) < 2:
        return "a vector or a number"
    if weight.name.rpartition(".")[2] == "bias":
        return "a bias, by its name"
    if isinstance(weight.layer, (nn.LayerNorm, nn.RMSNorm)) or (bias and bias.shape == weight.shape):
        return "scales entry by entry, as a normalisation's"
    return "a mask: zero and one other value, in one triangle" if _is_mask(tensor) else ""


def _is_mask(tensor: Tensor) -> bool:
    """Return whether square matrices hold zero and one other value, and all of it in the same triangle."""
    if tensor.shape[-1] != tensor.shape[-2]:
        return False
    lowest, highest = tensor.aminmax()
    two_values = not (lowest and highest) and bool(((tensor == lowest) | (tensor == highest)).all())
    return two_values and tensor.equal(tensor.tril()) != tensor.equal(tensor.triu())


def _row(part: Unfolded, n_parameters: int) -> dict[str, Any]:
    """Measure one matrix."""
    matrix = part.matrix
    shape = (matrix.shape[0], matrix.shape[1])
    s = rank.singular_values(matrix)
    ranks = {name: measure(s, shape, matrix.dtype) for name, measure in rank.MEASURES.items()}
    cost = math.ceil(rank.effective_rank(s) - ROUNDING) * sum(shape)
    std = float(matrix.double().std(correction=0))
    return {
        "unfolded": part.shape,
        "remark": ", ".join(filter(None, [part.remark, "" if s[0] else "all entries are zero"])),
        "dtype": str(matrix.dtype).removeprefix("torch."),
        "rows": shape[0],
        "columns": shape[1],
        "parameters": n_parameters,
        **ranks,
        # Equal entries have no spread, and an edge of 0: what is beyond it then is rounding.
        BEYOND: min(int(ranks["numerical rank"]), int((s > rank.marchenko_pastur_edges(shape, std)[1]).sum())),
        "saved": max(0, n_parameters - cost),
    }


def _weights(source: str) -> dict[str, Weight]:
    """Return the tensors of a file or of a model by name."""
    in_folder = (file for name in ("*.index.json", "*model.safetensors") for file in Path(source).glob(name))
    file = next(in_folder, Path(source))
    is_code = ":" in source and not file.exists()
    if not is_code and (not file.is_file() or file.suffix not in READERS):
        kind = "a folder without weights" if file.is_dir() else "of no known format" if file.is_file() else "no file"
        raise AnalysisError(f"{source} is {kind}; give a file ({', '.join(READERS)}) or package.module:name")
    try:
        return of_model(imported(source)) if is_code else _joined(_listed(READERS[file.suffix](file)))
    except (Exception, SystemExit) as error:  # a damaged file, or the user's own code, can raise nearly anything
        raise AnalysisError(f"{source} cannot be analysed: {_one_line(error)}") from error


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    """Map the tensors of a file, which has no order of its own: layer 2 comes before layer 10."""

    def natural(name: str) -> list[tuple[str, int]]:
        return [(text, int(number or 0)) for text, number in re.findall(r"(\D*)(\d*)", name)]

    with safe_open(file, framework="pt") as stored:
        return {name: stored.get_tensor(name) for name in sorted(stored.keys(), key=natural)}


class _Attributes:
    """Stands for a class that is not loaded: each of its objects is a mapping, whose ``vars`` are its attributes."""

    def __new__(cls, *arguments: Any) -> Any:
        return OrderedDict()  # the one type that PyTorch lets a file fill as a mapping and as an object


class _Anything:
    """Stands for a class of NumPy's, whose objects are filled in ways of their own."""

    def __init__(self, *arguments: Any) -> None:
        pass

    __setstate__ = __init__


def _read_pytorch(file: Path) -> Any:
    """Load the tensors of a file and what holds them; tensors are mapped where its format allows."""
    stand_ins: list[Any] = []
    if zipped := zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            if damaged := archive.testzip():  # PyTorch would load it unseen
                raise ValueError(f"{damaged} in it does not match its checksum")
        unknown = torch.serialization.get_unsafe_globals_in_checkpoint(file)
        stand_ins = [(_Anything if name.startswith("numpy") else _Attributes, name) for name in unknown]
    # Warnings are about old formats: nothing that the user can act on.
    with warnings.catch_warnings(action="ignore"), torch.serialization.safe_globals(stand_ins):
        return torch.load(file, map_location="cpu", weights_only=True, mmap=zipped)


def _read_index(file: Path) -> dict[str, Any]:
    """Read all files of a network whose tensors lie in several, as Hugging Face names them in an index."""
    parts = {file.parent / name for name in json.loads(file.read_text())["weight_map"].values()}
    return {name: tensor for part in sorted(parts) for name, tensor in READERS[part.suffix](part).items()}


READERS: dict[str, Callable[[Path], Any]] = {
    ".safetensors": _read_safetensors,
    **dict.fromkeys((".pt", ".pth", ".bin", ".ckpt", ".tar"), _read_pytorch),
    ".json": _read_index,
}


def _printable(name: str) -> str:
    """Return a name from a file without control characters, which a terminal would obey."""
    return "".join(letter if letter.isprintable() else "�" for letter in name)


def _unused(name: str, taken: Container[str]) -> str:
    """Return a name, with primes if another has it: ``fc`` and ``fc.weight`` of one file are both called ``fc``."""
    while name in taken:
        name += "′"
    return name


def _listed(loaded: Any) -> dict[str, Weight]:
    """List the tensors in nested mappings and lists, each once."""
    weights: dict[str, Weight] = {}
    first: dict[tuple[Any, ...], str] = {}
    for path, tensor, unwanted in _tensors_in(loaded, set()):
        name = _unused(_printable(path), weights)
        if (place := _place(tensor)) and (same := first.setdefault(place, name)) != name:
            unwanted = f"the same tensor as {same}"
        weights[name] = Weight(name, tensor.detach, tuple(tensor.shape), unwanted=unwanted)
    return weights


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """Return where in memory a tensor's entries lie; empty if it has none of its own."""
    if tensor.layout != torch.strided or tensor.is_meta or not tensor.numel():
        return ()
    return tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.numel()


def _tensors_in(value: Any, seen: set[int], name: str = "", unwanted: str = "") -> Iterator[tuple[str, Tensor, str]]:
    """Yield tensors by dotted name, in order, each with the reason to skip it: it belongs to an optimiser.

    Each mapping and list is looked into once, as objects may hold each other; ``seen`` has their ids.
    """
    unwanted = OPTIMISER if MOMENTS.search(name) else unwanted
    if isinstance(value, Tensor):
        yield name or "tensor", value.detach(), unwanted
    elif isinstance(value, (Mapping, list, tuple)) and id(value) not in seen:
        seen.add(id(value))
        items = value if isinstance(value, Mapping) else dict(enumerate(value))
        items = {**items, **getattr(value, "__dict__", {})}
        if {"state", "param_groups"} <= items.keys():  # PyTorch's, whatever it is called here
            unwanted = OPTIMISER
        for key, item in items.items():
            inner = name if key in OF_MODULES else f"{name}.{key}".removeprefix(".")
            yield from _tensors_in(item, seen, inner, unwanted)


def of_model(model: nn.Module) -> dict[str, Weight]:
    """List the tensors of a model's ``state_dict``; a ``weight`` that a layer computes takes the place of its parts.

    A layer of factors has their product, an adapted one W + ΔW, and a pruned or parametrized one, as by ``weight_norm``
    or ``spectral_norm``, the weight that it works with.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"it gives {type(model).__name__}, not a torch.nn.Module")
    layers = dict(model.named_modules(remove_duplicate=False))
    parameters = dict(model.named_parameters(remove_duplicate=False))
    weights = _listed(model.state_dict())
    places = {_place(weight.read()) for weight in weights.values()} - {()}
    for owner, layer in layers.items():
        if not isinstance(getattr(type(layer), "weight", None), property):
            continue
        prefix, value = f"{owner}.".lstrip("."), layer.weight
        inside = [name for name, weight in weights.items() if name.startswith(prefix) and weight.is_free]
        if inside and isinstance(value, Tensor) and value.dim() > 1 and _place(value) not in places:
            n_stored = sum(math.prod(weights[name].shape) for name in inside if name in parameters)
            read = partial(getattr, layer, "weight")
            _compose(weights, inside, Weight(f"{prefix}weight", read, tuple(value.shape), n_stored=n_stored))
    for name, weight in _joined(weights).items():
        buffer = "a buffer, no parameter" if name not in parameters and len(weight.shape) > 1 else ""
        layer = layers.get(weight.name.rpartition(".")[0])
        weights[name] = weight._replace(layer=layer, unwanted=weight.unwanted or buffer)
    return weights


def _normed(directions: Tensor, lengths: Tensor) -> Tensor:
    """Return the weight that ``weight_norm`` would (Salimans & Kingma 2016, arXiv 1602.07868, equation 2)."""
    across = [axis for axis, size in enumerate(lengths.shape) if size == 1]
    norms: Tensor = torch.linalg.vector_norm(directions, dim=across, keepdim=True)
    return directions * (lengths / norms)


# Some weights are stored as two tensors: the ends of their names, the end of the weight's, and how to compute it.
JOINED: list[tuple[tuple[str, str], str, Callable[..., Tensor]]] = [
    (("_v", "_g"), "", _normed),  # torch.nn.utils.weight_norm's
    ((".original1", ".original0"), "", _normed),  # the same as a parametrization
    (("_orig", "_mask"), "", torch.mul),  # torch.nn.utils.prune's
    ((".B.weight", ".C.weight"), ".weight", LowRankLayer.product),  # LowRankLayer's
    ((".lora_B", ".lora_A"), ".lora", torch.matmul),
    ((".lora_B.weight", ".lora_A.weight"), ".lora", torch.matmul),  # PEFT's
]


def _joined(weights: dict[str, Weight]) -> dict[str, Weight]:
    """Put together the weights that are stored as two tensors, told by their names and shapes alone."""
    for endings, kept, apply in JOINED:
        for stem in [f".{name}".removesuffix(endings[0]) for name in weights if f".{name}".endswith(endings[0])]:
            names = [f"{stem}{ending}"[1:] for ending in endings]
            parts = [weights[name] for name in names if name in weights and weights[name].is_free]
            try:
                shape = tuple(apply(*(torch.empty(part.shape, device="meta") for part in parts)).shape)
            except (RuntimeError, TypeError):  # a part is missing, or the shapes do not fit
                continue
            whole = f"{stem.replace('.parametrizations.', '.')}{kept}"[1:]
            n_stored = sum(math.prod(part.shape) for part in parts if not part.name.endswith("_mask"))
            read = partial(lambda apply, parts: apply(*(part.read() for part in parts)), apply, parts)
            _compose(weights, names, Weight(whole, read, shape, n_stored=n_stored))
    return weights


def _compose(weights: dict[str, Weight], parts: list[str], whole: Weight) -> None:
    """Put a computed weight in the place of the first of its parts, and leave the others out."""
    weights[parts[0]] = whole
    for name in parts[1:]:
        weights[name] = weights[name]._replace(unwanted=f"a part of {whole.name}")


def imported(source: str, *, called: bool = True) -> Any:
    """Import ``package.module:name`` as Python started in this folder would; of a function return what it returns."""
    if "" not in sys.path:
        sys.path.insert(0, "")
    found = pkgutil.resolve_name(source)
    return found() if called and callable(found) and not isinstance(found, nn.Module) else found


def _one_line(error: BaseException) -> str:
    """Return an error's type and the first sentence that it says."""
    # PyTorch says what is wrong with a file after a paragraph on how to load it all the same.
    said = re.sub(r"^Weights only load failed.*?(WeightsUnpickler error:|\n\n)", "", str(error), flags=re.DOTALL)
    said = re.split(r"\.\s|\n", said.strip())[0]
    return f"{type(error).__name__}: {_printable(said)}" if said else type(error).__name__
