"""What is decided from timed steps: precision, batch, and the lines that say so."""

import pytest
import torch

from diffusionad_hf.training import plan as module
from diffusionad_hf.training.arguments import TrainingConfig
from diffusionad_hf.training.loop import start_processes
from diffusionad_hf.training.plan import Counts, Plan, probe


@pytest.fixture
def decided(monkeypatch):
    """Probes a device of which is known how long a step takes, how much slower bf16 products are, and what fits."""

    def decide(seconds, slower=1.0, fits=8, former=None, **options):
        asked = []

        def measure(args, train_set, synthesizer, device, precision, batch):
            asked.append((precision, batch))
            if batch > fits:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return seconds[precision], 0.1

        monkeypatch.setattr(module, "_measure", measure)
        monkeypatch.setattr(module, "_times_slower", lambda device, dtype: slower)
        monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
        start_processes()

        class Images:
            size = (64, 96)

        return probe(TrainingConfig(**options), Images(), None, former), asked

    return decide


@pytest.mark.parametrize(
    "bf16, slower, options, expected",
    [
        (0.5, 1.0, {}, "bf16"),
        (0.95, 1.0, {}, "no"),  # not worth being less exact
        (0.5, 48.0, {}, "no"),  # where a step might take minutes, none is tried
        (0.5, 1.0, {"mixed_precision": "no"}, "no"),
        (9.0, 48.0, {"mixed_precision": "bf16"}, "bf16"),  # as asked for, and said
    ],
)
def test_the_fastest_precision_is_taken_unless_asked(bf16, slower, options, expected, decided):
    plan, asked = decided({"no": 1.0, "bf16": bf16}, slower, **options)
    assert plan.mixed_precision == expected
    if slower > 3:
        assert len(asked) == 1 and "bfloat16 is 48 times slower here" in plan.remarks[0]


def test_a_batch_that_does_not_fit_is_split_into_as_many_passes(decided):
    plan, asked = decided({"no": 1.0, "bf16": 2.0}, fits=3, train_batch_size=8)
    assert (plan.train_batch_size, plan.gradient_accumulation_steps, plan.seconds_per_step) == (2, 4, 4.0)
    assert "2 photos at a time, as no more fit into the memory" in plan.remarks
    with pytest.raises(MemoryError, match="96 x 64 px does not fit .* `gradient_checkpointing`"):
        decided({"no": 1.0}, fits=0, train_batch_size=8)


def test_what_is_gone_on_with_keeps_its_precision_and_batch(decided):
    former = Plan("bf16", 2, 4)
    plan, asked = decided({"no": 1.0, "bf16": 3.0}, former=former)
    assert (plan.mixed_precision, plan.train_batch_size, plan.gradient_accumulation_steps) == ("bf16", 2, 4)
    assert asked == [("bf16", 2)]


@pytest.mark.parametrize(
    "photos, promise",
    [
        (
            13,
            "which promise a false-alarm rate of 14.3 % at best (5 % takes 38 photos); too few to show that it has "
            "learnt: all verdicts will be undecided, give 14 photos or more",
        ),
        (19, "which promise a false-alarm rate of 10 % at best (5 % takes 38 photos)"),
        (38, "which promise a false-alarm rate of 5 % at best"),
    ],
)
def test_the_plan_is_five_lines_and_promises_what_it_can_keep(photos, promise):
    start_processes()
    held_out = photos // 2
    plan, args = Plan("no", 8, 1, 2.0, 0.1), TrainingConfig()
    left = Counts(args, 2 * held_out, held_out, 0).seconds_left(plan, 0)
    device, preset, steps, promised, time = plan.lines(args, photos - held_out, held_out, (224, 288), left)
    assert preset == "Preset:  perceptual, 288 x 224 px, float32" and steps == "Steps:   100 of 8 photos, 2 s each"
    assert promised == f"Photos:  {photos - held_out} to train on, {held_out} held out, {promise}"
    assert device.startswith("Device:  ") and time == "Time:    about 3 minutes"
