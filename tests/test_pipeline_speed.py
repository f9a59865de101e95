"""What makes the pipeline fast keeps its answers."""

import numpy as np
import pytest
import torch

from benchmarks.inference import papers_way
from diffusionad_hf import DiffusionADPipeline
from tests.conftest import make_pipeline


@pytest.mark.parametrize("autograd", [True, False])
def test_one_batch_of_both_scales_gives_what_two_plain_passes_give(autograd):
    pipe = make_pipeline(64)
    pixels, noise = torch.rand(1, 3, 64, 64), torch.randn(2, 1, 3, 64, 64)
    expected_map, expected_score = papers_way(pipe, pixels, noise, autograd)
    output = pipe(pixels, noise=noise)
    assert output.anomaly_score[0] == pytest.approx(expected_score, abs=1e-5)
    np.testing.assert_allclose(output.anomaly_map[0], expected_map.numpy(), atol=1e-4)


def test_on_a_cpu_both_networks_compute_channels_last():
    # At 32 px the smallest map is a single pixel, which has no layout to hand on.
    pipe, images, seen = make_pipeline(64), torch.rand(2, 3, 64, 64), {}
    for name, network in (("unet", pipe.unet), ("segmenter", pipe.segmenter)):
        network.conv_out.register_forward_pre_hook(lambda _, inputs, name=name: seen.update({name: inputs[0]}))
    pipe(images)
    for name, sample in seen.items():
        assert sample.is_contiguous(memory_format=torch.channels_last), name


@pytest.mark.parametrize("side, images", [(512, 1), (256, 1), (128, 4), (96, 7), (32, 16)])
def test_on_a_cpu_a_pass_takes_as_many_images_as_its_cache_likes(side, images):
    pipe = make_pipeline()
    pipe.register_to_config(image_size=side)
    assert pipe.default_batch_size == images


def test_weights_keep_their_layout(pipe):
    pipe(torch.rand(1, 3, 32, 32))
    assert all(parameter.is_contiguous() for parameter in pipe.unet.parameters())


@pytest.mark.parametrize("output_type", ["np", "pt"])
def test_what_a_network_returns_may_be_overwritten_by_the_next_one(output_type):
    # As CUDA graphs do: one memory for the results of all networks, used again by whichever runs next.
    pipe, images = make_pipeline(), torch.rand(2, 3, 32, 32)
    expected = pipe(images, output_type=output_type, return_intermediates=True)
    returned = []

    def overwrite(module, inputs):
        for tensor in returned:
            tensor.fill_(7)
        returned.clear()

    pipe.unet.register_forward_pre_hook(overwrite)
    pipe.segmenter.register_forward_pre_hook(overwrite)
    pipe.unet.register_forward_hook(lambda module, inputs, output: returned.append(output.sample))
    pipe.segmenter.register_forward_hook(lambda module, inputs, output: returned.append(output))
    found = pipe(images, output_type=output_type, return_intermediates=True, batch_size=1)
    np.testing.assert_allclose(found.anomaly_score, expected.anomaly_score, atol=1e-6)
    torch.testing.assert_close(found.intermediates, expected.intermediates, atol=1e-4, rtol=1e-3)


def test_compiled_networks_give_the_same_scores_and_save_as_plain_ones(tmp_path):
    images = torch.rand(2, 3, 32, 32)
    pipe = make_pipeline()
    expected = pipe(images).anomaly_score
    # The tracing is what may fail; generating code takes a minute and changes rounding alone.
    pipe.segmenter.compile(backend="eager")
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    np.testing.assert_allclose(pipe(images).anomaly_score, expected, atol=1e-6)
    pipe.save_pretrained(tmp_path)
    loaded = DiffusionADPipeline.from_pretrained(tmp_path)
    np.testing.assert_allclose(loaded(images).anomaly_score, expected, atol=1e-6)
    assert (tmp_path / "unet" / "modeling_norm_guided_unet.py").is_file()
