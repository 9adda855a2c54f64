"""`SparseSelfAttention` in own models, with selectors and with plain functions."""

from __future__ import annotations

import pytest
import small_selectors as small
import torch

from aerogel.attention import BlockPlan, SparseSelfAttention, make_selector


def test_a_full_selector_is_torchs_attention():
    torch.manual_seed(0)
    layer = SparseSelfAttention(32, 4, 2, selector=small.Dense(), qkv_bias=True)
    x = torch.randn(2, 50, 32)
    q, k, v = (
        part(x).view(2, 50, -1, 8).transpose(1, 2) for part in (layer.query, layer.key, layer.value)
    )
    want = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, enable_gqa=True
    )
    torch.testing.assert_close(layer(x), layer.out(want.transpose(1, 2).flatten(2)))


def test_functions_choose_by_what_the_caller_knows():
    def regions(q, k, grid):
        index = torch.arange(4).view(1, 4, 1)
        return BlockPlan.from_regions(2, index, grid[0] * grid[1] // 4, grid)

    layer = SparseSelfAttention(16, 2, selector=regions, causal=False)
    x = torch.randn(1, 36, 16)
    before = layer(x, grid=(6, 6))
    x[0, 35] += 1  # the last region's last token
    changed = (layer(x, grid=(6, 6)) - before).abs().amax(-1)[0].view(6, 6) > 1e-7
    assert changed[3:, 3:].all()
    assert int(changed.sum()) == 9


def test_rotary_positions_and_padding_take_part():
    layer = SparseSelfAttention(16, 2, selector=small.Spans(1, 4), rope=lambda q, k: (2 * q, k))
    x = torch.randn(2, 20, 16)
    padding = torch.arange(20) >= torch.tensor([[0], [8]])
    out = layer(x, padding)
    torch.testing.assert_close(out[1, 8:], layer(x[1:, 8:])[0])
    out.sum().backward()
    assert layer.query.weight.grad is not None


def test_heads_that_do_not_divide_and_unknown_selectors_are_refused():
    with pytest.raises(ValueError, match="num_kv_heads=3"):
        SparseSelfAttention(16, 4, 3)
    with pytest.raises(ValueError, match="no-such"):
        make_selector("no-such")
