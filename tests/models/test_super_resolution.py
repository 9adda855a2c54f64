"""EDSR and SwinIR: sizes and names as published, windows by the formula, compiled as they are."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from aerogel import runtime
from aerogel.models import EDSR, SwinIR
from aerogel.models.checkpoint import read_state_dict
from aerogel.models.swinir import _tokens_apart
from aerogel.sparsity import magnitude_


def parameters(model, without=""):
    return sum(p.numel() for n, p in model.named_parameters() if not without or without not in n)


def tiny_swin(**kwargs):
    torch.manual_seed(0)
    return SwinIR(2, 12, (2,), (3,), 4, **kwargs).eval()


def test_parameters_are_as_many_as_the_papers_say():
    with torch.device("meta"):
        assert parameters(EDSR(4)) == 43_089_923  # EDSR-L: 43M
        assert parameters(EDSR(2, 64, 16, 1.0)) == 1_369_859  # baseline: 1.37M
    # SwinIR-lightweight, published without the tables of relative positions.
    counts = {2: 878, 3: 886, 4: 897}
    for scale, thousands in counts.items():
        model = SwinIR(scale)
        assert round(parameters(model, "relative_position_bias_table") / 1e3) == thousands
        assert parameters(model) - parameters(model, "relative_position_bias_table") == 32_400


def test_names_are_basicsrs():
    with torch.device("meta"):
        edsr = EDSR(4, 8, 2).state_dict()
    assert set(edsr) == {
        f"{layer}.{kind}"
        for layer in (
            *("conv_first", "conv_after_body", "conv_last", "upsample.0", "upsample.2"),
            *(f"body.{i}.conv{j}" for i in (0, 1) for j in (1, 2)),
        )
        for kind in ("weight", "bias")
    }
    block = "layers.0.residual_group.blocks.1."
    assert set(tiny_swin(upsampler="pixelshuffle").state_dict()) >= {
        *("conv_first.weight", "patch_embed.norm.weight", "norm.bias", "conv_after_body.weight"),
        *("conv_before_upsample.0.weight", "upsample.0.weight", "conv_last.bias"),
        *(block + "attn." + n for n in ("relative_position_bias_table", "relative_position_index")),
        *(block + n for n in ("norm1.weight", "attn.qkv.bias", "attn.proj.weight", "norm2.bias")),
        *(block + n for n in ("mlp.fc1.weight", "mlp.fc2.bias")),
        "layers.0.conv.weight",
    }


def test_stored_masks_of_windows_are_passed_over(tmp_path):
    model, other = tiny_swin(), SwinIR(2, 12, (2,), (3,), 4)
    state = model.state_dict()
    state["layers.0.residual_group.blocks.1.attn_mask"] = torch.zeros(4, 16, 16)
    torch.save({"params": state}, tmp_path / "published.pth")
    other.load_state_dict(read_state_dict(tmp_path / "published.pth"))
    x = torch.rand(1, 3, 8, 8)
    assert torch.equal(other.eval()(x), model(x))


@pytest.mark.parametrize("scale", [1, 2, 3, 4, 8])
def test_images_grow_by_the_scale(scale):
    x = torch.rand(2, 3, 5, 6)
    assert EDSR(scale, 4, 1)(x).shape == (2, 3, 5 * scale, 6 * scale)
    for upsampler in ("pixelshuffle", "pixelshuffledirect"):
        model = SwinIR(scale, 6, (2,), (3,), 4, upsampler=upsampler)
        assert model(x).shape == (2, 3, 5 * scale, 6 * scale)


def test_edsr_equals_the_formula_written_out():
    torch.manual_seed(0)
    model = EDSR(2, 6, 2, 0.1)
    x = torch.rand(1, 3, 7, 8)
    mean = torch.tensor([0.4488, 0.4371, 0.4040]).view(1, 3, 1, 1)
    first = model.conv_first((x - mean) * 255)
    y = first
    for block in model.body:
        y = y + 0.1 * block.conv2(F.relu(block.conv1(y)))
    y = F.pixel_shuffle(model.upsample[0](model.conv_after_body(y) + first), 2)
    torch.testing.assert_close(model(x), model.conv_last(y) / 255 + mean)


def _attend(attention, places, x, allowed):
    """Tokens x (n, C) at (row, column) places of one window, one head and pair at a time."""
    q, k, v = attention.qkv(x).chunk(3, -1)
    size, dim = 4, x.shape[-1] // attention.num_heads
    heads = []
    for h in range(attention.num_heads):
        part = slice(h * dim, (h + 1) * dim)
        scores = q[:, part] @ k[:, part].T / dim**0.5
        for i, (r1, c1) in enumerate(places):
            for j, (r2, c2) in enumerate(places):
                row = (r1 - r2 + size - 1) * (2 * size - 1) + c1 - c2 + size - 1
                scores[i, j] += attention.relative_position_bias_table[row, h]
                if not allowed(i, j):
                    scores[i, j] -= 100.0
        heads.append(scores.softmax(-1) @ v[:, part])
    return attention.proj(torch.cat(heads, -1))


@torch.no_grad()
@pytest.mark.parametrize("index", [0, 1])
def test_attention_in_windows_still_and_moved_equals_a_loop(index):
    model = tiny_swin()
    block = model.layers[0].residual_group.blocks[index]
    for parameter in block.parameters():
        parameter.add_(0.3 * torch.randn_like(parameter))
    x = torch.randn(1, 8, 12, 12)
    shift = 2 * index
    expected = x.clone()
    normed = block.norm1(x)[0]
    for top in range(0, 8, 4):
        for left in range(0, 12, 4):
            places = [(r, c) for r in range(4) for c in range(4)]
            at = [((top + r + shift) % 8, (left + c + shift) % 12) for r, c in places]
            # In a moved window tokens that came round the edge are strangers to the others.
            side = [(row < top, column < left) for row, column in at]
            tokens = torch.stack([normed[where] for where in at])
            out = _attend(block.attn, places, tokens, lambda i, j, side=side: side[i] == side[j])
            for where, value in zip(at, out, strict=True):
                expected[0][where] += value
    expected = expected + block.mlp(block.norm2(expected))
    torch.testing.assert_close(block(x, _tokens_apart(8, 12, 4)), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["EDSR", "SwinIR"])
def test_sparse_networks_compile_to_the_same_outputs(kind):
    torch.manual_seed(0)
    model = EDSR(2, 8, 2, 1.0, in_chans=1).eval() if kind == "EDSR" else tiny_swin(in_chans=1)
    magnitude_(model, 0.95, exclude=("upsample*",))
    x = torch.rand(1, 1, 24, 20)
    compiled = runtime.compile(model, (x,), threads=1, cache=False)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: EDSR(5), "scale must be 3 or a power of two, got 5"),
        (lambda: SwinIR(0), "got 0"),
        (lambda: EDSR(2, 0), "channels=0"),
        (lambda: SwinIR(2, 10, (2,), (3,)), "embed_dim=10"),
        (lambda: SwinIR(2, 12, (2, 2), (3,)), "must pair"),
        (lambda: SwinIR(2, 12, (2,), (3,), 1), "window_size must be at least 2, got 1"),
        (lambda: SwinIR(2, 12, (2,), (3,), upsampler="nearest"), "got 'nearest'"),
        (lambda: EDSR(2, 4, 1)(torch.zeros(1, 1, 8, 8)), r"\(batch, 3, height, width\)"),
        (lambda: EDSR(2, 4, 1)(torch.zeros(1, 3, 8, 8).byte()), "torch.uint8"),
        (lambda: EDSR(2, 4, 1)(torch.zeros(3, 8, 8)), r"\(3, 8, 8\)"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
