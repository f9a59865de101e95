"""How the page is started: by its modules, and on Hugging Face by the block at the top of `space/README.md`."""

import os
import re
import subprocess
import sys
from pathlib import Path

import yaml
from packaging.version import Version

SPACE = Path(__file__).resolve().parents[2] / "space"


def test_the_front_matter_builds_a_space():
    _, block, text = (SPACE / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    card = yaml.safe_load(block)
    assert card["sdk"] == "gradio" and (SPACE / card["app_file"]).is_file()
    constraint = (SPACE.parent / "constraints.txt").read_text(encoding="utf-8")
    low, high = re.search(r"^gradio>=([\d.]+),<([\d.]+)$", constraint, re.M).groups()
    assert Version(low) <= Version(card["sdk_version"]) < Version(high), "tested with another gradio"
    assert isinstance(card["python_version"], str), "YAML would read 3.10 as 3.1"
    assert isinstance(card["sdk_version"], str) and len(card["short_description"]) <= 60
    assert {"anomaly-detection", "diffusionad"} <= set(card["tags"]) and card["models"] == []
    assert "DIFFUSIONAD_MODELS" in text


def test_importing_the_modules_changes_nothing_and_loads_no_gradio(tmp_path):
    code = """
import os, sys
before = {name: value for name, value in os.environ.items() if "GRADIO" in name}
from diffusionad_hf.space import actions, app
assert "gradio" not in sys.modules
from diffusionad_hf.space import page
assert before == {name: value for name, value in os.environ.items() if "GRADIO" in name}
"""
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "TMPDIR": str(tmp_path)})
    assert not list(tmp_path.glob("diffusionad-space-*"))
