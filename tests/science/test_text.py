"""The text of the language model: where it comes from, what is refused, and that a label is the next character."""

import hashlib

import pytest
import torch

from lowrank_helpers import data, text
from lowrank_helpers.data import DatasetError
from lowrank_helpers.models import LanguageModel
from lowrank_helpers.text import load_text
from lowrank_helpers.training import Recipe, evaluate, fit

PLAY = "".join(chr(ord("a") + i * i % 26) for i in range(1000))


@pytest.fixture
def published(monkeypatch, tmp_path):
    """A short text in place of the published one, on a server, and no folder that has it."""
    (tmp_path / "server.txt").write_text(PLAY)
    monkeypatch.setattr(text, "URL", (tmp_path / "server.txt").as_uri())
    monkeypatch.setattr(text, "SHA256", hashlib.sha256(PLAY.encode()).hexdigest())
    return tmp_path / "data"


def test_splits_follow_each_other_in_the_text_and_a_label_is_the_next_character(published):
    play, characters = load_text(8, data_dir=published)
    assert play.name == "tiny_shakespeare"
    read = torch.cat([images.flatten() for images, _ in play.splits().values()])
    asked = torch.cat([labels.flatten() for _, labels in play.splits().values()])
    assert "".join(characters[i] for i in read) == PLAY[:992]
    assert "".join(characters[i] for i in asked) == PLAY[1:993]
    assert {split: len(labels) for split, (_, labels) in play.splits().items()} == {
        "train": 112, "validation": 6, "test": 6,
    }  # fmt: skip


def test_the_text_is_downloaded_once_and_an_altered_one_refused(published, monkeypatch):
    load_text(8, data_dir=published)
    monkeypatch.setattr(text, "URL", "http://127.0.0.1:1/")
    assert load_text(8, data_dir=published)[0].name == "tiny_shakespeare"
    assert [file.name for file in (published / text.FILE).parent.iterdir()] == ["input.txt"]
    (published / text.FILE).write_text(PLAY + "!")
    with pytest.raises(DatasetError, match=r"input\.txt is not the published text"):
        load_text(8, data_dir=published)


@pytest.mark.parametrize("wrong", ["http://127.0.0.1:1/", "another text"])
def test_without_the_published_text_it_is_pythons_help_and_nothing_is_kept(published, wrong, monkeypatch):
    monkeypatch.setattr(text, "URL" if "http" in wrong else "SHA256", wrong)
    assert load_text(8, data_dir=published)[0].name == "python_help"
    assert not published.exists()


def test_digits_takes_the_text_that_needs_no_network(monkeypatch):
    monkeypatch.setattr(text, "folders", lambda _: pytest.fail("it looked for the other text"))
    play, characters = load_text(64, "digits")
    assert play.name == "python_help" and play.train_labels.numel() > 10 * data.N_PIXELS
    assert play.train_images.max() < len(characters)


def test_a_language_model_learns_which_character_follows(published):
    play, characters = load_text(8, data_dir=published)
    model = LanguageModel(len(characters), context=8, width=16, n_blocks=1, seed=0)
    history = fit(model, play, Recipe(12, 16, 2e-2, precision="bfloat16"))
    scored = evaluate(model, play.test_images, play.test_labels, "bfloat16")
    assert (scored.loss, scored.accuracy) == pytest.approx((history.final("test").loss, history.final("test").accuracy))
    with torch.no_grad():
        likelihood = model(play.test_images).log_softmax(-1).gather(2, play.test_labels[..., None])
    assert scored.loss == pytest.approx(-likelihood.mean().item(), rel=0.05)
    assert scored.loss < 1 < 2.5 < history.loss["test"][0]
