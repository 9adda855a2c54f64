"""From a module and example inputs to a flat, functional graph of ATen operators."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.nn.utils import prune as torch_prune
from torch.utils._pytree import TreeSpec

from aerogel.runtime import graph
from aerogel.runtime.module_state import bake_parametrizations, plain_layers
from aerogel.runtime.passes.remove_mutation import mutates, remove_mutation


class CaptureError(RuntimeError):
    """The model cannot be turned into a graph; the message names the module and the reason."""


@dataclass(frozen=True)
class Captured:
    """A graph that takes and returns flat leaves, and how calls fold into them.

    Attributes:
        graph_module: Placeholders are the leaves of (args, kwargs); the output is a tuple.
        in_spec: Tree of (args, kwargs).
        out_spec: Tree of the result.
        input_names: One name per leaf, for error messages.
    """

    graph_module: fx.GraphModule
    in_spec: TreeSpec
    out_spec: TreeSpec
    input_names: tuple[str, ...]


def frozen_copy(model: nn.Module) -> nn.Module:
    """A deep copy in eval mode whose masks are baked into plain weights without gradients."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for value in vars(module).values():
            # A mask hook leaves its product on the module: a non-leaf tensor refuses deepcopy.
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    clone = plain_layers(bake_parametrizations(copy.deepcopy(model, memo).eval()))
    with torch.no_grad():
        for module in clone.modules():
            _apply_prune_hooks(module)
    return clone.requires_grad_(False)


def _apply_prune_hooks(module: nn.Module) -> None:
    hooks = list(module._forward_pre_hooks.values())
    for hook in hooks:
        if isinstance(hook, torch_prune.BasePruningMethod):
            torch_prune.remove(module, hook._tensor_name)


def capture(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Captured:
    """Export a model and flatten the result.

    Args:
        model: In eval mode, on the CPU.
        args: Positional example inputs; every shape in them becomes static.
        kwargs: Keyword example inputs.

    Raises:
        CaptureError: The model's forward cannot be exported (data-dependent control flow,
            unsupported operators), or writes to its buffers or inputs.
    """
    try:
        with torch.no_grad():
            program = torch.export.export(model, args, kwargs, strict=False)
            flat = remove_mutation(_flatten(program))
            if mutates(flat):  # what is left needs torch's own, slower functionalization
                program = program.run_decompositions({})
                flat = _flatten(program)
    except Exception as error:
        raise CaptureError(_explain_failure(model, error)) from error
    _reject_side_effects(program)
    in_spec, out_spec = program.call_spec.in_spec, program.call_spec.out_spec
    if in_spec is None or out_spec is None:
        raise CaptureError("torch.export gives no call specification")
    names = tuple(str(node.target) for node in flat.graph.nodes if node.op == "placeholder")
    return Captured(flat, in_spec, out_spec, names)


def _reject_side_effects(program: ExportedProgram) -> None:
    for output in program.graph_signature.output_specs:
        if output.kind is not OutputKind.USER_OUTPUT:
            raise CaptureError(
                f"forward changes {output.target or 'an input'!r} "
                f"({output.kind.name.lower()}), which a compiled model must not"
            )
    for given in program.graph_signature.input_specs:
        if given.kind in (InputKind.CUSTOM_OBJ, InputKind.TOKEN):
            raise CaptureError(f"forward uses {given.target!r}, a {given.kind.name.lower()}")


def _flatten(program: ExportedProgram) -> fx.GraphModule:
    """Turn lifted weights back into attributes; keep the user's leaves as placeholders."""
    tensors = {**program.state_dict, **program.constants}
    targets = {
        spec.arg.name: spec.target
        for spec in program.graph_signature.input_specs
        if spec.kind is not InputKind.USER_INPUT
    }
    edited = copy.deepcopy(program.graph)
    edited.set_codegen(fx.graph.CodeGen())
    attributes: dict[str, Any] = dict(program.graph_module.named_children())
    for node in list(edited.nodes):
        if node.op != "placeholder" or node.name not in targets:
            continue
        path = targets[node.name]
        attributes[node.name] = tensors[path].detach()
        with edited.inserting_before(node):
            constant = edited.get_attr(node.name)
        constant.meta = {"val": attributes[node.name], "fqn": path}
        node.replace_all_uses_with(constant)
        edited.erase_node(node)
    return graph.tidy(fx.GraphModule(attributes, edited))


def _explain_failure(model: nn.Module, error: Exception) -> str:
    where = _innermost_module(model, error)
    place = f"module {where!r}" if where else type(model).__name__
    reason = next((line for line in str(error).splitlines() if line.strip()), "no reason given")
    return f"torch.export fails in {place}: {type(error).__name__}: {reason.strip()}"


def _innermost_module(model: nn.Module, error: BaseException) -> str:
    """Path of the deepest submodule whose forward was running when the error was raised."""
    paths = {id(module): name for name, module in model.named_modules()}
    types = {type(module) for module in model.modules()}
    found = ""
    for frame_owner in _frame_owners(error.__traceback__):
        if id(frame_owner) in paths:
            found = paths[id(frame_owner)] or found
        elif type(frame_owner) in types:  # export may run on a copy of the module
            found = type(frame_owner).__name__
    return found


def _frame_owners(traceback: TracebackType | None) -> Iterator[nn.Module]:
    while traceback is not None:
        owner = traceback.tb_frame.f_locals.get("self")
        if isinstance(owner, nn.Module):
            yield owner
        traceback = traceback.tb_next
