"""BlockMasks say what plans say; checked by execution on the CPU, uncompiled."""

from __future__ import annotations

from dataclasses import replace

import plans as make
import pytest
import torch

from aerogel.attention import AttentionShape, SpanPlan, attend, gpu
from aerogel.attention.gpu import to_block_mask
from aerogel.attention.prompt_patterns import TriShapePlan

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


@pytest.mark.parametrize("causal", [True, False])
def test_flex_attention_gives_the_reference(causal):
    shape = AttentionShape(2, 4, 2, 150, 200, causal=causal)
    q, k, v = make.tensors(shape, 16)
    padding = torch.arange(200) >= torch.tensor([[0], [40]])
    plans = make.masked_plans(shape, 3)
    names = ("offsets per head", "list")
    if causal:
        names = ("mix", "shifted span", "token span", "block span", "block", "tri-shape")
        plans["tri-shape"] = TriShapePlan(SpanPlan.uniform(3, 40), 30)
    for plan in (plans[name] for name in names):
        for pads, window in ((None, 70), (padding, None)):
            options = {"plan": plan, "causal": causal, "key_padding": pads, "return_lse": True}
            got = attend(q, k, v, backend="flex", window=window, **options)
            want = attend(q, k, v, backend="reference", window=window, **options)
            torch.testing.assert_close(got.output, want.output, rtol=2e-5, atol=2e-5)
            filled = torch.isfinite(want.lse)
            torch.testing.assert_close(got.lse[filled], want.lse[filled], rtol=2e-5, atol=2e-5)


def test_a_plans_mask_is_made_once_for_each_shape_and_goes_with_the_plan():
    shape = AttentionShape(1, 2, 2, 100, 100, causal=True)
    plan = make.masked_plans(shape)["block"]
    mask = to_block_mask(plan, shape)
    assert to_block_mask(plan, shape) is mask
    assert to_block_mask(plan, shape, window=9) is not mask
    assert to_block_mask(plan, replace(shape, causal=False)) is not mask
    real = torch.ones(1, 100, dtype=torch.bool)
    assert to_block_mask(plan, shape, key_padding=real) is not mask
    before = len(gpu._masks)
    del plan
    assert len(gpu._masks) == before - 1


def test_whole_tiles_go_to_the_full_lists():
    shape = AttentionShape(1, 1, 1, 256, 256, causal=True)
    from aerogel.attention import DensePlan

    mask = to_block_mask(DensePlan(), shape)
    assert mask.kv_num_blocks.flatten().tolist() == [1, 1, 1, 1]
    assert mask.full_kv_num_blocks.flatten().tolist() == [0, 1, 2, 3]
    assert mask.kv_indices[0, 0, :, 0].tolist() == [0, 1, 2, 3]
