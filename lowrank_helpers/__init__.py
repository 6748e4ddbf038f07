"""The science of the series: data, models, training, rank, factors, LoRA, subspaces, statistics, costs, plots.

These modules work on any tensors and networks and import nothing from the packages below, which run and check
notebooks (``series``) and render them (``report``).
"""

from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
