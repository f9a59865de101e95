"""The documentation does what it says: its commands and programs run, its links lead somewhere, its site builds."""

import importlib.util
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from collections import defaultdict
from importlib.metadata import distributions
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from PIL import Image

from diffusionad_hf.cli.main import main
from diffusionad_hf.training import arguments
from diffusionad_hf.version import __version__
from tests.conftest import make_pipeline
from tests.training.runs import forget_accelerator

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "space/checkpoints/demo-part/examples"
PAGES = sorted([*ROOT.glob("docs/**/*.md"), *(ROOT / name for name in ("README.md", "CONTRIBUTING.md"))])
PAGES += [ROOT / "training/README.md", ROOT / "space/README.md"]
NOTEBOOKS = sorted(ROOT.glob("docs/notebooks/*.ipynb"))
TRACKED = ("*.md", "benchmarks/*.md", "docs/**/*.md", "space/**/*.md", "training/*.md", ".github/**/*.md")
SHELL = {"bash", "sh", "shell", "console"}
# Blocks that say themselves, in a comment before them, why they cannot run here. More of them is a decision.
MOST_NOT_RUN = 15
# What makes any training short; its data, networks and outputs stay as they are.
SHORT = {"image_size": "32", "max_train_steps": 2, "train_batch_size": 2, "lr_warmup_steps": 1, "report_to": "none"}


class Block(NamedTuple):
    page: Path
    line: int
    language: str
    code: str
    reason: str | None

    @property
    def where(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def read_blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    pattern = r"(?:^<!-- not run: ([^\n]+) -->\n\n?)?^```(\w+)[^\n]*\n(.*?)^```$"
    found = re.finditer(pattern, text, flags=re.M | re.S)
    return [Block(page, text.count("\n", 0, m.start()) + 1, m[2], m[3], m[1]) for m in found]


def read_cells(notebook: Path) -> list[Block]:
    """The cells with code, of which lines to Jupyter itself, such as installations, are left out."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    codes = {i: "".join(cell["source"]) for i, cell in enumerate(cells) if cell["cell_type"] == "code"}
    return [Block(notebook, i, "python", re.sub(r"^[%!].*", "", code, flags=re.M), None) for i, code in codes.items()]


BLOCKS = [block for page in PAGES for block in read_blocks(page) if block.language in {*SHELL, "python"}]
BLOCKS += [cell for notebook in NOTEBOOKS for cell in read_cells(notebook)]


def make_photos(folder: Path, names: list[str], seed: int, source: str = "good.png") -> None:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    photo = np.asarray(Image.open(EXAMPLES / source).convert("RGB").resize((64, 64))).astype(float)
    for name in names:
        noisy = photo * rng.uniform(0.97, 1.03) + rng.normal(0, 2, photo.shape)
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / name)


@pytest.fixture(scope="module")
def stage(tmp_path_factory) -> Path:
    """A folder with everything that the pages speak of, tiny, beside the clone's own folders."""
    stage = tmp_path_factory.mktemp("docs")
    for name in ("space", "training", "benchmarks", "demo_part", "diffusionad_hf", "constraints.txt"):
        (stage / name).symlink_to(ROOT / name)
    make_photos(stage / "photos", [f"{i}.png" for i in range(10)], seed=0)
    make_photos(stage / "good", [f"{i}.png" for i in range(20)], seed=1)
    make_photos(stage / "good_scans", [f"{i}.png" for i in range(3)], seed=2)
    make_photos(stage / "new", ["a.png", "b.png"], seed=3)
    make_photos(stage / "mvtec_ad/screw/train/good", [f"{i}.png" for i in range(12)], seed=4)
    make_photos(stage / "mvtec_ad/screw/test/good", ["0.png", "1.png"], seed=5)
    make_photos(stage / "mvtec_ad/screw/test/scratch", ["0.png", "1.png"], seed=6, source="scratch.png")
    masks = stage / "mvtec_ad/screw/ground_truth/scratch"
    masks.mkdir(parents=True)
    for i in range(2):
        Image.fromarray(np.pad(np.full((9, 9), 255, np.uint8), ((20, 35), (20, 35)))).save(masks / f"{i}_mask.png")
    make_photos(stage / "dtd/images/banded", ["0.png", "1.png"], seed=7, source="stain.png")
    for name in ("a.png", "b.png"):
        (stage / "photos" / name).write_bytes((stage / "new" / name).read_bytes())
    marks = '{"marks": [{"file": "a.png", "mark": "fine"}, {"file": "b.png", "mark": "defect"}]}'
    (stage / "feedback.json").write_text(marks)
    # As ids on the Hub, of which no test asks the real one, and as folders that somebody trained.
    pipe = make_pipeline()
    scores = pipe([np.full((32, 32, 3), value, np.uint8) for value in range(0, 250, 10)]).anomaly_score
    pipe.register_to_config(calibration_scores=[float(s) for s in scores])
    for name in ("org/diffusionad-mvtec-screw", "fabric-64", "runs/screw"):
        pipe.save_pretrained(stage / name)
    return stage


def short(preset: str) -> dict:
    return _load_preset(preset) | SHORT


_load_preset = arguments.load_preset


def run_shell(block: Block) -> None:
    """Runs each command: Python's in this process, to spare imports; `make` only says what it would do."""
    for line in block.code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if not words:
            continue
        code, said = 0, ""
        if words[0] == "diffusionad":
            forget_accelerator()
            code = main(words[1:])
        elif words[:2] == ["python", "-m"]:
            code = run_module(words[2:])
        else:
            bin = Path(sys.executable).parent
            programs = {"accelerate": [bin / "accelerate"], "make": ["make", "-nC", ROOT]}
            path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
            environment = {**os.environ, "PYTHONPATH": path}
            command = [*programs[words[0]], *words[1:]]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
            code, said = done.returncode, done.stderr[-2000:]
        # 1 and 3 are verdicts, of which these photos get any.
        if code not in ((0, 1, 3) if words[1] == "inspect" else (0,)):
            raise RuntimeError(f"{line}: exit code {code} {said}")


def run_module(words: list[str]) -> int:
    with mock.patch.object(sys, "argv", words):
        try:
            runpy.run_module(words[0], run_name="__main__", alter_sys=True)
        except SystemExit as ended:
            return ended.code or 0
    return 0


def test_every_block_runs(stage, monkeypatch):
    monkeypatch.chdir(stage)
    monkeypatch.setattr(arguments, "load_preset", short)
    # Tutorial first: the others speak of the model that it trains.
    pages = defaultdict(list)
    for block in sorted(BLOCKS, key=lambda block: block.page.name != "tutorial.md"):
        if block.reason is None:
            pages[block.page].append(block)
    failed = []
    for blocks in pages.values():
        names: dict = {}
        for block in blocks:
            forget_accelerator()
            try:
                if block.language in SHELL:
                    run_shell(block)
                else:
                    exec(compile("\n" * block.line + block.code, block.page, "exec"), names)
            except (Exception, SystemExit) as error:
                failed.append(f"{block.where}: {error!r:.2000}")
    forget_accelerator()
    assert not failed, "\n".join(failed)


def test_what_is_not_run_says_why_and_is_counted():
    not_run = [block for block in BLOCKS if block.reason is not None]
    assert len(not_run) <= MOST_NOT_RUN, [block.where for block in not_run]
    assert len(BLOCKS) - len(not_run) > len(not_run)
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert text.count("<!-- not run:") == sum(block.reason is not None for block in read_blocks(page)), page
        assert all(mark in {"", "bash", "python", "bibtex", "json", "math", "text"} for mark in fences(text)), page


def fences(text: str) -> list[str]:
    """The languages of the blocks of a page, "" where none is named."""
    return re.findall(r"^```(\w*)", text, flags=re.M)[::2]


def test_settings_for_others_are_whole():
    files = [*ROOT.glob(".github/**/*.yml"), ROOT / ".pre-commit-config.yaml", ROOT / "CITATION.cff"]
    contents = {file.name: yaml.safe_load(file.read_text(encoding="utf-8")) for file in files}
    assert contents["CITATION.cff"]["version"] == __version__
    steps = [step for job in contents["checks.yml"]["jobs"].values() for step in job["steps"]]
    targets = re.findall(r"^make (\S+)$", "\n".join(step.get("run", "") for step in steps), flags=re.M)
    assert set(targets) == {"quality", "test", "wheel", "docs"}
    subprocess.run(["make", "-n", *targets], cwd=ROOT, check=True, capture_output=True)
    # An unquoted comma cuts a label and leaves keys without a value.
    forms = [contents[form.name] for form in ROOT.glob(".github/ISSUE_TEMPLATE/*.yml") if form.name != "config.yml"]
    fields = [field["attributes"] for form in forms for field in form["body"]]
    assert len(fields) > 6 and all(None not in field.values() for field in fields)


def test_where_packages_come_from_is_left_to_who_installs():
    files = [*ROOT.glob(".github/**/*.yml"), *ROOT.glob("*/Dockerfile"), ROOT / "Makefile", ROOT / "constraints.txt"]
    named = r"index[-_]url[=: ]+['\"]?https?:|find[-_]links[=: ]+['\"]?https?:"
    assert not [file for file in files if re.search(named, file.read_text(encoding="utf-8"), flags=re.I)]


def test_pins_can_be_installed_with_the_oldest_python():
    oldest = {"python_version": "3.10", "python_full_version": "3.10.0"}
    lines = (line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#"))
    checked, too_new = [], []
    for pin in map(Requirement, lines):
        installed = next(iter(distributions(name=pin.name)), None)
        if installed and installed.version in pin.specifier and (not pin.marker or pin.marker.evaluate(oldest)):
            checked.append(pin.name)
            if "3.10" not in SpecifierSet(installed.metadata["Requires-Python"] or ""):
                too_new.append(str(pin))
    assert checked and not too_new


def test_links_between_files_lead_somewhere():
    broken = []
    pages = {page for pattern in TRACKED for page in ROOT.glob(pattern)}
    for page in pages - {ROOT / "model_card.md"}:  # whose links lead to files of a published model
        text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            path, _, anchor = target.partition("#")
            if re.match(r"[a-z]+:|/", target) or "{{" in target:
                continue
            file = page.parent / path if path else page
            titles = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), flags=re.M) if anchor else []
            anchors = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
            if not file.exists() or (anchor and anchor not in anchors):
                broken.append(f"{page.relative_to(ROOT)}: {target}")
    assert not broken


def test_the_site_builds_without_warnings_and_asks_nobody(tmp_path):
    if not importlib.util.find_spec("mkdocs"):
        pytest.skip("needs mkdocs-material: pip install -e .[docs]")
    site = tmp_path / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--site-dir", site]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    pages = {page.relative_to(site).as_posix(): page.read_text(encoding="utf-8") for page in site.rglob("*.html")}
    loaded = r'<(?:script|img|iframe)[^>]+src="(?:https?:)?//|<link[^>]+(?:stylesheet|preconnect)[^>]+href="https?://'
    assert not [name for name, html in pages.items() if re.search(loaded, html)]
    assert pages["explanation/method.html"].count("<math") == 5
    for command in ("inspect", "calibrate", "train", "deploy-space"):
        assert f"usage: diffusionad {command} " in pages["reference/command-line.html"]
    for name in ("DiffusionADPipeline", "calibrate", "TrainingConfig", "NormGuidedScheduler", "deploy_space"):
        assert name in pages["reference/python.html"]
