"""Named sizes of the two networks, and untrained pipelines of them."""

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .pipeline_diffusionad import DiffusionADPipeline

# `paper` is the size of the published models and predicts the noise, as they do. The others predict the image, which
# narrow networks learn in fewer steps. `tiny` has self-attention only up to 16 px: on a CPU, attention at 32 px took
# half of its time. `perceptual`, the trainer's default, works on patches of 4 px, with a segmenter on the features of
# a pretrained encoder and a memory of normal images.
_SMALL = {"base_channels": 32, "segmenter_base_channels": 16, "prediction_type": "sample"}
_TINY = {**_SMALL, "base_channels": 16, "norm_num_groups": 16, "largest_attention_map": 16}
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"base_channels": 128, "segmenter_base_channels": 64},
    "small": _SMALL,
    "tiny": _TINY,
    "perceptual": {
        **{name: value for name, value in _TINY.items() if name != "segmenter_base_channels"},
        "patch_size": 4,
        "padding_mode": "replicate",
        "memory_size": 2000,
    },
}


def build_pipeline(
    preset: str = "small",
    resolution: int = 256,
    prediction_type: str | None = None,
    image_size: tuple[int, int] | None = None,
) -> "DiffusionADPipeline":
    """
    Builds an untrained pipeline of a named size.

    Args:
        preset: `"perceptual"`, `"paper"`, `"small"` or `"tiny"`.
        resolution: Side length of the images in px; a multiple of 32. It decides the number of levels.
        prediction_type: What the UNet predicts, see [`NormGuidedScheduler`]; by default the preset's.
        image_size: Height and width of images that are no squares, of about `resolution ** 2` px.

    Raises:
        ValueError: If the preset or prediction type is unknown, or the size does not fit the networks.
    """
    # Here, so that the names are known without torch: `--help` is there at once.
    from .modeling_anomaly_segmenter import AnomalySegmenter
    from .modeling_norm_guided_unet import NormGuidedUNet2DModel
    from .modeling_perceptual_segmenter import PerceptualSegmenter
    from .pipeline_diffusionad import DiffusionADPipeline
    from .scheduling_norm_guided import NormGuidedScheduler

    if preset not in PRESETS:
        raise ValueError(f'preset="{preset}": must be one of {", ".join(PRESETS)}.')
    unet_sizes = dict(PRESETS[preset])
    segmenter: AnomalySegmenter | PerceptualSegmenter
    if "memory_size" in unet_sizes:
        segmenter = PerceptualSegmenter(memory_size=unet_sizes.pop("memory_size")).load_encoder()
    else:
        segmenter = AnomalySegmenter(base_channels=unet_sizes.pop("segmenter_base_channels"))
    default_prediction_type = unet_sizes.pop("prediction_type", "epsilon")
    config = NormGuidedUNet2DModel.size_config(resolution=resolution, **unet_sizes)
    multiple = math.lcm(segmenter.size_multiple, _smallest_map(config))
    for side in image_size or (resolution,):
        if side < multiple or side % multiple:
            raise ValueError(
                f"resolution={side}: the networks halve the image at every level, so it must be a multiple of "
                f"{multiple}."
            )
    return DiffusionADPipeline(
        unet=NormGuidedUNet2DModel(**config),
        segmenter=segmenter,
        scheduler=NormGuidedScheduler(prediction_type=prediction_type or default_prediction_type),
        image_size=image_size or resolution,
    )


def size_multiple(preset: str, resolution: int) -> int:
    """What both sides of the images must be multiples of at a resolution, for networks of a named size."""
    from .modeling_norm_guided_unet import NormGuidedUNet2DModel

    names = ("base_channels", "patch_size", "norm_num_groups", "largest_attention_map")
    sizes = {name: value for name, value in PRESETS[preset].items() if name in names}
    return math.lcm(
        32,
        _smallest_map(NormGuidedUNet2DModel.size_config(resolution=resolution, **sizes)),
    )


def _smallest_map(config: dict[str, Any]) -> int:
    return config["patch_size"] * 2 ** (len(config["block_out_channels"]) - 1)
