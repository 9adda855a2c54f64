"""Whole networks of transformers, half of their weights pruned: whatever share of one is native,
its compiled outputs are right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from fakes import build_with
from torch import Tensor, nn

from networks import sparsify_

transformers = pytest.importorskip("transformers")

IMAGE, TOKENS, VOCABULARY = 32, 11, 60
Config = dict[str, Any]
# Vision transformers and encoders share these words; each network takes those it knows.
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
         "intermediate_size": 32}  # fmt: skip
VISION = {**SMALL, "image_size": IMAGE, "patch_size": 8}
TEXT = {**SMALL, "vocab_size": VOCABULARY, "max_position_embeddings": 32}
DECODER = {**TEXT, "num_key_value_heads": 1, "pad_token_id": 0}

# Name of the configuration and model (without the ending), and what makes it small.
IMAGES: dict[str, Config] = {
    "ResNet": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1],
               "layer_type": "bottleneck"},
    "ConvNext": {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2},
    "ConvNextV2": {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2},
    "RegNet": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "groups_width": 4},
    "EfficientNet": {"image_size": IMAGE, "width_coefficient": 0.25, "depth_coefficient": 0.2,
                     "hidden_dim": 320, "depthwise_padding": []},
    "MobileNetV1": {"image_size": IMAGE, "depth_multiplier": 0.125},
    "MobileNetV2": {"image_size": IMAGE, "depth_multiplier": 0.15},
    "PoolFormer": {"hidden_sizes": [8, 16], "depths": [1, 1], "num_encoder_blocks": 2,
                   "patch_sizes": [7, 3], "strides": [4, 2], "padding": [2, 1]},
    "ViT": VISION,
    "DeiT": VISION,
    "Swin": {"image_size": IMAGE, "patch_size": 4, "embed_dim": 8, "depths": [1, 1],
             "num_heads": [1, 2], "window_size": 4},
    "Beit": VISION,
    "Dinov2": VISION,
    "Segformer": {"hidden_sizes": [8, 16], "depths": [1, 1], "num_encoder_blocks": 2,
                  "sr_ratios": [2, 1], "num_attention_heads": [1, 2], "patch_sizes": [7, 3],
                  "strides": [4, 2], "mlp_ratios": [2, 2]},
}  # fmt: skip
TEXTS: dict[str, Config] = {
    "Bert": TEXT,
    "Roberta": TEXT,
    "DistilBert": {"vocab_size": VOCABULARY, "dim": 16, "n_layers": 2, "n_heads": 2,
                   "hidden_dim": 32, "max_position_embeddings": 32},
    "Albert": {**TEXT, "embedding_size": 8},
    "Electra": {**TEXT, "embedding_size": 8},
    "MPNet": TEXT,
    "DebertaV2": {**TEXT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"],
                  "position_buckets": 8, "norm_rel_ebd": "layer_norm"},
    "SqueezeBert": {**TEXT, "embedding_size": 16, "q_groups": 2, "k_groups": 2, "v_groups": 2,
                    "post_attention_groups": 1, "intermediate_groups": 2, "output_groups": 2},
    "GPT2": {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32},
    "Llama": DECODER,
    "Qwen2": DECODER,
    "Mistral": {**DECODER, "sliding_window": 4},
    "OPT": {**TEXT, "ffn_dim": 32, "word_embed_proj_dim": 16, "pad_token_id": 0},
    "GPTNeoX": TEXT,
    "Bloom": {"vocab_size": VOCABULARY, "hidden_size": 16, "n_layer": 2, "n_head": 2},
    "T5": {"vocab_size": VOCABULARY, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2,
           "num_heads": 2},
}  # fmt: skip


def network(name: str, config: Config) -> nn.Module:
    """A tiny random network, half of whose weights are zeros."""
    kind = "T5EncoderModel" if name == "T5" else f"{name}Model"
    torch.manual_seed(0)
    model = getattr(transformers, kind)(getattr(transformers, f"{name}Config")(**config)).eval()
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = False
    with torch.no_grad():
        for module in model.modules():  # fresh statistics would hide what folding gets wrong
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.3)
                module.running_var.uniform_(0.5, 2.0)
    return sparsify_(model, 0.5)


def images(batch: int) -> dict[str, Tensor]:
    """Random pixels."""
    return {"pixel_values": torch.randn(batch, 3, IMAGE, IMAGE)}


def texts(batch: int) -> dict[str, Tensor]:
    """Random tokens, of another number for every batch; of the last text some are masked."""
    tokens = TOKENS - batch
    mask = torch.ones(batch, tokens, dtype=torch.long)
    mask[-1, tokens - 3 :] = 0
    return {"input_ids": torch.randint(3, VOCABULARY, (batch, tokens)), "attention_mask": mask}


CASES = [(name, config, images) for name, config in IMAGES.items()]
CASES += [(name, config, texts) for name, config in TEXTS.items()]


@pytest.mark.parametrize(("name", "config", "inputs"), CASES, ids=[case[0] for case in CASES])
@pytest.mark.filterwarnings("ignore")
def test_compiled_outputs_are_right(
    name: str, config: Config, inputs: Callable[[int], dict[str, Tensor]]
) -> None:
    model = network(name, config)
    # The timers prefer whatever is native: it runs, whether it would win or not.
    compiled = build_with(model, **inputs(2))
    for batch in (2, 1):  # the second is planned anew: another batch, and another length of text
        given = inputs(batch)
        with torch.no_grad():
            expected = model(**given)
        found = compiled(**given)
        assert type(found) is type(expected)
        assert found.keys() == expected.keys()
        for key, wanted in expected.items():
            if isinstance(wanted, Tensor):
                scale = float(wanted.abs().max())
                torch.testing.assert_close(found[key], wanted, rtol=0, atol=1e-4 * scale, msg=key)
    explained = compiled.explain()
    assert not [note for note in explained.notes if "rejected" in note]
