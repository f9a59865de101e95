"""What the page says must be what the model says; and what it hands out must hold what it promises."""

import csv
import html
import json
import math
import re
import shutil
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import gradio as gr
import numpy as np
import pytest
from PIL import Image

from diffusionad_hf import DiffusionADPipeline
from diffusionad_hf.export.exporting import export_pipeline
from diffusionad_hf.familiarity_diffusionad import Familiarity, describe, pixel_digest
from diffusionad_hf.images_diffusionad import load_image, resize_image
from diffusionad_hf.pipeline_diffusionad import conformal_threshold
from diffusionad_hf.space import models
from diffusionad_hf.space.actions import COPY, TRAINED_ON, calibrate_on, download, inspect_many, inspect_one
from diffusionad_hf.space.handlers import Handlers, batch_card, verdict_card
from diffusionad_hf.space.intake import LIMITS, Refusal, Settings, Upload, owner_of
from diffusionad_hf.space.models import Calibration, Model, ModelError, Models, Product, about, products
from diffusionad_hf.space.pieces import batch_table, compare, region_list, score_scale
from diffusionad_hf.space.views import load, p_words, promise_words, view
from tests.space.conftest import archive


def uploads(*paths):
    return [Upload(path.name, path) for path in paths]


def inspected(results, model, path, name="photo.png", settings=Settings()):  # noqa: B008
    return inspect_one(results, "anna", model, Upload(name, path), settings)[1]


def describe_at(model, photo):
    return describe(resize_image(load_image(photo), model.load().config.image_size))


def at(threshold):
    """A threshold set by hand."""
    return Calibration(own_threshold=threshold)


def batch_of(results, model, files, threshold=0.4):
    """The steps of a batch, the last of which is the batch."""
    return inspect_many(results, "anna", model, files, replace(model.calibration, own_threshold=threshold))


def record(folder, calibration):
    return json.loads(download(folder, "json", calibration, 0.5).read_text(encoding="utf-8"))


def picture(folder, kind, calibration, opacity=0.5):
    return Image.open(download(folder, kind, calibration, opacity))


def read_calibration(file, model):
    return Calibration.read(Upload(file.name, file), model)


def test_moving_the_threshold_redraws_without_the_model(results, model, parts):
    folder = inspected(results, model, parts[0])
    model.pipe = None
    low, high = view(folder, at(0.01)), view(folder, at(0.99))
    assert model.pipe is None
    assert low.overlay != high.overlay and low.overlay.read_bytes() != high.overlay.read_bytes()
    assert low.regions and not high.regions
    assert low.regions[0].box == (0, 0, 96, 96), "regions are in pixels of the photo, not of the page"
    assert [record(folder, at(threshold))["is_anomalous"] for threshold in (0.01, 0.99)] == [True, False]
    for step in range(10):
        view(folder, at(step / 20))
    assert len(list(folder.glob("view-*.jpg"))) <= 5, "old views do not pile up"


def test_no_defect_means_no_regions_no_outlines_and_an_empty_mask(results, model, parts):
    folder = inspected(results, model, parts[0])
    score, highest = load(folder).score, float(np.load(folder / "map.npy").max())
    between = (score + highest) / 2
    assert score < between < highest, "single pixels lie above this threshold, the image does not"
    assert view(folder, at(between)).regions == record(folder, at(between))["regions"] == []
    assert not np.any(picture(folder, "mask", at(between)))
    np.testing.assert_array_equal(picture(folder, "overlay", at(between), 0.0), Image.open(parts[0]), "only the photo")
    *_, batch = batch_of(results, model, uploads(parts[0]), between)
    assert batch.rows[0].cells[1:5:3] == ["normal", "0"]


@pytest.mark.parametrize("size", [(96, 96), (1500, 400), (20, 2000), (8, 8)])
def test_downloads_have_the_photo_s_size_and_agree_with_the_record(results, model, parts, tmp_path, size):
    photo = tmp_path / "in.png"
    Image.open(parts[0]).resize(size).save(photo)
    folder = inspected(results, model, photo, '<b>"x".png')
    threshold = float(np.median(np.load(folder / "map.npy")))
    mask, depth = (picture(folder, kind, at(threshold)) for kind in ("mask", "map"))
    assert picture(folder, "overlay", at(threshold)).size == mask.size == depth.size == size
    assert set(np.unique(mask)) <= {0, 255} and depth.mode == "I;16"
    found = record(folder, at(threshold))
    assert (found["width"], found["height"]) == size and found["threshold"] == threshold
    for region in found["regions"]:
        x0, y0, x1, y1 = region["box"]
        assert 0 <= x0 < x1 <= size[0] and 0 <= y0 < y1 <= size[1]
    if min(size) > 50:
        # The 16-bit map holds the model's values: those above the threshold are the mask's.
        share = (np.asarray(depth) >= threshold * 65535).mean()
        assert abs(share - (np.asarray(mask) > 0).mean()) < 0.02


def test_the_report_is_one_page_escapes_names_and_warns_of_unfamiliar_photos(results, model, parts, white):
    name = "<script>alert(1)</script>.png"
    unknown = replace(model.calibration, familiarity=None)
    for photo, calibration, warned in (
        (white, model.calibration, True),
        (parts[0], model.calibration, False),
        (white, unknown, False),
    ):
        folder = inspected(results, model, photo, name)
        page = download(folder, "report", calibration, 0.5).read_text(encoding="utf-8")
        assert ("<h1>Undecided: unlike any normal image" in page) == warned
        assert "<script>alert" not in page and html.escape(name) in page
        assert page.count("data:image/webp;base64,") == 1 and "://" not in page
        assert warned or "Anomalous: defect found" in page or "Normal: no defect found" in page


def test_other_settings_change_the_score_drop_the_p_value_and_leave_the_model_as_it_was(results, model, parts):
    changed = Settings(seed=5, num_noises=2, resolution=96)
    usual, other, again = (
        load(inspected(results, model, parts[0], settings=settings)) for settings in (Settings(), changed, Settings())
    )
    assert other.score != usual.score and other.p_value(model.calibration) is None
    assert other.verdict(model.calibration).reason == "settings_changed"
    assert again.score == usual.score
    for unknown in (Settings(small_timestep=500), Settings(big_timestep=1000)):
        with pytest.raises(Refusal, match="Timesteps"):
            inspected(results, model, parts[0], settings=unknown)


def test_another_resolution_keeps_the_shape_of_a_model_that_is_not_square(results, model, parts, tmp_path):
    pipe = DiffusionADPipeline.from_pretrained(model.source, image_size=(32, 128))
    pipe.save_pretrained(tmp_path / "long")
    long = Models(str(tmp_path)).get("long")
    assert models._size(Settings(), long.load()) == [32, 128]
    assert models._size(Settings(resolution=128), long.load()) == [64, 256]
    assert inspected(results, long, parts[0], settings=Settings(resolution=128))
    assert "Inspects at 128 × 32 px." in models.about(Models(str(tmp_path)), "long")


def test_models_are_found_in_folders_and_missing_ones_are_named(checkpoints, tmp_path, caplog):
    assert Models(str(tmp_path)).names == [] and f"{tmp_path}: holds no model" in caplog.text
    found = Models(f" {checkpoints} , {tmp_path / 'nothing'},{tmp_path}")
    assert found.names == ["flange"]
    for name in ("other", "", None, "../flange"):
        with pytest.raises(ModelError, match="There are: flange"):
            found.get(name)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "model_index.json").write_text("{}")
    with pytest.raises(ModelError, match="broken: this model could not be loaded") as caught:
        Models(str(tmp_path)).get("broken")
    assert str(tmp_path) not in str(caught.value)


def test_only_the_models_used_last_stay_loaded(checkpoints, fragile, monkeypatch):
    monkeypatch.setattr(models, "MOST_LOADED", 1)
    both = Models(f"{checkpoints},{fragile}")
    for first, second in (("flange", "fragile"), ("fragile", "flange")):
        assert both.get(first).pipe and both.get(second).pipe and both.models[first].pipe is None


def test_an_exported_model_serves_like_the_original(model, tmp_path, parts, results):
    pytest.importorskip("openvino")
    export_pipeline(DiffusionADPipeline.from_pretrained(model.source), tmp_path / "fast")
    exported = Models(str(tmp_path)).get("fast")
    ours, theirs = (load(inspected(results, m, parts[0])) for m in (exported, model))
    assert ours.score == pytest.approx(theirs.score, abs=1e-3)
    assert exported.calibration.threshold == model.calibration.threshold
    with pytest.raises(Refusal, match="fixed in this category's model: leave them empty"):
        inspected(results, exported, parts[0], settings=Settings(resolution=128))


def test_a_damaged_description_of_normal_images_costs_the_warning_not_the_model(checkpoints, tmp_path, parts, caplog):
    shutil.copytree(checkpoints / "flange", tmp_path / "flange", ignore=shutil.ignore_patterns("README.md"))
    index = tmp_path / "flange" / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "familiarity": None}))
    # Where earlier versions kept it.
    (tmp_path / "flange" / "familiarity.json").write_text('{"limit": 5, "grids": ["AAAA"]}')
    damaged = Models(str(tmp_path))
    calibration = damaged.get("flange").calibration
    assert calibration.scores and calibration.familiarity is None
    told = about(damaged, "flange")
    assert "It cannot tell photos of something else" in told and "familiarity.json" in caplog.text
    assert told.endswith("nothing is known of its accuracy.")


def test_a_batch_has_a_row_for_every_file_sorted_with_the_unusable_last(results, model, parts, tmp_path, notes, white):
    packed = [("deep/down/part.png", parts[2].read_bytes()), ("deep/down/part.jpg", parts[3].read_bytes())]
    more = archive(tmp_path / "more.zip", packed)
    files = [Upload("x;=cmd()|a.png", parts[0]), *uploads(notes, more, white)]
    *steps, batch = batch_of(results, model, files)
    assert steps == [(0, 5), (5, 5)]
    failure = batch.rows[-1].record
    assert failure["name"] == "notes.txt" and "Not an image" in failure["error"]
    scores = [row.record["anomaly_score"] for row in batch.rows[:-1]]
    assert scores == sorted(scores, reverse=True)
    assert sum(batch.counts.values()) == 5 and batch.counts["Not inspected"] == 1
    assert {row.cells[0]: row.cells[-1] for row in batch.rows}[
        "white.png"
    ] == "Unlike any normal image the model knows. Another object, position, distance, light or focus?"
    lines = batch.table.read_text(encoding="utf-8-sig").splitlines()
    assert all(line[0] == line[-1] == '"' and line.count('","') == 7 for line in lines), "every field is quoted"
    rows = list(csv.DictReader(lines))
    assert {row["File"] for row in rows} == {"x;'=cmd()|a.png", "part.png", "part.jpg", "notes.txt", "white.png"}
    with zipfile.ZipFile(batch.archive) as bundle:
        assert bundle.testzip() is None
        names = bundle.namelist()
        records = json.loads(bundle.read("results.json"))
    assert len(names) == len(set(names)) == 3 + 4 * 3, "`part.png` and `part.jpg` do not share their pictures"
    assert {"report.csv", "report.html", "results.json", "overlays/part-overlay.jpg", "masks/white-mask.png"} <= set(
        names
    )
    score = load(inspected(results, model, parts[2])).score
    assert {r["name"]: r.get("anomaly_score") for r in records}["part.png"] == pytest.approx(score, abs=1e-5)


def test_a_model_that_runs_keeps_only_other_runs_waiting(checkpoints, results, parts, monkeypatch):
    """Its category can be chosen, its card read, and thresholds moved meanwhile."""
    offered = Models(str(checkpoints))
    model, running, go_on = offered.get("flange"), threading.Event(), threading.Event()
    folder, call = inspected(results, model, parts[0]), models._call

    def slow(*args):
        running.set()
        assert go_on.wait(60)
        return call(*args)

    monkeypatch.setattr(models, "_call", slow)
    with ThreadPoolExecutor(2) as pool:
        run = pool.submit(inspected, results, model, parts[1])
        assert running.wait(60)
        meanwhile = pool.submit(lambda: (offered.get("flange"), about(offered, "flange"), view(folder, at(0.1))))
        assert meanwhile.result(30)[0] is model and not run.done()
        go_on.set()
        assert run.result(60)


def test_large_images_leave_fewer_noise_draws(model, results, parts):
    with pytest.raises(Refusal, match="16 noise draws at 512 x 512 px take too long: at most 4 at that size"):
        inspected(results, model, parts[0], settings=Settings(num_noises=16, resolution=512))
    assert inspected(results, model, parts[0], settings=Settings(num_noises=16))


def test_what_a_batch_does_not_reach_in_time_is_a_row(results, model, parts, monkeypatch):
    monkeypatch.setattr("diffusionad_hf.space.actions.LIMITS", replace(LIMITS, batch_seconds=0))
    *_, batch = batch_of(results, model, uploads(*parts[:3]))
    assert len(batch.rows) == 3 and all("Not reached in 0 minutes" in row.record["error"] for row in batch.rows)


def test_a_download_is_drawn_once_and_one_of_each_kind_is_kept(results, model, parts):
    folder = inspected(results, model, parts[0])
    first = download(folder, "overlay", at(0.3), 0.5)
    drawn = first.stat().st_mtime_ns
    assert download(folder, "overlay", at(0.3), 0.5) == first and first.stat().st_mtime_ns == drawn
    other = download(folder, "overlay", at(0.4), 0.5)
    assert other != first and not first.exists() and other.name == first.name
    assert other.read_bytes() != download(folder, "mask", at(0.4), 0.5).read_bytes() and other.exists()


def test_unpacked_files_do_not_outlive_the_batch(results, model, parts, tmp_path):
    steps = batch_of(results, model, uploads(archive(tmp_path / "a.zip", [("a.png", parts[0].read_bytes())])))
    next(steps)
    assert list(results.folder.glob("tmp*"))
    steps.close()  # the visitor has left
    assert not list(results.folder.glob("tmp*"))


def test_an_image_that_breaks_the_model_is_one_row_and_it_works_again(results, model, parts, white, monkeypatch):
    def fragile(pipe, images, settings):
        if any(image.min() == image.max() for image in images):
            raise RuntimeError("broken")
        return call(pipe, images, settings)

    call = models._call
    monkeypatch.setattr(models, "_call", fragile)
    *_, batch = batch_of(results, model, uploads(parts[0], white, parts[1]))
    assert [row.record["name"] for row in batch.rows if not row.pictures] == ["white.png"] and len(batch.rows) == 3


def test_calibration_is_split_conformal_on_the_given_images_and_travels_as_a_file(results, model, parts, notes):
    *steps, done = calibrate_on(results, "anna", model, uploads(*parts, notes), 0.1)
    assert steps == [(8, 13), (13, 13)]
    scores = sorted(float(s) for s in model.pipe(parts).anomaly_score)
    np.testing.assert_allclose(done.calibration.scores, scores, atol=1e-5)
    assert done.calibration.threshold == conformal_threshold(done.calibration.scores, 0.1)
    assert [reason.split(":")[0] for reason in done.unusable] == ["notes.txt"]
    assert done.calibration.yours and done.calibration.familiarity is not None
    loaded = read_calibration(done.file, model)
    assert loaded.scores == done.calibration.scores and loaded.threshold == done.calibration.threshold
    assert loaded.familiarity.limit == done.calibration.familiarity.limit
    np.testing.assert_array_equal(loaded.familiarity.grids, done.calibration.familiarity.grids)
    result = load(inspected(results, model, parts[0]))
    assert result.p_value(loaded) == loaded.p_value(result.score)
    other = Models(model.source).get("flange")
    other.name = "other"
    with pytest.raises(Refusal, match="belongs to flange"):
        read_calibration(done.file, other)
    other.name = "flange"
    next(other.pipe.segmenter.parameters()).data += 1
    with pytest.raises(Refusal, match="model has changed"):
        read_calibration(done.file, other)
    edited = json.loads(done.file.read_text())
    done.file.write_text(json.dumps({**edited, "scores": [score / 2 for score in edited["scores"]]}))
    with pytest.raises(Refusal, match="damaged or edited"):
        read_calibration(done.file, model)


def test_too_few_images_are_refused_and_too_low_a_rate_is_the_lowest_they_can_promise(results, model, parts):
    files = uploads(*parts)
    with pytest.raises(Refusal, match="9 usable images; a calibration takes 10"):
        list(calibrate_on(results, "anna", model, files[:9], 0.1))
    *_, done = calibrate_on(results, "anna", model, files, 0.01)
    assert math.isfinite(done.calibration.threshold) and done.calibration.false_alarm_rate == 1 / 13
    assert "About 7.69 %" in promise_words(done.calibration)


def test_a_calibration_of_a_product_with_a_long_name_is_a_file(results, checkpoints, parts):
    *_, done = calibrate_on(
        results, "anna", Model("\U0001f600" * 60, str(checkpoints / "flange")), uploads(*parts), 0.1
    )
    assert done.file.is_file() and len(done.file.name.encode()) < 256


def test_a_key_of_something_else_than_an_inspection_is_refused_in_a_line(results, checkpoints):
    request = SimpleNamespace(session_hash="anna")
    key, _ = results.new(owner_of(request))
    said, *_ = Handlers(results, Models(str(checkpoints))).threshold(key, 0.5, 0.6, 5, {}, request)
    assert "no longer kept" in said


def test_photos_the_model_was_trained_on_are_unusable_for_calibration(results, model, parts):
    pipe = model.load()
    seen = pixel_digest(resize_image(load_image(parts[0]), pipe.config.image_size))
    pipe.register_to_config(training_digests=seen)
    *_, done = calibrate_on(results, "anna", model, uploads(*parts), 0.1)
    assert len(done.calibration.scores) == 11 and done.unusable == [f"{parts[0].name}: {TRAINED_ON}"]


def test_a_copy_of_a_photo_counts_once_in_a_calibration(results, model, parts, tmp_path):
    content = [(f"{folder}/{part.name}", part.read_bytes()) for folder in ("a", "b") for part in parts[:9]]
    with pytest.raises(Refusal, match=f"9 usable images.*: {COPY}"):
        list(calibrate_on(results, "anna", model, uploads(archive(tmp_path / "a.zip", content)), 0.1))


def test_pictures_in_an_archive_have_names_that_every_file_system_takes(results, model, parts, tmp_path):
    content = [(f"{sign * 119}{i}.png", parts[0].read_bytes()) for sign in "件" for i in (1, 2)]
    *_, batch = batch_of(results, model, uploads(archive(tmp_path / "a.zip", content)))
    with zipfile.ZipFile(batch.archive) as bundle:
        bundle.extractall(tmp_path / "unpacked")
    assert len([path for path in (tmp_path / "unpacked").rglob("*.*") if path.parent.name == "overlays"]) == 2


def test_what_nothing_supports_is_undecided_in_the_record_the_report_and_a_batch(results, model, parts, white):
    """Before, a rate that 12 photos cannot promise moved the threshold to 1: green for everything."""
    unpromised, unlearnt, saturated = (
        replace(model.calibration, **change)
        for change in ({"false_alarm_rate": 0.001}, {"has_learnt": False}, {"scores": (0.1,) * 11 + (1.0,)})
    )
    for photo, calibration, reason in (
        (parts[0], unpromised, "rate_not_promised"),
        (parts[0], unlearnt, "not_learnt"),
        (parts[0], replace(saturated, false_alarm_rate=0.08), "no_difference"),
        (parts[0], Calibration(), "not_calibrated"),
        (white, model.calibration, "unfamiliar"),
        (white, replace(model.calibration, own_threshold=0.99), "unfamiliar"),
    ):
        folder = inspected(results, model, photo)
        found = record(folder, calibration)
        assert (found["verdict"], found["reason"], found["is_anomalous"]) == ("undecided", reason, None)
        page, card = (
            download(folder, "report", calibration, 0.5).read_text(encoding="utf-8"),
            verdict_card(folder, calibration),
        )
        assert "<h1>Undecided: " in page and 'class="card undecided"' in card and "<h2>Undecided: " in card
        assert "✓" not in card and "✕" not in card
        *_, batch = inspect_many(results, "anna", model, uploads(photo), calibration)
        assert batch.counts == {"undecided": 1}
        assert "<b>undecided</b>" in batch_table(batch.rows)
        assert "<strong>1</strong> undecided</label>" in batch_card(batch)


def test_a_model_saved_with_other_settings_than_calibrated_is_undecided_until_calibrated_anew(
    results, checkpoints, parts, tmp_path
):
    larger = DiffusionADPipeline.from_pretrained(checkpoints / "flange", image_size=96)
    larger.save_pretrained(tmp_path / "larger")
    model = Models(str(tmp_path / "larger")).get("larger")
    folder = inspected(results, model, parts[0])
    found = record(folder, model.calibration)
    assert (found["verdict"], found["reason"], found["p_value"]) == ("undecided", "settings_changed", None)
    *_, batch = inspect_many(results, "anna", model, uploads(*parts[:2]), model.calibration)
    assert batch.counts == {"undecided": 2} and "Other settings" in batch_card(batch)
    *_, done = calibrate_on(results, "anna", model, uploads(*parts), 0.1)
    assert record(folder, done.calibration)["reason"] == "calibrated"


def test_a_model_that_has_not_learnt_gives_no_verdicts_with_a_calibration_of_ones_own_either(
    results, checkpoints, parts, tmp_path
):
    pipe = DiffusionADPipeline.from_pretrained(checkpoints / "flange")
    pipe.register_to_config(has_learnt=False)
    pipe.save_pretrained(tmp_path / "dull")
    model = Models(str(tmp_path / "dull")).get("dull")
    folder = inspected(results, model, parts[0])
    *_, done = calibrate_on(results, "anna", model, uploads(*parts), 0.1)
    for calibration in (model.calibration, done.calibration, read_calibration(done.file, model)):
        for moved in (calibration, calibration.moved(0.7, 10)):
            assert record(folder, moved)["reason"] == "not_learnt"


def test_a_threshold_moved_by_hand_or_a_new_calibration_changes_the_sentence_and_the_p_value(results, model, parts):
    folder, usual = inspected(results, model, parts[0]), model.calibration
    assert "Calibrated on 12 normal images for a false-alarm rate of 10 %" in verdict_card(folder, usual)
    moved = verdict_card(folder, usual.moved(0.7, 10))
    assert f"At your threshold 0.7; calibrated: {usual.threshold:.4g}." in moved
    yours = replace(usual, scores=usual.scores[:11], yours=True)
    yours = replace(yours, scores=(0.0, *yours.scores[1:]))
    said, score = verdict_card(folder, yours), load(folder).score
    assert "11 normal images for" in said and "of the 11 normal" in said
    assert f"(p = {yours.p_value(score):.2g})" in said
    # Where the page itself puts its controls, the calibration decides, to the last digit.
    for calibration in (usual, replace(usual, false_alarm_rate=1 / 13), replace(usual, false_alarm_rate=0.001)):
        assert calibration.moved(round(calibration.shown_threshold, 4), calibration.shown_rate) == calibration
    assert usual.moved(1.0, 0.1).verdict(0).reason == "rate_not_promised"


def test_a_product_is_what_its_card_and_its_folder_say(tried, tmp_path, checkpoints):
    brass, steel = products(Models(str(tried)))
    assert (steel.title, steel.facts) == ("Flange", "image AUROC 0.875 · rendered images, CC BY-SA 4.0")
    assert steel.source == "a workshop, CC BY-SA 4.0"
    assert [(e.label, e.is_good) for e in steel.examples] == [("good", True), ("good", True), ("deep scratch", False)]
    assert brass == Product("brass", "brass", "no card", "", brass.examples) and len(brass.examples) == 3
    shutil.copytree(checkpoints / "flange", tmp_path / "odd")
    for card in ("---\n- 1\n---\n", "---\nx: [\n---\n", "---\ndata_origin: [1]\ncategory: {a: 1}\n---\n", "\x00", ""):
        (tmp_path / "odd" / "README.md").write_text(card)
        (odd,) = products(Models(str(tmp_path)))
        assert odd.name == "odd" and "AUROC" not in odd.facts


@pytest.mark.parametrize(
    "evaluation, shown",
    [
        ('{"image_auroc": 0.875, "intervals": {"image_auroc": [0.61, 0.97]}}', "0.88 [0.61, 0.97]"),
        ('{"image_auroc": 0.9, "intervals": {"image_auroc": [0.61, 0.97]}}', "0.875"),  # of another model
        ('{"image_auroc": 0.875, "intervals": {"image_auroc": ["low"]}}', "0.875"),
        ('{"image_auroc": {}}', "0.875"),
        ("[1]", "0.875"),
        ("{", "0.875"),
    ],
)
def test_what_was_measured_is_shown_with_its_interval(evaluation, shown, tmp_path, checkpoints):
    folder = shutil.copytree(checkpoints / "flange", tmp_path / "flange")
    (folder / "evaluation.json").write_text(evaluation)
    models = Models(str(tmp_path))
    (product,) = products(models)
    assert product.facts.startswith(f"image AUROC {shown} · rendered")
    assert f"| image AUROC | {shown} | flanges |" in about(models, "flange")


def test_a_hub_that_does_not_answer_keeps_no_one_waiting(checkpoints, monkeypatch):
    answered = threading.Event()
    monkeypatch.setattr(models, "_HUB_SECONDS", 0.2)
    monkeypatch.setattr(models, "hf_hub_download", lambda *_: answered.wait(60))
    monkeypatch.setattr(models, "snapshot_download", lambda *_, **__: answered.wait(60))
    here, there = products(Models(f"{checkpoints},no-one/no-such-model"))
    answered.set()
    assert here.title == "Flange" and there.facts == "the Hub did not answer"


def test_a_photo_of_another_shape_is_not_squeezed_and_it_is_said_what_was_seen(results, model, parts, tmp_path):
    part = Image.open(parts[0])
    wide = Image.new("RGB", (144, 96), part.getpixel((2, 2)))
    wide.paste(part, (24, 0))
    wide.save(tmp_path / "wide.png")
    folder = inspected(results, model, tmp_path / "wide.png")
    found, alone = load(folder), load(inspected(results, model, parts[0]))
    assert found.score == pytest.approx(alone.score, abs=1e-5) and found.size == (144, 96)
    assert "only the middle, 96 × 96 px" in found.note
    assert found.note in verdict_card(folder, model.calibration) and found.note == record(folder, at(0.1))["note"]
    # What was not looked at may hold a defect.
    assert record(folder, at(0.99))["verdict"] == "undecided" and record(folder, at(0.01))["verdict"] == "anomalous"
    mask = np.asarray(picture(folder, "mask", at(0.01)))
    assert mask.shape == (96, 144) and mask.any() and not mask[:, :20].any() and not mask[:, -20:].any()
    # Where the model knows photos that were squeezed, so is this one.
    squeezed = [np.asarray(wide)] * 5
    model.calibration = replace(
        model.calibration, familiarity=Familiarity.of([describe_at(model, p) for p in squeezed])
    )
    assert load(inspected(results, model, tmp_path / "wide.png")).note == ""


def test_of_several_frames_it_is_said_that_only_the_first_was_inspected(results, model, parts, tmp_path):
    first, second = Image.open(parts[0]), Image.open(parts[1])
    first.save(tmp_path / "two.tiff", save_all=True, append_images=[second])
    assert "only the first one" in load(inspected(results, model, tmp_path / "two.tiff")).note
    *_, batch = batch_of(results, model, uploads(tmp_path / "two.tiff"))
    assert "only the first one" in batch.rows[0].cells[-1]


def test_the_scale_counts_the_normal_photos_above_the_threshold_and_marks_this_one(results, model, parts):
    result, scores = load(inspected(results, model, parts[0])), model.calibration.scores
    threshold = (scores[-3] + scores[-2]) / 2
    shown = score_scale(result, replace(model.calibration, own_threshold=threshold))
    assert f"2 of the {len(scores)} normal photos" in shown and f"this photo {result.score:.3f}" in shown
    assert "No normal photos to compare with" in score_scale(result, Calibration())


@pytest.mark.parametrize("scores", [[0.2, 0.412, 0.82001], [0.2, 0.412, 0.8399]])
def test_the_scale_shows_no_photo_above_the_threshold_that_the_highest_one_sets(scores, results, model, parts):
    result = load(inspected(results, model, parts[0]))
    highest = Calibration(scores=tuple(scores), own_threshold=scores[-1])
    assert "0 of the 3 normal photos" in (shown := score_scale(result, highest))
    assert "beyond" not in shown and shown.count('class="within"') == 3
    # Two in one bar, one of them above.
    both = score_scale(result, Calibration(scores=(0.2, 0.412, 0.413), own_threshold=0.412))
    rects = re.findall(r'<rect class="(\w+)" x="(\d+)" width="0.9" y="([\d.]+)" height="([\d.]+)"', both)
    assert rects == [
        ("within", "10", "50.0", "50.0"),
        ("within", "20", "50.0", "50.0"),
        ("beyond", "20", "0.0", "50.0"),
    ]


def test_pictures_and_regions_are_safe_and_stay_within_the_photo(results, model, parts):
    folder = inspected(results, model, parts[0], name='"><script>.png')
    result, shown = load(folder), view(folder, at(0.01))
    pictures = compare(result, shown, "photo.jpg", "overlay.jpg")
    assert "<script" not in pictures and "Anomaly map" in pictures and "1 region outlined" in pictures
    assert "most of the image" in region_list(result, shown, "overlay.jpg")
    assert region_list(result, view(folder, at(0.99)), "overlay.jpg") == ""


DAMAGED = '{{"format": "diffusionad-calibration", "category": "flange", "false_alarm_rate": {}, "scores": {}}}'


def test_other_files_are_not_taken_for_a_calibration(tmp_path, model):
    path, unfamiliar = tmp_path / "c.json", '[0.5], "familiarity": {"limit": 0}'
    wrong = [(0.1, "[]"), (0.1, "[NaN]"), (0.1, '["x"]'), (0.1, "5"), (7, "[0.5]"), (0.1, unfamiliar)]
    large = DAMAGED.format(0.1, "[0.5" + ", 0.5" * 1_200_000 + "]")
    nothing = ["", "[1, 2]", "{}", '{"format": "x"}', "\udcff\udcfe", "[" * 100_000, large]
    for content in (*nothing, *(DAMAGED.format(*values) for values in wrong)):
        path.write_bytes(content.encode(errors="surrogateescape"))
        with pytest.raises(Refusal, match="calibration file"):
            read_calibration(path, model)


def test_words_for_p_values_count_the_images():
    calibration = Calibration(tuple(i / 100 for i in range(1, 20)))
    words = [p_words(calibration.p_value(score), 19) for score in (0.9, 0.19, 0.0)]
    assert [text.split(" normal")[0] for text in words] == ["None of the 19", "1 of the 19", "19 of the 19"]
    assert words[0].endswith("(p = 0.05).") and Calibration().shown_threshold == 0.5


def test_the_photo_box_is_emptied_of_another_product_s_example_only(results, tried):
    models = Models(str(tried))
    on, request = Handlers(results, models, products(models)), SimpleNamespace(session_hash="anna")

    def inspected(photo):
        return on.inspect(request, photo, "steel", "", 0.5, 0.6, 5, {}, "", 1, "", "", "")

    assert "Example" in inspected(None)[0] and inspected(None)[-1] == gr.skip(), "one may be put there meanwhile"
    on.example_photos["elsewhere.png"] = "brass"
    assert inspected({"path": "elsewhere.png"})[-1] is None


def test_coming_back_draws_a_result_again_only_if_something_was_missed(results, checkpoints):
    on, request = Handlers(results, Models(str(checkpoints))), SimpleNamespace(session_hash="anna")
    key, _ = results.new(owner_of(request))
    moved = (key, 0.5, 0.6, 5, {}, request)
    assert on.redraw_missed(False, *moved) == (gr.skip(),) * 5
    done, verdict, *_ = on.redraw_missed(True, *moved)
    assert done is False and "no longer kept" in verdict


def test_the_examples_of_the_only_product_go_when_another_is_taught(results, tried):
    only = Models(str(tried / "steel"))
    on = Handlers(results, only, products(only))
    assert [on.examples(name)["visible"] for name in (only.names[0], "taught")] == [True, False]
