"""The reconstruction network: a noise-predicting UNet with a fixed number of attention heads at every level."""

import inspect

import torch
import torch.nn.functional as F
from diffusers import ModelMixin, UNet2DModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import nn

# This file is saved beside the weights and runs on its own there, so it must not import other modules of this package.
# Diffusers recognises a model's file by the name `ModelMixin` in it.
__all__ = ["ModelMixin", "NormGuidedUNet2DModel"]

# Smaller feature maps get no self-attention (args1.json: "attention_resolutions": "32,16,8").
_SMALLEST_ATTENTION_MAP = 8


class ExactGroupNorm(nn.GroupNorm):
    """
    [`torch.nn.GroupNorm`], as exact in the channels-last memory format as in the contiguous one.

    On a CPU, torch computes the variance of channels-last maps as the difference of two large sums: if a map's mean is
    three times its deviation, the result is off by 3e-4 instead of 1e-6.
    """

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        """As [`torch.nn.GroupNorm`]."""
        by_channel = sample.ndim == 4 and sample.is_contiguous(memory_format=torch.channels_last)
        # Exported graphs keep the stock norm, which runtimes recognise.
        exported = torch.jit.is_tracing()
        stock = sample.dtype != torch.float32 or sample.device.type != "cpu" or torch.is_grad_enabled()
        if stock or exported or not by_channel:
            return super().forward(sample)
        # Per channel, (N, G, C / G), with the channel's own mean subtracted before squaring; then merged per group.
        groups = (len(sample), self.num_groups, -1)
        mean = sample.mean((2, 3), keepdim=True)
        variance = (sample - mean).square_().mean((2, 3)).view(groups)
        mean = mean.view(groups)
        group_mean = mean.mean(2, keepdim=True)
        group_variance = (variance + (mean - group_mean).square()).mean(2, keepdim=True)
        scale = (group_variance + self.eps).rsqrt() * self.weight.view(1, self.num_groups, -1)
        shift = self.bias.view(1, self.num_groups, -1) - group_mean * scale
        return torch.addcmul(shift.view(len(sample), -1, 1, 1), sample, scale.view(len(sample), -1, 1, 1))


class NormGuidedUNet2DModel(UNet2DModel):
    r"""
    Predicts the noise in a noised image, or the image itself: a [`UNet2DModel`] with two additions, the number of
    attention heads (`attention_head_dim` fixes their width instead, so their number grows with the channels) and
    patches. Convolutions may see the border's values beyond the border, instead of zeros.

    Weights of the paper's UNet fit one to one (`models/Recon_subnetwork.py` of the reference). As there, the last
    convolution of every residual block, of every attention block and of the network starts at zero.

    Args:
        num_attention_heads (`int`, defaults to 4): Heads of every attention block; must divide its channels.
        patch_size (`int`, defaults to 1): Side length in px of square patches, whose pixels become the channels of one
            position (pixel unshuffle). Every level computes `patch_size ** 2` times less. 1 in the reference.
        padding_mode (`str`, defaults to `"zeros"`): What convolutions see beyond the border: `"zeros"` (the
            reference), or `"replicate"`, the values at the border. With zeros, a network has to learn what its border
            looks like: after a short training the outermost patches have another brightness than the rest.
        *: Every argument of [`UNet2DModel`], with the reference's values as defaults.

    Raises:
        ValueError: If `num_attention_heads` does not divide an attention block's channels, `patch_size` is below 1, or
            the `padding_mode` is unknown.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int = 256,
        in_channels: int = 3,
        out_channels: int = 3,
        center_input_sample: bool = False,
        time_embedding_type: str = "positional",
        time_embedding_dim: int | None = None,
        freq_shift: int = 0,
        flip_sin_to_cos: bool = False,
        down_block_types: tuple[str, ...] = ("ResnetDownsampleBlock2D",) * 3 + ("AttnDownBlock2D",) * 3,
        mid_block_type: str | None = "UNetMidBlock2D",
        up_block_types: tuple[str, ...] = ("AttnUpBlock2D",) * 3 + ("ResnetUpsampleBlock2D",) * 3,
        block_out_channels: tuple[int, ...] = (128, 128, 256, 256, 512, 512),
        layers_per_block: int = 2,
        mid_block_scale_factor: float = 1,
        downsample_padding: int = 1,
        downsample_type: str = "resnet",
        upsample_type: str = "resnet",
        dropout: float = 0.0,
        act_fn: str = "silu",
        attention_head_dim: int | None = 8,
        norm_num_groups: int = 32,
        attn_norm_num_groups: int | None = None,
        norm_eps: float = 1e-5,
        resnet_time_scale_shift: str = "default",
        add_attention: bool = True,
        class_embed_type: str | None = None,
        num_class_embeds: int | None = None,
        num_train_timesteps: int | None = None,
        num_attention_heads: int = 4,
        patch_size: int = 1,
        padding_mode: str = "zeros",
    ):
        if patch_size < 1:
            raise ValueError(f"patch_size={patch_size}: must be at least 1.")
        if padding_mode not in ("zeros", "replicate"):
            raise ValueError(f'padding_mode="{padding_mode}": must be zeros or replicate.')
        # All arguments are in the config by now; the stock class replaces the channels there by those of the patches.
        stock = {name: self.config[name] for name in inspect.signature(UNet2DModel).parameters if name in self.config}
        channels = {"in_channels": in_channels, "out_channels": out_channels}
        super().__init__(**stock | {name: count * patch_size**2 for name, count in channels.items()})
        self.register_to_config(**channels)
        for module in self.modules():
            if isinstance(module, Attention):
                if module.inner_dim % num_attention_heads:
                    raise ValueError(
                        f"num_attention_heads={num_attention_heads} does not divide an attention block's "
                        f"{module.inner_dim} channels: choose another number or other block_out_channels."
                    )
                module.heads = num_attention_heads
                module.scale = (module.inner_dim // num_attention_heads) ** -0.5
                _zero(module.to_out[0])
            elif isinstance(module, ResnetBlock2D):
                _zero(module.conv2)
            elif isinstance(module, nn.Conv2d) and module.kernel_size != (1, 1):
                module.padding_mode = padding_mode  # type: ignore[assignment]
            elif type(module) is nn.GroupNorm:
                # The stock blocks create their norms themselves; the exact one has the same parameters.
                module.__class__ = ExactGroupNorm
        _zero(self.conv_out)

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float | int,
        class_labels: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DOutput | tuple[torch.Tensor]:
        """
        Args:
            sample (`torch.Tensor` of shape `(N, in_channels, H, W)`): Noised images; H and W multiples of
                `patch_size * 2 ** (levels - 1)`.
            timestep (`torch.Tensor` of shape `(N,)`, `float` or `int`): Their timesteps.
            class_labels (`torch.Tensor` of shape `(N,)`, *optional*): As in [`UNet2DModel`].
            return_dict (`bool`): Return a `UNet2DOutput`, else a plain tuple.

        Returns:
            `UNet2DOutput` or `tuple`: `(N, out_channels, H, W)`: the noise, or what the scheduler's `prediction_type`
            says.
        """
        patch_size = self.config.patch_size
        if patch_size > 1:
            sample = F.pixel_unshuffle(sample, patch_size)
        (output,) = super().forward(sample, timestep, class_labels, return_dict=False)
        if patch_size > 1:
            output = F.pixel_shuffle(output, patch_size)
        return UNet2DOutput(sample=output) if return_dict else (output,)

    @classmethod
    def from_pretrained(cls, *args, output_loading_info: bool = False, **kwargs):
        """As [`ModelMixin.from_pretrained`], but raises `ValueError` if tensors are missing, instead of going on."""
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        missing = sorted(info["missing_keys"])
        if missing:
            raise ValueError(f"the weights lack {len(missing)} of the model's tensors, such as {missing[0]}")
        return (model, info) if output_loading_info else model

    @staticmethod
    def size_config(
        base_channels: int,
        resolution: int,
        norm_num_groups: int = 32,
        largest_attention_map: int = 32,
        patch_size: int = 1,
        layers_per_block: int = 2,
        padding_mode: str = "zeros",
    ) -> dict:
        """
        The size-dependent part of the configuration, as the reference derives it (`models/Recon_subnetwork.py`).

        Args:
            base_channels (`int`): Channels at full resolution; a multiple of `norm_num_groups`.
            resolution (`int`): Side length of the images in px.
            norm_num_groups, patch_size, layers_per_block (`int`): As in the constructor.
            padding_mode (`str`): As there.
            largest_attention_map (`int`): Side length up to which feature maps get self-attention.

        Returns:
            `dict`: Keyword arguments of this class.
        """
        side = resolution // patch_size
        multipliers: tuple[int, ...] = (1, 1, 2, 2, 4, 4)
        if side <= 64:
            multipliers = (1, 2, 3, 4)
        elif side <= 128:
            multipliers = (1, 1, 2, 3, 4)
        attends = [
            _SMALLEST_ATTENTION_MAP <= side // 2**level <= largest_attention_map for level in range(len(multipliers))
        ]
        return {
            "sample_size": resolution,
            "block_out_channels": tuple(base_channels * m for m in multipliers),
            "down_block_types": tuple("AttnDownBlock2D" if a else "ResnetDownsampleBlock2D" for a in attends),
            "up_block_types": tuple("AttnUpBlock2D" if a else "ResnetUpsampleBlock2D" for a in reversed(attends)),
            "norm_num_groups": norm_num_groups,
            "patch_size": patch_size,
            "layers_per_block": layers_per_block,
            "padding_mode": padding_mode,
        }


@torch.no_grad()
def _zero(module: nn.Module) -> None:
    for parameter in module.parameters():
        parameter.zero_()
