"""The data sets themselves."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from aerogel import data
from aerogel.data import fashion_mnist, folder, wordnet
from aerogel.data.text import RetrievalSplit, TokenSplit


def test_fashion_mnist_is_complete_and_balanced(real_asset):
    real_asset("fashion-mnist")
    dataset = data.load("fashion-mnist")
    assert dataset.train.images.shape == (60_000, 1, 28, 28)
    assert dataset.test.images.shape == (10_000, 1, 28, 28)
    assert dataset.train.labels.bincount().tolist() == [6_000] * 10
    assert dataset.test.labels.bincount().tolist() == [1_000] * 10
    whole = dataset.train.normalized(dataset.train.images)
    assert abs(float(whole.mean())) < 1e-3
    assert abs(float(whole.std()) - 1) < 1e-3


def test_limit_keeps_a_fixed_choice(real_asset):
    real_asset("fashion-mnist")
    first, again = (data.load("fashion-mnist", limit=100) for _ in range(2))
    assert len(first.train) == len(first.test) == 100
    assert torch.equal(first.train.images, again.train.images)


def test_wordnet_parts_share_no_synset(real_asset):
    synsets = list(wordnet.read_synsets(real_asset("wordnet")))
    assert len(synsets) == 117_659
    train, queries, documents = wordnet.split_texts(synsets)
    assert len(queries) == len(documents) == wordnet.HELD_OUT
    assert len(set(documents)) == wordnet.HELD_OUT
    assert not {*queries, *documents} & set(train)


def test_a_wordnet_line_becomes_a_synset():
    line = (
        "00003356 00 a 02 nascent 0 half_grown(a) 0 000 |  being born; or beginning; "
        '"the nascent chicks"; "a nascent insurgency"   \n'
    )
    synset = wordnet._parse(line)
    assert synset.lemmas == ("nascent", "half grown")
    assert synset.definition == "being born; or beginning"
    assert synset.examples == ("the nascent chicks", "a nascent insurgency")
    assert synset.document == "nascent, half grown: being born; or beginning"


def test_digits_need_nothing_from_outside():
    pytest.importorskip("sklearn")
    dataset = data.load("digits")
    assert dataset.input_shape == (1, 8, 8)
    assert len(dataset.train) + len(dataset.test) == 1797


def test_the_fallback_is_said_aloud(tmp_path: Path, monkeypatch):
    pytest.importorskip("sklearn")

    def gone(cache_dir, on_progress, limit):
        raise data.FetchError("tried: everything")

    monkeypatch.setitem(data._LOADERS, "fashion-mnist", gone)
    with pytest.warns(UserWarning, match=r"scikit-learn digits(.|\n)*tried: everything"):
        dataset = data.load("fashion-mnist", fallback="digits")
    assert dataset.name == "digits"
    assert dataset.input_shape == (1, 28, 28)
    with pytest.raises(data.FetchError):
        data.load("fashion-mnist")


def test_an_unknown_data_set_lists_the_nearest():
    with pytest.raises(ValueError, match="fashion-mnist"):
        data.load("fashion_mnist")


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\x00\x00\x09\x01\x00\x00\x00\x01\x00",
        b"\x00\x00\x08\x01\x00\x00\x00\x05abc",
        b"\x00\x00\x08\x03\x00\x00",
    ],
)
def test_a_bad_idx_file_gives_a_clear_error(raw: bytes, tmp_path: Path):
    path = tmp_path / "x-ubyte"
    path.write_bytes(raw)
    with pytest.raises(ValueError, match="x-ubyte"):
        fashion_mnist.read_idx(path)


def write_images(root: Path, classes: tuple[str, ...], count: int, size: tuple[int, int]) -> None:
    image = pytest.importorskip("PIL.Image")
    for number, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for index in range(count):
            colour = (number * 100, index, 50)
            image.new("RGB", size, colour).save(root / name / f"{index}.png")


def test_a_folder_of_images_is_a_data_set(tmp_path: Path):
    write_images(tmp_path, ("cat", "dog"), 10, (40, 30))
    dataset = folder.load(tmp_path, size=16)
    assert dataset.class_names == ("cat", "dog")
    assert len(dataset.train) == 18
    assert len(dataset.test) == 2
    assert dataset.train.images[0, :, 8, 8].tolist()[0] in (0, 100)


def test_a_folder_with_train_and_val_keeps_its_split(tmp_path: Path):
    write_images(tmp_path / "train", ("a", "b"), 3, (20, 20))
    write_images(tmp_path / "val", ("a", "b"), 2, (20, 20))
    dataset = folder.load(tmp_path, size=8)
    assert (len(dataset.train), len(dataset.test)) == (6, 4)


def test_a_broken_image_is_named(tmp_path: Path):
    write_images(tmp_path, ("a", "b"), 3, (20, 20))
    (tmp_path / "a" / "broken.png").write_bytes(b"not an image")
    with pytest.raises(ValueError, match=r"broken\.png"):
        folder.load(tmp_path, size=8)


def test_an_empty_folder_says_what_it_should_look_like(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(folder, "_pillow", lambda: None)
    (tmp_path / "cat").mkdir()
    with pytest.raises(ValueError, match="one sub-folder of images for each class"):
        data.load(tmp_path)


def test_without_pillow_the_error_says_what_to_install(tmp_path: Path, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ModuleNotFoundError, match="pip install pillow"):
        data.load(tmp_path)


def token_split(lengths: list[int]) -> TokenSplit:
    ids = torch.zeros(len(lengths), 20, dtype=torch.int32)
    for row, length in enumerate(lengths):
        ids[row, :length] = torch.arange(1, length + 1)
    return TokenSplit([f"text {i}" for i in range(len(lengths))], ids, torch.tensor(lengths))


def test_a_text_batch_is_padded_to_its_longest_text():
    split = token_split([3, 9, 20])
    (ids, mask), target = split.batch(torch.tensor([0, 1]))
    assert ids.shape == mask.shape == (2, 16)
    assert mask.sum(1).tolist() == [3, 9]
    assert target is None
    assert split.batch(torch.tensor([2])).inputs[0].shape == (1, 20)


def test_a_subset_of_queries_keeps_its_documents():
    split = RetrievalSplit(
        token_split(list(range(1, 11))), token_split(list(range(10, 0, -1))), torch.arange(10)
    )
    part = split.subset(4)
    for row in range(4):
        query, document = part.queries.texts[row], part.documents.texts[int(part.relevant[row])]
        assert query == document
