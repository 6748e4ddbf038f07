"""Training steps on a CUDA device, each with one launch.

A step of a small network is some hundred kernels that run for microseconds each: to launch them one by one takes five
times as long as they run. So they are recorded once, as a ``torch.cuda.CUDAGraph``, and replayed.
"""

from collections.abc import Callable

import torch
from torch import Tensor

LAUNCHED = 3  # steps launched as usual before the recording, as PyTorch asks


class GraphSteps:
    """Takes recorded steps for the images whose numbers an index holds.

    The first steps are launched as usual, on the stream of the recording; so is the smaller batch that ends an epoch,
    which comes too seldom to be recorded.

    Parameters
    ----------
    step : callable
        Moves the network once for the images of an index (batch_size,).
    optimiser : torch.optim.Optimizer
        Moves it; gets a learning rate on the device and becomes capturable.
    """

    def __init__(
        self, step: Callable[[Tensor], None], optimiser: torch.optim.Optimizer, batch_size: int, device: torch.device
    ) -> None:
        for group in optimiser.param_groups:
            group |= {"lr": torch.tensor(group["lr"], device=device), "capturable": True}
        self._step, self._optimiser = step, optimiser
        self._stream = torch.cuda.Stream(device)
        self._n_launched = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._index = torch.empty(batch_size, dtype=torch.int64, device=device)

    def __call__(self, index: Tensor) -> None:
        """Move the network once, against the gradient of the batch of these images."""
        if self._n_launched < LAUNCHED or len(index) < len(self._index):
            self._n_launched += 1
            usual = torch.cuda.current_stream(index.device)
            self._stream.wait_stream(usual)
            with torch.cuda.stream(self._stream):
                self._step(index)
            usual.wait_stream(self._stream)
            return
        self._index.copy_(index)
        if not self._graph:
            self._graph = self._recorded()
        self._graph.replay()

    def _recorded(self) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        self._optimiser.zero_grad()  # gradients are the graph's own
        # Not torch.cuda.graph, which collects garbage and gives all free memory back first, for each network again.
        with torch.cuda.stream(self._stream):
            graph.capture_begin()
            try:
                self._step(self._index)
            finally:
                graph.capture_end()
        return graph
