"""The face of every image classifier here: timm's member names and meanings."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


class VisionModel(nn.Module):
    """A stack of blocks `features`, then pooling and a linear classifier.

    Sub-classes build `features` (an `nn.Sequential` over [B, C, H, W]) and `classifier` (ending in
    an `nn.Linear`), and describe the stages in `feature_info`.
    """

    features: nn.Sequential
    classifier: nn.Module
    classifier_name: str  # state-dict name of the last linear layer
    num_features: int  # channels of `forward_features`
    head_hidden_size: int  # channels that the last linear layer sees
    num_classes: int
    in_chans: int
    global_pool: str
    drop_rate: float

    def __init__(self) -> None:
        super().__init__()
        self.feature_info: list[dict[str, Any]] = []  # num_chs, reduction, module of each stage
        self.grad_checkpointing = False

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) -> feature map (B, num_features, h, w)."""
        self._check_input(x)
        if self.grad_checkpointing and self.training:
            from torch.utils.checkpoint import checkpoint_sequential

            return checkpoint_sequential(
                self.features, len(self.feature_info), x, use_reentrant=False
            )
        return self.features(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Feature map -> pooled features (B, C) if `pre_logits`, else logits (B, num_classes)."""
        if self.global_pool == "avg":
            x = F.adaptive_avg_pool2d(x, 1).flatten(1)
        return x if pre_logits else self.classifier(x)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) -> logits (B, num_classes)."""
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        *,
        norm: bool = False,
        output_fmt: str = "NCHW",
        return_prefix_tokens: bool = False,
        intermediates_only: bool = False,
        stop_early: bool = True,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Feature maps at the end of chosen stages, and the final map.

        Args:
            x: (B, C, H, W).
            indices: the last n stages, or a list of stage numbers (negative from the end); None
                is all.
            norm: accepted for timm's sake; these models have no separate last norm.
            output_fmt: "NCHW" or "NLC".
            return_prefix_tokens: accepted for timm's sake; there are none.
            intermediates_only: return the list alone.
            stop_early: with `intermediates_only`, do not compute past the last chosen stage.

        Raises:
            ValueError: unknown format or a stage that does not exist.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt must be 'NCHW' or 'NLC', got {output_fmt!r}")
        self._check_input(x)
        wanted = self._stage_indices(indices)
        ends = [int(info["module"].removeprefix("features.")) for info in self.feature_info]
        maps: list[Tensor] = []
        for number, block in enumerate(self.features):
            x = block(x)
            if number in ends and ends.index(number) in wanted:
                maps.append(x if output_fmt == "NCHW" else x.flatten(2).transpose(1, 2))
            if intermediates_only and stop_early and len(maps) == len(wanted):
                break
        return maps if intermediates_only else (x, maps)

    def get_classifier(self) -> nn.Module:
        """The last linear layer (or `nn.Identity` without classes)."""
        return self.get_submodule(self.classifier_name)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the last linear layer; `num_classes=0` leaves the pooled features."""
        if num_classes < 0:
            raise ValueError(f"num_classes must not be negative, got {num_classes}")
        if global_pool is not None:
            self.global_pool = _check_pool(global_pool, num_classes)
        self.num_classes = num_classes
        old = self.get_classifier()
        layer = make_head(self.head_hidden_size, num_classes)
        if isinstance(old, nn.Linear):
            layer.to(old.weight.device, old.weight.dtype)
        self.set_submodule(self.classifier_name, layer)

    def no_weight_decay(self) -> set[str]:
        """Parameters without weight decay beyond biases and norms: none."""
        return set()

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns for layer-wise learning rates: the blocks in order (coarse: stem and rest)."""
        blocks = r"^features\.(\d+)" if not coarse else r"^features\.([1-9]\d*)"
        return {"stem": r"^features\.0\.", "blocks": re.compile(blocks)}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade time for memory: recompute activations in the backward pass."""
        self.grad_checkpointing = enable

    def prune_targets(self) -> Iterator[tuple[str, str]]:
        """(module name, "conv") of every 1x1 convolution: what pruning may touch.

        The first convolution, depthwise convolutions and the classifier stay dense: together
        they are a few per cent of the work (Elsen et al., arXiv 1911.09723).
        """
        for name, module in self.named_modules():
            if isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1):
                yield name, "conv"

    def attention_modules(self) -> list[nn.Module]:
        """Modules with an attention selector: none in a convolutional network."""
        return []

    def _check_input(self, x: Tensor) -> None:
        if x.dim() != 4 or x.shape[1] != self.in_chans:
            raise ValueError(
                f"expected images (B, {self.in_chans}, H, W), got shape {tuple(x.shape)}"
            )
        if not x.is_floating_point():
            raise TypeError(f"images must be float (divide by 255 and normalise), got {x.dtype}")

    def _stage_indices(self, indices: int | list[int] | None) -> set[int]:
        count = len(self.feature_info)
        if indices is None:
            return set(range(count))
        if isinstance(indices, int):
            if not 1 <= indices <= count:
                raise ValueError(f"indices must be 1..{count} last stages, got {indices}")
            return set(range(count - indices, count))
        for index in indices:
            if not -count <= index < count:
                raise ValueError(f"indices: there are {count} stages, got {index}")
        return {index % count for index in indices}


def make_head(in_features: int, num_classes: int) -> nn.Module:
    """The classifier: a linear layer with small weights, or the identity for 0 classes."""
    if num_classes == 0:
        return nn.Identity()
    layer = nn.Linear(in_features, num_classes)
    if not layer.weight.is_meta:
        nn.init.normal_(layer.weight, 0.0, 0.01)
        nn.init.zeros_(layer.bias)
    return layer


def _check_pool(global_pool: str, num_classes: int) -> str:
    if global_pool not in ("avg", ""):
        raise ValueError(f"global_pool must be 'avg' or '', got {global_pool!r}")
    if global_pool == "" and num_classes:
        raise ValueError("global_pool='' needs num_classes=0: a classifier wants pooled features")
    return global_pool
