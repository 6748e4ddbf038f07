import numpy as np
import pytest
import torch

from lowrank_helpers import models
from lowrank_helpers.layers import factorize
from lowrank_helpers.report import explorer
from lowrank_helpers.training import evaluate, predict, sample


@pytest.fixture(scope="module")
def model():
    return models.mlp([784, 32, 16, 10], seed=0)


@pytest.fixture(scope="module")
def measured(model, digits):
    before = [weight.clone() for weight in model.parameters()]
    found = explorer.measured(model, digits)
    assert all(map(torch.equal, before, model.parameters())), "the network stays as it was"
    return found


def test_what_a_cut_does_to_the_matrix_and_the_network_is_measured(model, measured, digits):
    images, labels = sample(digits.test_images, digits.test_labels, explorer.N_IMAGES)
    layer, cut = measured["layers"]["fc1"], measured["layers"]["fc1"]["cuts"]["truncated SVD"]
    W, X = model.fc1.weight.detach().double().numpy(), images.double().numpy().T
    U, s, Vh = np.linalg.svd(W, full_matrices=False)
    for i, rank in enumerate(layer["ranks"]):
        lost = W - (U[:, :rank] * s[:rank]) @ Vh[:rank]
        assert cut["matrix"][i] == pytest.approx(100 * np.linalg.norm(lost) / np.linalg.norm(W), abs=0.1)
        assert cut["outputs"][i] == pytest.approx(100 * np.linalg.norm(lost @ X) / np.linalg.norm(W @ X), abs=0.1)
        small = factorize(model, {"fc1": rank})
        assert cut["accuracy"]["test"][i] == pytest.approx(100 * evaluate(small, images, labels).accuracy, abs=0.3)
        same = np.mean(predict(small, images[:16]).argmax(dim=1).numpy() == cut["answers"][i])
        assert same >= 15 / 16, "rounding may turn a close answer"
    assert [layer["shape"], layer["ranks"][0], layer["ranks"][-1]] == [[32, 784], 1, 32]


def test_each_cut_is_best_at_its_own_error(measured):
    cuts = measured["layers"]["fc1"]["cuts"]
    plain, aware = cuts["truncated SVD"], cuts["activation-aware SVD"]
    assert all(np.array(plain["matrix"]) <= aware["matrix"]) and min(plain["matrix"][:-1]) > 0
    assert np.mean(aware["outputs"]) < np.mean(plain["outputs"])
