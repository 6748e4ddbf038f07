"""What a piece of work costs: time, the memory it holds at once, and the bytes that training keeps between steps."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from lowrank_helpers.models import n_trainable
from lowrank_helpers.timing import median_seconds
from lowrank_helpers.training import products_in


def peak_bytes(work: Callable[[], object], device: torch.device) -> int:
    """Return the most bytes that work holds at once, above what was held before it.

    On CUDA the allocator counts them. Elsewhere they are summed from the allocations and releases that PyTorch's
    profiler lists; on Apple's MPS it sees the CPU's share alone.

    Examples
    --------
    >>> peak_bytes(lambda: torch.zeros(1000), torch.device("cpu"))
    4000
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler writes a line at each start and stop
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = profiler.profiler.kineto_results.events()
    memory = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    peak: int = max(accumulate((change for _, change in memory), initial=0))
    return peak


@dataclass(frozen=True)
class StepCosts:
    """What a training step costs.

    Attributes
    ----------
    trained : int
        Parameters that are trained.
    kept_bytes, peak_bytes : int
        Gradients and Adam's state, which stay from step to step; and the most that a step holds at once beyond these.
    operations : int
        Of its matrix products, forward and backward, as PyTorch counts them: 2·n·m·b for n×m and b samples.
    seconds : float
        The median of repeated steps.
    """

    trained: int
    kept_bytes: int
    peak_bytes: int
    operations: int
    seconds: float


def step_costs(model: nn.Module, images: Tensor, labels: Tensor, precision: str = "float32") -> StepCosts:
    """Measure a step of Adam on a batch.

    Parameters
    ----------
    model : nn.Module
        Frozen parameters stay as they are; the others hardly change, as the learning rate is 1e-6.
    images, labels : Tensor, shapes (n, n_inputs) and (n,)
    precision : {"float32", "bfloat16"}
        Of the matrix products.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.Adam(trained, lr=1e-6, fused=images.device.type != "mps")

    def step() -> None:
        with products_in(precision, images.device):
            logits = model(images)
        optimiser.zero_grad()
        F.cross_entropy(logits.float(), labels).backward()
        optimiser.step()

    with FlopCounterMode(display=False) as counter:
        step()  # the first also makes the optimiser's state
    kept = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    kept += [tensor for state in optimiser.state.values() for tensor in state.values()]
    return StepCosts(
        trained=n_trainable(model),
        kept_bytes=sum(tensor.nbytes for tensor in kept),
        peak_bytes=peak_bytes(step, images.device),
        operations=counter.get_total_flops(),
        seconds=median_seconds(step, images.device),
    )
