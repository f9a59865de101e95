"""Checkpoints of the paper's own code: the paper's own numbers, through the public path."""

import os
import pickle

import numpy as np
import pytest
import torch

from diffusionad_hf import DiffusionADPipeline
from diffusionad_hf.cli.main import main
from diffusionad_hf.convert import pipeline_from_checkpoint
from tests.reference import CONFIGURATIONS, FIXTURES, golden_inputs, reference_weights, write_reference_checkpoint


@pytest.fixture(scope="module", params=CONFIGURATIONS)
def converted(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    checkpoint = write_reference_checkpoint(folder / "params-last.pt", request.param)
    assert main(["convert", str(checkpoint), str(folder / "pipeline")]) == 0
    checkpoint.unlink()
    return request.param, DiffusionADPipeline.from_pretrained(folder / "pipeline")


def test_every_golden_tensor_is_reproduced(converted):
    configuration, pipe = converted
    x, noise = golden_inputs(configuration)
    output = pipe(x, noise=noise, return_intermediates=True)
    steps = output.intermediates
    with torch.no_grad():
        steps["eps"] = pipe.unet(x, 200).sample
    errors = [(steps[f"noise_pred_{scale}"] - noise[i]).square().mean() for i, scale in enumerate(("small", "big"))]
    steps |= {"score": torch.from_numpy(output.anomaly_score), "loss": sum(errors)}
    names = {
        "eps": "eps",
        "noised_small": "x_t_normal",
        "noised_big": "x_t_noisier",
        "pred_original_small": "x0_normal",
        "pred_original_big": "x0_noisier",
        "renoised": "x_t_from_noisier",
        "reconstruction": "guided",
        "probability": "mask",
        "score": "score",
        "loss": "loss",
    }
    golden = np.load(FIXTURES / "official_outputs.npz")
    assert {f"{configuration}.{name}" for name in names.values()} == {k for k in golden if k.startswith(configuration)}
    for ours, theirs in names.items():
        value = steps[ours].numpy()
        if configuration == "px256" and value.ndim == 4:
            value = value[:, :, ::4, ::4]
        np.testing.assert_allclose(value, golden[f"{configuration}.{theirs}"], atol=1e-4, rtol=0, err_msg=theirs)
    # The maps that users see are the probabilities themselves where no resizing is due.
    np.testing.assert_array_equal(np.stack(output.anomaly_map), steps["probability"][:, 0].numpy())


def test_the_training_arguments_become_configuration(tmp_path):
    path = write_reference_checkpoint(tmp_path / "params.pt", "px64")
    state = torch.load(path, weights_only=False)
    state["args"].update(eval_normal_t=150, eval_noisier_t=600, condition_w=0.5, less_t_range=250)
    torch.save(state, path)
    config = pipeline_from_checkpoint(path).scheduler.config
    assert (config.small_timestep, config.big_timestep) == (150, 600)
    assert (config.guidance_weight, config.timestep_boundary) == (0.5, 250)


def test_a_checkpoint_without_arguments_converts_with_the_papers(tmp_path):
    weights = {f"{n}_model_state_dict": reference_weights("px256", n) for n in ("unet", "seg")}
    torch.save(weights, tmp_path / "params.pt")
    pipe = pipeline_from_checkpoint(tmp_path / "params.pt")
    assert (pipe.config.image_size, pipe.scheduler.config.big_timestep) == (256, 400)


class Payload:
    """Runs a command when unpickled."""

    def __init__(self, proof):
        self.proof = proof

    def __reduce__(self):
        return os.system, (f"touch {self.proof}",)


@pytest.mark.parametrize("inside", ["args", "whole file", "weights"])
def test_a_malicious_pickle_is_refused_and_not_run(tmp_path, capsys, inside):
    proof, path = tmp_path / "executed", tmp_path / "params.pt"
    payload = Payload(proof)
    if inside == "whole file":
        path.write_bytes(pickle.dumps(payload))
    elif inside == "args":
        torch.save({"unet_model_state_dict": {}, "seg_model_state_dict": {}, "args": payload}, path)
    else:
        torch.save({"unet_model_state_dict": {"a": payload}, "seg_model_state_dict": {}}, path)
    assert main(["convert", str(path), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "params.pt" in error and error.count("\n") == 1
    assert not proof.exists() and not (tmp_path / "out").exists()


def damaged(tmp_path, kind):
    path = tmp_path / "params.pt"
    if kind == "missing":
        return path
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("hello")
    elif kind == "truncated":
        write_reference_checkpoint(path, "px64")
        path.write_bytes(path.read_bytes()[:100_000])
    elif kind == "other keys":
        torch.save({"model": {"a": torch.zeros(1)}}, path)
    elif kind == "a tensor":
        torch.save(torch.zeros(3), path)
    else:
        state = {f"{n}_model_state_dict": reference_weights("px64", n) for n in ("unet", "seg")}
        if kind == "tensor missing":
            del state["unet_model_state_dict"]["middle.1.proj_out.bias"]
        elif kind == "wrong shape":
            state["unet_model_state_dict"]["out.2.weight"] = torch.zeros(3, 32, 5, 5)
        elif kind == "one number repeated":
            state["unet_model_state_dict"]["out.2.weight"] = torch.zeros(1).expand(3, 2**40)
        elif kind == "no number at all":
            state["unet_model_state_dict"]["out.2.weight"] = torch.zeros(2**40, 0)
        elif kind == "a wide network of few numbers":
            state["seg_model_state_dict"]["encoder_segment.block1.0.weight"] = torch.zeros(2**20, 1, 1, 1)
        elif kind == "a deep network of few numbers":
            state["unet_model_state_dict"]["down.1000000000.0.in_layers.0.weight"] = torch.zeros(32)
        torch.save(state, path)
    return path


@pytest.mark.parametrize(
    "kind",
    ["missing", "empty", "text", "truncated", "other keys", "a tensor", "tensor missing", "wrong shape"]
    + ["one number repeated", "no number at all", "a wide network of few numbers", "a deep network of few numbers"],
)
def test_unusable_checkpoints_get_one_clear_line(tmp_path, capsys, kind):
    path = damaged(tmp_path, kind)
    assert main(["convert", str(path), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert str(path) in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()
