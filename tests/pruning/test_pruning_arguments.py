"""What is no argument is refused by name, before the model is touched."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from aerogel.models import VisionTransformer
from aerogel.pruning import (
    ITOP,
    SET,
    SRSTE,
    BidirectionalNM,
    DynamicSparseLearning,
    Goal,
    GradualPruner,
    GroupKernelConfig,
    GroupKernelPruner,
    IterativeSoftShrinkage,
    LotteryTicket,
    PenalisedPruner,
    PointwisePruner,
    ProgressiveGradientFlow,
    RigL,
    dsnot_,
    joint_weight_decay,
    magnitude_,
    prune,
    random_prune,
    sparsegpt_,
    track_gradient_noise,
    wanda_,
)
from aerogel.pruning.gpusq_vit import GPUSQTrainer
from aerogel.pruning.sparse_then_prune import Loaders, sparse_then_prune
from every_method import Net, sgd

NAN, INF = math.nan, math.inf

# For every method that trains: good arguments, and per argument values that are none.
FRACTIONS = (NAN, -0.1, 1.5, INF, "a", None, [0.5])
COUNTS = (NAN, -1, 0, 1.5, INF, "a", None, [1], True)
GLOBS = (3, None, [3], "a")
TRAINERS = {
    GradualPruner: (
        {"final_sparsity": 0.5, "begin_step": 0, "end_step": 4, "frequency": 1},
        {
            "final_sparsity": FRACTIONS,
            "initial_sparsity": FRACTIONS,
            "begin_step": (NAN, -1, 1.5, "a", None),
            "end_step": COUNTS[:-1],
            "frequency": COUNTS,
            "power": (NAN, 0.0, -1.0, INF, "a", None),
            "threshold_ema": FRACTIONS,
            "scope": ("rows", 3, None),
            "pool": ("mean", 3, None),
            "include": GLOBS,
            "exclude": GLOBS,
            "pattern": (3, None, "5:4"),
            "coupling": (3, None, "firm"),
        },
    ),
    PointwisePruner: (
        {"sparsity": 0.5, "steps": 12},
        {
            "sparsity": FRACTIONS,
            "initial_sparsity": FRACTIONS,
            "steps": COUNTS,
            "begin": FRACTIONS,
            "end": FRACTIONS,
            "frequency": COUNTS,
            "blocks": (1.5, None, [1], "4x"),
            "layers": ([3], ["nothing"]),
        },
    ),
    GroupKernelPruner: (
        {"config": GroupKernelConfig(sparsity=0.5, rearrange=False), "steps": 6},
        {"steps": COUNTS},
    ),
    BidirectionalNM: (
        {"n": 2, "m": 4},
        {"n": COUNTS, "m": COUNTS, "sr_ste_lambda": (NAN, -1.0, INF, "a", None)},
    ),
    SRSTE: (
        {"n": 2, "m": 4, "include": ["point.weight"]},
        {"n": COUNTS, "m": COUNTS, "lam": (NAN, -1.0, INF, "a", None)},
    ),
    ProgressiveGradientFlow: (
        {"n": 2, "m": 4, "total_steps": 12},
        {
            "n": COUNTS,
            "total_steps": COUNTS,
            "dense_fraction": FRACTIONS,
            "fine_tune_fraction": FRACTIONS,
            "k": (NAN, 0.0, -1.0, "a"),
            "locations": (3, None, "ff", [3]),
        },
    ),
    DynamicSparseLearning: (
        {"density": 0.5, "total_steps": 12, "update_every": 3},
        {
            "density": FRACTIONS,
            "total_steps": COUNTS,
            "update_every": COUNTS,
            "grad_accum": COUNTS,
            "z0": FRACTIONS,
            "z_min": FRACTIONS,
        },
    ),
    IterativeSoftShrinkage: (
        {"sparsity": 0.5, "prune_steps": 4, "total_steps": 12},
        {
            "sparsity": (NAN, -0.1, 1.5, "a", [0.5]),
            "alpha": FRACTIONS,
            "prune_steps": COUNTS,
            "total_steps": (NAN, -1, 0, 1.5, "a"),
            "sample": COUNTS,
        },
    ),
    PenalisedPruner: (
        {"sparsity": 0.5},
        {"sparsity": FRACTIONS, "lam": (NAN, -0.1, INF, "a", None), "blocks": (3, None, "b")},
    ),
    GPUSQTrainer: (
        {"total_steps": 12},
        {"total_steps": COUNTS, "quantise_from": FRACTIONS},
    ),
}
DYNAMIC = {
    "sparsity": FRACTIONS,
    "total_steps": COUNTS,
    "update_every": COUNTS,
    "drop_fraction": FRACTIONS,
}
OFTEN = {"grad_accum": COUNTS, "drop_noise": (NAN, -0.1, INF, "a", None), "end": FRACTIONS}
for method in (RigL, SET, ITOP):
    changes = DYNAMIC if method is ITOP else {**DYNAMIC, **OFTEN}
    TRAINERS[method] = ({"sparsity": 0.5, "total_steps": 12, "update_every": 3}, changes)


def cases(table):
    return [
        pytest.param(method, good, name, value, id=f"{method.__name__}-{name}-{value!r}")
        for method, (good, bad) in table.items()
        for name, values in bad.items()
        for value in values
    ]


def snapshot(model):
    """All that a refused call could have left behind in a model."""
    state = {name: value.clone() for name, value in model.state_dict().items()}
    hooks = [
        (name, type(module), len(module._forward_hooks), len(module._forward_pre_hooks))
        for name, module in model.named_modules()
    ]
    return state, hooks, [module.training for module in model.modules()]


def assert_same(before, after):
    assert before[1:] == after[1:]
    assert before[0].keys() == after[0].keys()
    assert all(torch.equal(value, after[0][name]) for name, value in before[0].items())


@pytest.mark.parametrize(("method", "good", "name", "value"), cases(TRAINERS))
def test_trainers_name_what_they_refuse_and_touch_nothing(method, good, name, value):
    model = Net()
    before = snapshot(model)
    with pytest.raises((ValueError, TypeError), match=rf"\b{name}\b"):
        method(model, sgd(model), **{**good, name: value})
    assert_same(before, snapshot(model))


def vit():
    torch.manual_seed(0)
    sizes = {"patch_size": 2, "in_chans": 1, "embed_dim": 16, "depth": 2, "num_heads": 2}
    return VisionTransformer(4, **sizes, num_classes=4, mlp_ratio=2.0)


def inputs():
    return [torch.randn(4, 1, 4, 4, generator=torch.Generator().manual_seed(i)) for i in (0, 1)]


def loaders():
    batches = [(x, torch.arange(4)) for x in inputs()]
    return Loaders(batches, batches)


CALIBRATED = {"batches": (3, None, []), "sparsity": (NAN, -0.1, 1.0, "a", [0.5]), "pattern": (3,)}
FUNCTIONS = {
    magnitude_: ({}, {"sparsity": CALIBRATED["sparsity"], "scope": ("rows", 3), "include": GLOBS}),
    wanda_: ({"batches": inputs()}, CALIBRATED),
    sparsegpt_: (
        {"batches": inputs()},
        {**CALIBRATED, "block": COUNTS, "damp": (NAN, 0.0, -1.0, INF, "a", None)},
    ),
    dsnot_: (
        {"batches": inputs()},
        {
            **CALIBRATED,
            "max_cycles": (NAN, -1, 1.5, "a", None),
            "threshold": (NAN, -1.0, "a", None),
            "var_power": (NAN, -1.0, INF, "a", None),
            "start": (3, "wands"),
            "skip": (3, "attention"),
        },
    ),
    random_prune: (
        {"density": 0.5},
        {"density": (NAN, 0.0, -0.1, 1.5, INF, "a", [0.5]), "pattern": (3, None)},
    ),
    prune: (
        {"method": "magnitude", "sparsity": 0.5},
        {"sparsity": (NAN, -0.1, 1.0, "a", [0.5]), "steps": COUNTS[:6], "data": (3, None)},
    ),
    sparse_then_prune: (
        {"loaders": loaders(), "epochs": 1},
        {
            "lam": (NAN, -0.1, INF, "a", None),
            "epochs": (NAN, -1, 1.5, "a", None),
            "ratio": FRACTIONS,
            "max_lr": (NAN, 0.0, -1.0, INF, "a", None),
            "warmup_steps": (NAN, -1, 1.5, "a", None),
            "blocks": (3, None, "b", [7]),
            "penalty": (3, None, "l2"),
        },
    ),
    joint_weight_decay: ({"weight_decay": 0.1}, {"weight_decay": (NAN, -1.0, INF, "a", None)}),
}


@pytest.mark.parametrize(("method", "good", "name", "value"), cases(FUNCTIONS))
def test_functions_name_what_they_refuse_and_touch_nothing(method, good, name, value):
    model = vit()
    before = snapshot(model)
    with pytest.raises((ValueError, TypeError), match=rf"\b{name}\b"):
        method(model, **{**good, name: value})
    assert_same(before, snapshot(model))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rounds": 1.5}, "rounds must be a whole number of at least 1, got 1.5"),
        ({"rounds": NAN}, "rounds must be a whole number of at least 1, got nan"),
        ({"rate": "a"}, r"rate must be a number in \(0, 1\), got 'a'"),
        ({"rate": {"*": None}}, r"rate\['\*'\] must be a number in \(0, 1\), got None"),
        ({"rate": NAN}, r"rate must be in \(0, 1\), got nan"),
        ({"output_rate": "a"}, r"output_rate must be a number in \(0, 1\), got 'a'"),
        ({"rewind_to": 1.5}, "rewind_to must be a whole number of at least 0, got 1.5"),
        ({"scope": "row"}, "scope must be one of 'layer', 'global', got 'row'"),
        ({"reset": 3}, "reset must be one of .*, got 3"),
    ],
)
def test_lottery_tickets_name_what_they_refuse(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        LotteryTicket(lambda: nn.Linear(4, 4), lambda *_: None, **{"rounds": 2, **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group": 1.5}, "group must be a whole number"),
        ({"group": 0}, "group must be at least 1, got 0"),
        ({"sparsity": "a"}, r"sparsity must be a number in \[0, 1\), got 'a'"),
        ({"rates": 3}, "rates must be a mapping, got 3"),
        ({"patterns": "group"}, "patterns must be a mapping, got 'group'"),
    ],
)
def test_group_kernel_configs_name_what_they_refuse(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        GroupKernelConfig(**options)


@pytest.mark.parametrize("updates", [0, -1, 1.5, NAN, "a"])
def test_goals_name_what_they_refuse(updates):
    with pytest.raises((ValueError, TypeError), match="updates must be"):
        Goal((), 0.5, "unstructured", 10, updates=updates)


@pytest.mark.parametrize("decay", [NAN, -0.1, 1.0, "a", None])
def test_tracking_of_noise_names_what_it_refuses(decay):
    model = Net()
    optimizer = sgd(model)
    with pytest.raises((ValueError, TypeError), match="decay must be"):
        track_gradient_noise(model, optimizer, decay)
    assert not optimizer._optimizer_step_post_hooks
