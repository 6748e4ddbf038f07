"""The ranks of somebody else's network: every matrix of a file of weights, or of a model, by every measure.

Files are mapped and measured a tensor at a time, so that a file may be larger than memory. No code of a file is ever
executed: safetensors hold none, and of PyTorch's files only tensors and plain containers are unpickled.
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
from itertools import product
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
from lowrank_helpers.rank import Array
from lowrank_helpers.unfold import LAYERS, RECURRENT, Unfolded, format_shape, unfold

OPTIMISER = "an optimiser's state, no weight"
# What PyTorch's optimisers call their state of a weight, as a part of a tensor's name.
MOMENTS = re.compile(r"(^|\.)(max_exp_avg_sq|exp_avg_sq|exp_avg|exp_inf|momentum_buffer|square_avg|acc_delta)(\.|$)")
ROUNDING = 1e-9  # by which five equal directions may measure as more than five
HALF = ("float16", "bfloat16")
BEYOND = "beyond Marchenko–Pastur"  # the column of directions beyond the edge
NO_VALUES = torch.empty(1, device="meta")  # in place of a tensor that has none or cannot be read


class AnalysisError(ValueError):
    """A source cannot be analysed; the message says why, in one line."""


class Weight(NamedTuple):
    """A tensor of a network.

    Attributes
    ----------
    name : str
    read : callable
        Returns the tensor; a file is read, and a product computed, only then.
    shape : tuple of int
    layer : nn.Module, optional
        The layer that the tensor belongs to, if known.
    unwanted : str
        Why the tensor is not measured; empty if it is.
    n_stored : int
        Size of the parameters that a computed tensor is made of, such as two factors; 0 if the tensor itself is stored.
    """

    name: str
    read: Callable[[], Tensor]
    shape: tuple[int, ...]
    layer: nn.Module | None = None
    unwanted: str = ""
    n_stored: int = 0


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
    weights = _weights(source)
    shapes = {weight.name: weight.shape for weight in weights}
    rows: dict[str, dict[str, Any]] = {}
    skipped: dict[str, str] = {}
    for weight in tqdm(weights, desc="measuring", unit="tensor"):
        try:
            for name, row in _measured(weight, shapes).items():
                rows[_unused(name, rows)] = row
        except ValueError as reason:
            skipped[weight.name] = str(reason)
    if not rows:
        reasons = [f"{name} ({reason})" for name, reason in skipped.items()]
        said = ", ".join(reasons[:3] + ["…"] * (len(reasons) > 3)) or "it holds no tensors"
        raise AnalysisError(f"{source} has no matrix to measure: {said}")
    return Analysis(source, pd.DataFrame.from_dict(rows, orient="index").rename_axis("matrix"), skipped)


@torch.no_grad()
def _measured(weight: Weight, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, dict[str, Any]]:
    """Return a row of the table for each matrix of a tensor, or raise a ``ValueError`` that says why there is none."""
    if weight.unwanted:
        raise ValueError(weight.unwanted)
    try:
        tensor = weight.read()
        if reason := _no_matrix(tensor) or _elementwise(weight, tensor, shapes):
            raise ValueError(reason)
        n_stored, n = weight.n_stored or tensor.numel(), tensor.numel()
        parts = _unfolded(weight, tensor, shapes)
        return {name: _row(part, n_stored * part.matrix.numel() // n) for name, part in parts.items()}
    except (RuntimeError, MemoryError) as error:  # PyTorch says "can't allocate memory" by a RuntimeError
        raise ValueError(f"could not be measured: {_one_line(error)}") from error


def _unfolded(weight: Weight, tensor: Tensor, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Unfolded]:
    """Return the matrices of a tensor by name; a stack, such as a layer's experts, has several."""
    if tensor.dim() == 2 or _is_convolution(weight, shapes):
        return unfold(weight.name, tensor, weight.layer, _hidden_size(weight.name, shapes))
    while tensor.dim() > 2 and len(tensor) == 1:
        tensor = tensor[0]
    of, stack = format_shape(tensor.shape[-2:]), tensor.shape[:-2]
    remark = f"of a stack of {format_shape(stack)}" if stack else "axes of size 1 dropped"
    indices = product(*map(range, stack))
    short = weight.name.removesuffix(".weight")
    return {".".join([short, *map(str, index)]): Unfolded(tensor[index], of, remark) for index in indices}


def _is_convolution(weight: Weight, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Return whether a tensor of three axes or more is a convolution's or bilinear layer's weight, and no stack.

    The layer decides, if it is known. Otherwise a convolution's weight is called ``weight``. One with three axes also
    has a vector of biases, whereas a stack has a matrix; or it has more filters than a filter has rows or columns.
    """
    if isinstance(weight.layer, nn.Bilinear) or hasattr(weight.layer, "kernel_size"):
        return True
    owner, _, part = weight.name.rpartition(".")
    if part != "weight" or len(weight.shape) > 3:
        return part == "weight"
    has_biases = len(shapes.get(f"{owner}.bias".removeprefix("."), ())) == 1
    return has_biases or (weight.layer is None and weight.shape[0] >= min(weight.shape[1:]))


def _hidden_size(name: str, shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    """Return the hidden size of a weight's recurrent layer: the columns of its weight for the hidden units."""
    if not (found := RECURRENT.search(name)):
        return None
    beside = [f"{name[: found.start()]}weight_{kind}{found[2] or ''}" for kind in ("hr", "hh")]
    return next((math.prod(shapes[other][1:]) for other in beside if other in shapes), None)


def _elementwise(weight: Weight, tensor: Tensor, shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Return why a tensor with the shape of a matrix is none, by its name, layer or values; empty if it is one."""
    owner, _, part = weight.name.rpartition(".")
    of_weight, of_bias = (shapes.get(f"{owner}.{name}".removeprefix("."), ()) for name in ("weight", "bias"))
    scales = part in ("weight", "bias") and of_weight == of_bias
    if scales or isinstance(weight.layer, (nn.LayerNorm, nn.RMSNorm)):
        return "scales or shifts entry by entry, as a normalisation's"
    if part == "bias" and of_weight[:1] == of_bias[:1] and len(of_weight) > len(of_bias):
        return "biases, a vector for each matrix of a stack"
    applied = weight.layer is None or weight.n_stored or isinstance(weight.layer, LAYERS)
    if 1 in tensor.shape and tensor.dim() == 2 and not (applied and "weight" in part):
        return "a vector"
    return "a mask: zero and one other value" if _is_mask(tensor) else ""


def _is_mask(tensor: Tensor) -> bool:
    """Return whether a square tensor holds zero and one other value; with two axes, all of it in one triangle."""
    n, lowest, highest = tensor.shape[-1], tensor.min(), tensor.max()
    if n < 3 or tensor.shape[-2] != n or bool(lowest) == bool(highest):
        return False
    kept = tensor == (lowest if lowest else highest)
    triangles = [int(triangle.sum()) for triangle in (kept.tril(-1), kept.triu(1))]
    two_values = bool((kept | (tensor == 0)).all())
    return two_values and (tensor.dim() > 2 or sorted(triangles) == [0, n * (n - 1) // 2])


def _no_matrix(tensor: Tensor) -> str:
    """Return why a tensor of this type and shape cannot be measured; empty if it can."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    reasons = {
        "quantised: integers that stand for values by a scale": lambda: tensor.is_quantized,
        f"sparse ({str(tensor.layout).removeprefix('torch.')})": lambda: tensor.layout != torch.strided,
        "without values: not initialised, or of a type that this PyTorch cannot read": lambda: tensor.is_meta,
        f"complex numbers ({dtype})": tensor.is_complex,
        f"integers ({dtype}): counts, indices or quantised values": lambda: not tensor.is_floating_point(),
        f"quantised ({dtype}), which means something only with its scales": lambda: tensor.dtype.itemsize == 1,
        f"empty, {format_shape(tensor.shape)}": lambda: tensor.numel() == 0,
        "a single number": lambda: tensor.numel() == 1,
        "a vector": lambda: sum(size > 1 for size in tensor.shape) == 1 and tensor.dim() != 2,
        "a view of fewer numbers than it has entries": lambda: tensor.nbytes > tensor.untyped_storage().nbytes(),
    }
    return next((reason for reason, applies in reasons.items() if applies()), "")


def _row(part: Unfolded, n_parameters: int) -> dict[str, Any]:
    """Measure one matrix."""
    matrix = part.matrix
    shape = (matrix.shape[0], matrix.shape[1])
    s = rank.singular_values(matrix)
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
    if not file.is_file() or file.suffix not in READERS:
        kind = "a folder" if file.is_dir() else "of no known format" if file.is_file() else "no file"
        raise AnalysisError(f"{source} is {kind}; give a file ({', '.join(READERS)}) or package.module:callable")
    return _together(_listed(READERS[file.suffix](file)))


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    """Map the tensors of a file, which has no order of its own: layer 2 comes before layer 10."""

    def natural(name: str) -> list[tuple[str, int]]:
        return [(text, int(number or 0)) for text, number in re.findall(r"(\D*)(\d*)", name)]

    def tensor(name: str) -> Tensor:
        try:
            return stored.get_tensor(name)
        except (SafetensorError, TypeError, KeyError, RuntimeError):  # a type that this PyTorch does not have
            return NO_VALUES

    try:
        with safe_open(file, framework="pt") as stored:
            return {name: tensor(name) for name in sorted(stored.keys(), key=natural)}
    except (SafetensorError, OSError) as error:
        raise AnalysisError(f"{file} cannot be read as safetensors: {_one_line(error)}") from error


def _read_pytorch(file: Path) -> Any:
    """Load the tensors and containers of a file; tensors are mapped where its format allows."""
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


READERS: dict[str, Callable[[Path], Any]] = {
    ".safetensors": _read_safetensors,
    **dict.fromkeys((".pt", ".pth", ".bin"), _read_pytorch),
}


def _check_archive(file: Path) -> None:
    """Refuse an archive with a damaged record, which PyTorch would load unseen, or with a program."""
    with zipfile.ZipFile(file) as archive:
        if damaged := archive.testzip():
            raise AnalysisError(f"{file} is damaged: {_printable(damaged)} in it does not match its checksum")
        if any(name.endswith("/constants.pkl") for name in archive.namelist()):
            raise AnalysisError(f"{file} is a program of TorchScript's, not weights; save its state_dict() instead")


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
    for path, tensor, unwanted in _tensors_in(loaded):
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


def _tensors_in(loaded: Any) -> Iterator[tuple[str, Tensor, str]]:
    """Yield tensors by dotted name, in order, each with the reason to skip it: it belongs to an optimiser.

    An optimiser's state is a mapping with PyTorch's ``state`` and ``param_groups`` or with optax's ``mu`` and ``nu``.
    A container that holds itself is entered once.
    """
    pending: list[tuple[str, Any, str]] = [("", loaded, "")]
    entered: set[int] = set()
    while pending:
        name, value, unwanted = pending.pop()
        unwanted = OPTIMISER if MOMENTS.search(name) else unwanted
        if isinstance(value, Tensor):
            yield name or "tensor", NO_VALUES if is_lazy(value) else value.detach(), unwanted
        elif isinstance(value, (Mapping, list, tuple)) and id(value) not in entered:
            entered.add(id(value))
            items = value if isinstance(value, Mapping) else dict(enumerate(value))
            if {"state", "param_groups"} <= items.keys() or {"mu", "nu"} <= items.keys():
                unwanted = OPTIMISER
            pending += [(f"{name}.{key}".removeprefix("."), item, unwanted) for key, item in items.items()][::-1]


def of_model(model: nn.Module) -> list[Weight]:
    """List the tensors of a model's ``state_dict``; a weight that a layer computes takes the place of its parts.

    A layer of factors has their product, an adapted one W + ΔW, and a pruned or parametrized one, as by ``weight_norm``
    or ``spectral_norm``, the weight that it works with.
    """
    _compute(model)
    layers = dict(model.named_modules(remove_duplicate=False))
    parameters = dict(model.named_parameters(remove_duplicate=False))
    stored = _listed(model.state_dict())
    places = {_place(weight.read()) for weight in stored.values()} - {()}
    weights: dict[str, Weight] = {}
    for name, weight in stored.items():
        unwanted = weight.unwanted
        for whole in _candidates(name, len(weight.shape)):
            owner, _, part = whole.rpartition(".")
            try:
                value = getattr(layers.get(owner), part, None)
            except Exception:  # a property of the user's own may raise anything
                continue
            if whole not in stored and isinstance(value, Tensor) and _place(value) not in places:
                n_stored = math.prod(weight.shape) if name in parameters else 0
                n_stored += weights[whole].n_stored if whole in weights else 0
                read = partial(getattr, layers[owner], part)
                weights[whole] = Weight(whole, read, tuple(value.shape), layers[owner], n_stored=n_stored)
                unwanted = f"a part of {whole}"
                break
        if name not in parameters and len(weight.shape) > 1:
            unwanted = unwanted or "a buffer, no parameter"
        weights[name] = weight._replace(layer=layers.get(name.rpartition(".")[0]), unwanted=unwanted)
    return list(weights.values())


def _candidates(name: str, n_axes: int) -> Iterator[str]:
    """Yield names that a layer may compute from a stored tensor: ``weight`` from ``weight_orig`` or ``base.weight``."""
    path = name.replace("parametrizations.", "")
    owners = [path[: dot.start()] for dot in re.finditer(r"\.", path)][::-1]
    yield from (path.rpartition("_")[0], *owners)
    if n_axes > 1:
        yield from (*(f"{owner}.weight" for owner in owners), "weight")


@torch.no_grad()
def _compute(model: nn.Module) -> None:
    """Update weights that ``torch.nn.utils`` computes only before a layer's pass, such as pruned ones."""
    for layer in model.modules():
        for hook in layer._forward_pre_hooks.values():
            if type(hook).__module__.startswith("torch.nn.utils."):
                hook(layer, ())


def _normed(directions: Tensor, lengths: Tensor) -> Tensor:
    """Return the weight that ``weight_norm`` would (Salimans & Kingma 2016, arXiv 1602.07868, equation 2)."""
    across = [axis for axis, size in enumerate(lengths.shape) if size == 1]
    if lengths.dim() != directions.dim() or len(across) < lengths.dim() - 1:
        raise TypeError(f"lengths of shape {format_shape(lengths.shape)} are not those of weight_norm")
    return directions * (lengths / directions.norm(dim=across, keepdim=True))


def _product(B: Tensor, C: Tensor) -> Tensor:
    """Return the weight of a low-rank layer, of a convolution in its shape."""
    return (B.flatten(1) @ C.flatten(1)).view(len(B), *C.shape[1:])


# A file keeps some weights as two tensors: the ends of their names, the end of the weight's, and how to compute it.
JOINED: list[tuple[tuple[str, ...], str, Callable[..., Tensor]]] = [
    (("_v", "_g"), "", _normed),
    ((".original1", ".original0"), "", _normed),
    (("_orig", "_mask"), "", torch.mul),
    ((".B.weight", ".C.weight"), ".weight", _product),  # LowRankLayer
    ((".lora_B", ".lora_A"), ".lora", torch.matmul),
    ((".lora_B.weight", ".lora_A.weight"), ".lora", torch.matmul),  # PEFT's
]


def _together(stored: Mapping[str, Weight]) -> list[Weight]:
    """Put together the weights that a file keeps as two tensors, connected by their names and shapes alone."""
    named = {f".{name}": weight for name, weight in stored.items() if not weight.unwanted}
    together = {name: [weight] for name, weight in stored.items()}
    for endings, name, apply in JOINED:
        for stem in [first.removesuffix(endings[0]) for first in named if first.endswith(endings[0])]:
            parts = [named[stem + ending] for ending in endings if stem + ending in named]
            try:
                shape = tuple(apply(*(torch.empty(part.shape, device="meta") for part in parts)).shape)
            except (RuntimeError, TypeError):  # a part is missing, or the shapes do not fit
                continue
            whole = (stem.replace(".parametrizations.", ".") + name).removeprefix(".")
            n_stored = sum(math.prod(part.shape) for part in parts if not part.name.endswith("_mask"))
            for part in parts:
                together[part.name] = [part._replace(unwanted=f"a part of {whole}")]
            together[parts[0].name].insert(0, Weight(whole, partial(_applied, apply, parts), shape, n_stored=n_stored))
    return [weight for several in together.values() for weight in several]


def _applied(apply: Callable[..., Tensor], parts: list[Weight]) -> Tensor:
    return apply(*(part.read() for part in parts))


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
