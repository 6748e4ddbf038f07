"""The science of the series, for any tensors and networks; ``series`` runs notebooks and ``report`` renders them."""

from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
