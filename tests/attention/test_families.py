"""Every selector serves every family of models: padded batches, caches, beams, sliding windows."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
from tiny_models import FAMILIES, prompts, tiny

from aerogel.attention import (
    DoubleSparsitySelector,
    ElasticSpan,
    MInferenceSelector,
    MoAPlan,
    MoASelector,
    S2Selector,
    ScatterbrainSelector,
    Selector,
    ZipVLSelector,
    attach,
    calibrate_channels,
    detach,
)
from aerogel.attention.cache import AerogelCache
from aerogel.attention.selector_file import model_fingerprint
from aerogel.finetune.attention_gate import make_gates

WINDOWED = ("Mistral", "Gemma2")
OPTIONS = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "num_beams": 2}


def labels(model) -> Selector:
    windows = torch.randint(2, 63, (1, 16), generator=torch.Generator().manual_seed(0))
    channels = calibrate_channels(model, [windows])
    return DoubleSparsitySelector(channels, heavy_tokens=1000, dense_layers=())


def spans(model) -> Selector:
    sizes = model_fingerprint(model)
    whole = ElasticSpan(0, 1.0)
    plan = MoAPlan.uniform(whole, sizes["layers"], sizes["kv_heads"], 16, 16)
    return MoASelector(plan, max_new=16)


# With a budget for everything, so that each must give what the model's own attention gives.
MAKE: dict[str, Callable[..., Selector]] = {
    "minference": lambda model: MInferenceSelector(),
    "seerattention": lambda model: make_gates(model, block_size=16, gate_dim=8, threshold=0.0),
    "moa": spans,
    "double-sparsity": labels,
    "s2-attention": lambda model: S2Selector(16, 1, 1),
    "zipvl": lambda model: ZipVLSelector(1.0, kv="full"),
}


@cache
def expected(family: str) -> torch.Tensor:
    ids, mask = prompts(2, 24)
    return tiny(family).generate(ids, attention_mask=mask, **OPTIONS)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("slug", MAKE)
def test_left_padded_beams_on_its_own_cache_are_the_dense_models(slug, family):
    model = tiny(family)
    ids, mask = prompts(2, 24)
    attach(model, MAKE[slug](model))
    try:
        run = {"attention_mask": mask, "past_key_values": AerogelCache(model), **OPTIONS}
        if slug == "zipvl" and family in WINDOWED:
            with pytest.raises(ValueError, match="without a sliding window"):
                model.generate(ids, **run)
        else:
            assert torch.equal(model.generate(ids, **run), expected(family))
    finally:
        detach(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_scatterbrain_reads_whole_padded_prompts_and_refuses_windows_and_steps(family):
    model = tiny(family)
    ids, mask = prompts(2, 24)
    with torch.no_grad():
        want = model(ids, attention_mask=mask).logits
        attach(model, ScatterbrainSelector(num_features=0, window=1000))
        if family in WINDOWED:
            with pytest.raises(ValueError, match="window=12: expected None"):
                model(ids, attention_mask=mask)
            return
        got = model(ids, attention_mask=mask).logits
        torch.testing.assert_close(got[mask.bool()], want[mask.bool()], rtol=1e-4, atol=1e-4)
        with pytest.raises(ValueError, match="cannot decode on a cache"):
            model.generate(ids, attention_mask=mask, **OPTIONS)
