"""Super-resolution data: small images made from large ones, and patches of both.

large = aerogel.data.superres.photographs().float() / 255
train = PatchPairs([*superres.to_luma(large)], scale=2, size=64)
low, high = train.batch(6, generator)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

# ITU-R BT.601 for R, G, B in 0..1, in units of 0..255: what super-resolution papers measure on.
LUMA_WEIGHTS = (65.481, 128.553, 24.966)
LUMA_OFFSET = 16.0


def photographs() -> Tensor:
    """The two photographs that come with scikit-learn (a temple, a flower): (2, 3, 427, 640) uint8.

    Raises:
        ModuleNotFoundError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_sample_images
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the photographs come with scikit-learn: pip install scikit-learn"
        ) from error
    stacked = torch.stack([torch.from_numpy(image.copy()) for image in load_sample_images().images])
    return stacked.permute(0, 3, 1, 2).contiguous()


def to_luma(images: Tensor) -> Tensor:
    """The Y channel of colour images, in 0..1 (16/255 is black, 235/255 white).

    Args:
        images: (..., 3, H, W) float in 0..1.

    Returns:
        (..., 1, H, W).

    Raises:
        ValueError: integers, or other than 3 channels.
    """
    _require_float("images", images)
    if images.dim() < 3 or images.shape[-3] != 3:
        raise ValueError(f"images must be (..., 3, height, width), got {tuple(images.shape)}")
    weights = torch.tensor(LUMA_WEIGHTS, dtype=images.dtype, device=images.device)
    return ((images * weights.view(3, 1, 1)).sum(-3, keepdim=True) + LUMA_OFFSET) / 255.0


def shrink_images(images: Tensor, scale: int) -> Tensor:
    """Small images: bicubic, with a kernel as wide as the scale against aliasing.

    Args:
        images: (B, C, H, W) float in 0..1.
        scale: what both sides are divided by.

    Returns:
        (B, C, H / scale, W / scale), clipped to 0..1.

    Raises:
        ValueError: integers, or sides that are no multiples of the scale.
    """
    _require_float("images", images)
    height, width = images.shape[-2:]
    if scale < 1 or height % scale or width % scale:
        raise ValueError(
            f"images are {height}x{width}, expected multiples of scale={scale}; see `cropped`"
        )
    size = (height // scale, width // scale)
    return F.interpolate(images, size, mode="bicubic", antialias=True).clamp(0.0, 1.0)


def enlarge_bicubic(images: Tensor, scale: int) -> Tensor:
    """Bicubic interpolation, the baseline: (B, C, H, W) -> (B, C, scale * H, scale * W).

    Raises:
        ValueError: integers.
    """
    _require_float("images", images)
    return F.interpolate(images, scale_factor=scale, mode="bicubic")


def cropped(images: Tensor, scale: int) -> Tensor:
    """The images without the last rows and columns beyond multiples of the scale."""
    height, width = images.shape[-2:]
    return images[..., : height - height % scale, : width - width % scale]


def tiles(images: Tensor, size: int, row_step: int, column_step: int) -> Tensor:
    """Square pieces on a grid.

    Args:
        images: (B, C, H, W).
        size: side of a piece.
        row_step: rows from one to the next.
        column_step: columns from one to the next.

    Returns:
        (B, rows, columns, C, size, size), as many as fit.

    Raises:
        ValueError: pieces larger than the images.
    """
    if min(images.shape[-2:]) < size:
        raise ValueError(f"size={size} is larger than the images, {tuple(images.shape[-2:])}")
    pieces = images.unfold(-2, size, row_step).unfold(-2, size, column_step)
    return pieces.permute(0, 2, 3, 1, 4, 5)


class PatchPairs:
    """Random patches of large images and of the small ones made from them.

    Args:
        images: each (C, H, W) float in 0..1.
        scale: large over small.
        size: side of a large patch, a multiple of the scale.
        rotate: also turn patches by multiples of 90 degrees; flips alone otherwise.

    Raises:
        ValueError: integers, sides or size that are no multiples of the scale, images smaller
            than a patch.
    """

    def __init__(
        self, images: Sequence[Tensor], scale: int, size: int, *, rotate: bool = True
    ) -> None:
        if not images:
            raise ValueError("images is empty")
        if size < scale or size % scale:
            raise ValueError(f"size={size} must be a multiple of scale={scale}")
        for image in images:
            if image.dim() != 3 or min(image.shape[1:]) < size:
                raise ValueError(
                    f"images must be (channels, height, width) of at least {size}x{size}, got "
                    f"{tuple(image.shape)}"
                )
        self.scale, self.size, self.rotate = scale, size, rotate
        self.large = list(images)
        self.small = [shrink_images(image[None], scale)[0] for image in images]

    def batch(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw patches.

        Args:
            count: of them.
            generator: CPU source of the choice of image, place, flips and turn.

        Returns:
            Small (count, C, size / scale, size / scale) and large (count, C, size, size) patches.
        """
        pairs = [self._pair(generator) for _ in range(count)]
        return torch.stack([low for low, _ in pairs]), torch.stack([high for _, high in pairs])

    def _pair(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        def draw(below: int) -> int:
            return int(torch.randint(below, (), generator=generator))

        index = draw(len(self.large))
        side = self.size // self.scale
        height, width = self.small[index].shape[1:]
        top, left = draw(height - side + 1), draw(width - side + 1)
        flips, turn = draw(4), draw(4) if self.rotate else 0
        axes = [axis for axis, bit in ((1, 1), (2, 2)) if flips & bit]

        def cut(image: Tensor, top: int, left: int, side: int) -> Tensor:
            return image[:, top : top + side, left : left + side].flip(axes).rot90(turn, (1, 2))

        scale = self.scale
        low = cut(self.small[index], top, left, side)
        return low, cut(self.large[index], top * scale, left * scale, self.size)


def _require_float(argument: str, images: Tensor) -> None:
    if not images.is_floating_point():
        raise ValueError(
            f"{argument} must be float in 0..1, got {images.dtype}: divide 8-bit images by 255"
        )
