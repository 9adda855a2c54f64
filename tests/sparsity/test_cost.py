import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from aerogel.sparsity.cost import (
    gradual_training_flops,
    inference_flops,
    nm_training_flops,
    storage_bytes,
    training_flops,
)
from aerogel.sparsity.masks import random_masks
from aerogel.sparsity.oneshot import magnitude_
from aerogel.sparsity.select import select_parameters


def test_linear_and_convolution_flops_equal_the_closed_form():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8),
        nn.Conv2d(8, 4, 1), nn.Flatten(), nn.Linear(4 * 6 * 6, 10),
    )  # fmt: skip
    x = torch.randn(2, 3, 16, 16)
    generator = torch.Generator().manual_seed(0)
    masks = random_masks(select_parameters(model), 0.3, generator=generator)
    report = inference_flops(model, masks, x)
    positions = {"0": 64, "2": 36, "3": 36, "5": 1}
    dense = {n: 2 * 2 * p * model[int(n)].weight.numel() for n, p in positions.items()}
    kept = {n: 2 * 2 * p * int(masks[f"{n}.weight"].sum()) for n, p in positions.items()}
    assert report.layers == {f"{n}.weight": (dense[n], kept[n]) for n in positions}
    assert report.dense == sum(dense.values())
    assert report.sparse == sum(kept.values())
    assert inference_flops(model, None, x).ratio == 1.0


@settings(max_examples=15, deadline=None)
@given(density=st.floats(0.05, 1.0), tokens=st.integers(1, 5))
def test_only_masked_weights_are_discounted(density, tokens):
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4))
    masks = random_masks(select_parameters(model, include=["1"]), density)
    report = inference_flops(model, masks, torch.randn(3, tokens, 6))
    assert report.dense == 2 * 3 * tokens * (48 + 32)
    assert report.sparse == 2 * 3 * tokens * (48 + masks.nnz)


def test_attention_products_and_packed_projections_are_counted():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).train()
    names = ["self_attn", "self_attn.out_proj", "linear1", "linear2"]
    masks = random_masks(select_parameters(layer, include=names), 0.5)
    report = inference_flops(layer, masks, torch.randn(2, 5, 8))
    projections = 2 * 10 * (4 * 64 + 2 * 128)
    scores = 2 * 2 * (2 * 5 * 5 * 8)
    assert report.dense == projections + scores
    assert report.sparse == projections // 2 + scores
    assert layer.training


def test_layers_that_run_twice_and_transposed_convolutions_count_fully():
    shared = nn.Linear(4, 4, bias=False)
    twice = nn.Sequential(shared, nn.ReLU(), shared)
    masks = random_masks(select_parameters(shared), 0.5)
    report = inference_flops(twice, {"0.weight": masks["weight"]}, torch.randn(1, 4))
    assert (report.dense, report.sparse) == (64, 32)
    up = nn.ConvTranspose2d(2, 3, 2, stride=2)
    mask = torch.ones_like(up.weight, dtype=torch.bool)
    mask[0] = False
    report = inference_flops(up, {"weight": mask}, torch.randn(1, 2, 4, 4))
    assert report.layers["weight"] == (2 * 16 * 24, 2 * 16 * 12)
    assert report.dense == 2 * 16 * 24


def test_training_flops_follow_their_formulas():
    assert training_flops(100, 10, "dense") == 300
    assert training_flops(100, 10, "static") == training_flops(100, 10, "set") == 30
    rigl = training_flops(100, 10, "rigl", update_every=99)
    assert rigl == pytest.approx((30 * 99 + 20 + 100) / 100)
    assert 30 < rigl < training_flops(100, 10, "dsl", update_every=1)
    curve = [0.0, 0.5, 0.5, 1.0]
    assert gradual_training_flops(lambda s: 100 * (1 - s), curve) == pytest.approx(150)
    dense = gradual_training_flops(lambda s: 100 * (1 - s), curve, dense_gradients=True)
    assert dense == pytest.approx(200)
    assert nm_training_flops(100, 2, 8, "bdwp") == pytest.approx(150)
    assert nm_training_flops(100, 2, 8, "sr_ste") == pytest.approx(225)
    assert nm_training_flops(100, 2, 8, "sdgp") == pytest.approx(225)
    assert nm_training_flops(100, 2, 8, "dense") == pytest.approx(300)
    assert nm_training_flops(100, 1, 2, "bdwp", backward=10, update=7) == pytest.approx(62)


def test_storage_of_each_format_is_counted_to_the_byte():
    mask = torch.zeros(4, 16, dtype=torch.bool)
    mask.view(4, 4, 4)[..., :2] = True
    assert storage_bytes(mask, "dense") == 256
    assert storage_bytes(mask, "csr32") == 32 * 8 + 20
    assert storage_bytes(mask, "csr16", 2) == 32 * 4 + 20
    assert storage_bytes(mask, "bitmap") == 128 + 8
    # 2:4: FP16 2*16+4 bits a group, INT8 2*8+4, as the published layouts.
    assert storage_bytes(mask, "2:4", 2) == 16 * 36 // 8
    assert storage_bytes(mask, "2:4", 1) == 16 * 20 // 8
    assert storage_bytes({"a": mask, "b": mask}, "bitmap") == 2 * 136
    model = nn.Linear(64, 32, bias=False)
    masks = magnitude_(model, 0.9)
    assert storage_bytes(masks, "bitmap") < 0.14 * storage_bytes(masks, "dense")


def test_bad_costs_are_refused():
    model, x = nn.Linear(4, 4), torch.randn(1, 4)
    with pytest.raises(ValueError, match="nearest: weight"):
        inference_flops(model, {"wieght": torch.ones(4, 4, dtype=torch.bool)}, x)
    with pytest.raises(ValueError, match="shape"):
        inference_flops(model, {"weight": torch.ones(4, 3, dtype=torch.bool)}, x)
    lstm = nn.LSTM(4, 4)
    with pytest.raises(ValueError, match="LSTM"):
        inference_flops(lstm, {"weight_hh_l0": torch.ones(16, 4, dtype=torch.bool)}, x)
    with pytest.raises(ValueError, match="nearest: rigl"):
        training_flops(2, 1, "rigll")
    with pytest.raises(ValueError, match="update_every"):
        training_flops(2, 1, "rigl")
    with pytest.raises(ValueError, match="sparse"):
        training_flops(1, 2)
    with pytest.raises(ValueError, match="empty"):
        gradual_training_flops(lambda s: 1.0, [])
    with pytest.raises(ValueError, match=r"n must be in \[1, 2\], got 3"):
        nm_training_flops(1, 3, 2)
    with pytest.raises(ValueError, match="nearest: csr16"):
        storage_bytes(torch.ones(2, 2, dtype=torch.bool), "csr1")
    with pytest.raises(ValueError, match=r"^mask: .*2:4"):
        storage_bytes(torch.ones(2, 4, dtype=torch.bool), "2:4")
    with pytest.raises(ValueError, match="csr32"):
        storage_bytes(torch.ones(1, 70000, dtype=torch.bool), "csr16")
