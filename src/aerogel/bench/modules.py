"""Engines that run modules, inside a worker process: build the network, then prepare the call."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch
from torch import nn

from aerogel import runtime
from aerogel.bench.engines import MODULE_ENGINES, Workspace, plain_copy
from aerogel.bench.inputs import Call, Inputs, output_tensors, save_tensors


def from_request(request: dict[str, Any]) -> tuple[Call, dict[str, Any]]:
    """Answer "prepare".

    Args:
        request: "engine" (a name and options), "network" (builder, its arguments, and a file of
            weights), "inputs", "outputs" and "threads".

    Returns:
        The call, and what the engine says about the network.
    """
    torch.set_num_threads(request["threads"])
    torch.set_grad_enabled(False)
    model = plain_copy(build(**request["network"]))
    inputs = Inputs.load(Path(request["inputs"]))
    kind = next(each for each in MODULE_ENGINES if each.name == request["engine"])
    with Workspace() as workspace:
        engine = kind(**request["options"])
        call = engine.prepare(model, inputs, request["threads"], workspace)
    save_tensors(output_tensors(call()), Path(request["outputs"]), {})
    return call, {"facts": call.facts()} if hasattr(call, "facts") else {}


def build(builder: str, arguments: dict[str, Any], weights: str) -> nn.Module:
    """A network from its `Source` and its weights.

    Args:
        builder: Import path of a function.
        arguments: What it is called with.
        weights: A checkpoint by `aerogel.save`.
    """
    module, _, name = builder.partition(":")
    model = getattr(importlib.import_module(module), name)(**arguments)
    return runtime.load(weights, model)
