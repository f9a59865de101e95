"""What does not fit into memory at once is done in smaller parts, and nothing is lost."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import make_pipeline

ROOT = Path(__file__).resolve().parents[1]

_LIMITED = """
import json, resource
import torch
from tests.conftest import make_pipeline

def limit(megabytes):
    with open("/proc/self/status") as status:
        used = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmSize"))
    resource.setrlimit(resource.RLIMIT_AS, (used + megabytes * 2**20, resource.RLIM_INFINITY))

images = torch.rand(48, 3, 64, 64)
pipe, too_large = make_pipeline(64), make_pipeline(512)
expected = pipe(images[:3], batch_size=1).anomaly_score.tolist()
limit(300)
output = pipe(images, batch_size=48)
result = {"expected": expected, "found": output.anomaly_score.tolist(), "maps": len(output.anomaly_map)}
limit(240)
try:
    too_large(torch.rand(2, 3, 512, 512))
except MemoryError as error:
    result["error"] = str(error)
print(json.dumps(result))
"""


@pytest.fixture(scope="module")
def limited():
    """What a process of its own gives, and says, that may take but little more memory than it has."""
    if sys.platform != "linux":
        pytest.skip("limits its memory as Linux does")
    if torch.__version__.startswith("2.6."):
        pytest.skip("torch 2.6 crashes where it should say that memory ran out")
    done = subprocess.run([sys.executable, "-c", _LIMITED], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr


@pytest.fixture
def warnings(monkeypatch):
    """The warnings of the pipeline."""
    said = []
    monkeypatch.setattr("diffusionad_hf.pipeline_diffusionad.logger.warning", said.append)
    return said


def run_out_of_memory(pipe, most, error):
    """Makes the UNet fail on more images than `most`; returns the numbers of images that it was given."""
    seen = []

    def hook(module, inputs):
        seen.append(len(inputs[0]) // 2)
        if seen[-1] > most:
            raise error

    pipe.unet.register_forward_pre_hook(hook)
    return seen


def test_too_large_a_batch_is_halved_when_memory_really_runs_out(limited):
    result, said = limited
    np.testing.assert_allclose(result["found"][:3], result["expected"], atol=1e-5)
    assert len(result["found"]) == result["maps"] == 48
    assert "48 images at once do not fit into the memory of cpu: going on with 24 at a time." in said


def test_an_image_that_does_not_fit_alone_is_one_clear_line(limited):
    result, _ = limited
    assert "not even one image of 512 x 512 px fits into the memory of cpu" in result["error"]
    assert "\n" not in result["error"]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("MPS backend out of memory (MPS allocated: 9.00 GB)"),
        RuntimeError("GET was unable to find an engine to execute this computation"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        MemoryError(),
    ],
)
def test_halving_keeps_order_noise_and_intermediates(error, warnings):
    pipe, images = make_pipeline(), torch.rand(7, 3, 32, 32)
    call = {"generator": torch.Generator().manual_seed(3), "return_intermediates": True}
    expected = pipe(images, batch_size=1, **call)
    seen = run_out_of_memory(pipe, 2, error)
    call["generator"].manual_seed(3)
    found = pipe(images, batch_size=5, **call)
    np.testing.assert_allclose(found.anomaly_score, expected.anomaly_score, atol=1e-6)
    torch.testing.assert_close(found.intermediates, expected.intermediates, atol=1e-4, rtol=1e-3)
    assert len(warnings) == 1 and "5 images at once" in warnings[0] and "2 at a time" in warnings[0]
    assert seen == [5, 2, 2, 1, 2]
    # What was found out is kept for the calls to come.
    pipe(images[:4], batch_size=4)
    assert len(warnings) == 1 and seen[5:] == [2, 2]


def test_another_error_is_not_taken_for_lack_of_memory(warnings):
    pipe = make_pipeline()
    seen = run_out_of_memory(pipe, 0, RuntimeError("expected scalar type Float but found Half"))
    with pytest.raises(RuntimeError, match="expected scalar type"):
        pipe(torch.rand(4, 3, 32, 32), batch_size=4)
    assert seen == [4] and not warnings
