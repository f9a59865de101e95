"""The segmentation network: compares an image with its reconstruction."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn
from torch.utils.checkpoint import checkpoint

__all__ = ["AnomalySegmenter", "ModelMixin"]

# Channels of the six levels, as multiples of the base (models/Seg_subnetwork.py of the reference; DRAEM's design).
_LEVELS = (1, 2, 4, 8, 8, 8)


def _conv(in_channels: int, out_channels: int) -> list[nn.Module]:
    return [
        nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    ]


@contextmanager
def _kept_statistics(block: nn.Module) -> Iterator[None]:
    """Restores the running statistics of the batch norms at the end."""
    norms = [module for module in block.modules() if isinstance(module, nn.BatchNorm2d)]
    kept = [dict(norm.named_buffers()) for norm in norms]
    # Updates go into copies: the originals are saved for the backward pass, which refuses modified tensors.
    for norm, buffers in zip(norms, kept, strict=True):
        for name, buffer in buffers.items():
            setattr(norm, name, buffer.clone())
    try:
        yield
    finally:
        for norm, buffers in zip(norms, kept, strict=True):
            for name, buffer in buffers.items():
                setattr(norm, name, buffer)


class AnomalySegmenter(ModelMixin, ConfigMixin):
    r"""
    A six-level UNet of (convolution, batch norm, ReLU) pairs with bilinear upsampling.

    As `models/Seg_subnetwork.py` of the reference, but returns logits, which are more precise than probabilities.

    Args:
        in_channels (`int`): Channels of image and reconstruction together.
        out_channels (`int`): Channels of the anomaly map.
        base_channels (`int`): Channels at full resolution.
    """

    _supports_gradient_checkpointing = True

    # Every level but the first halves the map, so the sides of an input must be multiples of this.
    size_multiple = 2 ** (len(_LEVELS) - 1)

    @register_to_config
    def __init__(self, in_channels: int = 6, out_channels: int = 1, base_channels: int = 64):
        super().__init__()
        self.gradient_checkpointing = False
        widths = [base_channels * level for level in _LEVELS]
        self.down_blocks = nn.ModuleList()
        for inputs, width in zip([in_channels, *widths], widths, strict=False):
            self.down_blocks.append(nn.Sequential(*_conv(inputs, width), *_conv(width, width)))
        self.pool = nn.MaxPool2d(2)
        self.upsample = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
        self.up_convs = nn.ModuleList()
        self.up_blocks = nn.ModuleList()
        below = widths[-1]
        for i, skip in enumerate(reversed(widths[:-1])):
            # The reference narrows to the width of the level ABOVE the skip, except at both ends.
            width = base_channels * (8, 4, 2, 1, 1)[i]
            self.up_convs.append(nn.Sequential(*_conv(below, width)))
            self.up_blocks.append(nn.Sequential(*_conv(width + skip, width), *_conv(width, width)))
            below = width
        self.conv_out = nn.Conv2d(below, out_channels, kernel_size=3, padding=1)

    @classmethod
    def from_pretrained(cls, *args, output_loading_info: bool = False, **kwargs):
        """As [`ModelMixin.from_pretrained`], but raises `ValueError` if tensors are missing, instead of going on."""
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        missing = sorted(info["missing_keys"])
        if missing:
            raise ValueError(f"the weights lack {len(missing)} of the model's tensors, such as {missing[0]}")
        return (model, info) if output_loading_info else model

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        """
        Args:
            sample (`torch.Tensor` of shape `(N, in_channels, H, W)`): Image and reconstruction, concatenated; H and W
                multiples of 32.

        Returns:
            `torch.Tensor` of shape `(N, out_channels, H, W)`: Logits of a pixel being anomalous.
        """
        skips: list[torch.Tensor] = []
        for block in self.down_blocks:
            sample = self._run(block, self.pool(sample) if skips else sample)
            skips.append(sample)
        skips.pop()
        for up_conv, up_block in zip(self.up_convs, self.up_blocks, strict=True):
            sample = self._run(up_conv, self.upsample(sample))
            sample = self._run(up_block, torch.cat((sample, skips.pop()), dim=1))
        return self.conv_out(sample)

    def _run(self, block: nn.Module, sample: torch.Tensor) -> torch.Tensor:
        if not (self.gradient_checkpointing and torch.is_grad_enabled()):
            return block(sample)
        # The recomputation must not update the running statistics a second time.
        contexts = lambda: (nullcontext(), _kept_statistics(block))  # noqa: E731
        return checkpoint(block, sample, use_reentrant=False, context_fn=contexts)
