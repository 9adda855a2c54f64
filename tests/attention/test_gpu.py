"""BlockMasks say what plans say; checked by execution on the CPU, uncompiled."""

from __future__ import annotations

import plans as make
import pytest
import torch

from aerogel.attention import AttentionShape, attend
from aerogel.attention.gpu import to_block_mask

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


@pytest.mark.parametrize("causal", [True, False])
def test_flex_attention_gives_the_reference(causal):
    shape = AttentionShape(2, 4, 2, 150, 200, causal=causal)
    q, k, v = make.tensors(shape, 16)
    padding = torch.arange(200) >= torch.tensor([[0], [40]])
    plans = make.masked_plans(shape, 3)
    names = ("mix", "shifted span", "block") if causal else ("offsets per head", "list")
    for plan in (plans[name] for name in names):
        for pads in (None, padding):
            got = attend(
                q, k, v, plan=plan, causal=causal, key_padding=pads, return_lse=True, backend="flex"
            )
            want = attend(
                q, k, v, plan=plan, causal=causal, key_padding=pads, return_lse=True,
                backend="reference",
            )  # fmt: skip
            torch.testing.assert_close(got.output, want.output, rtol=2e-5, atol=2e-5)
            filled = torch.isfinite(want.lse)
            torch.testing.assert_close(got.lse[filled], want.lse[filled], rtol=2e-5, atol=2e-5)


def test_whole_tiles_go_to_the_full_lists():
    shape = AttentionShape(1, 1, 1, 256, 256, causal=True)
    from aerogel.attention import DensePlan

    mask = to_block_mask(DensePlan(), shape)
    assert mask.kv_num_blocks.flatten().tolist() == [1, 1, 1, 1]
    assert mask.full_kv_num_blocks.flatten().tolist() == [0, 1, 2, 3]
    assert mask.kv_indices[0, 0, :, 0].tolist() == [0, 1, 2, 3]
