"""The reconstruction network: a noise-predicting UNet with a fixed number of attention heads at every level."""

import torch
import torch.nn.functional as F
from diffusers import ModelMixin, UNet2DModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import nn

# Files saved with a model travel to the Hub beside its weights and are imported there on their own: this module
# imports nothing of this package, and the name `ModelMixin` has to stand in its namespace for diffusers to recognise
# it.
__all__ = ["ModelMixin", "NormGuidedUNet2DModel"]

# Feature maps of fewer px a side get no self-attention (args1.json: "attention_resolutions": "32,16,8").
_SMALLEST_ATTENTION_MAP = 8


class ExactGroupNorm(nn.GroupNorm):
    """
    [`torch.nn.GroupNorm`], as exact in the channels-last layout as in the contiguous one.

    On a CPU, torch takes the variance of channels-last maps as the difference of two big sums: where a map's mean is
    three times its deviation, the result is off by 3e-4 instead of 1e-6.
    """

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        """As [`torch.nn.GroupNorm`]."""
        by_channel = sample.ndim == 4 and sample.is_contiguous(memory_format=torch.channels_last)
        # Exported graphs hold the norm as such, which their runtimes know.
        exported = torch.jit.is_tracing()
        stock = sample.dtype != torch.float32 or sample.device.type != "cpu" or torch.is_grad_enabled()
        if stock or exported or not by_channel:
            return super().forward(sample)
        # (N, G, C / G): sums over a channel's pixels run along memory, and each channel's own mean is taken off first.
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
    Predicts the noise in a noised image, or the image itself; stock [`UNet2DModel`] plus the two things its
    configuration cannot say: the number of attention heads per level (`attention_head_dim` fixes their width instead,
    so the number would grow with the channels), and the patches that it looks at instead of pixels.

    Weights of the paper's own UNet fit one to one (`models/Recon_subnetwork.py` of the reference). As there, the last
    convolution of every residual block, of every attention block and of the network starts at zero.

    Args:
        num_attention_heads (`int`, defaults to 4): Heads of every attention block; must divide its channels.
        patch_size (`int`, defaults to 1): Side length in px of the patches that the network takes for its pixels: all
            of a patch's values are channels of one position, going in and coming out, so that nothing of the image is
            lost and every level computes `patch_size ** 2` times less. 1 in the reference.
        *: Every argument of [`UNet2DModel`], with the reference's values as defaults.

    Raises:
        ValueError: If an attention block's channels are no multiple of `num_attention_heads`, or the patches have no
            size.
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
    ):
        if patch_size < 1:
            raise ValueError(f"patch_size={patch_size}: must be at least 1.")
        super().__init__(
            sample_size=sample_size,
            in_channels=in_channels * patch_size**2,
            out_channels=out_channels * patch_size**2,
            center_input_sample=center_input_sample,
            time_embedding_type=time_embedding_type,
            time_embedding_dim=time_embedding_dim,
            freq_shift=freq_shift,
            flip_sin_to_cos=flip_sin_to_cos,
            down_block_types=down_block_types,
            mid_block_type=mid_block_type,
            up_block_types=up_block_types,
            block_out_channels=block_out_channels,
            layers_per_block=layers_per_block,
            mid_block_scale_factor=mid_block_scale_factor,
            downsample_padding=downsample_padding,
            downsample_type=downsample_type,
            upsample_type=upsample_type,
            dropout=dropout,
            act_fn=act_fn,
            attention_head_dim=attention_head_dim,
            norm_num_groups=norm_num_groups,
            attn_norm_num_groups=attn_norm_num_groups,
            norm_eps=norm_eps,
            resnet_time_scale_shift=resnet_time_scale_shift,
            add_attention=add_attention,
            class_embed_type=class_embed_type,
            num_class_embeds=num_class_embeds,
            num_train_timesteps=num_train_timesteps,
        )
        # The stock class has just noted the channels of the patches.
        self.register_to_config(in_channels=in_channels, out_channels=out_channels)
        for module in self.modules():
            if isinstance(module, Attention):
                if module.inner_dim % num_attention_heads:
                    raise ValueError(
                        f"num_attention_heads={num_attention_heads} does not divide an attention block's "
                        f"{module.inner_dim} "
                        "channels: choose another number or other block_out_channels."
                    )
                module.heads = num_attention_heads
                module.scale = (module.inner_dim // num_attention_heads) ** -0.5
                _zero(module.to_out[0])
            elif isinstance(module, ResnetBlock2D):
                _zero(module.conv2)
            elif type(module) is nn.GroupNorm:
                # The stock blocks make their norms themselves; ours has the same parameters.
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
                `patch_size` times 2 to the number of levels less one.
            timestep (`torch.Tensor` of shape `(N,)`, `float` or `int`): How much noise is in them.
            class_labels (`torch.Tensor` of shape `(N,)`, *optional*): As in [`UNet2DModel`].
            return_dict (`bool`): Return an `UNet2DOutput`, else a plain tuple.

        Returns:
            `UNet2DOutput` or `tuple`: The noise, `(N, out_channels, H, W)`, or what else the scheduler's
            `prediction_type` says.
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
        """
        As [`ModelMixin.from_pretrained`], but a missing tensor is an error: diffusers goes on with random values.

        Raises:
            ValueError: If a tensor is missing.
        """
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
    ) -> dict:
        """
        The size-dependent part of the configuration, as the reference derives it (`models/Recon_subnetwork.py`).

        Args:
            base_channels (`int`): Channels at full resolution; a multiple of `norm_num_groups`.
            resolution (`int`): Side length of the images in px.
            norm_num_groups (`int`): Groups of every group norm.
            largest_attention_map (`int`): Side length up to which feature maps get self-attention.
            patch_size (`int`): Side length in px of the patches; the levels follow from the number of patches.
            layers_per_block (`int`): Residual blocks of every level on the way down; one more on the way up.

        Returns:
            `dict`: Keyword arguments of this class.
        """
        side = resolution // patch_size
        multipliers: tuple[int, ...]
        if side <= 64:
            multipliers = (1, 2, 3, 4)
        elif side <= 128:
            multipliers = (1, 1, 2, 3, 4)
        else:
            multipliers = (1, 1, 2, 2, 4, 4)
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
        }


@torch.no_grad()
def _zero(module: nn.Module) -> None:
    for parameter in module.parameters():
        parameter.zero_()
