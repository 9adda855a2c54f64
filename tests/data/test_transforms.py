"""Augmentation: the right pixels, and the same ones whatever the batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from aerogel.data import ImageSplit
from aerogel.data import transforms as tf


@pytest.fixture
def split() -> ImageSplit:
    images = torch.randint(0, 256, (50, 2, 9, 7), generator=torch.Generator().manual_seed(0))
    return ImageSplit(images.byte(), torch.arange(50) % 5, (0.3, 0.5), (0.2, 0.4), 5)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 3), st.integers(1, 3), st.integers(1, 9), st.integers(1, 9), st.data())
def test_crop_and_flip_equal_slicing(pad, channels, height, width, draw):
    x = torch.randint(0, 256, (3, channels, height, width)).byte()
    corners = st.lists(st.integers(0, 2 * pad), min_size=3, max_size=3)
    dy, dx = torch.tensor(draw.draw(corners)), torch.tensor(draw.draw(corners))
    mirror = torch.tensor(draw.draw(st.lists(st.booleans(), min_size=3, max_size=3)))
    got = tf.crop_flip(x, pad, dy, dx, mirror)
    padded = F.pad(x, (pad,) * 4)
    for i in range(3):
        want = padded[i, :, dy[i] : dy[i] + height, dx[i] : dx[i] + width]
        assert torch.equal(got[i], want.flip(-1) if mirror[i] else want)


@pytest.mark.parametrize("policy", ["none", "flip", "standard", "strong"])
def test_a_sample_does_not_depend_on_its_batch(split: ImageSplit, policy: str):
    indices = torch.tensor([7, 3, 41, 12])
    (whole,), target = split.batch(indices, augment=policy, seed=3, epoch=2)
    for row in range(4):
        (one,), label = split.batch(indices[row : row + 1], augment=policy, seed=3, epoch=2)
        assert torch.equal(one[0], whole[row])
        assert torch.equal(label[0], target[row])


def test_epochs_and_seeds_differ(split: ImageSplit):
    indices = torch.arange(50)
    views = [
        split.batch(indices, augment="standard", seed=s, epoch=e).inputs[0]
        for s, e in ((0, 0), (0, 1), (1, 0))
    ]
    assert not torch.equal(views[0], views[1])
    assert not torch.equal(views[0], views[2])


def test_random_numbers_are_uniform_and_independent():
    u = tf.sample_uniform(1, 2, torch.arange(20_000), 6)
    assert u.shape == (20_000, 6)
    assert u.min() >= 0
    assert u.max() < 1
    assert np.abs(u.mean(0) - 0.5).max() < 0.01
    assert np.abs(u.std(0) - 12**-0.5).max() < 0.01
    assert np.abs(np.corrcoef(u.T) - np.eye(6)).max() < 0.03
    assert len(np.unique(u)) > 119_900


def test_single_items_agree_with_batches(split: ImageSplit):
    image, label = split[5]
    (batch,), labels = split.batch(torch.tensor([5]))
    assert torch.equal(image, batch[0])
    assert label == labels[0]


def test_normalize_removes_mean_and_deviation():
    x = torch.tensor([[[[0, 255]], [[51, 102]]]], dtype=torch.uint8)
    got = tf.normalize(x, (0.5, 0.2), (0.5, 0.1))
    torch.testing.assert_close(got, torch.tensor([[[[-1.0, 1.0]], [[0.0, 2.0]]]]))
    with pytest.raises(ValueError, match="2 channels"):
        tf.normalize(x, (0.5,), (0.5,))


def test_erased_share_is_between_2_and_33_percent():
    x = torch.ones(500, 1, 28, 28)
    u = torch.from_numpy(tf.sample_uniform(0, 0, torch.arange(500), 5))
    erased = (tf.random_erase(x, u, 0.5) == 0).float().mean((1, 2, 3))
    hit = erased > 0
    assert 0.4 < float(hit.float().mean()) < 0.6
    assert float(erased[hit].min()) > 0.01
    assert float(erased[hit].max()) < 0.36


def test_mixed_targets_are_probabilities(split: ImageSplit):
    _, target = split.batch(torch.arange(50), augment=tf.Augment(mixup=0.4))
    assert target.shape == (50, 5)
    torch.testing.assert_close(target.sum(1), torch.ones(50))


@pytest.mark.parametrize("alpha", [0.2, 0.5, 1.0, 3.0])
def test_beta_quantiles_have_the_right_moments(alpha: float):
    sample = tf.beta_quantile((np.arange(10_000) + 0.5) / 10_000, alpha)
    assert abs(sample.mean() - 0.5) < 1e-3
    assert abs(sample.var() - 1 / (4 * (2 * alpha + 1))) < 1e-3


def test_bad_arguments_are_named(split: ImageSplit):
    with pytest.raises(ValueError, match="standard"):
        split.batch(torch.arange(2), augment="standart")
    with pytest.raises(ValueError, match="images"):
        ImageSplit(torch.zeros(2, 1, 3, 3), torch.zeros(2).long(), (0.0,), (1.0,), 2)
    with pytest.raises(ValueError, match="labels"):
        ImageSplit(torch.zeros(2, 1, 3, 3).byte(), torch.tensor([0, 2]), (0.0,), (1.0,), 2)
    with pytest.raises(ValueError, match="limit"):
        split.subset(0)
