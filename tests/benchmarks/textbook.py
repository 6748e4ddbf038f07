"""MNIST as tutorials train it: what the benchmarks of training are compared with.

One image at a time through a transform, batches of 32, and the loss fetched after every step.
"""

from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from torchvision import datasets, transforms


def loader(folder: Path) -> DataLoader[Any]:
    """Return the loader of the training images."""
    dataset = datasets.MNIST(folder, transform=transforms.ToTensor())
    return DataLoader(dataset, batch_size=32, shuffle=True)


def network(widths: list[int]) -> nn.Sequential:
    """Return a multilayer perceptron of that shape, ReLU between the layers."""
    layers: list[nn.Module] = [nn.Flatten()]
    for in_features, out_features in pairwise(widths):
        layers += [nn.Linear(in_features, out_features, bias=False), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def train_epoch(model: nn.Module, batches: DataLoader[Any], optimiser: torch.optim.Optimizer) -> tuple[float, float]:
    """Train for one epoch and return the mean loss and the accuracy on the way."""
    device = next(model.parameters()).device
    criterion = nn.CrossEntropyLoss()
    model.train()
    running_loss, correct, total = 0.0, 0, 0
    for images, labels in batches:
        images, labels = images.to(device), labels.to(device)
        optimiser.zero_grad()
        outputs = model(images)
        loss = criterion(outputs, labels)
        loss.backward()
        optimiser.step()
        running_loss += loss.item()
        correct += (outputs.argmax(dim=1) == labels).sum().item()
        total += len(labels)
    return running_loss / len(batches), correct / total
