"""Analyse networks of torchvision and transformers with random weights, and write docs/architectures.md.

Each is built and measured in a process of its own, so that its peak memory is its own.
"""

import resource
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torchvision
import transformers
from torch import nn

from lowrank_helpers import PROJECT
from lowrank_helpers.analysis import analyze

SMALL = {"num_hidden_layers": 2, "hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8}
TORCHVISION = ("resnet50", "densenet121", "mobilenet_v3_large", "convnext_tiny", "vit_b_16", "swin_t")
TRANSFORMERS = {
    "GPT2": {},
    "Bert": {},
    "ViT": {},
    "Whisper": {},
    "Llama": SMALL | {"num_key_value_heads": 4},
    "Mixtral": SMALL | {"num_key_value_heads": 4, "num_local_experts": 4},
}
TITLE = """# What `lowrank analyze` sees

Networks of torchvision {torchvision} and transformers {transformers} with random weights, in their default sizes; Llama
and Mixtral with two layers of width 512. Written by `python scripts/architectures.py`, on two cores. The memory is the
most that the process held, with Python, PyTorch and the network in it.

| network | matrices | left out, and why | seconds | peak memory (GB) |
|---|--:|---|--:|--:|
"""
_chosen = ""  # in the process that measures it


def build() -> nn.Module:
    """Return the network that this process measures."""
    if _chosen in TORCHVISION:
        return torchvision.models.get_model(_chosen, weights=None)
    config = getattr(transformers, f"{_chosen}Config")(**TRANSFORMERS[_chosen])
    return getattr(transformers, f"{_chosen}Model")(config)


def row(name: str) -> str:
    """Measure one network, and return its line of the table."""
    global _chosen
    _chosen, start = name, time.perf_counter()
    found = analyze(f"{__name__}:build")
    seconds = time.perf_counter() - start
    left_out = "; ".join(f"{n}: {reason}" for reason, n in Counter(found.skipped.values()).most_common())
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # of kibibytes
    return f"| {name} | {len(found.table)} | {left_out} | {seconds:.0f} | {memory:.1f} |"


if __name__ == "__main__":
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        rows = list(pool.map(row, [*TORCHVISION, *TRANSFORMERS]))
    title = TITLE.format(torchvision=torchvision.__version__, transformers=transformers.__version__)
    (PROJECT / "docs" / "architectures.md").write_text(title + "\n".join(rows) + "\n")
