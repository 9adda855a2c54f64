"""What to compress and how: one recipe decides a whole run, and its YAML file repeats it.

    model: mobilenet_v1_laptop
    data: fashion-mnist
    sparsity: 0.9
    pattern: 4x1
    prune: {epochs: 4, learning_rate: 0.002}

Values come from a built-in recipe (`base`, see `recipes/`), then the file, then flags of the
command line. Errors name the file, line and column; unknown keys and names list the nearest.
"""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

if TYPE_CHECKING:
    from aerogel.pruning.method import Method

ENGINES = ("torch eager", "torch channels_last", "torch.compile", "onnxruntime", "openvino")
# Peers for networks with zeros, which are compared only where they are asked for.
SPARSE_ENGINES = ("deepsparse",)
ENGINE_ALIASES = {
    "torch": "torch eager",
    "channels_last": "torch channels_last",
    "compile": "torch.compile",
    "ort": "onnxruntime",
}


def pruning_methods() -> dict[str, Method]:
    """`aerogel.pruning.METHODS`, imported when a recipe is checked rather than for ``--help``."""
    from aerogel.pruning import METHODS

    return METHODS


def nearest(name: str, known: list[str] | tuple[str, ...], count: int = 5) -> str:
    """The names of `known` most like `name`, joined for a message."""
    near = difflib.get_close_matches(name, known, n=count, cutoff=0.4)
    return ", ".join(near or sorted(known)[:count])


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Rewrite(_Part):
    """That a method put other layers into a network, as a run records it.

    Args:
        method: Slug of a `RewritingMethod`.
        weights: Names of the weights whose layers it replaced.
        sparsity: It was asked for, in [0, 1).
    """

    method: str
    weights: list[str]
    sparsity: float = Field(ge=0.0, lt=1.0)

    @field_validator("method")
    @classmethod
    def _rewrites(cls, method: str) -> str:
        from aerogel.pruning import RewritingMethod

        if not isinstance(pruning_methods().get(method), RewritingMethod):
            raise ValueError(f"{method!r} rewrites no network")
        return method


class ModelSpec(_Part):
    """Which network: a registered name, a file or folder, or `import.path:callable`.

    Args:
        name: What to build or load.
        options: Keyword arguments of its constructor.
        weights: File to start from, or "pretrained" to fetch the published ones; None starts
            from what `name` brings.
        rewrite: Other layers in it.
    """

    name: str = Field(min_length=1)
    options: dict[str, Any] = {}
    weights: str | None = None
    rewrite: Rewrite | None = None


class DataSpec(_Part):
    """Which data: a registered name or a folder of images, one sub-folder a class.

    Args:
        name: What to load.
        limit: Use only so many examples of each split; None uses all.
        fallback: "digits" takes scikit-learn's digits, and says so, if the data cannot be had.
    """

    name: str = Field(min_length=1)
    limit: int | None = Field(default=None, ge=1)
    fallback: Literal["digits"] | None = None


class Ramp(_Part):
    """When the zeros come, as fractions of the pruning phase's steps.

    Args:
        initial_sparsity: Fraction of zeros at `begin`.
        begin: Where the ramp starts, in [0, 1).
        end: Where it reaches the recipe's sparsity, in (begin, 1].
        updates: How many times the mask is computed anew between them.
        power: Exponent of the curve; 3 is the paper's cubic.
    """

    initial_sparsity: float = Field(default=0.0, ge=0.0, lt=1.0)
    begin: float = Field(default=0.0, ge=0.0, lt=1.0)
    end: float = Field(default=0.6, gt=0.0, le=1.0)
    updates: int = Field(default=40, ge=1)
    power: float = Field(default=3.0, gt=0.0)

    @model_validator(mode="after")
    def _ordered(self) -> Ramp:
        if self.end <= self.begin:
            raise ValueError(f"end = {self.end} is not after begin = {self.begin}")
        return self


class Distillation(_Part):
    """Learning from the dense network while pruning.

    Args:
        weight: Share of the loss that is the dense network's, in [0, 1].
        temperature: Softens both outputs.
        features: Patterns of module names whose outputs are learnt too, e.g. "encoder.layer.*".
        feature_weight: What the error of those outputs is multiplied by.
    """

    weight: float = Field(default=0.5, ge=0.0, le=1.0)
    temperature: float = Field(default=2.0, gt=0.0)
    features: list[str] = []
    feature_weight: float = Field(default=1.0, ge=0.0)


class Training(_Part):
    """One training phase: the fields of `aerogel.train.TrainConfig`; `epochs: 0` skips the phase.

    Args:
        epochs: Passes over the training data; fractions are allowed.
        steps: Optimizer steps, in place of epochs.
        batch_size: Examples a step, over all processes.
        grad_accumulation: Micro-batches a step.
        optimizer: "sgd" (Nesterov momentum) or "adamw".
        lr: Peak learning rate.
        momentum: Of SGD; first beta of AdamW.
        weight_decay: On weights; biases and normalisation are left out.
        schedule: "cosine", "onecycle" or "constant".
        warmup: Fraction of the steps over which the rate rises to its peak.
        label_smoothing: Share of the target spread over all classes.
        gradient_clip: Largest gradient norm; None does not clip.
        augment: "none", "flip", "standard" or "strong".
        channels_last: Lay out images channels innermost, which is faster on a CPU.
        eval_samples: Test examples scored after each epoch; None takes all, 0 none.
    """

    epochs: float = Field(default=8.0, ge=0.0)
    steps: int | None = Field(default=None, ge=1)
    batch_size: int = Field(default=128, ge=1)
    grad_accumulation: int = Field(default=1, ge=1)
    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: float = Field(default=0.1, gt=0.0)
    momentum: float = Field(default=0.9, ge=0.0, lt=1.0)
    weight_decay: float = Field(default=5e-4, ge=0.0)
    schedule: Literal["cosine", "onecycle", "constant"] = "cosine"
    warmup: float = Field(default=0.1, ge=0.0, lt=1.0)
    label_smoothing: float = Field(default=0.0, ge=0.0, lt=1.0)
    gradient_clip: float | None = Field(default=None, gt=0.0)
    augment: Literal["none", "flip", "standard", "strong"] = "none"
    channels_last: bool = True
    eval_samples: int | None = Field(default=2000, ge=0)

    @model_validator(mode="after")
    def _divides(self) -> Training:
        if self.batch_size % self.grad_accumulation:
            raise ValueError(
                f"batch_size = {self.batch_size} is not a multiple of "
                f"grad_accumulation = {self.grad_accumulation}"
            )
        return self

    @property
    def skipped(self) -> bool:
        """Whether this phase is left out."""
        return self.epochs == 0 and self.steps is None


def _known_engines(names: list[str]) -> list[str]:
    known = (*ENGINES, *SPARSE_ENGINES)
    full = [ENGINE_ALIASES.get(name, name) for name in names]
    for name in full:
        if name not in known:
            near = nearest(name, (*known, *ENGINE_ALIASES), len(known))
            raise ValueError(f"engine {name!r} is unknown; nearest: {near}")
    return list(dict.fromkeys(full))


class Measurement(_Part):
    """How speed is measured.

    Args:
        engines: Peers, by name or alias; those not installed are reported as missing.
        batches: Batch sizes.
        threads: Thread counts; 0 means every core of this machine.
        rounds: Interleaved rounds over all engines; medians are reported.
        tolerance: Largest difference allowed between compiled and eager outputs, relative to the
            largest output.
        clock: "wall", or "cpu" for the time that an engine had its core, at one thread.
        isolate: Whether each engine has a process of its own.
    """

    engines: Annotated[list[str], AfterValidator(_known_engines)] = list(ENGINES)
    batches: list[Annotated[int, Field(ge=1)]] = Field(default=[1, 32], min_length=1)
    threads: list[Annotated[int, Field(ge=0)]] = Field(default=[1, 0], min_length=1)
    rounds: int = Field(default=15, ge=3)
    tolerance: float = Field(default=1e-4, gt=0.0)
    clock: Literal["wall", "cpu"] = "wall"
    isolate: bool = True


class Recipe(_Part):
    """Everything that decides a compression run.

    Args:
        model, data: What to compress and on which data.
        method: Slug of the pruning method; see `aerogel systems`.
        sparsity: Fraction of zeros in the pruned layers, in [0, 1).
        pattern: Which weights become zero together: unstructured, 4x1, 2:4, ...; some methods have
            their own.
        include, exclude: Globs of parameter names (`features.*`); without `include`, what the model
            proposes (`prune_targets()`), or the method, or every linear and convolution weight.
        schedule, distillation: How pruning proceeds.
        dense, prune: The two training phases.
        measure: How speed is measured.
        seed: Of every random choice.
    """

    model: ModelSpec
    data: DataSpec
    method: str = "gradual-pruning"
    sparsity: float = Field(default=0.9, ge=0.0, lt=1.0)
    pattern: str = "unstructured"
    include: list[str] = []
    exclude: list[str] = []
    schedule: Ramp = Ramp()
    distillation: Distillation | None = None
    dense: Training = Training()
    prune: Training = Training()
    measure: Measurement = Measurement()
    seed: int = Field(default=0, ge=0, lt=2**32)

    @field_validator("method")
    @classmethod
    def _known_method(cls, method: str) -> str:
        from aerogel.pruning.method import method_slug

        name = method_slug(method)
        if name not in pruning_methods():
            raise ValueError(
                f"{method!r} is unknown; nearest: {nearest(name, [*pruning_methods()])}"
            )
        return name

    @field_validator("pattern")
    @classmethod
    def _known_pattern(cls, pattern: str) -> str:
        from aerogel.sparsity import parse_pattern

        parse_pattern(pattern)
        return pattern

    @field_validator("prune")
    @classmethod
    def _method_trains(cls, phase: Training, info: ValidationInfo) -> Training:
        method = pruning_methods().get(info.data.get("method", ""))
        if phase.skipped and method is not None and not method.one_shot:
            raise ValueError(f"method = {method.slug!r} needs training steps; expected above 0")
        return phase

    @model_validator(mode="after")
    def _method_has_pattern(self) -> Recipe:
        method = pruning_methods()[self.method]
        if not method.prunes_by(self.pattern):
            raise ValueError(
                f"method = {self.method!r} prunes by {' or '.join(method.patterns)} "
                f"(for example {method.pattern or method.patterns[0]}), "
                f"not by pattern = {self.pattern!r}"
            )
        return self

    @model_validator(mode="after")
    def _ramp_rises(self) -> Recipe:
        if self.schedule.initial_sparsity > self.sparsity:
            raise ValueError(
                f"schedule.initial_sparsity = {self.schedule.initial_sparsity} is above "
                f"sparsity = {self.sparsity}"
            )
        return self

    def to_yaml(self) -> str:
        """The whole recipe as YAML; `load_recipe` of it gives this recipe again."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, width=100)
