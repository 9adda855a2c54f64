"""Learning from a dense teacher: of labels, of its softened outputs, and of its features.

    with DistillationObjective(student, teacher, layers=("blocks.10", "blocks.11")) as objective:
        loss = objective(inputs, labels)

Reference: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", arXiv 1503.02531;
Yu et al., arXiv 2305.10727, for the three terms together.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from fnmatch import fnmatchcase
from types import TracebackType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from aerogel.arguments import check_names, check_number
from aerogel.sparsity.blocks import first_tensor
from aerogel.sparsity.penalties import add_gradient

TaskLoss = Callable[[Any, Any], Tensor]
Scores = Callable[[Any], Tensor]


def hard_loss(output: Any, labels: Tensor) -> Tensor:
    """Cross-entropy of a batch's class scores."""
    return F.cross_entropy(class_scores(output), labels)


def soft_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Kullback-Leibler divergence of softened outputs, times the squared temperature.

    Args:
        student: (..., classes) scores; the divergence is a mean over the first dimension.
        teacher: scores of the same shape.
        temperature: > 0.

    Reference:
        Hinton, Vinyals, Dean, arXiv 1503.02531.
    """
    divergence = F.kl_div(
        F.log_softmax(student / temperature, dim=-1),
        F.log_softmax(teacher / temperature, dim=-1),
        reduction="batchmean",
        log_target=True,
    )
    return divergence * temperature**2


def feature_errors(
    student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Mean squared difference of every layer's features.

    Raises:
        ValueError: a layer whose features have different shapes (named).
    """
    for name, feature in student.items():
        if feature.shape != teacher[name].shape:
            raise ValueError(
                f"features of {name!r} have shape {tuple(feature.shape)} in the student and "
                f"{tuple(teacher[name].shape)} in the teacher"
            )
    return {name: F.mse_loss(feature, teacher[name]) for name, feature in student.items()}


def feature_loss(
    errors: Mapping[str, Tensor], factors: Mapping[str, float] | None = None
) -> Tensor:
    """Sum over layers of factor * mean squared difference; all factors are 1 by default.

    Raises:
        ValueError: no layer.
    """
    if not errors:
        raise ValueError("no features to compare: name at least one layer")
    weights = factors or dict.fromkeys(errors, 1.0)
    return torch.stack([weights[name] * error for name, error in errors.items()]).sum()


def class_scores(output: Any) -> Tensor:
    """Of a network that returns them alone, first, or as `logits`."""
    named = output.get("logits", output) if isinstance(output, Mapping) else output
    scores = first_tensor(getattr(named, "logits", named))
    if scores is None:
        raise ValueError(f"no class scores in an output of type {type(output).__name__}")
    return scores


class FeatureTap:
    """Keeps the outputs of some modules in the latest forward pass.

    A context manager, or `remove()` it: then the network is as it was.

    Args:
        model: any module.
        layers: names or globs of modules; of a tuple, the first tensor is kept.
        argument: what the layers are called in errors.

    Attributes:
        names: of the modules, in the model's order.
        features: name -> output, with its graph.

    Raises:
        ValueError: a glob that matches no module; the nearest names are listed.
    """

    def __init__(self, model: nn.Module, layers: Sequence[str], argument: str = "layers") -> None:
        self.names = matching_modules(model, layers, argument)
        self.features: dict[str, Tensor] = {}
        modules = dict(model.named_modules())
        self._handles: list[RemovableHandle] = [
            modules[name].register_forward_hook(self._hook(name)) for name in self.names
        ]

    def take(self) -> dict[str, Tensor]:
        """The features by name, in order, which are forgotten here.

        Raises:
            RuntimeError: a module did not run since (named).
        """
        found, self.features = self.features, {}
        missing = [name for name in self.names if name not in found]
        if missing:
            raise RuntimeError(f"no forward pass went through {missing[0]!r} yet")
        return {name: found[name] for name in self.names}

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.features.clear()

    def __enter__(self) -> FeatureTap:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()

    def _hook(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            feature = first_tensor(output)
            if feature is None:
                raise ValueError(f"{name!r} returns no tensor, but {type(output).__name__}")
            self.features[name] = feature

        return hook


def matching_modules(model: nn.Module, globs: Sequence[str], argument: str) -> list[str]:
    """Names of the modules that globs match, in the model's order.

    Raises:
        ValueError: a glob that matches none; the nearest names are listed.
    """
    check_names(argument, globs)
    names = [name for name, _ in model.named_modules() if name]
    for glob in globs:
        if not any(fnmatchcase(name, glob) for name in names):
            near = ", ".join(difflib.get_close_matches(glob, names, n=3, cutoff=0.0))
            raise ValueError(f"{argument}: no module matches {glob!r}; nearest: {near}")
    return [name for name in names if any(fnmatchcase(name, glob) for glob in globs)]


class DistillationObjective:
    """alpha * hard + beta * soft + gamma * features, of a student and a frozen teacher.

    A context manager, or `close()` it. A term whose weight is 0 is not computed; with gamma = 0
    nothing is hooked.

    Args:
        student: the network that learns.
        teacher: a trained network that names its modules alike, in eval mode; never changed.
        layers: names or globs of the modules whose outputs are features.
        alpha, beta, gamma: weights of the terms, >= 0.
        temperature: of the soft term, > 0.
        task_loss: the hard term, (output, targets) -> scalar; None drops it, and targets are never
            looked at.
        scores: class scores of an output, (..., classes), for the soft term.
        attach: add the gradients of the soft and the feature term in every backward pass through
            the student's output, for training loops whose loss is out of reach (it stands for the
            hard term then). It must not be scaled.

    Attributes:
        factors: of the layers' terms, by name; None is 1 for all.
        terms: values of the terms of the latest batch: "hard", "soft", "features".
        errors: mean squared differences of the latest batch, by layer.
        called: whether there was a batch.

    Raises:
        ValueError: a weight or temperature out of range, a teacher in training mode or one that
            shares parameters with the student, layers that match nothing; when it is called,
            features of different shapes.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        layers: Sequence[str] = (),
        *,
        alpha: float = 1.0,
        beta: float = 10.0,
        gamma: float = 5.0,
        temperature: float = 3.0,
        task_loss: TaskLoss | None = hard_loss,
        scores: Scores = class_scores,
        attach: bool = False,
    ) -> None:
        for name, value in (("alpha", alpha), ("beta", beta), ("gamma", gamma)):
            check_number(name, value, "[0, inf)")
        check_number("temperature", temperature, "(0, inf)")
        check_teacher(teacher, student)
        self.student, self.teacher = student, teacher
        self.alpha, self.beta, self.gamma, self.temperature = alpha, beta, gamma, temperature
        self.factors: dict[str, float] | None = None
        self.terms: dict[str, float] = {}
        self.errors: dict[str, float] = {}
        self.called = False
        self._task_loss, self._scores = task_loss, scores
        self._taps: list[FeatureTap] = []
        self._handles: list[RemovableHandle] = []
        if gamma > 0:
            tap = FeatureTap(student, layers)
            self._taps = [tap]
            self._taps.append(FeatureTap(teacher, tap.names))
        if attach:
            self._handles = [student.register_forward_hook(self._attach, with_kwargs=True)]

    @property
    def layers(self) -> list[str]:
        """Names of the layers whose features are compared."""
        return list(self._taps[0].names) if self._taps else []

    @property
    def needs_targets(self) -> bool:
        """Whether the hard term is part of the loss."""
        return self._task_loss is not None and self.alpha > 0

    def __call__(self, inputs: Any, targets: Any = None) -> Tensor:
        """The loss of one batch.

        Args:
            inputs: a tensor, or a tuple of the networks' positional arguments.
            targets: for the hard term.
        """
        args = inputs if isinstance(inputs, tuple) else (inputs,)
        output = self.student(*args)
        loss = self._taught(output, args, {})
        if self._task_loss is not None and self.alpha > 0:
            hard = self._task_loss(output, targets)
            self.terms["hard"] = float(hard.detach())
            loss = loss + self.alpha * hard
        return loss

    def close(self) -> None:
        """Take every hook off both networks."""
        for tap in self._taps:
            tap.remove()
        for handle in self._handles:
            handle.remove()

    def __enter__(self) -> DistillationObjective:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _taught(self, output: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """beta * soft + gamma * features."""
        scores = self._scores(output)
        self.terms, self.called = {}, True
        loss = scores.new_zeros(())
        if self.beta == 0 and self.gamma == 0:
            return loss
        with torch.no_grad():
            taught = self.teacher(*args, **kwargs)
        if self.beta > 0:
            soft = soft_loss(scores, self._scores(taught), self.temperature)
            self.terms["soft"] = float(soft.detach())
            loss = loss + self.beta * soft
        if self.gamma > 0:
            ours, theirs = (tap.take() for tap in self._taps)
            found = feature_errors(ours, theirs)
            self.errors = {name: float(error.detach()) for name, error in found.items()}
            features = feature_loss(found, self.factors)
            self.terms["features"] = float(features.detach())
            loss = loss + self.gamma * features
        return loss

    def _attach(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        if not (module.training and torch.is_grad_enabled()):
            for tap in self._taps:
                tap.features.clear()
            return None
        if isinstance(output, Tensor):
            return add_gradient(output, self._taught(output, args, kwargs))
        if isinstance(output, MutableMapping) and "logits" in output:  # of transformers
            name = "loss" if isinstance(output.get("loss"), Tensor) else "logits"
            output[name] = add_gradient(output[name], self._taught(output, args, kwargs))
            return output
        raise ValueError(
            f"attached to {type(module).__name__}, which returns {type(output).__name__}: "
            "expected a tensor of class scores, or a mapping that has `logits`"
        )


def check_teacher(teacher: nn.Module, student: nn.Module) -> None:
    """ValueError if a teacher is in training mode or shares a parameter with the student."""
    training = next((name for name, m in teacher.named_modules() if m.training), None)
    if training is not None:
        raise ValueError(
            f"the teacher is in training mode (module {training!r}): call teacher.eval()"
        )
    ours = {id(p) for p in student.parameters()} | {p.data_ptr() for p in student.parameters()}
    for name, parameter in teacher.named_parameters():
        if id(parameter) in ours or (parameter.numel() and parameter.data_ptr() in ours):
            raise ValueError(
                f"the teacher shares parameter {name!r} with the student: give it a copy"
            )


def layer_factors(errors: Mapping[str, float]) -> dict[str, float] | None:
    """Factors of mean 1, proportional to the errors; None if all errors are zero.

    Args:
        errors: mean squared feature errors by layer, >= 0.

    Raises:
        ValueError: no layer, a negative error or one that is not finite.
    """
    if not errors:
        raise ValueError("layer_errors is empty: there is nothing to weigh layers by")
    for name, error in errors.items():
        check_number(f"layer_errors[{name!r}]", error, "[0, inf)")
    total = math.fsum(errors.values())
    if total == 0:
        return None
    return {name: len(errors) * error / total for name, error in errors.items()}
