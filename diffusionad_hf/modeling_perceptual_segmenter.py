"""A segmentation network on the features of a small frozen encoder: compares those of an image with those of its
reconstruction and with a memory of normal images.
"""

import os
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

# This file is saved beside the weights and runs on its own there, so it must not import other modules of this package.
# Diffusers recognises a model's file by the name `ModelMixin` in it.
__all__ = ["ModelMixin", "PerceptualSegmenter"]

# EfficientNet-Lite0 up to its 11th block: expansion, kernel, stride and channels of each (arXiv 1905.11946; "Lite":
# no squeeze-and-excitation, ReLU6 for swish).
_STEM_CHANNELS = 32
_BLOCKS = (
    (1, 3, 1, 16),
    *((6, 3, 2, 24), (6, 3, 1, 24)),
    *((6, 5, 2, 40), (6, 5, 1, 40)),
    *((6, 3, 2, 80), (6, 3, 1, 80), (6, 3, 1, 80)),
    *((6, 5, 1, 112), (6, 5, 1, 112), (6, 5, 1, 112)),
)
# Blocks whose outputs are the features, at strides 4, 8 and 16, and their channels.
_TAKEN = (2, 4, 10)
_CHANNELS = tuple(_BLOCKS[block][3] for block in _TAKEN)
_DESCRIBED = _CHANNELS[1] + _CHANNELS[2]
# Statistics of ImageNet, on which the encoder was trained.
_MEAN = (0.485, 0.456, 0.406)
_STD = (0.229, 0.224, 0.225)
# Available encoders and the files of their weights.
_ENCODERS = {"efficientnet-lite0": "efficientnet_lite0.safetensors"}


class _FrozenConv(nn.Module):
    """A convolution with a folded batch norm and TensorFlow's padding; its weights are buffers, so never trained."""

    weight: torch.Tensor
    bias: torch.Tensor

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1):
        super().__init__()
        self.stride, self.groups = stride, groups
        weight = torch.empty(out_channels, in_channels // groups, kernel, kernel)
        nn.init.kaiming_normal_(weight, mode="fan_out")
        self.register_buffer("weight", weight)
        self.register_buffer("bias", torch.zeros(out_channels))

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        kernel = self.weight.shape[-1]
        padding: list[int] = []
        for size in (sample.shape[-1], sample.shape[-2]):
            total = max((-(-size // self.stride) - 1) * self.stride + kernel - size, 0)
            padding += [total // 2, total - total // 2]
        # The convolution itself can pad equally on all sides.
        same = padding[0] if len(set(padding)) == 1 else None
        if same is None:
            sample = F.pad(sample, padding)
        return F.conv2d(sample, self.weight, self.bias, self.stride, same or 0, groups=self.groups)


class _Block(nn.Module):
    """Inverted residual: expand, depthwise convolution, project; with a skip connection if the shape is kept."""

    def __init__(self, in_channels: int, expansion: int, kernel: int, stride: int, out_channels: int):
        super().__init__()
        inner = in_channels * expansion
        self.expand = _FrozenConv(in_channels, inner, 1) if expansion > 1 else None
        self.depthwise = _FrozenConv(inner, inner, kernel, stride, groups=inner)
        self.project = _FrozenConv(inner, out_channels, 1)
        self.adds = stride == 1 and in_channels == out_channels

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        hidden = sample if self.expand is None else F.relu6(self.expand(sample))
        hidden = self.project(F.relu6(self.depthwise(hidden)))
        return hidden + sample if self.adds else hidden


class _Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = _FrozenConv(3, _STEM_CHANNELS, 3, 2)
        inputs = (_STEM_CHANNELS, *(block[3] for block in _BLOCKS))
        self.blocks = nn.ModuleList(_Block(width, *block) for width, block in zip(inputs, _BLOCKS, strict=False))

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        mean, std = (images.new_tensor(values).view(1, 3, 1, 1) for values in (_MEAN, _STD))
        hidden = F.relu6(self.stem((images - mean) / std))
        taken = []
        for i, block in enumerate(self.blocks):
            hidden = block(hidden)
            if i in _TAKEN:
                taken.append(hidden)
        return taken


def _conv(in_channels: int, out_channels: int, kernel: int = 3) -> list[nn.Module]:
    return [
        nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    ]


class PerceptualSegmenter(ModelMixin, ConfigMixin):
    r"""
    Compares an image with its reconstruction in the features of a frozen encoder.

    The decoder gets the image's features at strides 4, 8 and 16 and their absolute differences from the
    reconstruction's. With a memory it also gets the differences from the nearest features of normal images (as
    PatchCore, arXiv 2106.08265), per channel and as one distance. The logits are the decoder's output plus that
    distance, scaled and shifted; after training `distance_vote` adds to the scale, so that anomalies unlike the
    synthetic ones stand out too.

    A new network is random, encoder included: [`load_encoder`] loads its ImageNet weights.

    Args:
        encoder (`str`): Only `"efficientnet-lite0"`.
        width (`int`): Channels of the decoder.
        memory_size (`int`): Number of features of normal images in the memory; 0 for no memory.
        image_dropout (`float`): Probability in training of hiding the image's own features from the decoder, which
            would otherwise learn to recognise the synthetic anomalies by them.
        distance_vote (`float`): How much a distance twice as large as normal raises the logits, except in training.
        in_channels (`int`): Channels of image and reconstruction together; 6.

    Raises:
        ValueError: If the encoder is unknown, or the channels are not 6.
    """

    # The widest stride. Other sizes work too, with padding.
    size_multiple = 16

    @register_to_config
    def __init__(
        self,
        encoder: str = "efficientnet-lite0",
        width: int = 48,
        memory_size: int = 0,
        image_dropout: float = 0.7,
        distance_vote: float = 2.0,
        in_channels: int = 6,
    ):
        super().__init__()
        if encoder not in _ENCODERS:
            known = ", ".join(_ENCODERS)
            raise ValueError(
                f'encoder="{encoder}": unknown to this version, which has {known}; upgrade diffusionad-hf.'
            )
        if in_channels != 6:
            raise ValueError(f"in_channels={in_channels}: must be 6, an RGB image and its reconstruction.")
        # The attribute "encoder" would return the config's value.
        self.backbone = _Encoder()
        inputs = [2 * channels for channels in _CHANNELS]
        if memory_size:
            inputs[1] += _DESCRIBED + 1
            self.register_buffer("memory", torch.zeros(memory_size, _DESCRIBED))
            # The image that each feature comes from; the mean distance of normal features from the nearest one.
            self.register_buffer("memory_images", torch.full((memory_size,), -1, dtype=torch.int32))
            self.register_buffer("memory_scale", torch.ones(()))
            self.distance_weight = nn.Parameter(torch.ones(()))
            self.distance_bias = nn.Parameter(torch.full((), -4.0))
        self.lateral = nn.ModuleList(nn.Sequential(*_conv(channels, width, 1)) for channels in inputs)
        self.merge = nn.ModuleList(
            [
                nn.Sequential(*_conv(width, width)),
                nn.Sequential(*_conv(2 * width, width)),
                nn.Sequential(*_conv(2 * width, width), *_conv(width, width)),
            ]
        )
        self.conv_out = nn.Conv2d(width, 1, kernel_size=1)

    @classmethod
    def from_pretrained(cls, *args, output_loading_info: bool = False, **kwargs):
        """As [`ModelMixin.from_pretrained`], but raises `ValueError` if tensors are missing, instead of going on."""
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        missing = sorted(info["missing_keys"])
        if missing:
            raise ValueError(f"the weights lack {len(missing)} of the model's tensors, such as {missing[0]}")
        return (model, info) if output_loading_info else model

    def load_encoder(self, path: str | os.PathLike | None = None) -> "PerceptualSegmenter":
        """
        Loads the encoder's ImageNet weights, for a new network; a saved one contains them.

        Args:
            path: A safetensors file; by default the one beside this module.

        Raises:
            OSError: If the file is missing or damaged.
        """
        path = Path(path) if path is not None else Path(__file__).with_name(_ENCODERS[self.config.encoder])
        again = "install diffusionad-hf again"
        if not path.is_file():
            raise FileNotFoundError(f"{path}: the encoder's weights are missing; {again}.")
        try:
            self.backbone.load_state_dict(load_file(path))
        except (SafetensorError, RuntimeError) as error:
            raise OSError(f"{path}: the encoder's weights are damaged or of another one; {again}.") from error
        return self

    def forward(
        self, sample: torch.Tensor, images: torch.Tensor | None = None, chance: torch.Tensor | None = None
    ) -> torch.Tensor:
        """
        Args:
            sample (`torch.Tensor` of shape `(N, 6, H, W)`): Image and reconstruction in [0, 1], concatenated.
            images (`torch.Tensor` of shape `(N,)`, *optional*): In training, the positions of the images in
                [`remember`]'s, so that an image is not compared with its own features.
            chance (`torch.Tensor` of shape `(N,)`, *optional*): In training, a number in [0, 1) per image, which hides
                its own features from the decoder if below `image_dropout`.

        Returns:
            `torch.Tensor` of shape `(N, 1, H, W)`: Logits of a pixel being anomalous.

        Raises:
            ValueError: If there are not 6 channels.
        """
        if sample.ndim != 4 or sample.shape[1] != 6:
            raise ValueError(
                f"sample: has shape {tuple(sample.shape)}, must be (N, 6, H, W): an RGB image and its reconstruction."
            )
        # `chunk` would fix the number of images in an exported graph.
        pairs = [taken.unflatten(0, (2, -1)) for taken in self.backbone(torch.cat(sample.chunk(2, dim=1)))]
        seen = 1.0
        if chance is not None:
            dropout = self.config.image_dropout
            seen = (chance >= dropout).to(sample.dtype).view(-1, 1, 1, 1) / (1 - dropout)
        inputs = [[image * seen, (image - reconstruction).abs()] for image, reconstruction in pairs]
        distance = None
        if self.config.memory_size:
            described = _describe(pairs[1][0], pairs[2][0])
            nearest, distance = self._recall(described, images)
            inputs[1] += [(described - nearest).abs(), distance]
        fine, middle, coarse = (
            lateral(torch.cat(parts, dim=1)) for lateral, parts in zip(self.lateral, inputs, strict=True)
        )
        hidden = self.merge[0](coarse)
        hidden = self.merge[1](torch.cat([_resize(hidden, middle), middle], dim=1))
        hidden = self.merge[2](torch.cat([_resize(hidden, fine), fine], dim=1))
        logits = self.conv_out(hidden)
        if distance is not None:
            vote = 0.0 if self.training else self.config.distance_vote
            logits = logits + (self.distance_weight + vote) * _resize(distance, fine) + self.distance_bias - vote
        return _resize(logits, sample)

    @torch.no_grad()
    def describe(self, images: torch.Tensor) -> torch.Tensor:
        """The features to remember of images `(N, 3, H, W)` in [0, 1]: `(N, 152, H / 8, W / 8)`."""
        _, middle, coarse = self.backbone(images)
        return _describe(middle, coarse)

    @torch.no_grad()
    def remember(self, images: Iterable[torch.Tensor], pool: int = 50_000, seed: int = 0) -> None:
        """
        Fills the memory with diverse features of normal images: always the one farthest from all chosen before
        (greedy coreset of PatchCore).

        Args:
            images: `(3, H, W)` in [0, 1] each.
            pool: How many features to choose from, drawn at random.
            seed: Seed of the draws.
        """
        generator = torch.Generator().manual_seed(seed)
        features = self.memory.new_empty(0, _DESCRIBED, dtype=torch.float32)
        owner, keys = self.memory_images[:0], features[:, 0]
        for number, image in enumerate(images):
            found = self.describe(image[None].to(self.memory))[0].flatten(1).T
            # A uniform sample of all features so far, in the memory of one pool: those with the highest random keys.
            drawn = torch.rand(len(found), generator=generator).to(found.device)
            keys, kept = torch.cat([keys, drawn]).topk(min(pool, len(keys) + len(drawn)))
            features = torch.cat([features, found.float()])[kept]
            owner = torch.cat([owner, owner.new_full((len(found),), number)])[kept]
        # 64 random projections preserve distances well enough (Johnson-Lindenstrauss) and are cheaper.
        directions = torch.randn(_DESCRIBED, 64, generator=generator).to(features)
        short = features @ directions
        chosen = torch.zeros(self.config.memory_size, dtype=torch.long, device=features.device)
        distances = (short - short[0]).square().sum(1)
        for i in range(1, len(chosen)):
            chosen[i] = distances.argmax()
            distances = torch.minimum(distances, (short - short[chosen[i]]).square().sum(1))
        self.memory.copy_(features[chosen])
        self.memory_images.copy_(owner[chosen])
        self.memory_scale.fill_(1)
        distance = self._nearest(features[:4000], owner[:4000, None])[1]
        self.memory_scale.copy_(distance.mean().clamp(min=1e-3))

    def _recall(self, described: torch.Tensor, images: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """The nearest features in the memory to `(N, 152, h, w)`, and the distances, `(N, 1, h, w)`, normally 1."""
        size = described.shape[-2:]
        rows = described.permute(0, 2, 3, 1).flatten(0, 2)
        owner = None if images is None else images.to(rows.device).repeat_interleave(size[0] * size[1])[:, None]
        nearest, distance = self._nearest(rows, owner)
        nearest, distance = (part.view(-1, *size, part.shape[1]).permute(0, 3, 1, 2) for part in (nearest, distance))
        return nearest, distance / self.memory_scale

    def _nearest(self, rows: torch.Tensor, owner: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """For `(M, 152)`, the nearest features in the memory of other images, and the distances, `(M, 1)`."""
        # In half precision, the difference of two large squares would be lost.
        memory = self.memory.float()
        squared = torch.addmm(memory.square().sum(1), rows.detach().float(), memory.T, alpha=-2)
        if owner is not None:
            squared = squared.masked_fill(owner == self.memory_images, torch.inf)
        nearest = self.memory[squared.argmin(1)]
        distance = (rows.float() - nearest.float()).square().sum(1, keepdim=True).add(1e-6).sqrt()
        return nearest, distance.to(rows.dtype)


def _describe(middle: torch.Tensor, coarse: torch.Tensor) -> torch.Tensor:
    """Features of strides 8 and 16 as one map, averaged over 3 x 3 neighbourhoods."""
    middle, coarse = (F.avg_pool2d(part, 3, 1, 1) for part in (middle, coarse))
    return torch.cat([middle, _resize(coarse, middle)], dim=1)


def _resize(sample: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return F.interpolate(sample, size=like.shape[-2:], mode="bilinear", align_corners=False)
