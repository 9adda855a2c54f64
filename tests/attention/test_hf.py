"""transformers models with sparse attention: by name, attached, cached, padded."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest
import small_selectors as small
import torch
from tiny_models import FAMILIES, prompts, tiny

from aerogel.attention import attach, detach, load_selector, register, save_selector
from aerogel.attention.cache import AerogelCache
from aerogel.attention.hf import attached_layers, padding_mask
from aerogel.attention.when_imported import when_imported

transformers = pytest.importorskip("transformers")


def logits(model, ids, mask, **options):
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask, **options).logits


def close_where(a, b, mask):
    torch.testing.assert_close(a[mask.bool()], b[mask.bool()], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("left", [True, False])
def test_a_full_budget_by_name_gives_the_models_own_logits(family, left):
    model = tiny(family)
    ids, mask = prompts(left=left)
    before = logits(model, ids, mask)
    model.set_attn_implementation("aerogel:test-dense")
    close_where(logits(model, ids, mask), before, mask)
    model.set_attn_implementation("eager")
    assert torch.equal(logits(model, ids, mask), before)


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_with_a_cache_and_left_padding_gives_the_same_tokens(family):
    model = tiny(family)
    ids, mask = prompts()
    options = {"max_new_tokens": 8, "do_sample": False, "min_new_tokens": 8}
    before = model.generate(ids, attention_mask=mask, **options)
    model.set_attn_implementation("aerogel:test-dense")
    assert torch.equal(model.generate(ids, attention_mask=mask, **options), before)
    beams = model.generate(ids, attention_mask=mask, num_beams=3, **options)
    model.set_attn_implementation("eager")
    assert torch.equal(model.generate(ids, attention_mask=mask, num_beams=3, **options), beams)


def test_a_model_loads_with_the_name(tmp_path):
    tiny("Llama").save_pretrained(tmp_path)
    ids, mask = prompts()
    outs = [
        logits(
            transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=name),
            ids,
            mask,
        )
        for name in ("sdpa", "aerogel:test-dense")
    ]
    close_where(*outs, mask)


@pytest.mark.parametrize("family", ["Llama", "Mistral", "GPTNeoX"])
@pytest.mark.parametrize("kind", [small.Blocks, small.Lists, small.Spans])
def test_padding_does_not_change_what_a_sequence_says(family, kind):
    """A left-padded row gives what the row alone gives; spans and lists know where it begins."""
    model = tiny(family)
    model.set_attn_implementation(f"aerogel:{kind.slug}")
    ids, mask = prompts()
    together = logits(model, ids, mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0))
    for row in range(3) if kind is not small.Blocks else [0]:
        real = mask[row].bool()
        alone = logits(model, ids[row : row + 1, real], None)
        torch.testing.assert_close(together[row, real], alone[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [small.Blocks, small.Lists, small.Spans])
def test_steps_with_a_cache_give_the_logits_of_the_whole_prompt(kind):
    model = tiny("Qwen3")
    model.set_attn_implementation(f"aerogel:{kind.slug}")
    ids = prompts()[0][:1]
    whole = logits(model, ids, None)
    cache, steps = None, []
    for cut in (slice(0, 32), slice(32, 39), slice(39, 40)):
        with torch.no_grad():
            out = model(input_ids=ids[:, cut], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        steps.append(out.logits)
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["Llama", "Qwen3", "Phi3", "GPTNeoX"])
def test_attached_selectors_get_the_cache_and_keys_before_rope(family):
    model = tiny(family)
    ids, mask = prompts()
    options = {"max_new_tokens": 5, "do_sample": False, "min_new_tokens": 5}
    before = logits(model, ids, mask)
    tokens = model.generate(ids, attention_mask=mask, **options)
    names = set(model.state_dict())
    selector = attach(model, "test-cached")
    got = model.generate(ids, attention_mask=mask, past_key_values=AerogelCache(model), **options)
    assert torch.equal(got, tokens)
    assert selector.lengths == [40, 41, 42, 43, 44]
    assert all(state.cache is None for state in attached_layers(model))
    detach(model)
    assert set(model.state_dict()) == names
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.equal(logits(model, ids, mask), before)


def test_keys_before_rope_are_the_projections_output():
    model = tiny("Qwen3")
    seen = {}

    class Spy(small.Cached):
        slug = "test-spy"
        needs = frozenset({"pre_rope", "layer_input"})

        def plan_prefill(self, ctx):
            seen[ctx.layer_idx] = ctx
            return super().plan_prefill(ctx)

        def on_append(self, ctx):
            pass

    attach(model, Spy())
    logits(model, prompts()[0], None)
    layer = model.model.layers[0].self_attn
    for ctx, name in ((seen[0].q_pre, "q"), (seen[0].k_pre, "k")):
        project, norm = getattr(layer, f"{name}_proj"), getattr(layer, f"{name}_norm")
        want = norm(project(seen[0].layer_input).unflatten(-1, (-1, 16))).transpose(1, 2)
        assert torch.equal(ctx, want)
    detach(model)


def test_ring_caches_generate_as_the_full_cache_does():
    for family in ("Llama", "GPTNeoX"):
        model = tiny(family)
        ids, mask = prompts()
        options = {"max_new_tokens": 12, "do_sample": False, "min_new_tokens": 12}
        attach(model, "test-spans")
        want = model.generate(ids, attention_mask=mask, **options)
        cache = AerogelCache(model)
        got = model.generate(ids, attention_mask=mask, past_key_values=cache, **options)
        assert torch.equal(got, want)
        assert cache.get_seq_length() == 51
        assert cache.layers[0].keys.shape[1] < 2 * 4 * 20  # slots, not tokens
        detach(model)


@pytest.mark.parametrize("slug", ["test-spans", "test-blocks"])
def test_beams_reorder_our_caches(slug):
    model = tiny("Llama")
    ids, mask = prompts()
    options = {"max_new_tokens": 6, "do_sample": False, "min_new_tokens": 6, "num_beams": 3}
    attach(model, slug)
    want = model.generate(ids, attention_mask=mask, **options)
    cache = AerogelCache(model)
    got = model.generate(ids, attention_mask=mask, past_key_values=cache, **options)
    assert torch.equal(got, want)
    detach(model)


def test_four_dimensional_masks_warn_once_or_are_refused():
    model = tiny("Llama")
    ids, mask = prompts()
    causal = torch.ones(40, 40, dtype=torch.bool).tril() & mask[:, None, None].bool()
    before = logits(model, ids, mask)
    attach(model, "test-dense")
    with pytest.warns(UserWarning, match="4-D"):
        out = logits(model, ids, causal)
    close_where(out, before, mask)
    detach(model)
    attach(model, "test-dense", strict=True)
    with pytest.raises(ValueError, match="2-D"):
        logits(model, ids, causal)


def test_what_cannot_be_said_is_refused():
    model = tiny("Llama")
    ids, mask = prompts()
    model.set_attn_implementation("aerogel:test-cached")
    with pytest.raises(ValueError, match="attach"):
        logits(model, ids, mask)
    model.set_attn_implementation("aerogel:test-dense")
    with pytest.raises(ValueError, match="output_attentions"):
        model(input_ids=ids, output_attentions=True)
    with pytest.raises(ValueError, match="static"):
        model.generate(ids, attention_mask=mask, cache_implementation="static", max_new_tokens=2)
    with pytest.raises(ValueError, match="packed"):
        packed = torch.cat([torch.arange(20), torch.arange(20)])[None]
        model(input_ids=ids[:1], position_ids=packed, use_cache=False)
    attach(model, "test-dense")
    with pytest.raises(ValueError, match="attached already"):
        attach(model, "test-dense")
    with pytest.raises(ValueError, match="attention layer"):
        attach(torch.nn.Linear(1, 1), "test-dense")


def test_padding_masks_are_two_dimensional_or_nothing():
    mask = torch.ones(2, 9, dtype=torch.bool)
    assert padding_mask(2, 9, 9, attention_mask=mask) is None
    mask[0, 0] = False
    assert padding_mask(2, 3, 5, 6, 4, attention_mask=mask) is None  # padding has left the window
    assert padding_mask(2, 9, 9, attention_mask=mask).shape == (2, 9)


def test_selector_files_carry_options_and_refuse_other_models(tmp_path):
    model, path = tiny("Llama"), tmp_path / "blocks.safetensors"
    save_selector(small.Blocks(3, 16), model, path)
    selector = attach(model, path)
    assert (selector.top_k, selector.block) == (3, 16)
    with pytest.raises(ValueError, match="another model"):
        load_selector(path, tiny("Qwen3"))
    path.write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="not a selector file"):
        load_selector(path, model)
    with pytest.raises(FileNotFoundError, match="expected a selector"):
        attach(tiny("Llama"), "no-such-selector")


def test_models_train_through_sparse_attention():
    model = tiny("Llama")
    model.set_attn_implementation("aerogel:test-blocks")
    ids, mask = prompts()
    model.train()
    model(input_ids=ids, attention_mask=mask, labels=ids).loss.backward()
    grads = [p.grad for p in model.parameters()]
    assert all(g is not None and torch.isfinite(g).all() for g in grads)


def test_without_transformers_there_is_nothing_to_register(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert register() is False


@pytest.mark.parametrize(
    "first", ["import aerogel.attention, transformers", "import transformers, aerogel.attention"]
)
def test_names_are_known_whichever_is_imported_first(first):
    check = (
        "from transformers import AttentionInterface; "
        "assert 'aerogel:minference' in AttentionInterface._global_mapping; import sys; "
        "assert not any(type(f).__name__ == '_Waiting' for f in sys.meta_path)"
    )
    subprocess.run([sys.executable, "-c", f"{first}; {check}"], check=True)


def test_transformers_is_not_imported_before_it_is_needed():
    rooms = "aerogel.attention, aerogel.models, aerogel.compress, aerogel.train, aerogel.arena"
    check = "import sys; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", f"import {rooms}; {check}"], check=True)


def test_a_call_waits_for_its_module_and_comes_once(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    calls = []
    for name in ("waited_for", "never_there"):
        when_imported(name, lambda name=name: calls.append(sys.modules[name].value))
    assert importlib.util.find_spec("never_there") is None
    (tmp_path / "waited_for.py").write_text("value = 3")
    importlib.invalidate_caches()
    assert importlib.util.find_spec("waited_for") is not None  # looked at, not imported
    assert calls == []
    importlib.import_module("waited_for")
    assert calls == [3]
    del sys.modules["waited_for"]
    importlib.import_module("waited_for")
    when_imported("json", lambda: calls.append(4))
    assert calls == [3, 4]
    sys.meta_path[:] = [each for each in sys.meta_path if type(each).__name__ != "_Waiting"]
