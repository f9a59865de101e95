"""The networks: sizes, structure, and that they can be told apart by what goes in."""

import einops
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from diffusionad_hf import PRESETS, AnomalySegmenter, NormGuidedUNet2DModel, build_pipeline
from diffusionad_hf.convert import convert_unet_weights
from diffusionad_hf.modeling_norm_guided_unet import ExactGroupNorm
from tests.reference import reference_weights

PIXELS_TO_CHANNELS = "n c (h p) (w q) -> n (c p q) h w"
CHANNELS_TO_PIXELS = "n (c p q) h w -> n c (h p) (w q)"
SIDES = {"p": 2, "q": 2}


def millions(module):
    return sum(p.numel() for p in module.parameters()) / 1e6


@pytest.mark.parametrize(
    "preset, unet, segmenter",
    [("paper", 131.65, 28.37), ("small", 8.26, 1.78), ("tiny", 2.05, 1.78)],
)
def test_presets_have_the_published_sizes(preset, unet, segmenter):
    with torch.device("meta"):
        pipe = build_pipeline(preset, 256)
    assert millions(pipe.unet) == pytest.approx(unet, abs=0.02)
    assert millions(pipe.segmenter) == pytest.approx(segmenter, abs=0.01)


@pytest.mark.parametrize(
    "preset, resolution", [*((name, 32) for name in PRESETS), *(("tiny", size) for size in (64, 96, 128, 224))]
)
def test_every_preset_takes_every_multiple_of_32(preset, resolution):
    pipe = build_pipeline(preset, resolution)
    x = torch.rand(1, 3, resolution, resolution)
    assert pipe.unet(x, torch.tensor([7])).sample.shape == x.shape
    assert pipe.segmenter(torch.cat([x, x], 1)).shape == (1, 1, resolution, resolution)


@pytest.mark.parametrize("resolution", [0, -32, 100, 255])
def test_a_resolution_that_the_networks_cannot_take_is_named(resolution):
    with pytest.raises(ValueError, match=f"resolution={resolution}.*multiple of 32"):
        build_pipeline("tiny", resolution)


def test_an_unknown_preset_names_those_there_are():
    with pytest.raises(ValueError, match="huge.*paper, small, tiny"):
        build_pipeline("huge")


def test_every_attention_level_has_the_same_number_of_heads():
    unet = NormGuidedUNet2DModel(**NormGuidedUNet2DModel.size_config(32, 64))
    heads = {m.heads for m in unet.modules() if hasattr(m, "heads")}
    widths = {m.inner_dim for m in unet.modules() if hasattr(m, "heads")}
    assert heads == {4} and len(widths) > 1


def test_heads_that_do_not_divide_the_channels_are_refused():
    with pytest.raises(ValueError, match="num_attention_heads=5.*64"):
        NormGuidedUNet2DModel(**NormGuidedUNet2DModel.size_config(32, 64), num_attention_heads=5)


def test_the_number_of_heads_changes_the_output_and_survives_saving(tmp_path):
    weights = reference_weights("px64", "unet")
    x = torch.rand(1, 3, 64, 64)
    outputs = {}
    for heads in (1, 4):
        unet = NormGuidedUNet2DModel(**NormGuidedUNet2DModel.size_config(32, 64), num_attention_heads=heads).eval()
        unet.load_state_dict(convert_unet_weights(weights, unet))
        unet.save_pretrained(tmp_path / str(heads))
        loaded = NormGuidedUNet2DModel.from_pretrained(tmp_path / str(heads))
        with torch.no_grad():
            outputs[heads] = loaded(x, 200).sample
            torch.testing.assert_close(outputs[heads], unet(x, 200).sample, atol=1e-4, rtol=1e-3)
    assert not torch.allclose(outputs[1], outputs[4], atol=1e-3)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("autograd", [False, True])
@pytest.mark.parametrize("shape", [(2, 64, 48, 32), (1, 64, 1, 1), (3, 64, 20)])
def test_group_norms_are_exact_in_every_layout(shape, autograd, layout):
    norms = [m for m in random_unet(**NormGuidedUNet2DModel.size_config(32, 64)).modules() if is_norm(m)]
    assert len(norms) > 20 and {type(m) for m in norms} == {ExactGroupNorm}
    norm = next(m for m in norms if m.num_channels == 64)
    # What torch's own norm is worst at: maps whose mean is far from zero.
    sample = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.3 + 2
    expected = torch.nn.functional.group_norm(
        sample.double(), norm.num_groups, norm.weight.double(), norm.bias.double(), norm.eps
    )
    if len(shape) == 4:
        sample = sample.to(memory_format=layout)
    with torch.set_grad_enabled(autograd):
        found = norm(sample)
    # With autograd the stock norm computes, as ever.
    stock = autograd and layout == torch.channels_last
    torch.testing.assert_close(found.double(), expected, atol=5e-3 if stock else 5e-5, rtol=0)
    if shape[-1] > 1:
        assert found.stride() == sample.stride()


PATCHES = NormGuidedUNet2DModel.size_config(16, 64, norm_num_groups=16, patch_size=2)


def is_norm(module):
    return isinstance(module, torch.nn.GroupNorm)


def random_unet(**config):
    torch.manual_seed(0)
    unet = NormGuidedUNet2DModel(**config).eval()
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return unet


def test_a_unet_of_patches_says_pixels_and_survives_saving(tmp_path):
    unet = random_unet(**PATCHES)
    assert (unet.config.in_channels, unet.config.out_channels, unet.config.sample_size) == (3, 3, 64)
    unet.save_pretrained(tmp_path)
    loaded = NormGuidedUNet2DModel.from_pretrained(tmp_path)
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(loaded(x, 200).sample, unet(x, 200, return_dict=False)[0])
        assert unet(x, 200).sample.shape == x.shape


def test_a_unet_of_patches_is_the_stock_one_on_an_image_with_a_channel_for_every_pixel_of_a_patch():
    unet = random_unet(**PATCHES)
    stock = NormGuidedUNet2DModel(**(PATCHES | {"patch_size": 1, "in_channels": 12, "out_channels": 12})).eval()
    stock.load_state_dict(unet.state_dict())
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        found, expected = unet(x, 200).sample, stock(einops.rearrange(x, PIXELS_TO_CHANNELS, **SIDES), 200).sample
    torch.testing.assert_close(found, einops.rearrange(expected, CHANNELS_TO_PIXELS, **SIDES))


def test_patches_compute_a_quarter():
    def flops(patch_size):
        config = NormGuidedUNet2DModel.size_config(16, 64, norm_num_groups=16, patch_size=patch_size)
        # The same levels, so that nothing but the patches differs.
        config |= {name: PATCHES[name] for name in ("block_out_channels", "down_block_types", "up_block_types")}
        unet = NormGuidedUNet2DModel(**config)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            unet(torch.rand(1, 3, 64, 64), 200)
        return counter.get_total_flops()

    assert flops(2) < 0.27 * flops(1)


def test_patches_without_a_size_are_refused():
    with pytest.raises(ValueError, match="patch_size=0.*at least 1"):
        NormGuidedUNet2DModel(**(PATCHES | {"patch_size": 0}))


def test_a_network_that_repeats_the_border_needs_not_learn_it(tmp_path):
    """A uniform picture stays uniform up to the border, before any training; with zeros outside, it does not."""
    x, spread = torch.full((1, 3, 64, 64), 0.8), {}
    for mode in ("zeros", "replicate"):
        unet = random_unet(**PATCHES | {"padding_mode": mode})
        with torch.no_grad():
            # Attention sees no places, so that nothing but the padding could tell where the border is.
            patches = unet(x, 200).sample.unfold(2, 2, 2).unfold(3, 2, 2).flatten(4)
        spread[mode] = float((patches - patches[:, :, 16:17, 16:17]).abs().max())
        unet.save_pretrained(tmp_path / mode)
        loaded = NormGuidedUNet2DModel.from_pretrained(tmp_path / mode)
        with torch.no_grad():
            assert torch.equal(loaded(x, 200).sample, unet(x, 200).sample)
    assert spread["replicate"] < 1e-4 < 0.01 < spread["zeros"]


def test_only_the_default_preset_repeats_the_border_and_older_models_keep_zeros():
    found = {name: build_pipeline(name, 64).unet for name in ("perceptual", "small", "tiny")}
    assert {name: unet.conv_in.padding_mode for name, unet in found.items()} == {
        "perceptual": "replicate",
        "small": "zeros",
        "tiny": "zeros",
    }
    older = {name: value for name, value in found["perceptual"].config.items() if name != "padding_mode"}
    assert NormGuidedUNet2DModel.from_config(older).conv_in.padding_mode == "zeros"


def test_unknown_padding_is_refused():
    with pytest.raises(ValueError, match='padding_mode="mirror": must be zeros or replicate'):
        NormGuidedUNet2DModel(**(PATCHES | {"padding_mode": "mirror"}))


def test_an_untrained_unet_predicts_zero_as_the_reference_does():
    unet = build_pipeline("tiny", 32).unet
    assert not unet(torch.rand(1, 3, 32, 32), 5).sample.any()


def test_the_segmenter_sees_the_reconstruction():
    torch.manual_seed(0)
    segmenter = AnomalySegmenter(base_channels=4).eval()
    image, other = torch.rand(1, 3, 32, 32), torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        assert not torch.allclose(segmenter(torch.cat([image, image], 1)), segmenter(torch.cat([image, other], 1)))


def test_the_segmenter_returns_logits():
    torch.manual_seed(0)
    segmenter = AnomalySegmenter(base_channels=4).eval()
    with torch.no_grad():
        segmenter.conv_out.bias.fill_(50)
        assert segmenter(torch.rand(1, 6, 32, 32)).min() > 10
