"""What is no argument is refused by name, and changes nothing."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from aerogel.sparsity import (
    ALLR,
    LLR,
    NM,
    SRSTE,
    Block,
    Constant,
    Cosine,
    CosineFloor,
    Cubic,
    DistillationObjective,
    DropGrow,
    Exponential,
    FixedFraction,
    Geometric,
    InversePower,
    KernelGroup,
    LearnedMask,
    Linear,
    MaskSet,
    NMLadder,
    OneShot,
    Rebuild,
    Shrink,
    Snapshot,
    Soft,
    TransposableNM,
    WeightL1,
    allocate,
    balanced_halves,
    build_masks,
    drop,
    grow,
    hessian_gradients,
    kept_count,
    learning_rate_curve,
    nm_training_flops,
    parse_pattern,
    pruned_count,
    random_masks,
    recalibrate_batchnorm,
    reinitialize,
    retraining_curve,
    rewind,
    select_parameters,
    storage_bytes,
    topk_mask,
    topk_rows,
    training_flops,
)

NAN, INF = math.nan, math.inf
FRACTIONS = (NAN, -0.1, 1.5, INF, "a", None, [0.5])
COUNTS = (NAN, -1, 1.5, INF, "a", None, [1], True)
POSITIVE = (NAN, 0.0, -1.0, INF, "a", None)
CHOICES = ("nonsense", 3, None, [])


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))


def chosen():
    return select_parameters(net())


def scores():
    return torch.arange(64.0).view(8, 8)


RAMP = {"s_i": 0.0, "s_f": 0.5, "begin": 0, "n": 3, "every": 1}
OBJECTS = [
    (Constant, {"s": 0.5}, {"s": FRACTIONS, "every": (0, *COUNTS), "begin": COUNTS}),
    (
        Cubic,
        RAMP,
        {
            "s_i": FRACTIONS,
            "s_f": FRACTIONS,
            "begin": COUNTS,
            "n": (0, *COUNTS),
            "every": (0, *COUNTS),
            "power": POSITIVE,
        },
    ),
    (Geometric, {"s_f": 0.5, "rounds": 3}, {"s_f": (1.0, *FRACTIONS), "rounds": (0, *COUNTS)}),
    (FixedFraction, {"p": 0.2}, {"p": (0.0, 1.0, *FRACTIONS)}),
    (Cosine, {"z0": 0.3, "begin": 0, "end": 9}, {"z0": (NAN, -0.1, INF, "a"), "begin": COUNTS}),
    (CosineFloor, {"z0": 0.5, "T": 9}, {"z0": (NAN, -0.1, "a"), "z_min": (NAN, -0.1, "a")}),
    (InversePower, {"z0": 0.5, "k": 2.0, "T": 9}, {"z0": (NAN, -0.1), "k": POSITIVE, "T": COUNTS}),
    (Linear, {"k": 0.1}, {"k": POSITIVE, "begin": COUNTS}),
    (Exponential, {"k": 0.1}, {"k": POSITIVE[:3], "begin": COUNTS}),
    (OneShot, {"at": 3, "s": 0.5}, {"s": FRACTIONS}),
    (
        NMLadder,
        {"n": 1, "m": 4},
        {"n": (0, 5, *COUNTS), "m": (0, *COUNTS), "end": COUNTS, "axis_length": COUNTS[:5]},
    ),
    (NM, {"n": 2, "m": 4}, {"n": (0, 5, *COUNTS), "m": (0, *COUNTS), "axis": (2, "a", None)}),
    (TransposableNM, {"n": 2, "m": 4}, {"n": (0, 5, *COUNTS), "m": (0, *COUNTS)}),
    (Block, {"bh": 2, "bw": 2}, {"bh": (0, *COUNTS), "bw": (0, *COUNTS)}),
    (KernelGroup, {"g": 2}, {"g": (0, *COUNTS)}),
    (Shrink, {}, {"alpha": FRACTIONS}),
    (Soft, {}, {"beta": FRACTIONS, "grad": CHOICES}),
    (SRSTE, {}, {"lam": (NAN, -0.1, INF, "a", None)}),
    (
        DropGrow,
        {},
        {
            "rounding": CHOICES,
            "init_value": CHOICES,
            "gradient_window": (0, *COUNTS),
            "drop_noise": (NAN, -0.1, INF, "a", None),
            "growth": CHOICES[:3],
            "death": CHOICES[:3],
        },
    ),
    (Rebuild, {}, {"rounding": CHOICES, "pool": CHOICES, "scope": CHOICES}),
    (LLR, {"original": [0.1, 0.0], "steps": 2}, {"steps": (0, *COUNTS), "original": (3, "a")}),
    (
        ALLR,
        {"original": [0.1, 0.0], "steps": 2, "norm_drop": 0.1, "pruned_fraction": 0.5},
        {"norm_drop": (NAN, -1.0, INF, "a"), "pruned_fraction": (0.0, *FRACTIONS)},
    ),
    (LearnedMask, {"scores": scores(), "keep": 4}, {"keep": (65, *COUNTS)}),
    (WeightL1, {"selection": chosen(), "weight": 0.1}, {"weight": (NAN, -0.1, INF, "a", None)}),
    (
        DistillationObjective,
        {"student": net(), "teacher": net().eval()},
        {
            "alpha": (NAN, -0.1, INF, "a", None),
            "temperature": POSITIVE,
            "layers": (3, None, [3], "0"),
        },
    ),
    (MaskSet, {}, {"masks": (3, "a", [1], {"0.weight": 0.5})}),
]
GRASP = {"selection": chosen(), "batches": [(torch.randn(4, 8), torch.arange(4))]}
FUNCTIONS = [
    (
        pruned_count,
        {"numel": 10, "sparsity": 0.5},
        {
            "numel": COUNTS,
            "sparsity": FRACTIONS,
            "min_keep": COUNTS,
            "max_pruned_fraction": FRACTIONS[:5],
            "rounding": CHOICES,
        },
    ),
    (kept_count, {"numel": 10, "density": 0.5}, {"density": FRACTIONS, "numel": COUNTS}),
    (topk_mask, {"score": scores(), "k": 3}, {"k": (65, *COUNTS)}),
    (topk_rows, {"score": scores(), "k": 3}, {"k": (9, *COUNTS)}),
    (drop, {"mask": scores() > 9, "score": scores(), "count": 2}, {"count": (60, *COUNTS)}),
    (grow, {"mask": scores() > 9, "score": scores(), "count": 2}, {"count": COUNTS}),
    (
        build_masks,
        {"scores": {"a": scores()}, "densities": 0.5},
        {"scope": CHOICES, "pool": CHOICES, "rounding": CHOICES, "min_keep": COUNTS},
    ),
    (
        allocate,
        {"selection": chosen(), "density": 0.5, "kind": "erk"},
        {"density": (0.0, *FRACTIONS), "power": (NAN, INF, "a", None), "last_density": FRACTIONS},
    ),
    (random_masks, {"selection": chosen(), "densities": 0.5}, {"min_keep": COUNTS}),
    (
        training_flops,
        {"dense": 10.0, "sparse": 5.0, "method": "rigl", "update_every": 5},
        {"dense": POSITIVE, "sparse": (NAN, -1.0, 11.0, "a"), "update_every": (0, *COUNTS)},
    ),
    (
        nm_training_flops,
        {"forward": 10.0, "n": 2, "m": 4},
        {"n": (0, 5, *COUNTS), "m": (0, *COUNTS), "forward": (NAN, -1.0, INF, "a")},
    ),
    (
        storage_bytes,
        {"masks": scores() > 9, "format": "dense"},
        {"value_bytes": POSITIVE},
    ),
    (
        balanced_halves,
        {"batches": [(torch.randn(8, 2), torch.arange(8) % 2)], "num_classes": 2, "per_class": 2},
        {"num_classes": (0, *COUNTS), "per_class": (0, *COUNTS)},
    ),
    (hessian_gradients, {"model": net(), **GRASP}, {"temperature": POSITIVE}),
    (
        learning_rate_curve,
        {"make_scheduler": lambda o: None, "lr": 0.1, "steps": 4},
        {"lr": (NAN, -0.1, INF, "a", None), "steps": (0, *COUNTS)},
    ),
    (
        recalibrate_batchnorm,
        {"model": nn.Sequential(nn.BatchNorm1d(4)), "batches": [torch.randn(5, 4)]},
        {"fraction": (0.0, *FRACTIONS)},
    ),
    (parse_pattern, {}, {"spec": (3, None, NAN)}),
    (select_parameters, {"model": net()}, {"include": (3, None, [3], "a"), "exclude": (3, "a")}),
]


def cases(table):
    return [
        pytest.param(call, good, name, value, id=f"{call.__name__}-{name}-{value!r}")
        for call, good, bad in table
        for name, values in bad.items()
        for value in values
    ]


@pytest.mark.parametrize(("call", "good", "name", "value"), cases(OBJECTS + FUNCTIONS))
def test_bad_arguments_are_named(call, good, name, value):
    said = {"spec": "pattern", "axis": "axis"}.get(name, name)
    with pytest.raises((ValueError, TypeError), match=rf"\b{said}\b"):
        call(**{**good, name: value})


@pytest.mark.parametrize("name", [3, None, "", "LLLR"])
def test_retraining_schedules_without_a_name_are_refused(name):
    with pytest.raises(ValueError, match="unknown retraining schedule"):
        retraining_curve(name, [0.1, 0.0], 2)


BAD_MASKS = [
    {"0.weight": torch.ones(8, 7, dtype=torch.bool)},
    {"nowhere": torch.ones(8, 8, dtype=torch.bool)},
    {"0.weight": torch.ones(8, 8)},
    {"0.weight": 0.5},
    [torch.ones(8, 8, dtype=torch.bool)],
]


@pytest.mark.parametrize("masks", BAD_MASKS)
def test_masks_that_do_not_fit_leave_the_weights_alone(masks):
    model = net()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    other = Snapshot.capture(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)))
    calls = [
        lambda: rewind(model, other, masks=masks),
        lambda: reinitialize(model, masks=masks),
        lambda: reinitialize(model, "shuffle", masks=masks, snapshot=other),
    ]
    for call in calls:
        with pytest.raises((ValueError, TypeError), match=r"mask|nowhere"):
            call()
        assert all(torch.equal(before[n], value) for n, value in model.state_dict().items())
