"""`diffusionad evaluate` on a small test set."""

import json

import numpy as np
from PIL import Image

from diffusionad_hf.cli.main import main


def test_evaluate_prints_and_writes_the_metrics(model_dir, tmp_path, capsys):
    root = tmp_path / "data" / "part"
    rng = np.random.default_rng(0)
    for folder in ("train/good", "test/good", "test/hole", "ground_truth/hole"):
        (root / folder).mkdir(parents=True)
    mask = np.zeros((32, 32), np.uint8)
    mask[4:9, 4:9] = 255
    for i in range(4):
        image = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(image).save(root / f"train/good/{i}.png")
        Image.fromarray(image).save(root / f"test/good/{i}.png")
        Image.fromarray(np.where(mask[..., None], 255 - image, image)).save(root / f"test/hole/{i}.png")
        Image.fromarray(mask).save(root / f"ground_truth/hole/{i}_mask.png")
    (root / "test/good/9.png").write_bytes(b"")
    arguments = ["evaluate", "--model", model_dir, "--data-dir", str(root.parent)]
    arguments += ["--json", str(tmp_path / "e.json"), "--plots", str(tmp_path / "plots")]
    # One of nine files is more than the 5 % that may be unusable.
    assert main(arguments) == 2 and "9.png" in capsys.readouterr().err
    (root / "test/good/9.png").unlink()
    assert main(arguments) == 0
    printed, written = capsys.readouterr().out, json.loads((tmp_path / "e.json").read_text())
    assert f"{written['image_auroc']:.4f}" in printed and f"{written['aupro_30']:.4f}" in printed
    assert written["num_images"] == 8 and {p.name for p in (tmp_path / "plots").iterdir()} >= {"roc_curve.png"}
