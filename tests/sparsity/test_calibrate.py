import copy
import weakref

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from aerogel.sparsity.blocks import find_blocks
from aerogel.sparsity.calibrate import collect_input_stats, sequential_stages
from aerogel.sparsity.input_stats import InputStats, unfold_input
from aerogel.sparsity.select import select_parameters


def reference(samples: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """The definitions, on a list of (tokens, features) samples in float64."""
    samples = [s.double() for s in samples]
    every = torch.cat(samples)
    within = sum(len(s) * s.var(0, correction=0) for s in samples) / len(every)
    return {
        "sum": every.sum(0),
        "sumsq": every.square().sum(0),
        "mean": every.mean(0),
        "var": within,
        "pooled_var": every.var(0, correction=0),
        "hessian": 2 / len(samples) * every.T @ every,
        "signed_mean": torch.stack([s.sum(0) for s in samples]).mean(0),
        "norm": torch.stack([s.square().sum(0) for s in samples]).mean(0).sqrt(),
    }


def check(stats: InputStats, samples: list[torch.Tensor]) -> None:
    for name, wanted in reference(samples).items():
        found = getattr(stats, name)
        assert found.dtype == torch.float32
        assert torch.allclose(found.double(), wanted, rtol=1e-4, atol=1e-4), name


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    tokens=st.integers(2, 6),
    masked=st.booleans(),
    seed=st.integers(0, 100),
)
def test_streamed_statistics_equal_their_definitions(sizes, tokens, masked, seed):
    generator = torch.Generator().manual_seed(seed)
    stats = InputStats(nn.Linear(5, 3), "fc")
    samples = []
    for size in sizes:
        x = torch.randn(size, tokens, 5, generator=generator) + 1
        keep = torch.rand(size, tokens, generator=generator) < 0.7
        keep[:, 0] = True
        stats.update(x, token_mask=keep if masked else None)
        samples += [x[i][keep[i]] if masked else x[i] for i in range(size)]
    if len(samples) == stats.tokens:
        return  # one token each: var falls back to the pooled variance
    check(stats.finish(), samples)


def test_flattened_tokens_are_split_into_samples_again():
    x = torch.randn(3, 4, 5)
    flat = InputStats(nn.Linear(5, 2), "fc")
    flat.update(x.reshape(12, 5), batch_size=3)
    check(flat.finish(), list(x))
    rows = InputStats(nn.Linear(5, 2), "fc")
    rows.update(x[:, 0], batch_size=3)
    assert rows.samples == rows.tokens == 3
    assert torch.equal(rows.var, rows.pooled_var)


CONVS = [
    nn.Conv2d(4, 6, 3, stride=2, padding=1),
    nn.Conv2d(4, 6, (3, 1), padding="same", dilation=2),
    nn.Conv2d(4, 6, 3, padding=2, padding_mode="circular", groups=2),
    nn.Conv2d(4, 4, 3, padding=1, groups=4),
    nn.Conv2d(4, 6, 1),
    nn.Conv1d(4, 6, 5, stride=3, padding=2),
    nn.Conv3d(4, 2, 2),
]


@pytest.mark.parametrize("conv", CONVS, ids=[str(c)[:60] for c in CONVS])
def test_unfolded_inputs_times_weight_are_the_convolution(conv):
    torch.manual_seed(0)
    x = torch.randn(2, 4, *([7, 6, 5][: conv.weight.ndim - 2]))
    patches = unfold_input(x, conv)  # [b, g, P, F]
    weight = conv.weight.flatten(1).unflatten(0, (conv.groups, -1))  # [g, out/g, F]
    y = torch.einsum("bgpf,gof->bgop", patches, weight).flatten(1, 2)
    wanted = conv(x).flatten(2) - conv.bias[:, None]
    assert torch.allclose(y, wanted, atol=1e-5)
    stats = InputStats(conv, "conv")
    stats.update(x)
    for group in range(conv.groups):
        one = reference([p[group] for p in patches])
        for name in ("norm", "hessian", "var"):
            found = getattr(stats, name)
            found = found if conv.groups == 1 else found[group]
            assert torch.allclose(found.double(), one[name], atol=1e-4), name
    assert (stats.per_weight(stats.norm, conv.weight.shape) * conv.weight).shape == (
        conv.weight.shape
    )


def test_convolution_slices_do_not_change_the_statistics(monkeypatch):
    conv, x = nn.Conv2d(3, 4, 3), torch.randn(5, 3, 8, 8)
    whole = InputStats(conv, "c")
    whole.update(x)
    monkeypatch.setattr("aerogel.sparsity.input_stats.UNFOLD_ELEMENTS", 1)
    sliced = InputStats(conv, "c")
    sliced.update(x)
    assert sliced.samples == whole.samples == 5
    assert torch.allclose(sliced.hessian, whole.hessian, atol=1e-3)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x, scale=1.0):
        return (x + self.fc2(torch.relu(self.fc1(x))) * scale,)


class Stack(nn.Module):
    def __init__(self, depth: int = 3, width: int = 6) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(width, width), nn.Linear(width, 2)
        self.layers = nn.ModuleList(Block(width) for _ in range(depth))
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        x = self.stem(x)
        for i, layer in enumerate(self.layers):
            x = self.drop(layer(x, scale=1.0 + i)[0])
        return self.head(x)


def stack_and_data():
    torch.manual_seed(0)
    return Stack(), [torch.randn(4, 5, 6) for _ in range(3)]


def test_walking_without_pruning_equals_a_single_pass():
    model, batches = stack_and_data()
    model.train()
    selection = select_parameters(model)
    once = collect_input_stats(model, batches, selection)
    walked = collect_input_stats(model, batches, selection, prune=lambda stage: None)
    assert list(once) == list(walked) == list(selection)
    for name in selection:
        assert torch.allclose(once[name].hessian, walked[name].hessian, rtol=1e-4, atol=1e-4)
    assert model.training
    assert model.drop.training


def test_each_block_sees_its_predecessors_pruned_and_itself_dense():
    model, batches = stack_and_data()
    selection = select_parameters(model)
    stages = []

    def prune(stage):
        stages.append((stage.name, sorted(stage.stats)))
        # What the statistics must be: a forward pass of the model as it is at this moment.
        now = collect_input_stats(copy_ := copy.deepcopy(model), batches, select_parameters(copy_))
        for name, stats in stage.stats.items():
            assert torch.allclose(stats.hessian, now[name].hessian, rtol=1e-4, atol=1e-4)
            with torch.no_grad():
                selection[name].parameter.mul_(0.5)

    collect_input_stats(model, batches, selection, prune=prune)
    assert [name for name, _ in stages] == ["", "layers.0", "layers.1", "layers.2", ""]
    assert stages[0][1] == ["stem.weight"]
    assert stages[-1][1] == ["head.weight"]


@pytest.mark.parametrize("offload", [False, True])
def test_memory_never_holds_more_than_one_block_boundary(offload):
    model, batches = stack_and_data()
    selection = select_parameters(model, include=["layers.*"])
    outputs = []
    for layer in model.layers:
        layer.register_forward_hook(lambda m, a, out: outputs.append(weakref.ref(out[0])))
    stages = []
    for stage in sequential_stages(model, batches, selection, ["sumsq"], offload=offload):
        stages.append((stage.index, stage.total))
        alive = sum(out() is not None for out in outputs)
        assert alive <= len(batches)
    assert stages == [(0, 3), (1, 3), (2, 3)]


def tiny_bert():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=3, num_attention_heads=2,
        intermediate_size=24, max_position_embeddings=16,
    )  # fmt: skip
    return transformers.BertModel(config)


def tiny_decoder(kind: str):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    common = {
        "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2,
        "intermediate_size": 24, "max_position_embeddings": 32,
    }  # fmt: skip
    if kind == "llama":
        config = transformers.LlamaConfig(**common, num_key_value_heads=1)
        return transformers.LlamaForCausalLM(config)
    config = transformers.Gemma3TextConfig(
        **common, num_key_value_heads=1, head_dim=8, sliding_window=4,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    )  # fmt: skip
    return transformers.Gemma3ForCausalLM(config)


@pytest.mark.parametrize(
    "make", [tiny_bert, lambda: tiny_decoder("llama"), lambda: tiny_decoder("gemma")]
)
def test_transformers_blocks_replay_with_their_masks_and_rotary_embeddings(make):
    model = make()
    generator = torch.Generator().manual_seed(0)
    mask = torch.ones(3, 9, dtype=torch.long)
    mask[0, 5:] = 0
    ids = [torch.randint(40, (3, 9), generator=generator) for _ in range(2)]
    batches = [{"input_ids": i, "attention_mask": mask} for i in ids]
    inside = ["*layer*"]
    selection = select_parameters(model, include=inside)

    def prune(stage):
        twin = copy.deepcopy(model)
        now = collect_input_stats(twin, batches, select_parameters(twin, include=inside))
        for name, stats in stage.stats.items():
            assert stats.tokens == 2 * int(mask.sum())
            assert torch.allclose(stats.hessian, now[name].hessian, rtol=1e-3, atol=1e-3), name
            with torch.no_grad():
                selection[name].parameter.mul_(0.7)

    use_cache = getattr(model.config, "use_cache", None)
    found = collect_input_stats(model, batches, selection, prune=prune)
    assert list(found) == list(selection)
    assert getattr(model.config, "use_cache", None) == use_cache


def test_torch_encoder_is_seen_in_spite_of_its_fused_path():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    selection = select_parameters(model, include=["*linear?*"])
    stats = collect_input_stats(model, [torch.randn(2, 4, 8)], selection, ["sum"])
    assert all(s.tokens == 8 for s in stats.values())


def test_blocks_are_found_or_named():
    model, _ = stack_and_data()
    assert find_blocks(model)[0] == "layers"
    nested = nn.ModuleDict(
        {"layers": nn.ModuleList([nn.ModuleList([nn.Linear(2, 2) for _ in range(9)])] * 2)}
    )
    assert find_blocks(nested)[0] == "layers"
    chain = nn.Sequential(nn.Linear(2, 2), nn.Sequential(Block(2), Block(2)))
    assert find_blocks(chain)[0] == "1"
    assert find_blocks(chain, "")[0] == ""
    with pytest.raises(ValueError, match="nearest"):
        find_blocks(model, "layer")
    with pytest.raises(ValueError, match="no list of equal blocks"):
        find_blocks(nn.Linear(2, 2))


def test_blocks_that_are_no_chain_are_refused():
    class Parallel(Stack):
        def forward(self, x):
            return sum(layer(x)[0] for layer in self.layers)

    class Backwards(Stack):
        def forward(self, x):
            for layer in reversed(self.layers):
                x = layer(x)[0]
            return x

    for kind, message in ((Parallel, "not a chain"), (Backwards, "in order")):
        model = kind()
        walk = sequential_stages(
            model, [torch.randn(1, 6)], select_parameters(model, include=["layers.*"])
        )
        with pytest.raises(ValueError, match=message):
            list(walk)
        assert not model.layers[0]._forward_pre_hooks


def test_bad_calibration_is_refused_naming_the_layer():
    model, batches = stack_and_data()
    selection = select_parameters(model)
    with pytest.raises(ValueError, match="empty"):
        collect_input_stats(model, [], selection)
    with pytest.raises(ValueError, match="empty"):
        collect_input_stats(model, [], selection, prune=lambda stage: None)
    bad = [batches[0].clone()]
    bad[0][0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"stem.weight: .*NaN"):
        collect_input_stats(model, bad, selection)
    with pytest.raises(ValueError, match="nearest: hessian"):
        collect_input_stats(model, batches, selection, ["hesian"])
    with pytest.raises(TypeError, match="forward="):
        collect_input_stats(model, [3], selection)

    class Half(Stack):
        def forward(self, x):
            return self.stem(x)

    lazy = Half()
    with pytest.raises(ValueError, match=r"head.weight: no calibration input"):
        collect_input_stats(lazy, batches, select_parameters(lazy))
    with pytest.raises(ValueError, match="was not collected"):
        _ = collect_input_stats(model, batches, selection, ["sum"])["stem.weight"].hessian
    with torch.device("meta"):
        meta = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="weight: a meta weight"):
        collect_input_stats(meta, batches, select_parameters(meta))


def test_sequences_beyond_the_context_are_refused():
    model = tiny_bert()
    selection = select_parameters(model, include=["encoder.*"])
    batches = [{"input_ids": torch.zeros(1, 17, dtype=torch.long)}]
    with pytest.raises(ValueError, match="context of 16"):
        list(sequential_stages(model, batches, selection))


def test_labels_and_other_forwards_are_accepted():
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    x = torch.randn(3, 2, 2)
    selection = select_parameters(model)
    plain = collect_input_stats(model, [x], selection, ["sum"])
    labelled = collect_input_stats(model, [(x, torch.zeros(3))], selection, ["sum"])
    custom = collect_input_stats(
        model, [{"image": x}], selection, ["sum"], forward=lambda m, b: m(b["image"])
    )
    assert torch.equal(plain["1.weight"].sum, labelled["1.weight"].sum)
    assert torch.equal(plain["1.weight"].sum, custom["1.weight"].sum)
    assert F.mse_loss(plain["1.weight"].sum, x.flatten(1).sum(0)) < 1e-9
