"""From the names in a recipe to a network and its data.

A model is a registered name, `import.path:callable`, a `torch.export` file (.pt2), an ONNX file, a
safetensors file that says which network it belongs to, the folder of an earlier run, or the folder
of a Hugging Face model.
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from aerogel import bench, data, models, runtime
from aerogel.compress.recipe import DataSpec, ModelSpec, Rewrite
from aerogel.pruning import METHODS, RewritingMethod

# Under this key `model.safetensors` records the network it belongs to, as JSON of a ModelSpec.
MODEL_KEY = "aerogel.model"
PRETRAINED = "pretrained"
# Of names that are paths even without a folder.
_SUFFIXES = (".safetensors", ".pt2", ".onnx", ".pt", ".pth")


class DataShape(Protocol):
    """What of a data set decides a network's shape."""

    @property
    def task(self) -> str:
        """What is learnt."""

    @property
    def num_classes(self) -> int:
        """0 where there are no classes."""

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Of one sample."""


@dataclass(frozen=True)
class _Shape:
    """The same without the data."""

    task: str
    num_classes: int
    input_shape: tuple[int, ...]


def load_data(spec: DataSpec, on_progress: data.Progress | None = None) -> data.Dataset:
    """The data set of a recipe.

    Raises:
        ValueError: Unknown name (nearest are listed) or unusable folder.
        FetchError: It can be had from nowhere.
    """
    return data.load(spec.name, limit=spec.limit, fallback=spec.fallback, on_progress=on_progress)


def load_model(spec: ModelSpec, dataset: DataShape | None, *, seed: int = 0) -> nn.Module:
    """Build the network of a recipe with its starting weights.

    Args:
        spec: What to build.
        dataset: Fixes the number of classes and the input's shape where the network takes them.
        seed: Of the initial weights.

    Raises:
        ValueError: No such network, not a network, weights that do not fit or are not finite.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _build(spec, dataset)
        if spec.rewrite is not None:
            model = _rewritten(model, spec.rewrite)
    if spec.weights is not None and spec.name not in models.list_models():
        if spec.weights == PRETRAINED:
            raise ValueError(f"no pretrained weights are known for model = {spec.name!r}")
        runtime.load(Path(spec.weights).expanduser(), model)
    check_finite(model, f"model = {spec.name!r}")
    return model


def _rewritten(model: nn.Module, rewrite: Rewrite) -> nn.Module:
    method = METHODS[rewrite.method]
    assert isinstance(method, RewritingMethod)
    return method.rewrite(model, rewrite.weights, rewrite.sparsity)


def spec_of(path: Path) -> ModelSpec | None:
    """Which network a file of `aerogel compress` belongs to, or None where it does not say.

    Raises:
        ValueError: Metadata that cannot be read.
    """
    recorded = runtime.inspect(path).metadata.get(MODEL_KEY)
    if recorded is None:
        return None
    try:
        return ModelSpec.model_validate_json(recorded)
    except ValueError:
        raise ValueError(f"{path}: its {MODEL_KEY} metadata cannot be read") from None


def source_of(spec: ModelSpec, dataset: DataShape | None, seed: int = 0) -> bench.Source:
    """How another process builds the network that `load_model` builds, weights aside.

    Args:
        spec: What to build.
        dataset: The data it is built for.
        seed: As in `load_model`.
    """
    shape = None
    if dataset is not None:
        shape = asdict(_Shape(dataset.task, dataset.num_classes, tuple(dataset.input_shape)))
    plain = spec.model_copy(update={"weights": None}).model_dump(mode="json")
    return bench.Source(f"{__name__}:rebuild", {"spec": plain, "shape": shape, "seed": seed})


def rebuild(spec: dict[str, Any], shape: dict[str, Any] | None, seed: int) -> nn.Module:
    """The network of a `source_of`, in another process."""
    dataset = None if shape is None else _Shape(**shape)
    return load_model(ModelSpec(**spec), dataset, seed=seed)


def starts_trained(spec: ModelSpec) -> bool:
    """Whether the network comes with weights, so that dense training is not needed first."""
    return spec.weights is not None or _path_of(spec) is not None


def check_finite(model: nn.Module, what: str) -> None:
    """Raise if a weight is NaN or infinite.

    Raises:
        ValueError: With the first such weight's name and how many of its values are affected.
    """
    for name, value in model.state_dict().items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            bad = int((~torch.isfinite(value)).sum())
            raise ValueError(
                f"{what}: {name} has {bad} values that are NaN or infinite, of {value.numel()}"
            )


def example_inputs(dataset: data.Dataset, batch: int) -> tuple[Tensor, ...]:
    """Inputs of `batch` real test examples, for `model(*inputs)`; texts are of typical length."""
    split = getattr(dataset.test, "queries", dataset.test)
    order = torch.arange(len(split))
    if (lengths := getattr(split, "lengths", None)) is not None:
        order = (lengths - lengths.median()).abs().argsort(stable=True)
    return tuple(split.batch(order[torch.arange(batch) % len(split)]).inputs)


def _path_of(spec: ModelSpec) -> Path | None:
    path = Path(spec.name).expanduser()
    looks_like_path = os.sep in spec.name or path.suffix in _SUFFIXES
    return (
        path
        if looks_like_path or (path.is_dir() and spec.name not in models.list_models())
        else None
    )


def _build(spec: ModelSpec, dataset: DataShape | None) -> nn.Module:
    if spec.name in models.list_models():
        return _from_registry(spec, dataset)
    path = _path_of(spec)
    if path is not None and (path.exists() or ":" not in spec.name):
        return _from_path(path, spec, dataset)
    if ":" in spec.name:
        return _from_import(spec, dataset)
    return models.create_model(spec.name)  # raises, listing the nearest names


def _fitting(constructor: Callable[..., Any], dataset: DataShape | None) -> dict[str, Any]:
    """What the data decides, as far as the constructor has arguments of these names."""
    if dataset is None or dataset.task != "classification":
        return {}
    channels, size = dataset.input_shape[0], dataset.input_shape[-1]
    known = {"num_classes": dataset.num_classes, "in_chans": channels, "img_size": size}
    try:
        accepted = inspect.signature(constructor).parameters
    except (TypeError, ValueError):
        return {}
    return {name: value for name, value in known.items() if name in accepted}


def _from_registry(spec: ModelSpec, dataset: DataShape | None) -> nn.Module:
    fitting = _fitting(models.create_model, dataset)
    checkpoint = None if spec.weights is None else Path(spec.weights).expanduser()
    if spec.weights == PRETRAINED:
        checkpoint = data.fetch_checkpoint(spec.name)
    return models.create_model(spec.name, **{**fitting, **spec.options}, checkpoint_path=checkpoint)


def _from_import(spec: ModelSpec, dataset: DataShape | None) -> nn.Module:
    module_name, _, attribute = spec.name.partition(":")
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        target: Any = importlib.import_module(module_name)
        for part in attribute.split("."):
            target = getattr(target, part)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"model = {spec.name!r} cannot be imported: {error}") from None
    if isinstance(target, nn.Module):
        return target
    if not callable(target):
        raise ValueError(f"model = {spec.name!r} is a {type(target).__name__}, not a callable")
    return _checked(target(**{**_fitting(target, dataset), **spec.options}), spec.name)


def _checked(model: Any, name: str) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise ValueError(f"model = {name!r} gave a {type(model).__name__}, expected an nn.Module")
    return model


def _from_path(path: Path, spec: ModelSpec, dataset: DataShape | None) -> nn.Module:
    if not path.exists():
        known = ", ".join(models.list_models())
        raise ValueError(f"model = {spec.name!r}: no such file or folder; known names: {known}")
    if path.suffix == ".pt2":
        from aerogel.compress.exported import load_exported

        return load_exported(path)
    if path.suffix == ".onnx":
        return _from_onnx(path)
    if path.suffix == ".safetensors":
        return _from_safetensors(path, spec, dataset)
    if path.is_dir():
        return _from_folder(path, spec, dataset)
    raise ValueError(
        f"model = {spec.name!r}: expected a .safetensors, .onnx or .pt2 file or a folder. Pickled "
        "files can run code and are never opened; load the network yourself and give it as "
        "`import.path:callable`, or save its state_dict with aerogel.save"
    )


def _from_onnx(path: Path) -> nn.Module:
    model = runtime.from_onnx(path)
    first = model.meta["onnx_inputs"][0] if model.meta["onnx_inputs"] else None
    if first is not None and first.shape and isinstance(first.shape[0], int):
        _require_any_batch(model, path, first.shape[0])
    return model


def _require_any_batch(model: Any, path: Path, batch: int) -> None:
    """Exporters write a fixed batch into shapes that often do not depend on it; so try."""
    shapes = [declared.shape or () for declared in model.meta["onnx_inputs"]]
    if not all(isinstance(size, int) for shape in shapes for size in shape):
        return
    inputs = [
        torch.zeros((batch + 1, *shape[1:]), dtype=getattr(torch, declared.dtype))
        for declared, shape in zip(model.meta["onnx_inputs"], shapes, strict=True)
    ]
    try:
        with torch.no_grad():
            outputs = model(*inputs)
    except (RuntimeError, ValueError, IndexError):
        outputs = None
    found = outputs if isinstance(outputs, Tensor | None) else outputs[0]
    if found is None or found.dim() == 0 or found.shape[0] != batch + 1:
        raise ValueError(
            f"{path}: exported with a fixed batch of {batch}; export it with a dynamic first "
            "dimension"
        )


def _from_safetensors(path: Path, spec: ModelSpec, dataset: DataShape | None) -> nn.Module:
    origin = spec_of(path)
    if origin is None:
        raise ValueError(
            f"model = {spec.name!r} holds weights but does not say of which network; give the "
            "network as --model and the file as --weights"
        )
    merged = origin.model_copy(update={"options": {**origin.options, **spec.options}})
    return runtime.load(path, load_model(merged, dataset))


def _from_folder(path: Path, spec: ModelSpec, dataset: DataShape | None) -> nn.Module:
    if (path / "recipe.yaml").exists():
        return _from_safetensors(path / "model.safetensors", spec, dataset)
    if (path / "config.json").exists():
        return _from_hugging_face(path)
    raise ValueError(
        f"model = {spec.name!r}: expected the folder of an aerogel run (recipe.yaml and "
        "model.safetensors) or of a Hugging Face model (config.json and model.safetensors)"
    )


def _from_hugging_face(path: Path) -> nn.Module:
    try:
        from transformers import AutoModel
    except ImportError:
        raise ValueError("Hugging Face folders need: pip install 'aerogel[text]'") from None
    kind = json.loads((path / "config.json").read_text()).get("model_type")
    try:
        model = AutoModel.from_pretrained(
            path, use_safetensors=True, trust_remote_code=False, local_files_only=True
        )
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"model folder {str(path)!r} (type {kind!r}): {error}") from None
    return _checked(model, str(path))
