"""The ranks of somebody else's network: every matrix of a file of weights, or of a model, by every measure.

A tensor at a time is read and measured, so that a file may be larger than memory. No code of a file is ever executed:
safetensors hold none, and of PyTorch's files only tensors and plain containers are unpickled.
"""

import importlib
import math
import re
import sys
import warnings
import zipfile
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

import pandas as pd
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from tqdm.auto import tqdm

from lowrank_helpers import rank
from lowrank_helpers.models import FactorizedLinear
from lowrank_helpers.rank import Array
from lowrank_helpers.unfold import RECURRENT, Unfolded, times, unfold

PYTORCH_FILES = (".pt", ".pth", ".bin")
SAFETENSORS_FILES = (".safetensors",)
OPTIMISER_KEY = re.compile(r"optim[^.]*\.")  # of checkpoints: {"model": …, "optimizer": …, "epoch": 3}
OPTIMISER = "an optimiser's state, no weight"
ROUNDING = 1e-9  # by which five equal directions may measure as more than five
HALF = ("float16", "bfloat16")
# How weight_norm names the directions of a weight's rows, and the lengths to multiply them by.
LENGTHS = {"weight_v": "weight_g", "parametrizations.weight.original1": "parametrizations.weight.original0"}
BEYOND = "beyond Marchenko–Pastur"  # the column of directions beyond the edge


class AnalysisError(ValueError):
    """What was given cannot be analysed; the message says why, in one line."""


class Weight(NamedTuple):
    """A tensor of a network.

    Attributes
    ----------
    name : str
    read : callable
        Returns the tensor; only then is it in memory.
    layer : nn.Module, optional
        Whose tensor it is, where that is known.
    unwanted : str
        Why it is not to be measured; empty if it is.
    n_stored : int, optional
        How many numbers are kept for it, where these are not its entries: factors for their product.
    beside : callable, optional
        Returns the tensor whose columns are as many as the hidden units of the recurrent layer that this one is of.
    """

    name: str
    read: Callable[[], Tensor]
    layer: nn.Module | None = None
    unwanted: str = ""
    n_stored: int | None = None
    beside: Callable[[], Tensor] | None = None


@dataclass(frozen=True)
class Analysis:
    """What the matrices of a network measure.

    Attributes
    ----------
    source : str
        What was analysed, as it was given.
    table : DataFrame
        One row a matrix (index ``matrix``), in the network's order. ``unfolded``: how the axes of the tensor became
        rows and columns; ``remark``: what else to know of that; ``dtype``, as stored; ``rows``, ``columns``;
        ``parameters``, the numbers that are stored for it; the names of ``rank.MEASURES``, the numerical rank by the
        stored dtype; ``beyond Marchenko–Pastur``, the directions beyond the edge of a random matrix whose entries have
        the same standard deviation; ``saved``, the parameters that factors at the effective rank, rounded up, would
        save, 0 where they would cost more.
    skipped : dict of str to str
        By name, why a tensor was not measured.
    """

    source: str
    table: pd.DataFrame
    skipped: dict[str, str]

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
        A file of safetensors or of PyTorch's (``.pt``, ``.pth``, ``.bin``: a ``state_dict``, or tensors in nested
        mappings and lists); or ``package.module:callable``, which is imported, called and returns a ``nn.Module``.

    Raises
    ------
    AnalysisError
        The source does not exist, is damaged, is of another kind, holds more than tensors, or has no matrix.

    Examples
    --------
    >>> from tempfile import TemporaryDirectory
    >>> from safetensors.torch import save_file
    >>> with TemporaryDirectory() as folder:
    ...     save_file({"fc.weight": torch.ones(4, 3), "fc.bias": torch.ones(4)}, f"{folder}/net.safetensors")
    ...     found = analyze(f"{folder}/net.safetensors")
    >>> int(found.table.loc["fc", "numerical rank"]), found.skipped
    (1, {'fc.bias': 'a vector'})
    """
    weights = _together(_weights(source))
    rows: dict[str, dict[str, Any]] = {}
    skipped: dict[str, str] = {}
    for weight in tqdm(weights, desc="measuring", unit="tensor"):
        measured, reason = _measured(weight)
        for name, row in measured.items():
            rows[_unused(name, rows)] = row
        if reason:
            skipped[weight.name] = reason
    if not rows:
        raise AnalysisError(f"{source} has no matrix to measure: {_first_reasons(skipped)}")
    return Analysis(source, pd.DataFrame.from_dict(rows, orient="index").rename_axis("matrix"), skipped)


def _first_reasons(skipped: Mapping[str, str]) -> str:
    named = [f"{name} ({reason})" for name, reason in list(skipped.items())[:3]]
    return (", ".join(named) or "it holds no tensors") + (", …" if len(skipped) > 3 else "")


@torch.no_grad()
def _measured(weight: Weight) -> tuple[dict[str, dict[str, Any]], str]:
    """Return a row of the table for each matrix of a tensor, or why there is none."""
    if weight.unwanted:
        return {}, weight.unwanted
    try:
        tensor = weight.read()
        hidden_size = math.prod(weight.beside().shape[1:]) if weight.beside else None
    except (SafetensorError, TypeError, KeyError, RuntimeError) as error:  # numbers that this PyTorch does not have
        return {}, f"cannot be read: {_one_line(error)}"
    if reason := _no_matrix(tensor):
        return {}, reason
    parts = unfold(weight.name, tensor, weight.layer, hidden_size)
    try:
        return {name: _row(part, weight.n_stored) for name, part in parts.items()}, ""
    except ValueError as error:
        return {}, str(error)
    except (RuntimeError, MemoryError) as error:  # PyTorch says "can't allocate memory" by a RuntimeError
        return {}, f"could not be measured: {_one_line(error)}"


def _no_matrix(tensor: Tensor) -> str:
    """Say why a tensor is no matrix to measure; nothing of one that is."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    reasons = {
        "quantised: integers that stand for values by a scale": lambda: tensor.is_quantized,
        f"sparse ({str(tensor.layout).removeprefix('torch.')})": lambda: tensor.layout != torch.strided,
        "without values (on the device meta)": lambda: tensor.is_meta,
        f"complex numbers ({dtype})": tensor.is_complex,
        f"integers ({dtype}): counts, indices or quantised values": lambda: not tensor.is_floating_point(),
        f"quantised ({dtype}), which means something only with its scales": lambda: tensor.dtype.itemsize == 1,
        f"empty, {times(tensor.shape)}": lambda: tensor.numel() == 0,
        "a single number": lambda: tensor.numel() == 1,
        "a vector": lambda: sum(size > 1 for size in tensor.shape) == 1 and tensor.dim() != 2,
        "a view of fewer numbers than it has entries": lambda: tensor.nbytes > tensor.untyped_storage().nbytes(),
    }
    return next((reason for reason, applies in reasons.items() if applies()), "")


def _row(part: Unfolded, n_stored: int | None) -> dict[str, Any]:
    """Measure one matrix."""
    matrix = part.matrix
    shape = (matrix.shape[0], matrix.shape[1])
    s = rank.singular_values(matrix)
    n_parameters = n_stored or matrix.numel()
    ranks = {name: measure(s, shape, matrix.dtype) for name, measure in rank.MEASURES.items()}
    cost = math.ceil(rank.effective_rank(s) - ROUNDING) * sum(shape)
    return {
        "unfolded": part.shape,
        "remark": ", ".join(filter(None, [part.remark, "" if s[0] else "all entries are zero"])),
        "dtype": str(matrix.dtype).removeprefix("torch."),
        "rows": shape[0],
        "columns": shape[1],
        "parameters": n_parameters,
        **ranks,
        # Equal entries have no spread, and an edge of 0: what is beyond it then is rounding.
        BEYOND: min(int(ranks["numerical rank"]), rank.rank_beyond_edge(s, shape, _std(matrix, s))),
        "saved": max(0, n_parameters - cost),
    }


def _std(matrix: Tensor, s: Array) -> float:
    """Return the standard deviation of a matrix's entries from its singular values, without a copy in float64."""
    mean = sum(block.double().sum().item() for block in matrix.split(rank.ROWS_AT_ONCE)) / matrix.numel()
    scale = s[0] or 1.0  # so that no square overflows
    return scale * max(0.0, rank.stable_rank(s) / matrix.numel() - (mean / scale) ** 2) ** 0.5


def _weights(source: str) -> list[Weight]:
    """List the tensors of a file or of a model."""
    file = Path(source)
    if not file.exists() and ":" in source:
        return of_model(_called(source))
    if not file.is_file():
        raise AnalysisError(
            f"{source} is {'a folder' if file.is_dir() else 'no file'}; give a file "
            f"({', '.join(SAFETENSORS_FILES + PYTORCH_FILES)}) or package.module:callable"
        )
    if file.suffix in SAFETENSORS_FILES:
        return _of_safetensors(file)
    if file.suffix in PYTORCH_FILES:
        return _of_mapping(_loaded(file))
    raise AnalysisError(
        f"{source} ends in none of {', '.join(SAFETENSORS_FILES + PYTORCH_FILES)}: its format is not known"
    )


def _of_safetensors(file: Path) -> list[Weight]:
    try:
        stored = safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise AnalysisError(f"{file} cannot be read as safetensors: {_one_line(error)}") from error
    # The format keeps no order of its own: layer 2 before layer 10.
    names = sorted(stored.keys(), key=_natural)
    return [Weight(_printable(name), partial(stored.get_tensor, name)) for name in names]


def _natural(name: str) -> list[tuple[str, int]]:
    return [(text, int(number or 0)) for text, number in re.findall(r"(\D*)(\d*)", name)]


def _loaded(file: Path) -> Any:
    """Load what a file of PyTorch's holds: tensors, mapped rather than read where its format allows, and containers."""
    try:
        zipped = zipfile.is_zipfile(file)
        if zipped:
            _check_archive(file)
        with warnings.catch_warnings(action="ignore"):  # about old formats: nothing that the user can act on
            return torch.load(file, map_location="cpu", weights_only=True, mmap=zipped)
    except AnalysisError:
        raise
    except Exception as error:  # a damaged pickle can raise nearly anything
        if isinstance(error, UnpicklingError) and (asked_for := re.search(r"GLOBAL ([\w.]+)", str(error))):
            raise AnalysisError(
                f"{file} holds more than tensors ({asked_for[1]}), which is not loaded, as that could run code; "
                "save the model's state_dict() instead"
            ) from error
        raise AnalysisError(f"{file} is damaged, unreadable or no file of PyTorch's: {_one_line(error)}") from error


def _check_archive(file: Path) -> None:
    """Refuse an archive with a damaged record, which PyTorch would load unseen, or with a program."""
    with zipfile.ZipFile(file) as archive:
        if damaged := archive.testzip():
            raise AnalysisError(f"{file} is damaged: {_printable(damaged)} in it does not match its checksum")
        if any(name.endswith("/constants.pkl") for name in archive.namelist()):
            raise AnalysisError(f"{file} is a program of TorchScript's, not weights; save its state_dict() instead")


def _printable(name: str) -> str:
    """Return a name from a file without what a terminal would obey."""
    return "".join(letter if letter.isprintable() else "�" for letter in name)


def _unused(name: str, taken: Container[str]) -> str:
    """Return a name, with primes if another has it: ``fc`` and ``fc.weight`` of one file are both called ``fc``."""
    while name in taken:
        name += "′"
    return name


def _of_mapping(loaded: Any) -> list[Weight]:
    """List the tensors in nested mappings and lists, the state of an optimiser marked."""
    named: dict[str, Tensor] = {}
    for name, tensor in _tensors_in(loaded):
        named[_unused(_printable(name), named)] = tensor
    return [
        Weight(name, partial(Tensor.detach, tensor), unwanted=OPTIMISER if OPTIMISER_KEY.match(name) else unwanted)
        for name, tensor, unwanted in _tied(named)
    ]


def _tensors_in(loaded: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield tensors by dotted name, in order; a container that is met twice, as in itself, is entered once."""
    pending: list[tuple[str, Any]] = [("", loaded)]
    entered: set[int] = set()
    while pending:
        name, value = pending.pop()
        if isinstance(value, Tensor):
            yield name or "tensor", value if is_lazy(value) else value.detach()
        elif isinstance(value, (Mapping, list, tuple)) and id(value) not in entered:
            entered.add(id(value))
            items = value.items() if isinstance(value, Mapping) else enumerate(value)
            pending += [(f"{name}.{key}".removeprefix("."), item) for key, item in items][::-1]


def of_model(model: nn.Module) -> list[Weight]:
    """List the tensors of a model's ``state_dict``, with what layers compute in place of what they compute it from.

    A ``FactorizedLinear`` has the product of its factors, and a parametrized layer, as by ``weight_norm`` or
    ``spectral_norm``, the weight that it works with.
    """
    layers = dict(model.named_modules(remove_duplicate=False))
    weights: dict[str, Weight] = {}
    for stored, tensor, unwanted in _tied(dict(_tensors_in(model.state_dict()))):
        name = _computed(stored, layers)
        owner, _, part = name.rpartition(".")
        layer = layers.get(owner)
        read = partial(Tensor.detach, tensor) if name == stored else partial(getattr, layer, part)
        n_stored = None
        if isinstance(layer, FactorizedLinear) and part == "weight":
            n_stored = layer.B.numel() + layer.C.numel()
        weights.setdefault(name, Weight(name, read, layer, unwanted, n_stored))
    return list(weights.values())


def _computed(name: str, layers: Mapping[str, nn.Module]) -> str:
    """Return the name of what a layer computes from a stored tensor, or else the tensor's own."""
    owner, _, rest = name.partition("parametrizations.")
    if hasattr(layers.get(owner.removesuffix(".")), "parametrizations"):
        return owner + rest.partition(".")[0]
    owner, _, part = name.rpartition(".")
    factor = part in ("B", "C") and isinstance(layers.get(owner), FactorizedLinear)
    return f"{owner}.weight".removeprefix(".") if factor else name


def _together(weights: list[Weight]) -> list[Weight]:
    """Put together what a file keeps apart and only names connect.

    These are ``weight_norm``'s lengths and directions; and of a recurrent layer the weight that tells its hidden size:
    ``weight_hr`` of an LSTM with projections, else ``weight_hh``.
    """
    named = {weight.name: weight for weight in weights}
    for name, weight in list(named.items()):
        for directions, lengths in LENGTHS.items():
            stem = name.removesuffix(directions)
            if stem != name and stem + lengths in named:
                factor = named[stem + lengths]
                read = partial(_normed, weight.read, factor.read)
                named[name] = weight._replace(name=f"{stem}weight", read=read)
                named[factor.name] = factor._replace(unwanted=f"lengths of weight_norm's, multiplied into {stem}weight")
        if found := RECURRENT.search(name):
            layer, number = name[: found.start()], found[2] or ""
            telling = [named.get(f"{layer}weight_{kind}{number}") for kind in ("hr", "hh")]
            named[name] = weight._replace(beside=next((other.read for other in telling if other), None))
    return list(named.values())


def _normed(read_directions: Callable[[], Tensor], read_lengths: Callable[[], Tensor]) -> Tensor:
    """Return the weight that ``weight_norm`` would (Salimans & Kingma 2016, arXiv 1602.07868, equation 2)."""
    directions, lengths = read_directions(), read_lengths()
    if lengths.numel() != max(lengths.shape, default=0) or lengths.dim() != directions.dim():
        raise TypeError(f"lengths of shape {times(lengths.shape)} are not those of weight_norm")
    across = [axis for axis, size in enumerate(lengths.shape) if size == 1]
    return directions * (lengths / directions.norm(dim=across, keepdim=True))


def _tied(named: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor, str]]:
    """Yield tensors, each with why not to measure it: it has no entries yet, or one before it has the same."""
    first: dict[tuple[Any, ...], str] = {}
    for name, tensor in named.items():
        reason = ""
        if is_lazy(tensor):
            reason = "not initialised: the model must run once before it has this"
        elif tensor.layout == torch.strided and not tensor.is_meta and tensor.numel():
            place = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.numel())
            same = first.setdefault(place, name)
            reason = "" if same == name else f"the same tensor as {same}"
        yield name, tensor, reason


def _called(source: str) -> nn.Module:
    """Import ``package.module:callable`` as Python started in this folder would, call it, and check what it returns."""
    module, _, name = source.partition(":")
    sys.path.insert(0, "")
    try:
        model = getattr(importlib.import_module(module), name)()
    except (Exception, SystemExit) as error:  # the code is the user's own: it may raise anything
        raise AnalysisError(f"{source} cannot be called: {_one_line(error)}") from error
    finally:
        sys.path.remove("")
    if not isinstance(model, nn.Module):
        raise AnalysisError(f"{source} returns {type(model).__name__}, not a torch.nn.Module")
    return model


def _one_line(error: BaseException) -> str:
    """Return an error's type and the first sentence that it says."""
    said = str(error).partition("WeightsUnpickler error:")[2] or str(error)  # what PyTorch says after a paragraph
    said = re.split(r"\.\s|\n", said.strip())[0]
    return f"{type(error).__name__}: {_printable(said)}" if said else type(error).__name__
