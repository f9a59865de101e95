"""Reads checkpoints of the paper's own code into a pipeline."""

import pickle
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from einops import rearrange

from .files import one_line
from .modeling_anomaly_segmenter import AnomalySegmenter
from .modeling_norm_guided_unet import NormGuidedUNet2DModel
from .pipeline_diffusionad import DiffusionADPipeline
from .scheduling_norm_guided import NormGuidedScheduler

_RESNET_PARTS = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "embed_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}


def pipeline_from_checkpoint(checkpoint: str | Path) -> DiffusionADPipeline:
    """
    Reads a `params-*.pt` of the reference implementation.

    Args:
        checkpoint: The file; read with `weights_only=True`, so that nothing in it is executed.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not such a checkpoint, or its weights fit no network of this package.
    """
    state = _read(Path(checkpoint))
    unet_weights, segmenter_weights = state["unet_model_state_dict"], state["seg_model_state_dict"]
    args = dict(state.get("args") or {})
    try:
        # On "meta", networks take no memory before they take the weights: a file cannot ask for more than it holds.
        with torch.device("meta"):
            unet = NormGuidedUNet2DModel(**_unet_config(unet_weights, args))
        unet.load_state_dict(convert_unet_weights(unet_weights, unet), assign=True)
        first = segmenter_weights["encoder_segment.block1.0.weight"]
        last = segmenter_weights["decoder_segment.fin_out.0.weight"]
        size = {"in_channels": first.shape[1], "out_channels": last.shape[0], "base_channels": len(first)}
        with torch.device("meta"):
            segmenter = AnomalySegmenter(**size)
        segmenter.load_state_dict(convert_segmenter_weights(segmenter_weights), assign=True)
    except (KeyError, RuntimeError, IndexError) as error:
        raise ValueError(
            f"{checkpoint}: the weights do not fit the networks of DiffusionAD ({one_line(error)}). Only checkpoints "
            "with the reference's UNetModel and SegmentationSubNetwork can be converted."
        ) from error
    scheduler = NormGuidedScheduler(
        num_train_timesteps=int(args.get("T", 1000)),
        small_timestep=int(args.get("eval_normal_t", 200)),
        big_timestep=int(args.get("eval_noisier_t", 400)),
        timestep_boundary=int(args.get("less_t_range", 300)),
        guidance_weight=float(args.get("condition_w", 1.0)),
    )
    return DiffusionADPipeline(unet=unet.float().eval(), segmenter=segmenter.float().eval(), scheduler=scheduler)


def convert_unet_weights(weights: Mapping[str, torch.Tensor], unet: NormGuidedUNet2DModel) -> dict[str, torch.Tensor]:
    """
    Renames the state dict of the reference's `UNetModel` to that of `unet`, a network of the same structure: its flat
    `down`, `middle` and `up` lists hold the residual blocks, attentions and samplers of diffusers' blocks in order.
    """
    modules = {
        "time_embedding.1": "time_embedding.linear_1",
        "time_embedding.3": "time_embedding.linear_2",
        "down.0.0": "conv_in",
        "middle.0": "mid_block.resnets.0",
        "middle.1": "mid_block.attentions.0",
        "middle.2": "mid_block.resnets.1",
        "out.0": "conv_norm_out",
        "out.2": "conv_out",
    }
    position = 1
    for i, block in enumerate(unet.down_blocks):
        for j in range(len(block.resnets)):
            modules[f"down.{position}.0"] = f"down_blocks.{i}.resnets.{j}"
            modules[f"down.{position}.1"] = f"down_blocks.{i}.attentions.{j}"
            position += 1
        if block.downsamplers is not None:
            modules[f"down.{position}.0"] = f"down_blocks.{i}.downsamplers.0"
            position += 1
    position = 0
    for i, block in enumerate(unet.up_blocks):
        attends = hasattr(block, "attentions")
        for j in range(len(block.resnets)):
            modules[f"up.{position}.0"] = f"up_blocks.{i}.resnets.{j}"
            if attends:
                modules[f"up.{position}.1"] = f"up_blocks.{i}.attentions.{j}"
            position += 1
        # The reference upsamples at the end of a level's last entry; diffusers' blocks call their resnet upsampler
        # `upsamplers` or `resnet_up`.
        upsampler = "upsamplers.0" if getattr(block, "upsamplers", None) is not None else "resnet_up"
        modules[f"up.{position - 1}.{1 + attends}"] = f"up_blocks.{i}.{upsampler}"

    converted = {}
    for name, tensor in weights.items():
        path, _, kind = name.rpartition(".")
        if path in modules:
            converted[f"{modules[path]}.{kind}"] = tensor
            continue
        depth = 2 if path.startswith("middle") else 3
        parts = path.split(".")
        module, part = modules[".".join(parts[:depth])], ".".join(parts[depth:])
        if part == "to_qkv":
            heads = unet.config.num_attention_heads
            # Conv1d weights of width 1 are linear layers with one axis too many.
            by_head = rearrange(tensor, "(head qkv channel) ... -> qkv (head channel) (...)", head=heads, qkv=3)
            for target, value in zip(("to_q", "to_k", "to_v"), by_head, strict=True):
                converted[f"{module}.{target}.{kind}"] = value if kind == "weight" else value.squeeze(-1)
        elif part == "proj_out":
            converted[f"{module}.to_out.0.{kind}"] = tensor.squeeze(-1) if kind == "weight" else tensor
        elif part == "norm":
            converted[f"{module}.group_norm.{kind}"] = tensor
        else:
            converted[f"{module}.{_RESNET_PARTS[part]}.{kind}"] = tensor
    return converted


def convert_segmenter_weights(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Renames the state dict of the reference's `SegmentationSubNetwork` to that of an [`AnomalySegmenter`]."""
    modules = {f"encoder_segment.block{level + 1}": f"down_blocks.{level}" for level in range(6)}
    for i, name in enumerate(("_b", "1", "2", "3", "4")):
        modules[f"decoder_segment.up{name}"] = f"up_convs.{i}"
        modules[f"decoder_segment.db{name}"] = f"up_blocks.{i}"
    converted = {}
    for name, tensor in weights.items():
        if name.startswith("decoder_segment.fin_out.0."):
            converted[f"conv_out.{name.rpartition('.')[2]}"] = tensor
            continue
        network, block, index, kind = name.split(".")
        target = modules[f"{network}.{block}"]
        # The reference's up-convolutions carry the upsampling as layer 0.
        layer = int(index) - target.startswith("up_convs")
        converted[f"{target}.{layer}.{kind}"] = tensor
    return converted


def _unet_config(weights: Mapping[str, torch.Tensor], args: Mapping) -> dict:
    """The network's configuration, from the shapes of its weights, and from the training's arguments for the rest."""
    entries = len({name.split(".")[1] for name in weights if name.startswith("down.")})
    # Every level but one ends with an upsampler, the only residual block that is not the first of its entry.
    upsamplers = {name.split(".")[1] for name in weights if re.match(r"up\.\d+\.[12]\.in_layers", name)}
    per_level = entries // (len(upsamplers) + 1)
    firsts = range(1, entries, per_level)
    attends = [f"down.{entry}.1.norm.weight" in weights for entry in firsts]
    size = args.get("img_size", 256)
    head_width = int(args.get("num_head_channels") or -1)
    if head_width != -1:
        raise ValueError(f"checkpoints with attention heads of fixed width ({head_width}) are not supported")
    return {
        "sample_size": int(size[0] if isinstance(size, (list, tuple)) else size),
        "in_channels": weights["down.0.0.weight"].shape[1],
        "out_channels": weights["out.2.weight"].shape[0],
        "block_out_channels": tuple(weights[f"down.{entry}.0.out_layers.3.weight"].shape[0] for entry in firsts),
        "down_block_types": tuple("AttnDownBlock2D" if a else "ResnetDownsampleBlock2D" for a in attends),
        "up_block_types": tuple("AttnUpBlock2D" if a else "ResnetUpsampleBlock2D" for a in reversed(attends)),
        "layers_per_block": per_level - 1,
        "dropout": float(args.get("dropout") or 0.0),
        "num_attention_heads": int(args.get("num_heads") or 4),
    }


def _read(path: Path) -> dict:
    """A checkpoint's dictionary, unpickled with nothing but tensors and plain containers allowed."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint file.")
    try:
        with torch.serialization.safe_globals([(_plain_dict, "collections.defaultdict"), str]):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path}: refused, because it holds more than tensors and plain values and loading it could run code. "
            "Only convert checkpoints written by the reference's train.py."
        ) from error
    # On other files the unpickler may raise anything: KeyError, EOFError, RuntimeError, ...
    except Exception as error:
        raise ValueError(f"{path}: not a readable PyTorch checkpoint (truncated, or another kind of file).") from error
    for key in ("unet_model_state_dict", "seg_model_state_dict"):
        weights = state.get(key) if isinstance(state, Mapping) else None
        if not isinstance(weights, Mapping) or not all(isinstance(value, torch.Tensor) for value in weights.values()):
            raise ValueError(f"{path}: not a checkpoint of the reference: {key} is missing.")
        for name, value in weights.items():
            if value.layout != torch.strided or value.nbytes > value.untyped_storage().nbytes():
                raise ValueError(f"{path}: {key} claims more numbers for {name} than the file holds.")
    return state


def _plain_dict(*_: object) -> dict:
    """Replaces `collections.defaultdict(str)`, the type of the reference's `args`, which the unpickler refuses."""
    return {}
