"""One picture of a result: true for every shape of photo, in grey, and where the reconstruction is no good."""

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from diffusionad_hf import DiffusionADPipeline
from diffusionad_hf.figure import as_it_should_look, figure
from diffusionad_hf.files import bundled
from diffusionad_hf.images_diffusionad import to_uint8
from diffusionad_hf.verdicts_diffusionad import Verdict
from diffusionad_hf.visualization import find_regions, region_threshold

SENTENCES = {
    "normal": "Calibrated on 200 normal images for a false-alarm rate of 5 %.",
    "anomalous": "Calibrated on 200 normal images for a false-alarm rate of 5 %.",
    "undecided": "The model is not calibrated: nothing is known of false alarms.",
}


def verdict(word):
    return Verdict(word, "calibrated", SENTENCES[word])


def part(width=120, height=100, seed=0):
    """A photo with as much detail as a product has."""
    random = np.random.default_rng(seed).random((min(height, 400), min(width, 400)))
    smooth = ndimage.gaussian_filter(random, 1.5)
    light = to_uint8((smooth - smooth.min()) / max(np.ptp(smooth), 1e-9))
    return Image.fromarray(light).convert("RGB").resize((width, height))


def spot(width=120, height=100, value=0.9):
    anomaly_map = np.zeros((height, width), np.float32)
    anomaly_map[height // 4 : height // 2, width // 4 : width // 2] = value
    return anomaly_map


def drawn(word, photo=None, anomaly_map=None, **options):
    photo = part() if photo is None else photo
    anomaly_map = np.zeros(photo.size[::-1]) if anomaly_map is None else anomaly_map
    return np.asarray(figure(photo, anomaly_map, verdict(word), 0.4, **{"threshold": 0.3, **options}))


@pytest.mark.parametrize(
    "size", [(1, 1), (32, 32), (300, 200), (2048, 256), (256, 2048), (4000, 3), (3, 4000), (4000, 3000)]
)
def test_every_shape_of_photo(size):
    photo, anomaly_map = part(*size), spot(*size)
    for options in ({}, {"reconstruction": photo, "regions": find_regions(anomaly_map, 0.3)}):
        picture = figure(photo, anomaly_map, verdict("anomalous"), 1.0, threshold=0.3, p_value=0.004, **options)
        assert picture.mode == "RGB" and 580 <= picture.width <= 1130 and picture.height < 1100


def test_verdicts_differ_in_grey_and_undecided_is_grey():
    grey = {word: np.asarray(Image.fromarray(drawn(word)).convert("L"), int) for word in SENTENCES}
    marks = {word: pixels[20:57, 20:57] for word, pixels in grey.items()}
    for one, other in (("normal", "anomalous"), ("normal", "undecided"), ("anomalous", "undecided")):
        assert np.abs(marks[one] - marks[other]).mean() > 25
    for pixels in grey.values():
        bar = pixels[113]
        assert bar[60] - bar[-60] > 60, "below the threshold the bar is light, above it dark"
    head = drawn("undecided")[:160].astype(int)
    assert np.ptp(head, axis=2).max() < 30, "hardly any colour"


def test_a_normal_photo_gets_no_outline_an_undecided_or_anomalous_one_does():
    plain = drawn("normal", anomaly_map=spot())
    for word in ("anomalous", "undecided"):
        outlined = drawn(word, anomaly_map=spot())
        assert (outlined[190:, :380] != plain[190:, :380]).any()
    assert np.array_equal(plain[190:, :380], drawn("normal")[190:, :380])


def test_a_defect_of_one_pixel_on_a_large_scan_is_seen_in_the_map():
    anomaly_map = np.zeros((500, 8000), np.float32)
    anomaly_map[250, 4000] = 1
    picture = drawn("normal", Image.new("RGB", (8000, 500)), anomaly_map)
    assert (picture[200:] == picture[200:].max()).any() and (picture[:, :, 0] > 240)[260:330, 560:570].any()


def test_a_score_just_above_the_threshold_is_marked_beyond_the_middle_of_the_bar():
    for score, side in ((0.05, -1), (0.3, 0), (0.99, 1)):
        picture = np.asarray(figure(part(), spot(), verdict("anomalous"), score, threshold=0.3))
        marker = np.flatnonzero((picture[98] == (23, 32, 42)).all(axis=1)).mean()
        assert np.sign(round((marker - picture.shape[1] / 2) / 4)) == side


@pytest.mark.parametrize("threshold", [None, float("inf"), 0.0, 1.0])
def test_thresholds_that_are_none_and_extreme_ones(threshold):
    assert drawn("undecided", anomaly_map=spot(), threshold=threshold).size


@pytest.mark.parametrize(
    "anomaly_map, score, words",
    [
        (np.full((4, 4), np.nan), 0.1, "anomaly_map"),
        (np.zeros(4), 0.1, "anomaly_map"),
        (np.zeros((4, 4)), np.nan, "score"),
    ],
)
def test_what_cannot_be_drawn_is_named(anomaly_map, score, words):
    with pytest.raises(ValueError, match=words):
        figure(part(), anomaly_map, verdict("normal"), score)


def test_what_is_not_suspected_stays_the_photo_and_what_is_becomes_the_reconstruction():
    photo = part()
    reconstruction = part()
    reconstruction.paste((255, 0, 0), (0, 0, 120, 2))  # the coloured fringe of leftover noise
    reconstruction.paste((0, 0, 255), (30, 25, 60, 50))
    normal = np.asarray(as_it_should_look(photo, reconstruction, spot(), 0.3))
    assert (normal[27:48, 32:58] == (0, 0, 255)).all()
    away = np.ones(normal.shape[:2], bool)
    away[20:55, 25:65] = False
    assert np.array_equal(normal[away], np.asarray(photo)[away])


def test_a_reconstruction_that_misses_the_detail_is_not_shown():
    photo, anomaly_map = part(), spot()
    blurred = Image.fromarray(ndimage.gaussian_filter(np.asarray(photo), (4, 4, 0)))
    assert as_it_should_look(photo, photo, anomaly_map, 0.3) is not None
    assert as_it_should_look(photo, blurred, anomaly_map, 0.3) is None
    assert as_it_should_look(photo, part(seed=1), anomaly_map, 0.3) is None
    assert as_it_should_look(photo, photo, np.ones_like(anomaly_map), 0.3) is None, "nothing is known to be right"
    shown, left_out = (drawn("normal", reconstruction=picture) for picture in (photo, blurred))
    assert shown.shape[1] == 1130 and left_out.shape[1] == 760 and len(left_out) > len(shown)


def test_of_the_demo_part_engraving_and_edge_stay_and_a_scratch_goes():
    pipe = DiffusionADPipeline.from_pretrained(bundled("space/checkpoints/demo-part"))
    pipe.set_progress_bar_config(disable=True)
    files = [bundled(f"space/checkpoints/demo-part/examples/{name}.png") for name in ("good", "scratch")]
    found = pipe(files)
    for file, anomaly_map, reconstruction in zip(files, found.anomaly_map, found.reconstruction, strict=True):
        photo = Image.open(file).convert("RGB")
        threshold = region_threshold(pipe.threshold)
        normal = as_it_should_look(photo, Image.fromarray(to_uint8(reconstruction)), anomaly_map, threshold)
        changed = np.abs(np.asarray(normal, int) - np.asarray(photo)).max(axis=2)
        edge = changed.copy()
        edge[4:-4, 4:-4] = 0
        assert edge.max() == 0
        assert changed[anomaly_map >= threshold].mean() > 15 if file.stem == "scratch" else changed.max() < 10
