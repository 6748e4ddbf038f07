"""A text for a language model, as sequences of characters."""

import hashlib
import os
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path
from pydoc_data.topics import topics
from urllib.request import urlopen

import torch

from lowrank_helpers.data import DOWNLOAD_TIMEOUT, Dataset, DatasetError, folders

FILE = Path("tiny_shakespeare", "input.txt")
URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


def load_text(length: int, dataset: str = "auto", data_dir: str | Path = "") -> tuple[Dataset, str]:
    """Load a text: the first 90 % for training, 5 % for validation, and the last 5 % for testing.

    Parameters
    ----------
    length : int
        Characters of a sequence; no two overlap.
    dataset : str
        With ``digits``, which needs no network, the text is that of Python's own help on its language. Otherwise it is
        Tiny Shakespeare (Karpathy 2015), downloaded where it is missing, and Python's where that fails.
    data_dir : str or Path, optional
        The folder with ``tiny_shakespeare/input.txt``, as of :func:`lowrank_helpers.data.load`.

    Returns
    -------
    Dataset, str
        Inputs and labels are int64 (n, length); a label is the character after its input. Then the characters by
        number. The dataset's name says which text it is: ``tiny_shakespeare`` or ``python_help``.

    Raises
    ------
    DatasetError
        The file on this machine is not the published one.
    """
    name, text = "python_help", "\n".join(topics[topic] for topic in sorted(topics))
    if dataset != "digits":
        with suppress(OSError, HTTPException):  # no network, a wrong answer, or a folder that cannot be written
            name, text = "tiny_shakespeare", _shakespeare(folders(data_dir))
    characters = "".join(sorted(set(text)))
    number = {character: i for i, character in enumerate(characters)}
    tokens = torch.tensor([number[character] for character in text])
    n = (len(tokens) - 1) // length
    shares = [n - 2 * (n // 20), n // 20, n // 20]
    (train, validation, test), (train_next, validation_next, test_next) = (
        tokens[first : first + n * length].view(n, length).split(shares) for first in (0, 1)
    )
    return Dataset(name, train, train_next, validation, validation_next, test, test_next, 0.0, 1.0), characters


def _shakespeare(places: list[Path]) -> str:
    for file in (folder / FILE for folder in places if (folder / FILE).is_file()):
        if hashlib.sha256(content := file.read_bytes()).hexdigest() != SHA256:
            raise DatasetError(f"{file} is not the published text: its SHA-256 must be {SHA256}. Replace or remove it")
        return content.decode()
    with urlopen(URL, timeout=DOWNLOAD_TIMEOUT) as answer:
        content = bytes(answer.read())
    if hashlib.sha256(content).hexdigest() != SHA256:
        raise OSError(f"{URL} gave another text")
    file = places[-1] / FILE
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(f".{os.getpid()}")
    partial.write_bytes(content)
    partial.replace(file)  # none sees half of it
    return content.decode()
