"""Data: where it comes from, what is refused, and that it is what textbooks load."""

import socket
import time
import urllib.request
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from idx_files import write_small_fashion_mnist
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from lowrank_helpers import data
from lowrank_helpers.data import DatasetError, DatasetMissingError
from lowrank_helpers.hashing import checksum


@pytest.fixture
def no_network(monkeypatch):
    """Send every download to a port where nothing listens."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        _use_proxy(monkeypatch, unused.getsockname()[1])
        yield
    urllib.request.install_opener(None)


@pytest.fixture
def empty_project(monkeypatch, tmp_path):
    """Look for data in an empty place: neither the environment's folder nor the project's."""
    monkeypatch.delenv("LOWRANK_DATA_DIR", raising=False)
    monkeypatch.setattr(data, "PROJECT", tmp_path / "project")
    return tmp_path / "project"


def _use_proxy(monkeypatch, port):
    for variable in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(variable, f"http://127.0.0.1:{port}")
    for variable in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    urllib.request.install_opener(None)  # urllib reads the proxies once, when it makes its opener


def _damaged_mnist(folder):
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    (raw / "t10k-labels-idx1-ubyte").write_bytes(b"\0\0\x08\x01 cut off")


def test_mnist_is_the_published_set(mnist_dir):
    mnist = data.load("mnist", mnist_dir)
    assert mnist.train_images.shape == (60_000, 784) and mnist.test_images.shape == (10_000, 784)
    assert mnist.train_images.dtype == torch.float32 and mnist.train_labels.dtype == torch.int64
    assert (mnist.mean, mnist.std) == pytest.approx((0.1307, 0.3081), abs=5e-5)  # the constants of every tutorial
    assert torch.bincount(mnist.test_labels).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]


@pytest.mark.parametrize("name", ["mnist", "auto"])
def test_one_altered_byte_of_mnist_is_refused(name, mnist_dir, tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for file in data.MNIST_MD5:
        (raw / file).symlink_to(mnist_dir / "MNIST" / "raw" / file)
    altered = raw / "train-labels-idx1-ubyte"
    content = bytearray(altered.read_bytes())
    content[-1] ^= 1
    altered.unlink()
    altered.write_bytes(content)
    with pytest.raises(DatasetError, match=r"train-labels-idx1-ubyte.*expected MD5 a25bea7.*found [0-9a-f]{32}"):
        data.load(name, tmp_path)


def test_data_dir_goes_before_the_variable_and_the_variable_before_the_project(monkeypatch, empty_project, tmp_path):
    places = [tmp_path / "parameter", tmp_path / "variable", empty_project / "data"]
    for place in places:
        _damaged_mnist(place)  # each folder's refusal tells that it was the first one looked at
    monkeypatch.setenv("LOWRANK_DATA_DIR", str(places[1]))
    for folder, expected in ((places[0], places[0]), ("", places[1])):
        with pytest.raises(DatasetError, match=str(expected)):
            data.load("mnist", folder)
    monkeypatch.delenv("LOWRANK_DATA_DIR")
    with pytest.raises(DatasetError, match=str(places[2])):
        data.load("mnist")


def test_auto_falls_back_to_digits_and_says_so(no_network, empty_project):
    assert data.resolve("auto") == "digits"
    assert data.load("auto").name == "digits"


def test_a_named_set_that_cannot_be_had_lists_the_ways_to_provide_it(no_network, empty_project, capfd):
    with pytest.raises(DatasetMissingError) as refusal:
        data.load("kmnist")
    for part in ("kmnist", "LOWRANK_DATA_DIR", "data_dir", "digits", str(empty_project / "data"), "t10k-labels"):
        assert part in str(refusal.value)
    assert capfd.readouterr() == ("", "")


def test_a_server_that_never_answers_is_given_up(monkeypatch, empty_project):
    monkeypatch.setattr(data, "DOWNLOAD_TIMEOUT", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        _use_proxy(monkeypatch, silent.getsockname()[1])
        start = time.monotonic()
        with pytest.raises(DatasetMissingError, match="timed out"):
            data.load("mnist")
        assert time.monotonic() - start < 5
    urllib.request.install_opener(None)
    assert socket.getdefaulttimeout() is None


def test_an_unknown_name_is_refused_with_those_allowed():
    with pytest.raises(DatasetError, match=r"'cifar' is unknown; allowed: auto, mnist, fashion_mnist, kmnist, digits"):
        data.load("cifar")


def test_files_of_other_sets_are_read_as_they_lie(tmp_path):
    (train_images, _), (test_images, test_labels) = write_small_fashion_mnist(tmp_path).values()
    raw = tmp_path / "FashionMNIST" / "raw"
    fashion = data.load("fashion_mnist", tmp_path)
    assert fashion.test_labels.tolist() == test_labels.tolist()
    pixels = train_images / 255
    np.testing.assert_allclose(fashion.mean, pixels.mean(), rtol=1e-6)
    expected = (test_images.reshape(10, 784) / 255 - pixels.mean()) / pixels.std(ddof=1)
    np.testing.assert_allclose(fashion.test_images.numpy(), expected, atol=1e-5)
    whole = (raw / "t10k-images-idx3-ubyte").read_bytes()
    for damaged in (whole[:1000], (raw / "t10k-labels-idx1-ubyte").read_bytes()):
        (raw / "t10k-images-idx3-ubyte").write_bytes(damaged)
        with pytest.raises(DatasetError, match=r"FashionMNIST/raw are damaged"):
            data.load("fashion_mnist", tmp_path)


def test_digits_are_scikit_learns_enlarged_stratified_and_always_the_same(digits):
    from sklearn.datasets import load_digits

    assert (len(digits.train_images), len(digits.test_images)) == (1437, 360)
    std, mean = torch.std_mean(digits.train_images)
    assert (mean.item(), std.item()) == pytest.approx((0, 1), abs=1e-4)
    for labels in (digits.train_labels, digits.test_labels):
        assert (torch.bincount(labels) / len(labels)).sub(0.1).abs().max() < 0.01
    assert data.load("digits").fingerprint() == digits.fingerprint()
    rows = {row.numpy().tobytes() for row in digits.train_images}
    assert not any(row.numpy().tobytes() in rows for row in digits.test_images)
    # Resampling keeps the mean of each image that it enlarges.
    together = torch.cat([digits.train_images, digits.test_images]) * digits.std + digits.mean
    expected = np.sort(load_digits().images.mean(axis=(1, 2)) / 16)
    np.testing.assert_allclose(np.sort(together.mean(dim=1).numpy()), expected, atol=0.02)


def test_a_part_of_a_set_is_that_part_with_its_own_fingerprint(digits):
    one, two = torch.tensor([1]), torch.tensor([1, 2])
    part = digits.select(train=two, test=one)
    assert torch.equal(part.train_labels, digits.train_labels[1:3])
    assert torch.equal(part.test_images, digits.test_images[1:2])
    assert part.fingerprint() == digits.select(train=two, test=one).fingerprint()
    mask = digits.train_labels != 7
    assert 7 not in digits.select(train=mask).train_labels and len(digits.select(train=mask).test_labels) == 360


def _by_numpy(data):
    data.train_labels.numpy()[:] = data.train_labels.numpy()[::-1].copy()  # unknown to PyTorch
    return data


@pytest.mark.parametrize(
    "change",
    [
        _by_numpy,
        lambda data: data.train_images.add_(0.1) is None or data,
        lambda data: replace(data, train_labels=data.train_labels.flip(0)),
        lambda data: data.select(train=torch.arange(100)),
        lambda data: data.select(train=torch.arange(len(data.train_labels)).flip(0)),
        lambda data: data.select(validation=torch.arange(10)),
    ],
)
def test_whatever_a_student_does_to_the_data_changes_its_fingerprint(change):
    data_set = data.load("digits").hold_out()
    before = data_set.fingerprint()
    assert change(data_set).fingerprint() != before


@given(st.permutations(range(6)), st.integers(0, 5))
def test_a_checksum_sees_names_types_shapes_the_order_and_each_value(order, place):
    labels = torch.arange(6)
    of_labels = checksum({"labels": labels})
    assert (checksum({"labels": labels[list(order)]}) == of_labels) == (order == sorted(order))
    changed = labels.clone()
    changed[place] += 1
    others = {"values": {"labels": changed}, "names": {"label": labels}, "shapes": {"labels": labels.reshape(2, 3)}}
    others["types"] = {"labels": labels.view(torch.float64)}
    assert of_labels not in {checksum(other) for other in others.values()}
    strided = torch.stack([labels, labels], dim=1)[:, 0]
    assert checksum({"labels": strided}) == of_labels


def test_validation_images_are_training_images_set_aside(digits):
    split = digits.hold_out()
    sizes = {name: len(labels) for name, (_, labels) in split.splits().items()}
    assert sizes == {"train": 1198, "validation": 239, "test": 360}
    together = torch.cat([split.train_images, split.validation_images]).numpy()
    assert sorted(map(bytes, together)) == sorted(map(bytes, digits.train_images.numpy()))
    assert split.fingerprint() == digits.hold_out().fingerprint(), "the same ones each time"
    assert list(digits.splits()) == ["train", "test"]


def test_batches_are_those_of_a_textbook_loader():
    images, labels = torch.arange(103.0)[:, None], torch.arange(103)
    for epoch in (1, 2):
        sampler = RandomSampler(images, generator=data.epoch_generator(seed=5, epoch=epoch))
        loader = DataLoader(TensorDataset(images, labels), batch_size=10, sampler=sampler)
        ours = list(data.batches(103, 10, seed=5, epoch=epoch))
        assert [len(index) for index in ours] == [10] * 10 + [3]
        for (image, label), index in zip(loader, ours, strict=True):
            assert torch.equal(image, images[index]) and torch.equal(label, labels[index])


def test_each_seed_and_epoch_has_its_own_order():
    orders = [torch.cat(list(data.batches(50, 7, seed=s, epoch=e))) for s in range(3) for e in range(1, 4)]
    assert len({tuple(order.tolist()) for order in orders}) == len(orders)
