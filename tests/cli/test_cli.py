"""The command line itself: help, spelling of flags, exit codes, and the commands that hand on to other rooms."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from diffusionad_hf.cli import serve
from diffusionad_hf.cli.main import main

COMMANDS = "demo inspect calibrate evaluate train convert export serve publish list deploy-space".split()


def test_help_imports_nothing_that_takes_seconds_and_lists_every_command():
    code = (
        "import sys; from diffusionad_hf.cli.main import main\n"
        f"for arguments in {[['--help'], *([name, '--help'] for name in COMMANDS if name != 'train')]}:\n"
        "    try: main(arguments)\n"
        "    except SystemExit as stopped: assert stopped.code == 0\n"
        "assert not {'torch', 'diffusers', 'gradio', 'datasets'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(f"\n    {name}" in done.stdout for name in COMMANDS)
    module = [sys.executable, "-m", "diffusionad_hf", "--help"]
    assert done.stdout.startswith(subprocess.run(module, capture_output=True, text=True).stdout)


def test_flags_with_underscores_are_accepted(tmp_path, capsys):
    assert main(["evaluate", "--model", "m", "--data_dir=some_where", "--batch_size", "2"]) == 2
    # The value is left as it is.
    assert "some_where" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["publish", "folder", "--repo-id", "screw"], '--repo-id "screw": give ORG/NAME'),
        (["publish", "folder", "--repo-id", "org/x", "--create-pr", "--revision", "v2"], "leave out --revision"),
        (["deploy-space", "--repo-id", "org/x", "--models", "a b"], '--models "a b"'),
    ],
)
def test_messages_of_the_library_name_flags(arguments, words, capsys):
    assert main(arguments) == 2
    assert words in capsys.readouterr().err


def test_an_interruption_has_an_exit_code_of_its_own(monkeypatch, capsys):
    def interrupted(**_):
        raise KeyboardInterrupt

    monkeypatch.setattr("diffusionad_hf.hub.publishing.list_models", lambda _: interrupted())
    assert main(["list"]) == 130 and "interrupted" in capsys.readouterr().err


def test_train_hands_on_every_argument(monkeypatch, tmp_path):
    given = []
    monkeypatch.setitem(
        sys.modules,
        "diffusionad_hf.training.loop",
        SimpleNamespace(main=lambda argv, prog: given.extend([prog, *argv]) or 7),
    )
    arguments = ["--data_dir", "d", "--output-dir", "o", "--preset=tiny", "--resume_from_checkpoint", "latest"]
    (tmp_path / "d").mkdir()
    monkeypatch.chdir(tmp_path)
    assert main(["train", *arguments]) == 7 and given == ["diffusionad train", *arguments]


def test_help_and_refusals_of_train_need_no_torch(tmp_path):
    for arguments, expected, said in (
        (["--help"], 0, "usage: diffusionad train PHOTOS [--output-dir DIR]"),
        ([], 2, "give PHOTOS: a folder of normal photos"),
        (["photos", "--data-dir", "d"], 2, "PHOTOS photos and --data-dir d: give only one"),
        (["photos", "--sed", "3"], 2, "--sed"),
        (["my/missing/photos"], 2, "there is no folder my/missing/photos"),
        ([str(tmp_path), "--output-dir", __file__], 2, "test_cli.py: is a file"),
    ):
        program = (
            "import sys; sys.modules['torch'] = None; from diffusionad_hf.cli.main import main; "
            f"sys.exit(main(['train', *{arguments}]))"
        )
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
        assert done.returncode == expected, done.stderr
        assert said in (done.stdout or done.stderr).splitlines()[-1 if expected else 0]


@pytest.mark.parametrize(
    "module, arguments, extra",
    [("datasets", ["train", "."], "train"), ("gradio", ["serve"], "space")],
)
def test_an_extra_that_is_missing_is_named(module, arguments, extra, monkeypatch, capsys):
    for name in [name for name in sys.modules if name.startswith(("diffusionad_hf.training", "diffusionad_hf.space"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    if module == "datasets":
        monkeypatch.setitem(sys.modules, "diffusionad_hf.training.loop", None)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert f'pip install "diffusionad-hf[{extra}]"' in error and error.count("\n") == 1


def test_serve_tells_the_app_its_models_and_address(monkeypatch):
    seen = {}
    names = ("DIFFUSIONAD_MODELS", "GRADIO_SERVER_NAME", "GRADIO_SERVER_PORT")
    for name in names:
        monkeypatch.setenv(name, "before")

    def app():
        seen.update({name: os.environ[name] for name in names})

    monkeypatch.setattr(serve, "require", lambda module, extra: None)
    monkeypatch.setitem(sys.modules, "diffusionad_hf.space.app", SimpleNamespace(main=app))
    assert main(["serve"]) == 0 and set(seen.values()) == {"before"}
    assert main(["serve", "--model", "a", "org/b", "--model", "c", "--host", "0.0.0.0", "--port", "8000"]) == 0
    assert list(seen.values()) == ["a,org/b,c", "0.0.0.0", "8000"]


def test_demo_inspects_the_bundled_photos_and_asks_nothing_of_the_hub(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.chdir(tmp_path)
    assert main(["demo"]) == 0 and os.environ["HF_HUB_OFFLINE"] == "1"
    examples = serve.bundled("space/checkpoints").glob("*/examples/*")
    photos = {(file.parents[1].name, file.stem) for file in examples if file.suffix in (".png", ".jpg")}
    written = (tmp_path / "outputs/demo").glob("*/*_figure.png")
    assert {(file.parent.name, file.stem.removesuffix("_figure")) for file in written} == photos
    assert {model for model, _ in photos} == {"cookie", "demo-part"}
    assert capsys.readouterr().out.count("  anomalous  ") == len([stem for _, stem in photos if "good" not in stem])
