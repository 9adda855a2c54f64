"""GPUSQ-ViT: 2:4 first, integers behind the mask, a teacher that never changes."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import aerogel
from aerogel import compress, models, runtime
from aerogel.kernels import NM24Weight, quantize_rows
from aerogel.models import VisionTransformer
from aerogel.pruning import METHODS, Goal, GPUSQConfig, GPUSQTrainer, gpusq
from aerogel.pruning import gpusq_prune as prune
from aerogel.pruning import gpusq_quantise as quantise
from aerogel.pruning.gpusq_recipe import late_blocks
from aerogel.pruning.gpusq_student import student_masks
from aerogel.pruning.gpusq_vit import Stage, bake_student, export_nm, gpusq_cost
from aerogel.sparsity import NM, NMPairs
from aerogel.sparsity.fake_quantize import quantisers

CONFIG = GPUSQConfig(prune=Stage(2, 1e-2), quantise=Stage(1, 1e-2))
LATE = {"blocks.1", "blocks.2"}
PATTERNS = {"2:4": NM(2, 4), "pair": NMPairs(2, 4)}


def vit(**kwargs) -> VisionTransformer:
    torch.manual_seed(0)
    sizes = {"patch_size": 4, "in_chans": 1, "embed_dim": 16, "depth": 3, "num_heads": 2}
    model = VisionTransformer(8, **{**sizes, "num_classes": 3, "mlp_ratio": 2.0, **kwargs})
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.reset_parameters()
    return model.eval()


def loader(count: int = 3, seed: int = 1) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(8, 1, 8, 8, generator=generator),
            torch.randint(3, (8,), generator=generator),
        )
        for _ in range(count)
    ]


def weight(model: nn.Module, name: str = "blocks.0.mlp.fc1") -> Tensor:
    return model.get_submodule(name).weight.detach()


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(model.state_dict())


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def stages() -> tuple[VisionTransformer, nn.Module, nn.Module, dict[str, float]]:
    """The dense network, its sparse student, that in 8 bits, and the layers' errors."""
    dense = vit()
    sparse, errors = prune(dense, dense, loader(), CONFIG)
    return dense, sparse, quantise(sparse, dense, loader(), errors, CONFIG), errors


# The masks


@pytest.mark.parametrize("pattern", sorted(PATTERNS))
def test_every_group_keeps_exactly_two_through_both_stages_and_a_state_dict(pattern):
    dense, config = vit(), replace(CONFIG, pattern=pattern)
    result = gpusq(dense, loader(), config)
    chosen = PATTERNS[pattern]
    expected = {
        f"{name}.weight": chosen.select(weight(dense, name).abs())
        for name, _ in dense.prune_targets()
    }
    fresh = gpusq(vit(), loader(), replace(config, prune=Stage(0, 1.0), quantise=Stage(0, 1.0)))
    fresh.student.load_state_dict(result.student.state_dict())
    for student in (result.sparse, result.student, fresh.student):
        masks = student_masks(student)[1]
        assert set(masks) == set(expected)
        for name, mask in masks.items():
            assert torch.equal(mask, expected[name])  # those of the dense weights, ever
            assert chosen.is_satisfied(mask, exact=True)
            effective = weight(student, name.removesuffix(".weight"))
            assert not effective[~mask].any()
    x = loader()[0][0]
    assert torch.equal(fresh.student(x), result.student(x))


def test_patch_embedding_and_head_stay_dense(stages):
    dense, sparse, quantised, _ = stages
    assert {name.split(".")[0] for name in student_masks(sparse)[1]} == {"blocks"}
    for name in ("head.weight", "patch_embed.proj.weight"):
        assert (quantised.state_dict()[name] != 0).all()
        assert not torch.equal(quantised.state_dict()[name], dense.state_dict()[name])  # trained


def test_pruned_weights_have_no_gradient_and_stay_zero_under_weight_decay():
    dense = vit()
    sparse, _ = prune(dense, dense, loader(), replace(CONFIG, prune=Stage(1, 1e-2, 0.5)))
    sparse.train()(loader()[0][0]).square().sum().backward()
    selection, masks = student_masks(sparse)
    for name, ref in selection.items():
        stored = ref.parameter
        assert not stored.detach()[~masks[name]].any()
        assert not stored.grad[~masks[name]].any()
        assert stored.grad[masks[name]].any()


# The integers


@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantised_weight_is_the_rounded_masked_one(bits):
    dense = vit()
    at_once = replace(CONFIG, bits=bits, prune=Stage(0, 1.0), quantise=Stage(0, 1.0))
    sparse, _ = prune(dense, dense, loader(), at_once)
    student = quantise(sparse, dense, loader(), {}, at_once)
    selection, masks = student_masks(student)
    name = "blocks.0.mlp.fc1.weight"
    mask, stored = masks[name], selection[name].parameter
    with torch.no_grad():
        stored[~mask] = 100.0  # behind the mask: must not widen the scale
    levels, scales = quantize_rows((stored * mask).detach(), bits)
    assert torch.equal(weight(student), levels * scales[:, None])
    wrong = quantize_rows(stored.detach(), bits)
    assert not torch.equal(weight(student), wrong[0] * wrong[1][:, None] * mask)
    assert not weight(student)[~mask].any()
    student(loader()[0][0]).sum().backward()
    assert not stored.grad[~mask].any()


def test_layers_and_both_products_of_attention_are_quantised(stages):
    _, _, student, _ = stages
    names = {name for name, module in student.named_modules() if module in {*quantisers(student)}}
    for block in range(3):
        layers = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
        assert {f"blocks.{block}.{layer}.input_quantiser" for layer in layers} <= names
        operands = ("query", "key", "value", "probabilities")
        assert {f"blocks.{block}.attn.core.{operand}" for operand in operands} <= names
    assert len(names) == 3 * (4 + 4 + 4)
    assert not any(name.startswith(("head", "patch_embed", "norm")) for name in names)
    four = quantise(stages[1], stages[0], loader(), stages[3], replace(CONFIG, bits=4))
    assert {module.bits for module in quantisers(four.blocks[0].mlp)} == {4}
    assert {module.bits for module in quantisers(four.blocks[0].attn.core)} == {8}
    plain = quantise(
        stages[1], stages[0], loader(), stages[3], replace(CONFIG, quantise_attention=False)
    )
    assert not list(quantisers(plain.blocks[0].attn.core))


def test_eight_bits_barely_change_the_output():
    dense = vit()
    at_once = replace(CONFIG, prune=Stage(0, 1.0), quantise=Stage(0, 1.0))
    sparse, errors = prune(dense, dense, loader(), at_once)
    assert errors == {}
    x = loader()[0][0]
    distances = []
    for bits in (8, 4):
        student = quantise(sparse, dense, loader(), {}, replace(at_once, bits=bits))
        distances.append(float((student(x) - sparse(x)).detach().abs().max()))
    assert 0 < distances[0] < 0.05 < distances[1]


# The teacher


def test_the_teacher_and_what_is_given_never_change():
    dense = vit()
    teacher = copy.deepcopy(dense)
    before = snapshot(dense)
    sparse, errors = prune(dense, teacher, loader(), CONFIG)
    kept = snapshot(sparse)
    quantise(sparse, teacher, loader(), errors, CONFIG)
    assert same(snapshot(teacher), before)
    assert same(snapshot(dense), before)
    assert same(snapshot(sparse), kept)
    for model in (dense, teacher, sparse):
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_layer_errors_are_of_the_late_blocks_and_weigh_the_second_stage(stages, monkeypatch):
    dense, sparse, _, errors = stages
    assert set(errors) == LATE
    assert all(error > 0 for error in errors.values())
    seen = []
    config = replace(CONFIG, quantise=Stage(1, 1e-3))
    objective = GPUSQConfig.objective

    def watched(self, *args, **kwargs):
        seen.append(objective(self, *args, **kwargs))
        return seen[-1]

    monkeypatch.setattr(GPUSQConfig, "objective", watched)
    quantise(sparse, dense, loader(), errors, config)
    factors = seen[0].factors
    assert sum(factors.values()) / 2 == pytest.approx(1.0)
    assert factors["blocks.1"] / factors["blocks.2"] == pytest.approx(
        errors["blocks.1"] / errors["blocks.2"]
    )
    with pytest.warns(UserWarning, match="all layer_errors are zero"):
        quantise(sparse, dense, loader(), dict.fromkeys(LATE, 0.0), config)
    assert seen[-1].factors is None


def test_late_blocks_are_the_last_quarter_and_at_least_two():
    assert late_blocks(vit(depth=12)) == ("blocks.9", "blocks.10", "blocks.11")
    assert late_blocks(vit()) == ("blocks.1", "blocks.2")
    assert late_blocks(vit(depth=2)) == ("blocks.0", "blocks.1")


def test_distillation_brings_the_student_nearer_to_the_teacher():
    dense = vit()
    x = loader()[0][0]
    unlabelled = replace(CONFIG, supervised=False, prune=Stage(8, 3e-3))
    distances = [
        float((student(x) - dense(x)).detach().square().mean())
        for student, _ in (
            prune(dense, dense, loader(), replace(unlabelled, prune=Stage(0, 1.0))),
            prune(dense, dense, loader(), unlabelled),
        )
    ]
    assert distances[1] < 0.5 * distances[0]


def test_without_labels_a_loader_of_inputs_is_enough():
    dense = vit()
    inputs = [x for x, _ in loader()]
    result = gpusq(dense, inputs, replace(CONFIG, supervised=False))
    assert set(result.layer_errors) == LATE
    with pytest.raises(ValueError, match="no targets"):
        gpusq(dense, inputs, CONFIG)


def test_without_the_feature_term_there_are_no_errors_and_none_are_needed():
    dense, config = vit(), replace(CONFIG, gamma=0.0)
    result = gpusq(dense, loader(), config)
    assert result.layer_errors == {}


def test_critical_layers_can_be_named():
    dense = vit()
    config = replace(CONFIG, critical_layers=("blocks.0", "norm"))
    assert set(gpusq(dense, loader(), config).layer_errors) == {"blocks.0", "norm"}


def test_it_repeats_bit_for_bit(stages):
    again = gpusq(vit(), loader(), CONFIG)
    assert same(snapshot(again.student), snapshot(stages[2]))
    assert again.layer_errors == stages[3]


# What leaves


@pytest.mark.parametrize(("bits", "pattern"), [(8, "2:4"), (4, "2:4"), (4, "pair")])
def test_export_is_exact_and_takes_the_bytes_of_the_pattern(bits, pattern):
    dense = vit()
    config = replace(CONFIG, bits=bits, pattern=pattern)
    student = gpusq(dense, loader(), config).student
    state = export_nm(student)
    baked = bake_student(student)
    assert baked.state_dict().keys() == dense.state_dict().keys()
    group = 4 if pattern == "2:4" else 8
    stored = {"2:4": 2, "pair": 4}[pattern]
    for name, mask in student_masks(student)[1].items():
        packed = state[name]
        assert isinstance(packed, NM24Weight)
        assert torch.equal(packed.unpack(), baked.state_dict()[name])
        assert torch.equal(packed.mask(), mask)
        bytes_of_values = mask.numel() // group * stored * bits // 8
        index = mask.numel() // group * 4 // 8
        assert packed.nbytes == bytes_of_values + index + 4 * len(mask)
        scale = state[name.removesuffix("weight") + "input_scale"]
        assert float(scale) > 0
    others = {n for n, v in state.items() if isinstance(v, Tensor) and "input_scale" not in n}
    assert others | set(student_masks(student)[1]) == set(dense.state_dict())


def test_a_sparse_student_exports_in_floating_point(stages):
    state = export_nm(stages[1])
    packed = state["blocks.0.mlp.fc1.weight"]
    assert packed.bits is None
    assert torch.equal(packed.unpack(), weight(stages[1]))


def test_a_baked_student_is_plain_and_saves_as_two_of_four(stages, tmp_path):
    dense, _, student, _ = stages
    baked = bake_student(student)
    assert list(baked.state_dict()) == list(dense.state_dict())
    assert all(p.requires_grad for p in baked.parameters())
    assert not any(m._forward_pre_hooks for m in baked.modules())
    assert torch.equal(weight(baked), weight(student))
    assert list(quantisers(student))  # the student keeps its own
    x = loader()[0][0]
    torch.testing.assert_close(baked(x), student(x), rtol=0, atol=0.1)
    aerogel.save(baked, tmp_path / "baked.safetensors")
    kinds = {t.name: t.pattern for t in runtime.inspect(tmp_path / "baked.safetensors").tensors}
    assert kinds["blocks.0.mlp.fc1.weight"] == "2:4"
    state = {
        name: value.block_rows() if isinstance(value, NM24Weight) else value
        for name, value in export_nm(student).items()
    }
    aerogel.save(state, tmp_path / "packed.safetensors")
    loaded = runtime.load_packed(tmp_path / "packed.safetensors")
    assert torch.equal(loaded["blocks.0.mlp.fc1.weight"].unpack(), weight(student))


def test_costs_are_counted_apart(stages):
    _, sparse, student, _ = stages
    image = loader()[0][0][:1]
    cost, float_cost = gpusq_cost(student, image), gpusq_cost(sparse, image)
    tokens, dim = 5, 16
    linear = 3 * tokens * (3 * dim * dim + dim * dim + 2 * 2 * dim * dim)
    attention = 3 * 2 * tokens * tokens * dim
    rest = 4 * 16 * dim + dim * 3
    assert cost.dense_macs == linear + attention + rest
    assert cost.macs == linear // 2 + attention + rest
    assert cost.dense_bit_operations == cost.dense_macs * 1024
    assert cost.bit_operations == (linear // 2 + attention) * 64 + rest * 1024
    assert float_cost.bit_operations == float_cost.macs * 1024
    covered = 3 * (3 * dim * dim + dim * dim + 2 * 2 * dim * dim)
    assert cost.dense_bytes == 4 * covered
    rows = 3 * (3 * dim + dim + 2 * dim + dim)
    assert cost.bytes == covered * 20 // 32 + 4 * rows
    assert float_cost.bytes == covered * 4 // 2 + covered // 8
    assert not student.training


# In a training loop of one's own


def trained(steps: int, stop: int | None = None) -> tuple[nn.Module, GPUSQTrainer]:
    model = vit()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    trainer = GPUSQTrainer(model, optimizer, steps, CONFIG)
    _steps(model, optimizer, trainer, range(steps if stop is None else stop))
    return model, trainer


def _steps(model, optimizer, trainer, steps) -> None:
    data = loader()
    model.train()
    for step in steps:
        x, y = data[step % len(data)]
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        trainer.step()


def test_the_trainer_goes_through_both_stages():
    model, trainer = trained(10, stop=6)
    assert trainer.quantising
    factors = trainer.objective.factors
    assert set(factors) == LATE
    assert sum(factors.values()) == pytest.approx(2.0)
    _steps(model, trainer.optimizer, trainer, range(6, 10))
    masks = trainer.finalize()
    assert list(model.state_dict()) == list(vit().state_dict())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    for name, mask in masks.items():
        assert NM(2, 4).is_satisfied(mask, exact=True)
        found = weight(model, name.removesuffix(".weight"))
        assert not found[~mask].any()
        levels, scales = quantize_rows(found)
        torch.testing.assert_close(levels * scales[:, None], found, rtol=1e-6, atol=0)


@pytest.mark.parametrize("stop", [2, 5, 6, 8])
def test_a_stopped_trainer_goes_on_bit_for_bit(stop):
    whole, trainer = trained(10)
    trainer.finalize()
    half, stopped = trained(10, stop=stop)
    saved = copy.deepcopy((half.state_dict(), stopped.optimizer.state_dict(), stopped.state_dict()))
    model = vit()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    resumed = GPUSQTrainer(model, optimizer, 10, CONFIG)
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    resumed.load_state_dict(saved[2])
    _steps(model, optimizer, resumed, range(stop, 10))
    resumed.finalize()
    assert same(snapshot(model), snapshot(whole))


def test_the_trainer_refuses_what_it_cannot_do():
    model, trainer = trained(10, stop=2)
    with pytest.raises(RuntimeError, match="integers begin after 6"):
        trainer.finalize()
    with pytest.raises(ValueError, match=r"expected .'blocks.1', 'blocks.2'"):
        trainer.load_state_dict({"t": 3, "errors": {"other": 1.0}})
    with pytest.raises(ValueError, match="already parametrized"):
        GPUSQTrainer(model, trainer.optimizer, 10, CONFIG)
    untouched = vit()
    for change in ({"critical_layers": ("nowhere",)}, {"pattern": "3:7"}):
        with pytest.raises(ValueError, match=r"nowhere|3:7"):
            GPUSQTrainer(untouched, trainer.optimizer, 10, replace(CONFIG, **change))
    assert untouched.state_dict().keys() == vit().state_dict().keys()
    optimizer = torch.optim.SGD(untouched.parameters(), 0.1)
    with pytest.raises(ValueError, match="total_steps must be at least 2, got 1"):
        GPUSQTrainer(untouched, optimizer, 1, CONFIG)
    with pytest.raises(ValueError, match="leaves a stage empty"):
        GPUSQTrainer(untouched, optimizer, 2, CONFIG, quantise_from=0.1)


# From a recipe


def test_recipes_find_the_method():
    method = METHODS["gpusq-vit"]
    assert method.unfit(vit()) is None
    assert "no list of equal blocks" in method.unfit(nn.Linear(3, 3))
    assert "linear layer" in method.unfit(models.create_model("cifar_resnet_20"))
    names = tuple(f"{name}.weight" for name, _ in vit().prune_targets())
    for pattern, bits in (("2:4", 8), ("2:4:pairs", 4)):
        model = vit()
        goal = Goal(names, 0.5, pattern, 4, 0.0, 0.5, 0.0, 2, 3.0)
        trainer = method.build(model, torch.optim.SGD(model.parameters(), 0.1), goal)
        assert {q.bits for q in quantisers(model.blocks[0].mlp)} == {bits}
        assert trainer.first_quantised == 2


def test_a_recipe_compresses_with_it_and_goes_on_after_a_kill(tmp_path: Path, monkeypatch):
    recipe = compress.load_recipe(
        "digits",
        {
            "model.name": "vit_digits",
            "method": "gpusq-vit",
            "dense.epochs": 2,
            "dense.optimizer": "adamw",
            "dense.lr": 0.003,
            "prune.epochs": 1,
            "prune.optimizer": "adamw",
            "prune.lr": 0.001,
            "measure.engines": ["torch eager"],
            "measure.batches": [1],
            "measure.threads": [1],
            "measure.rounds": 3,
            "measure.isolate": False,
        },
    )
    assert recipe.pattern == "2:4"
    compress.run(recipe, tmp_path / "whole")
    taken, step = [], GPUSQTrainer.step

    def interrupted(self: GPUSQTrainer) -> None:
        taken.append(self.t)
        if len(taken) == 8:
            raise KeyboardInterrupt
        step(self)

    monkeypatch.setattr(GPUSQTrainer, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compress.run(recipe, tmp_path / "stopped")
    monkeypatch.setattr(GPUSQTrainer, "step", step)
    compress.run(recipe, tmp_path / "stopped")
    files = [tmp_path / name / "model.safetensors" for name in ("whole", "stopped")]
    assert files[0].read_bytes() == files[1].read_bytes()
    tensors = {t.name: t for t in runtime.inspect(files[0]).tensors}
    assert tensors["blocks.2.mlp.fc2.weight"].pattern == "2:4"


def test_networks_of_transformers_go_through_both_stages():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    images = {"image_size": 8, "patch_size": 4, "num_channels": 1, "num_labels": 3}
    config = transformers.ViTConfig(num_hidden_layers=3, **sizes, **images)
    model = transformers.ViTForImageClassification(config).eval()
    result = gpusq(model, loader(), CONFIG)
    masks = student_masks(result.student)[1]
    assert len(masks) == 3 * 6
    assert not any("classifier" in name or "patch" in name for name in masks)
    assert len(result.layer_errors) == 2
    # Inputs of the layers, their weights, and both operands of both products of attention.
    assert len(list(quantisers(result.student))) == 3 * (6 + 6 + 4)
    x = loader()[0][0]
    image = x[:1]
    cost, tokens = gpusq_cost(result.student, image), 5
    assert cost.bit_operations < gpusq_cost(result.sparse, image).bit_operations / 4
    left = cost.macs - 3 * tokens * (4 * 16 * 16 + 2 * 16 * 32) // 2
    assert left == 3 * 2 * tokens * tokens * 16 + 4 * 16 * 16 + 16 * 3
    baked = bake_student(result.student)
    assert list(baked.state_dict()) == list(model.state_dict())
    assert baked.config._attn_implementation == model.config._attn_implementation == "sdpa"
    torch.testing.assert_close(baked(x).logits, result.student(x).logits, rtol=0, atol=0.05)
    assert not torch.equal(baked(x).logits, result.student(x).logits)
    assert METHODS["gpusq-vit"].unfit(model) is None
    assert set(METHODS["gpusq-vit"].proposes(model)) == set(masks)


def test_of_a_swin_the_last_blocks_of_late_stages_teach_and_merging_stays_dense():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.SwinConfig(
        image_size=8, patch_size=1, num_channels=1, embed_dim=8, depths=[1, 2, 2],
        num_heads=[1, 2, 2], window_size=2, num_labels=3, drop_path_rate=0.0,
    )  # fmt: skip
    model = transformers.SwinForImageClassification(config).eval()
    late = late_blocks(model)
    assert [name.split("layers.")[1] for name in late] == ["1.blocks.1", "2.blocks.1"]
    result = gpusq(model, loader(), CONFIG)
    assert set(result.layer_errors) == set(late)
    masks = student_masks(result.student)[1]
    assert len(masks) == 5 * 6
    assert not any("downsample" in name for name in masks)
    assert len(list(quantisers(result.student))) == 5 * (6 + 6 + 4)
    x = loader()[0][0]
    baked = bake_student(result.student)
    torch.testing.assert_close(baked(x).logits, result.student(x).logits, rtol=0, atol=0.05)


# Bad input


def test_what_the_pattern_does_not_fit_is_named_or_left_dense():
    model = vit(embed_dim=12, mlp_ratio=1.5)  # 12 and 18 inputs
    with pytest.raises(ValueError, match=r"mlp\.fc2\.weight.*skip_incompatible=True"):
        prune(model, model, loader(), CONFIG)
    sparse, _ = prune(model, model, loader(), replace(CONFIG, skip_incompatible=True))
    assert len(student_masks(sparse)[1]) == 3 * 3
    pairs = replace(CONFIG, pattern="pair")
    with pytest.raises(ValueError, match=r"attn\.qkv\.weight"):
        prune(model, model, loader(), pairs)
    with pytest.raises(ValueError, match=r"PatchEmbed|Conv2d"):
        prune(model, model, loader(), replace(CONFIG, include=("patch_embed.*",)))


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"bits": 6}, "bits must be one of"),
        ({"bits": 3}, "experimental=True"),
        ({"bits": 16, "experimental": True}, "bits must be one of"),
        ({"pattern": "4x1"}, "pattern='4x1'"),
        ({"pattern": "1:4"}, "pattern='1:4': expected '2:4'"),
        ({"pattern": "2:4:pad"}, "pattern='2:4:pad': expected '2:4'"),
        ({"pattern": "1:4:pairs"}, "pattern='1:4:pairs': expected '2:4'"),
        ({"tau": 0.0}, "tau must be in"),
        ({"gamma": -1.0}, "gamma must be in"),
        ({"percentile": math.nan}, "percentile must be in"),
        ({"pattern": "2:4:axis0"}, "along inputs"),
        ({"critical_layers": "early"}, "critical_layers"),
        ({"calibration_batches": 0}, "calibration_batches"),
    ],
)
def test_bad_recipes_are_named(kwargs, match):
    with pytest.raises(ValueError, match=match):
        GPUSQConfig(**kwargs)


def test_bad_stages_are_named():
    for args, name in (
        ((-1, 1e-3), "epochs must be at least 0, got -1"),
        ((1, 0.0), "lr must be in"),
        ((1, math.nan), "lr must be in .*, got nan"),
        ((1, 1e-3, -1.0), "weight_decay must be in"),
    ):
        with pytest.raises(ValueError, match=name):
            Stage(*args)


def test_models_and_data_that_do_not_fit_are_refused(stages):
    dense, sparse, student, errors = stages
    with pytest.raises(ValueError, match="training mode"):
        prune(dense, vit().train(), loader(), CONFIG)
    with pytest.raises(ValueError, match="no module matches 'block'"):
        prune(dense, dense, loader(), replace(CONFIG, critical_layers=("block",)))
    with pytest.raises(ValueError, match="loader is empty"):
        prune(dense, dense, [], CONFIG)
    with pytest.raises(ValueError, match="batches is empty"):
        quantise(sparse, dense, [], errors, CONFIG)
    with pytest.raises(ValueError, match="no 2:4 masks"):
        quantise(dense, dense, loader(), errors, CONFIG)
    with pytest.raises(ValueError, match=r"blocks\.0\.attn\.qkv\.weight' is not 2:4:pairs"):
        quantise(sparse, dense, loader(), errors, replace(CONFIG, pattern="pair"))
    with pytest.raises(ValueError, match="quantised already"):
        quantise(student, dense, loader(), errors, CONFIG)
    with pytest.raises(ValueError, match="layer_errors name"):
        quantise(sparse, dense, loader(), {"blocks.1": 1.0}, CONFIG)
    with pytest.raises(ValueError, match=r"features of .* have shape"):
        other = vit(embed_dim=8)
        prune(dense, other, loader(), CONFIG)
    with pytest.raises(ValueError, match="loss became"):
        broken = [(x * math.inf, y) for x, y in loader()]
        prune(dense, dense, broken, replace(CONFIG, prune=Stage(1, 1e-3)))
    with pytest.raises(ValueError, match="no list of equal blocks"):
        prune(nn.Sequential(nn.Linear(4, 4)), nn.Linear(4, 4), loader(), CONFIG)


def test_a_model_whose_attention_cannot_be_reached_says_so():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    model = nn.Sequential(nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)).eval()
    data = [torch.randn(4, 5, 8) for _ in range(2)]
    config = replace(CONFIG, supervised=False)
    sparse, errors = prune(model, model, data, config)
    assert set(student_masks(sparse)[1]) == {
        f"0.layers.{i}.linear{j}.weight" for i in range(3) for j in (1, 2)
    }
    with pytest.raises(ValueError, match="quantise_attention=False"):
        quantise(sparse, model, data, errors, config)
    student = quantise(sparse, model, data, errors, replace(config, quantise_attention=False))
    assert torch.isfinite(student(data[0])).all()


def test_a_loop_that_calls_another_network_is_told():
    model = vit()
    trainer = GPUSQTrainer(model, torch.optim.SGD(model.parameters(), 0.1), total_steps=10)
    with pytest.raises(RuntimeError, match="no forward pass"):
        trainer.step()
