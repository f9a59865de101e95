"""The pipeline's promises: repeatable scores, calibrated verdicts, maps at each image's own size."""

import inspect
from collections import deque

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from diffusionad_hf import DiffusionADPipeline, DiffusionADPipelineOutput
from diffusionad_hf.calibration import calibrate
from diffusionad_hf.pipeline_diffusionad import InvalidImageError, conformal_p_value, conformal_threshold
from tests.conftest import make_pipeline


def images(count, seed=0):
    """Smooth random images of mixed sizes."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(20, 70, (count, 2))
    small = [rng.integers(0, 256, (5, 5, 3), dtype=np.uint8) for _ in range(count)]
    return [
        Image.fromarray(s).resize(tuple(int(v) for v in size), Image.BICUBIC)
        for s, size in zip(small, sizes, strict=True)
    ]


# ---- repeatability --------------------------------------------------------------------------------------------------


def test_scores_do_not_depend_on_batching_order_or_company(pipe):
    batch = images(5)
    together = pipe(batch, batch_size=5)
    for size in (1, 2, 3):
        np.testing.assert_allclose(pipe(batch, batch_size=size).anomaly_score, together.anomaly_score, atol=1e-6)
    np.testing.assert_allclose(pipe(batch[::-1]).anomaly_score[::-1], together.anomaly_score, atol=1e-6)
    alone = pipe(batch[3])
    assert alone.anomaly_score[0] == pytest.approx(together.anomaly_score[3], abs=1e-6)
    np.testing.assert_allclose(alone.anomaly_map[0], together.anomaly_map[3], atol=1e-5)
    assert len(set(together.anomaly_score)) == 5


def collections_of(photos):
    """The same photos in everything that people keep several in."""
    column = datasets.Dataset.from_dict({"image": photos}, features=datasets.Features(image=datasets.Image()))["image"]
    streamed = datasets.Dataset.from_dict({"image": photos}).to_iterable_dataset()["image"]
    objects = np.empty(len(photos), object)
    objects[:] = photos
    named = dict(enumerate(photos))
    by_index = type("Photos", (), {"__getitem__": lambda self, i: photos[i], "__len__": lambda self: len(photos)})()
    return {
        "column": column,
        "column of a stream": streamed,
        "tuple": tuple(photos),
        "generator": (photo for photo in photos),
        "map": map(np.asarray, photos),
        "values": named.values(),
        "deque": deque(photos),
        "array of objects": objects,
        "torch dataset": torch.utils.data.Subset(photos, range(len(photos))),
        "by index": by_index,
        "table": pd.Series(photos),
    }


def test_a_column_of_a_dataset_or_any_other_iterable_is_a_list_of_images(pipe):
    photos = images(3)
    expected = pipe(photos).anomaly_score
    for name, collection in collections_of(photos).items():
        np.testing.assert_array_equal(pipe(collection).anomaly_score, expected, err_msg=name)
        known = make_pipeline()
        scores = calibrate(known, collections_of(photos)[name], false_alarm_rate=0.4, batch_size=3)
        np.testing.assert_array_equal(scores, sorted(expected), err_msg=name)


def test_what_is_neither_an_image_nor_a_collection_of_some_is_named(pipe):
    photos = images(2)
    rows = datasets.Dataset.from_dict({"image": photos}, features=datasets.Features(image=datasets.Image()))
    for wrong, kind in (({"image": photos[0]}, "dict"), (rows, "dict"), (None, "NoneType"), (5, "int")):
        with pytest.raises(InvalidImageError, match=f"cannot inspect a {kind}"):
            pipe(wrong)
    with pytest.raises(InvalidImageError, match=r'dataset\["image"\]'):
        pipe(rows)
    with pytest.raises(InvalidImageError, match="^image 1: cannot inspect a NoneType"):
        pipe([photos[0], None])  # a row without an image

    def failing():
        yield photos[0]
        raise TypeError("of the generator's own")

    with pytest.raises(TypeError, match="of the generator's own"):
        pipe(failing())


@pytest.mark.filterwarnings("ignore:`torch_dtype` is deprecated")
def test_a_pipeline_made_from_another_shares_its_networks_type_and_configuration():
    pipe = make_pipeline()
    pipe.register_to_config(calibration_scores=[0.1, 0.2], false_alarm_rate=0.5, top_k=7)
    image = images(1)
    expected = pipe(image)
    other = DiffusionADPipeline.from_pipe(pipe)
    other.set_progress_bar_config(disable=True)
    assert other.unet is pipe.unet and other.config.top_k == 7 and type(other.scheduler) is type(pipe.scheduler)
    assert other(image).anomaly_score == expected.anomaly_score and other(image).p_value == expected.p_value
    assert DiffusionADPipeline.from_pipe(pipe, threshold=0.3).threshold == 0.3 != pipe.threshold
    pipe.to(dtype=torch.bfloat16)
    assert DiffusionADPipeline.from_pipe(pipe).unet.dtype == pipe.unet.dtype == torch.bfloat16
    for dtype in ("dtype", "torch_dtype"):  # the latter is what diffusers called it before
        assert DiffusionADPipeline.from_pipe(pipe, **{dtype: torch.float32}).dtype == torch.float32
        pipe.to(dtype=torch.bfloat16)


def test_scores_do_not_depend_on_the_global_random_state(pipe):
    image = images(1)
    torch.manual_seed(1)
    first = pipe(image).anomaly_score
    torch.manual_seed(2)
    assert pipe(image).anomaly_score == first


def test_the_seed_is_configuration():
    image, pipe = images(1), make_pipeline()
    before = pipe(image).anomaly_score
    pipe.register_to_config(seed=5)
    assert pipe(image).anomaly_score != before


def test_a_generator_draws_image_after_image(pipe):
    batch = images(3)
    first = pipe(batch, generator=torch.Generator().manual_seed(4), batch_size=3).anomaly_score
    np.testing.assert_allclose(
        pipe(batch, generator=torch.Generator().manual_seed(4), batch_size=1).anomaly_score, first, atol=1e-6
    )
    assert (pipe(batch, generator=torch.Generator().manual_seed(5)).anomaly_score != first).all()


def test_a_generator_of_the_configured_seed_gives_the_default_noise(pipe):
    image = images(1)
    seeded = pipe(image, generator=torch.Generator().manual_seed(pipe.config.seed)).anomaly_score
    np.testing.assert_allclose(seeded, pipe(image).anomaly_score, atol=1e-6)


def test_given_noise_is_used_small_scale_first(pipe):
    x, noise = torch.rand(2, 3, 32, 32), torch.randn(2, 2, 3, 32, 32)
    steps = pipe(x, noise=noise, return_intermediates=True).intermediates
    for i, (scale, t) in enumerate((("small", 200), ("big", 400))):
        torch.testing.assert_close(
            steps[f"noised_{scale}"], pipe.scheduler.add_noise(x, noise[i], torch.full((2,), t))
        )


def test_noise_averaging_is_the_mean_of_single_draws(pipe):
    image, generator = images(1), torch.Generator().manual_seed(pipe.config.seed)
    draws = [torch.randn(2, 1, 3, 32, 32, generator=generator) for _ in range(2)]
    size = image[0].size[::-1]
    singles = [pipe(image, noise=noise).anomaly_map[0] for noise in draws]
    averaged = pipe(image, num_noises=2).anomaly_map[0]
    assert averaged.shape == size
    np.testing.assert_allclose(averaged, np.mean(singles, axis=0), atol=1e-5)


# ---- output ---------------------------------------------------------------------------------------------------------


def test_maps_and_reconstructions_have_each_images_own_size(pipe):
    batch = images(4)
    output = pipe(batch)
    assert isinstance(output, DiffusionADPipelineOutput)
    for image, anomaly_map, reconstruction in zip(batch, output.anomaly_map, output.reconstruction, strict=True):
        assert anomaly_map.shape == image.size[::-1] and anomaly_map.dtype == np.float32
        assert 0 <= anomaly_map.min() and anomaly_map.max() <= 1
        assert reconstruction.shape == (*image.size[::-1], 3)
        assert 0 <= reconstruction.min() and reconstruction.max() <= 1


def test_the_score_is_the_mean_of_the_largest_map_values(pipe):
    output = pipe(torch.rand(1, 3, 32, 32), return_intermediates=True)
    values = np.sort(output.intermediates["probability"].numpy().ravel())
    assert output.anomaly_score[0] == pytest.approx(values[-50:].mean(), abs=1e-6)


def test_output_types_agree(pipe):
    image = images(1)
    arrays, tensors, pictures = (pipe(image, output_type=kind) for kind in ("np", "pt", "pil"))
    np.testing.assert_array_equal(tensors.anomaly_map[0].numpy(), arrays.anomaly_map[0])
    np.testing.assert_array_equal(tensors.reconstruction[0].permute(1, 2, 0).numpy(), arrays.reconstruction[0])
    assert pictures.anomaly_map[0].mode == "L" and pictures.reconstruction[0].mode == "RGB"
    assert np.abs(np.asarray(pictures.anomaly_map[0]) / 255 - arrays.anomaly_map[0]).max() < 0.003


def test_a_tuple_on_request(pipe):
    image = images(1)
    maps, scores, reconstructions = pipe(image, return_dict=False)
    assert scores == pipe(image).anomaly_score and len(maps) == len(reconstructions) == 1


def test_batches_of_arrays_and_tensors_are_images(pipe):
    tensor = torch.rand(3, 3, 32, 32)
    from_tensor = pipe(tensor).anomaly_score
    from_array = pipe(tensor.permute(0, 2, 3, 1).numpy()).anomaly_score
    from_list = pipe([tensor[0], tensor[1].permute(1, 2, 0).numpy(), tensor[2]]).anomaly_score
    np.testing.assert_allclose(from_array, from_tensor, atol=1e-6)
    np.testing.assert_allclose(from_list, from_tensor, atol=1e-6)


def test_no_gradients_are_kept(pipe):
    output = pipe(torch.rand(1, 3, 32, 32), output_type="pt", return_intermediates=True)
    assert not output.anomaly_map[0].requires_grad and not output.intermediates["reconstruction"].requires_grad


def test_a_pipeline_of_networks_in_training_mode_evaluates():
    pipe = make_pipeline()
    pipe = DiffusionADPipeline(pipe.unet.train(), pipe.segmenter.train(), pipe.scheduler)
    batch = torch.rand(2, 3, 32, 32)
    assert pipe(batch).anomaly_score[0] == pytest.approx(pipe(batch[:1]).anomaly_score[0], abs=1e-6)


def test_a_progress_bar_over_batches_only(capsys):
    pipe = make_pipeline()
    pipe.set_progress_bar_config(disable=False)
    pipe(torch.rand(1, 3, 32, 32))
    assert capsys.readouterr().err == ""
    pipe(torch.rand(3, 3, 32, 32), batch_size=1)
    assert "3/3" in capsys.readouterr().err


# ---- arguments ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, reason",
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"num_noises": 0}, "num_noises=0"),
        ({"small_timestep": 500}, "small_timestep=500"),
        ({"big_timestep": 1000}, "big_timestep=1000"),
        ({"output_type": "jpg"}, 'output_type="jpg"'),
        ({"noise": torch.zeros(2, 1, 3, 64, 64)}, r"noise: has shape .*\(2, 1, 3, 32, 32\)"),
        ({"noise": torch.zeros(2, 1, 3, 32, 32), "num_noises": 2}, "noise: give it alone"),
    ],
)
def test_nonsense_arguments_are_named(pipe, arguments, reason):
    with pytest.raises(ValueError, match=reason):
        pipe(torch.rand(1, 3, 32, 32), **arguments)


def test_an_empty_list_is_refused(pipe):
    with pytest.raises(ValueError, match="list is empty"):
        pipe([])


def test_timesteps_and_guidance_of_a_call_replace_the_configured_ones():
    image, pipe = torch.rand(1, 3, 32, 32), make_pipeline()
    called = pipe(image, small_timestep=100, big_timestep=700, guidance_weight=0.2).anomaly_score
    pipe.scheduler.register_to_config(small_timestep=100, big_timestep=700, guidance_weight=0.2)
    assert called == pipe(image).anomaly_score


# ---- verdicts -------------------------------------------------------------------------------------------------------


def test_without_calibration_there_is_no_verdict(pipe):
    output = pipe(torch.rand(1, 3, 32, 32))
    assert pipe.threshold is None and output.is_anomalous is None and output.p_value is None


def test_verdict_and_p_value_agree_for_every_score():
    scores = np.random.default_rng(0).random(57).tolist()
    tried = np.concatenate([scores, np.random.default_rng(1).random(500)])
    for alpha in (0.02, 0.05, 0.1, 0.25):
        threshold = conformal_threshold(scores, alpha)
        np.testing.assert_array_equal(tried > threshold, conformal_p_value(scores, tried) <= alpha)


def test_p_value_follows_its_definition():
    scores = [0.3, 0.1, 0.2, 0.2]
    assert conformal_p_value(scores, 0.2) == pytest.approx((1 + 3) / 5)
    assert conformal_p_value(scores, 0.35) == pytest.approx(1 / 5)
    assert conformal_p_value(scores, 0.0) == 1


def test_the_promised_false_alarm_rate_holds_on_average():
    rng = np.random.default_rng(0)
    rates = [np.mean(rng.normal(size=200) > conformal_threshold(rng.normal(size=39), 0.1)) for _ in range(2000)]
    assert np.mean(rates) == pytest.approx(0.1, abs=0.005)


@pytest.mark.parametrize("n, alpha, k", [(19, 0.05, 1), (99, 0.07, 7), (199, 0.05, 10)])
def test_the_threshold_is_the_right_order_statistic_despite_rounding(n, alpha, k):
    assert conformal_threshold(np.arange(n), alpha) == n - k


def test_too_few_scores_promise_nothing():
    assert conformal_threshold([0.1] * 18, 0.05) == float("inf")


def test_verdicts_of_a_calibrated_pipeline(model_dir):
    pipe = DiffusionADPipeline.from_pretrained(model_dir)
    scores = pipe.config.calibration_scores
    output = pipe(images(6))
    np.testing.assert_array_equal(output.is_anomalous, output.anomaly_score > sorted(scores)[-1])
    np.testing.assert_allclose(output.p_value, conformal_p_value(scores, output.anomaly_score))


def test_a_threshold_of_ones_own_replaces_the_calibrated_one(model_dir):
    pipe = DiffusionADPipeline.from_pretrained(model_dir, threshold=0.0)
    output = pipe(torch.rand(1, 3, 32, 32))
    assert pipe.threshold == 0.0 and output.is_anomalous.all() and output.p_value is not None


# ---- types and devices ----------------------------------------------------------------------------------------------


def test_bfloat16_gives_nearly_the_same_scores(pipe):
    batch = images(3)
    half = make_pipeline().to(dtype=torch.bfloat16)
    assert half.unet.dtype == torch.bfloat16
    output = half(batch)
    assert output.anomaly_map[0].dtype == np.float32
    np.testing.assert_allclose(output.anomaly_score, pipe(batch).anomaly_score, atol=0.02)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_in_every_type_and_with_offload(pipe):
    batch = images(3)
    expected = pipe(batch).anomaly_score
    for dtype, tolerance in ((torch.float32, 1e-3), (torch.bfloat16, 0.02), (torch.float16, 0.02)):
        np.testing.assert_allclose(make_pipeline().to("cuda", dtype)(batch).anomaly_score, expected, atol=tolerance)
    offloaded = make_pipeline()
    offloaded.enable_model_cpu_offload()
    np.testing.assert_allclose(offloaded(batch).anomaly_score, expected, atol=1e-3)
    assert offloaded.unet.device.type == "cpu"


def test_the_signature_is_the_promised_one():
    parameters = inspect.signature(DiffusionADPipeline.__call__).parameters
    promised = ["image", "batch_size", "generator", "noise", "output_type", "return_dict"]
    assert [p for p in parameters if p in promised] == promised
    assert all(parameters[p].kind == inspect.Parameter.KEYWORD_ONLY for p in promised[1:])
