"""The plain vision transformer: timm's interface, foreign weights, clear errors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from aerogel import models
from aerogel.models.vit_weights import convert_vit_state, resize_position_embedding

SIZES = {"patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3}


def small(img_size: int = 8, **kwargs):
    torch.manual_seed(0)
    return models.VisionTransformer(img_size, **{**SIZES, "num_classes": 5, **kwargs}).eval()


def test_it_equals_the_formula_written_out():
    model, x = small(), torch.randn(2, 3, 8, 8)
    state = model.state_dict()
    tokens = F.conv2d(
        x, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], 4
    ).flatten(2)
    tokens = torch.cat([state["cls_token"].expand(2, -1, -1), tokens.transpose(1, 2)], 1)
    tokens = tokens + state["pos_embed"]
    for block in model.blocks:
        q, k, v = block.attn.qkv(block.norm1(tokens)).chunk(3, dim=-1)
        heads = []
        for h in range(3):
            part = slice(8 * h, 8 * h + 8)
            scores = q[..., part] @ k[..., part].transpose(1, 2) / 8**0.5
            heads.append(scores.softmax(-1) @ v[..., part])
        tokens = tokens + block.attn.proj(torch.cat(heads, -1))
        hidden = F.gelu(block.mlp.fc1(block.norm2(tokens)))
        tokens = tokens + block.mlp.fc2(hidden)
    torch.testing.assert_close(model(x), model.head(model.norm(tokens)[:, 0]))


def test_names_and_interface_are_timms():
    model = small()
    assert {
        "cls_token",
        "pos_embed",
        "patch_embed.proj.weight",
        "blocks.1.norm1.weight",
        "blocks.1.attn.qkv.bias",
        "blocks.1.attn.proj.weight",
        "blocks.1.mlp.fc2.weight",
        "norm.bias",
        "head.weight",
    } <= model.state_dict().keys()
    targets = dict(model.prune_targets())
    assert len(targets) == 8
    assert set(targets.values()) == {"linear"}
    assert not {"head", "patch_embed.proj"} & targets.keys()
    assert len(model.attention_modules()) == 2
    assert model.no_weight_decay() == {"cls_token", "pos_embed"}


def test_features_behind_blocks_come_as_maps_or_tokens():
    model, x = small(), torch.randn(2, 3, 8, 8)
    final, maps = model.forward_intermediates(x, norm=True)
    torch.testing.assert_close(final, model.forward_features(x))
    torch.testing.assert_close(maps[-1], final[:, 1:].transpose(1, 2).unflatten(2, (2, 2)))
    ((tokens, prefix),) = model.forward_intermediates(
        x, [0], output_fmt="NLC", return_prefix_tokens=True, intermediates_only=True
    )
    assert (tokens.shape, prefix.shape) == ((2, 4, 24), (2, 1, 24))
    assert len(model.forward_intermediates(x, 1, intermediates_only=True)) == 1


def test_options_reach_their_layers():
    model = small(init_values=0.1, drop_path_rate=0.2, global_pool="avg", qkv_bias=False)
    assert model.blocks[1].drop_path.rate == pytest.approx(0.2)
    assert model.blocks[0].drop_path.rate == 0.0
    assert model.blocks[0].attn.qkv.bias is None
    assert float(model.blocks[0].ls1.gamma[0].detach()) == pytest.approx(0.1)
    x = torch.randn(1, 3, 8, 8)
    expected = model.forward_features(x)[:, 1:].mean(1)
    assert torch.equal(model.forward_head(model.forward_features(x), pre_logits=True), expected)
    assert small(num_classes=0)(x).shape == (1, 24)
    model.reset_classifier(3, "token")
    assert model(x).shape == (1, 3)


def test_other_image_sizes_resize_the_positions():
    model = small(dynamic_img_size=True)
    assert model(torch.randn(1, 3, 12, 8)).shape == (1, 5)
    positions = model.pos_embed.detach()
    assert resize_position_embedding(positions, (2, 2)) is positions
    bigger = resize_position_embedding(positions, (3, 5))
    assert bigger.shape == (1, 16, 24)
    assert torch.equal(bigger[:, 0], positions[:, 0])


def test_a_checkpoint_at_another_grid_and_class_count_loads(tmp_path: Path):
    path, model = tmp_path / "vit.safetensors", models.create_model("vit_digits")
    save_file(model.state_dict(), path)
    wanted = models.create_model("vit_digits", checkpoint_path=path, img_size=12, num_classes=3)
    assert wanted(torch.zeros(1, 1, 12, 12)).shape == (1, 3)
    assert torch.equal(wanted.blocks[2].mlp.fc1.weight, model.blocks[2].mlp.fc1.weight)


def test_transformers_weights_give_transformers_logits(tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=96,
        image_size=8,
        patch_size=4,
        num_labels=5,
        layer_norm_eps=1e-6,
    )
    torch.manual_seed(1)
    theirs = transformers.ViTForImageClassification(config).eval()
    model = small()
    model.load_state_dict(model.convert_state_dict(dict(theirs.state_dict())))
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(model(x), theirs(pixel_values=x).logits, rtol=1e-4, atol=1e-5)


def test_weights_with_heads_as_an_axis_become_linear_layers():
    model = small()
    own, foreign = model.state_dict(), {}
    renamed = {"patch_embed.proj.": "embedding.", "norm.": "transformer.norm."}
    for name, value in own.items():
        if name.startswith("blocks."):
            name = name.replace("blocks.", "transformer.encoder_layers.")
            if ".attn.qkv." in name:
                for part, piece in zip(("query", "key", "value"), value.chunk(3), strict=True):
                    apart = piece.t().unflatten(1, (3, 8)) if value.dim() == 2 else piece.view(3, 8)
                    foreign[name.replace("qkv", part)] = apart
                continue
            if ".attn.proj.weight" in name:
                value = value.t().unflatten(0, (3, 8))
            foreign[name.replace("attn.proj", "attn.out")] = value
        elif name == "pos_embed":
            foreign["transformer.pos_embedding.pos_embedding"] = value
        else:
            for ours, theirs in {**renamed, "head.": "classifier."}.items():
                name = name.replace(ours, theirs) if name.startswith(ours) else name
            foreign[name] = value
    converted = convert_vit_state(foreign)
    assert converted.keys() == own.keys()
    assert all(torch.equal(converted[name], own[name]) for name in own)
    del foreign["transformer.encoder_layers.0.attn.key.weight"]
    with pytest.raises(ValueError, match="queries, keys and values"):
        convert_vit_state(foreign)


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"num_heads": 5}, "multiple of num_heads=5"),
        ({"patch_size": 3}, "multiple of patch_size=3"),
        ({"depth": 0}, "depth"),
        ({"num_classes": -1}, "num_classes"),
        ({"global_pool": "max"}, "global_pool"),
        ({"global_pool": ""}, "num_classes=0"),
        ({"act_layer": "gelo"}, "act_layer"),
        ({"drop_path_rate": 1.0}, "rate"),
    ],
)
def test_bad_arguments_are_named(kwargs, match: str):
    with pytest.raises(ValueError, match=match):
        small(**kwargs)


def test_images_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"12x8.*dynamic_img_size"):
        small()(torch.zeros(1, 3, 12, 8))
    with pytest.raises(ValueError, match="do not divide"):
        small(dynamic_img_size=True)(torch.zeros(1, 3, 9, 8))
    with pytest.raises(ValueError, match="no square grid"):
        resize_position_embedding(torch.zeros(1, 4, 8), (2, 2))
