"""The block at the top of `space/README.md` is what a Space is built from."""

import re
from pathlib import Path

import yaml

SPACE = Path(__file__).resolve().parents[2] / "space"


def test_the_front_matter_builds_a_space():
    _, block, text = (SPACE / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    card = yaml.safe_load(block)
    assert card["sdk"] == "gradio" and (SPACE / card["app_file"]).is_file()
    constraint = (SPACE.parent / "constraints.txt").read_text(encoding="utf-8")
    low, high = re.search(r"^gradio>=([\d.]+),<([\d.]+)$", constraint, re.M).groups()

    def version(text):
        return tuple(map(int, text.split(".")))

    assert version(low) <= version(card["sdk_version"]) < version(high), "tested with another gradio"
    assert isinstance(card["python_version"], str), "YAML would read 3.10 as 3.1"
    assert isinstance(card["sdk_version"], str) and len(card["short_description"]) <= 60
    assert {"anomaly-detection", "diffusionad"} <= set(card["tags"]) and card["models"] == []
    assert "DIFFUSIONAD_MODELS" in text
