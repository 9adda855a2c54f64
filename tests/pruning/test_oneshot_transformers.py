"""One-shot pruning walks any transformers model block by block, in the memory of one block."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import aerogel
from aerogel.pruning import dsnot_, sparsegpt_, wanda_
from aerogel.runtime.detect import detect_zeros
from aerogel.sparsity import MaskSet, collect_input_stats
from aerogel.sparsity.input_stats import InputStats
from aerogel.sparsity.layer_walk import oriented_weight, selected_weights
from aerogel.sparsity.oneshot import wanda_mask

transformers = pytest.importorskip("transformers")

TOKENS, VOCABULARY, DEPTH = 12, 60, 3


def bert() -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=DEPTH, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=16,
    )  # fmt: skip
    return transformers.BertModel(config)


def llama() -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=DEPTH, num_attention_heads=2,
        intermediate_size=32, num_key_value_heads=1, max_position_embeddings=16,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=16, n_layer=DEPTH, n_head=2, n_positions=16
    )
    return transformers.GPT2LMHeadModel(config)


def opt() -> nn.Module:
    config = transformers.OPTConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=DEPTH, num_attention_heads=2,
        ffn_dim=32, max_position_embeddings=16, word_embed_proj_dim=16,
    )  # fmt: skip
    return transformers.OPTForCausalLM(config)


def t5() -> nn.Module:
    config = transformers.T5Config(
        vocab_size=VOCABULARY, d_model=16, d_kv=8, num_layers=DEPTH, num_heads=2, d_ff=32
    )
    return transformers.T5EncoderModel(config)


# Name to (how to make it, pruned weights a block).
MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "bert": (bert, 6),
    "llama": (llama, 7),
    "gpt2": (gpt2, 4),
    "opt": (opt, 6),
    "t5": (t5, 6),
}


def made(name: str) -> tuple[nn.Module, list[dict[str, Tensor]]]:
    """The model in evaluation mode with weights of a trained one's size, and padded batches."""
    torch.manual_seed(0)
    model = MODELS[name][0]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4.0)
    generator = torch.Generator().manual_seed(0)
    mask = torch.ones(3, TOKENS, dtype=torch.long)
    mask[0, 8:] = 0
    return model, [
        {
            "input_ids": torch.randint(VOCABULARY, (3, TOKENS), generator=generator),
            "attention_mask": mask,
        }
        for _ in range(3)
    ]


def block_of(parameter: str) -> int:
    return int(next(part for part in parameter.split(".") if part.isdigit()))


@pytest.fixture(params=MODELS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def test_every_block_is_calibrated_on_its_pruned_predecessors(name):
    """The walk gives what a forward pass of the model gives as it stands at that moment."""
    model, batches = made(name)
    dense = copy.deepcopy(model)
    masks = wanda_(model, batches, 0.5)
    assert len(masks) == DEPTH * MODELS[name][1]
    assert masks.sparsity() == pytest.approx(0.5)
    for block in range(1, DEPTH):
        inside = [n for n in masks if block_of(n) == block]
        twin = copy.deepcopy(model)
        with torch.no_grad():
            for n in masks:
                if block_of(n) >= block:
                    twin.get_parameter(n).copy_(dense.get_parameter(n))
        selection = selected_weights(twin, include=inside)
        stats = collect_input_stats(twin, batches, selection, ["sumsq"])
        for n, ref in selection.items():
            wanted = wanda_mask(oriented_weight(ref), stats[n], 0.5)
            found = masks[n].t() if name == "gpt2" else masks[n]
            # Sums in another order may turn a near tie: a handful of weights at most.
            assert int((wanted ^ found).sum()) <= 0.02 * found.numel(), n


def test_dsnot_prunes_it_and_keeps_what_is_outside_the_blocks(name):
    model, batches = made(name)
    dense = copy.deepcopy(model)
    seen: list[tuple[int, int]] = []
    report = dsnot_(
        model, batches, 0.6, on_progress=lambda done, total, layer: seen.append((done, total))
    )
    total = DEPTH * MODELS[name][1]
    assert seen == [(i + 1, total) for i in range(total)]
    assert report.swaps > 0
    for n, before in dense.named_parameters():
        after = model.get_parameter(n)
        kept = report.masks[n] if n in report.masks else torch.ones_like(after, dtype=torch.bool)
        assert torch.equal(after, torch.where(kept, before, 0.0)), n
        if n in report.masks:
            rows = kept.t() if name == "gpt2" else kept
            assert len(set(rows.sum(1).tolist())) == 1
    attention_only = dsnot_(copy.deepcopy(dense), batches, 0.6, skip="mlp")
    assert 0 < len(attention_only.layers) < total


def test_only_one_block_of_statistics_is_alive(name, monkeypatch):
    model, batches = made(name)
    alive: list[weakref.ref[InputStats]] = []
    built = InputStats.__init__

    def counting(self: InputStats, *args: Any, **kwargs: Any) -> None:
        built(self, *args, **kwargs)
        alive.append(weakref.ref(self))

    monkeypatch.setattr(InputStats, "__init__", counting)
    most = 0

    def look(done: int, total: int, layer: str) -> None:
        nonlocal most
        most = max(most, sum(ref() is not None for ref in alive))

    sparsegpt_(model, batches, 0.5, on_progress=look)
    assert len(alive) == DEPTH * MODELS[name][1]
    assert most <= MODELS[name][1]


@pytest.mark.parametrize("prune", [wanda_, sparsegpt_, dsnot_])
@pytest.mark.parametrize("make", [transformers.BertConfig, transformers.GPT2Config])
def test_the_memory_of_calibration_does_not_grow_with_the_number_of_blocks(prune, make):
    """All tensors alive between two layers, parameters and the masks found so far not counted."""

    def most(depth: int) -> int:
        torch.manual_seed(0)
        config = make(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=depth,
                      num_attention_heads=2)  # fmt: skip
        config.intermediate_size = config.n_inner = 32
        model = transformers.AutoModel.from_config(config).eval()
        batches = made("bert")[1]
        gc.collect()
        gc.freeze()  # what there is already is not looked at
        peak = 0

        def look(done: int, total: int, layer: str) -> None:
            nonlocal peak
            found = [t for t in gc.get_objects() if issubclass(type(t), Tensor)]
            live = [t for t in found if t.dtype != torch.bool]
            peak = max(peak, sum(t.numel() * t.element_size() for t in live))

        prune(model, batches, 0.5, on_progress=look)
        gc.unfreeze()
        return peak

    shallow, deep = most(2), most(6)
    assert shallow > 0
    assert deep <= shallow


def test_blocks_that_share_their_arguments_are_met_once_a_batch():
    model, batches = made("llama")
    calls = [0] * DEPTH
    for i, layer in enumerate(model.model.layers):
        layer.register_forward_hook(lambda *_, i=i: calls.__setitem__(i, calls[i] + 1))
    wanda_(model, batches, 0.5, sequential=True)
    # One dense pass over the first batch; then each block runs twice a batch, dense and pruned.
    assert calls == [1 + 2 * len(batches)] * DEPTH


def test_plain_token_tensors_beyond_the_context_are_refused():
    model, _ = made("llama")
    ids = torch.zeros(1, 17, dtype=torch.long)
    for prune in (wanda_, dsnot_):
        with pytest.raises(ValueError, match="17 tokens exceeds the model's context of 16"):
            prune(model, [ids], 0.5)
    with pytest.raises(ValueError, match="17 tokens exceeds"):
        wanda_(model, [ids], 0.5, sequential=False)


PATTERNS = pytest.mark.parametrize("pattern", [None, "2:4", "4:8"])


def tied_llama():
    """A model whose head is its embedding, and a batch of token ids."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=128, max_position_embeddings=16, tie_word_embeddings=True,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    ids = torch.randint(VOCABULARY, (4, TOKENS))
    return model, ids


@PATTERNS
@pytest.mark.parametrize("prune", [wanda_, sparsegpt_, dsnot_])
def test_a_model_saved_densely_with_its_zeros_is_recognised_as_sparse(prune, pattern, tmp_path):
    """As published checkpoints of Wanda and DSnoT are: plain safetensors, zeros written out."""
    model, ids = tied_llama()
    report = prune(model, [ids], 0.5 if pattern else 0.6, pattern=pattern)
    masks = report.masks if prune is dsnot_ else report
    model.save_pretrained(tmp_path / "published")
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "published")
    for n, mask in masks.items():
        zeros = detect_zeros(loaded.get_parameter(n))
        assert zeros.pattern == (pattern or "unstructured")
        assert zeros.sparsity == pytest.approx(1 - mask.float().mean().item(), abs=1e-6)
    aerogel.save(loaded, tmp_path / "small.safetensors")
    info = {t.name: t for t in aerogel.inspect(tmp_path / "small.safetensors").tensors}
    for n in masks:
        assert info[n].pattern == (pattern or "unstructured")
        assert info[n].stored_bytes < 0.62 * info[n].dense_bytes
    fresh = transformers.LlamaForCausalLM(model.config).eval()
    aerogel.load(tmp_path / "small.safetensors", fresh)
    with torch.no_grad():
        assert torch.equal(fresh(ids).logits, model(ids).logits)


@PATTERNS
def test_a_checkpoint_in_the_layout_of_the_authors_code_is_recognised_as_sparse(pattern, tmp_path):
    """Half precision, in shards, the tied head left out: `save_pretrained` as their `main` does."""
    model, ids = tied_llama()
    masks = dsnot_(model, [ids], 0.5 if pattern else 0.6, pattern=pattern).masks
    model.half().save_pretrained(tmp_path / "theirs", max_shard_size="50KB")
    assert len(list((tmp_path / "theirs").glob("model-*-of-*.safetensors"))) > 1
    blank = transformers.LlamaForCausalLM(model.config).eval().half()
    fresh = aerogel.load(tmp_path / "theirs", blank)
    for n, mask in masks.items():
        weight = fresh.get_parameter(n)
        assert torch.equal(weight, model.get_parameter(n))
        zeros = detect_zeros(weight)
        assert zeros.pattern == (pattern or "unstructured")
        assert zeros.sparsity >= 1 - mask.float().mean().item()  # half precision rounds some off
    assert torch.equal(fresh.lm_head.weight, model.lm_head.weight)
    loaded, x = fresh.model.layers[0].mlp.float(), torch.randn(1, 64)
    explained = aerogel.compile(loaded, (x,), cache=False).explain()
    assert {row.pattern for row in explained.rows if row.layer.endswith("proj")} == {
        pattern or "unstructured"
    }


@PATTERNS
def test_masks_published_densely_make_a_model_sparse_again(pattern, tmp_path):
    from safetensors.torch import save_file

    dense, batches = made("llama")
    pruned = copy.deepcopy(dense)
    masks = wanda_(pruned, batches, 0.5 if pattern else 0.6, pattern=pattern)
    for kind in (torch.uint8, torch.float16, torch.bool):
        written = {f"{name}_mask": mask.to(kind) for name, mask in masks.items()}
        save_file(written, tmp_path / "masks.safetensors")
        read = MaskSet.from_tensors(aerogel.load(tmp_path / "masks.safetensors"))
        assert set(read) == set(masks)
        model = copy.deepcopy(dense)
        read.apply_(model)
        for name in masks:
            assert torch.equal(model.get_parameter(name), pruned.get_parameter(name))
            assert detect_zeros(model.get_parameter(name)).pattern == (pattern or "unstructured")
    with pytest.raises(ValueError, match="'w' is no mask: expected 0 and 1 only"):
        MaskSet.from_tensors({"w": torch.full((2,), 2)})
    with pytest.raises(ValueError, match="'w_mask' is a second mask of 'w'"):
        MaskSet.from_tensors({"w": torch.ones(2), "w_mask": torch.ones(2)})


@PATTERNS
def test_a_refined_model_compiles_to_the_same_outputs(pattern):
    torch.manual_seed(0)
    layers = nn.ModuleList(
        nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True) for _ in range(2)
    )

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers, self.head = layers, nn.Linear(32, 5)

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x)
            return self.head(x)

    model, x = Encoder().eval(), torch.randn(3, 8, 32)
    report = dsnot_(
        model, [x], 0.5 if pattern else 0.7, pattern=pattern, include=["layers.*.linear?.weight"]
    )
    assert report.masks.sparsity() == pytest.approx(0.5 if pattern else 0.7, abs=0.02)
    with torch.no_grad():
        wanted = model(x)
    compiled = aerogel.compile(model, (x,))
    torch.testing.assert_close(compiled(x), wanted, rtol=1e-4, atol=1e-5)
    seen = {f"{row.layer}.weight": row.pattern for row in compiled.explain().rows}
    assert all(seen[name] == (pattern or "unstructured") for name in report.masks)
