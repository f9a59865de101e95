"""Files and folders are there whole or not at all."""

import os
from pathlib import Path

import pytest

from diffusionad_hf.files import files_below, replace_file, replace_folder, replacing, restore_folder, short_name


def write(text):
    return lambda folder: (folder.mkdir(), (folder / "a").write_text(text))


def test_a_file_and_a_folder_are_the_former_or_the_new_one(tmp_path, monkeypatch):
    file, folder = tmp_path / "file", tmp_path / "folder"
    replace_file(file, "1")
    replace_folder(folder, write("1"))

    def killed(*_):
        raise KeyboardInterrupt

    rename = Path.rename
    for at in (killed, lambda source, target: rename(source, target) if source == folder else killed()):
        monkeypatch.setattr(os, "replace", killed)
        monkeypatch.setattr(Path, "rename", at)
        with pytest.raises(KeyboardInterrupt):
            replace_file(file, "2")
        with pytest.raises(KeyboardInterrupt):
            replace_folder(folder, write("2"))
        monkeypatch.undo()
        restore_folder(folder)
        assert file.read_text() == (folder / "a").read_text() == "1"
    replace_file(file, "3")
    replace_folder(folder, write("3"))
    assert file.read_text() == (folder / "a").read_text() == "3"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


@pytest.mark.parametrize("then", ["written again", "read"])
def test_a_former_folder_that_a_kill_left_beside_the_new_one_goes(then, tmp_path):
    folder = tmp_path / "folder"
    write("1")(tmp_path / ".folder.former")
    write("2")(folder)
    if then == "read":
        restore_folder(folder)
    else:
        replace_folder(folder, write("3"))
    assert (folder / "a").read_text() == ("2" if then == "read" else "3")
    assert list(tmp_path.iterdir()) == [folder]


def test_a_failed_write_leaves_the_former_file_and_nothing_beside_it(tmp_path):
    file = tmp_path / "file"
    replace_file(file, b"1")
    with pytest.raises(ZeroDivisionError), replacing(file) as partial:
        partial.write_text("2")
        assert file.read_text() == "1"
        1 / 0  # noqa: B018
    assert file.read_text() == "1" and list(tmp_path.iterdir()) == [file]


def test_the_disk_has_the_content_before_the_file_has_its_name(tmp_path, monkeypatch):
    order = []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: (order.append("sync"), sync(descriptor)))
    monkeypatch.setattr(os, "replace", lambda *paths: (order.append("name"), replace(*paths)))
    replace_file(tmp_path / "file", "Zoë\r\n")
    assert order == ["sync", "name"]
    assert (tmp_path / "file").read_bytes() == b"Zo\xc3\xab\r\n"


def test_two_writers_at_once_do_not_meet(tmp_path):
    # A name as long as a file system allows.
    file = tmp_path / ("n" * 255)
    with replacing(file) as first, replacing(file) as second:
        first.write_text("1")
        second.write_text("2")
    assert file.read_text() == "1" and list(tmp_path.iterdir()) == [file]


def test_a_folder_s_files_are_found_through_links_once_and_without_litter(tmp_path):
    root = tmp_path / ".hidden/data"
    kept = ["a.png", "day1/b.png", "day1/deep/c.png", "z.png"]
    litter = [
        "._a.png",
        ".ipynb_checkpoints/a-checkpoint.png",
        "day1/__MACOSX/b.png",
        "day1/@eaDir/b.png",
        "Thumbs.db",
    ]
    for name in (*kept, *litter, "../elsewhere/d.png"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    links = {"again": "day1", "day1/deep/up": "../..", "day2": "../elsewhere", "gone.png": "nothing", "loop": "loop"}
    for name, target in links.items():
        (root / name).symlink_to(target)
    found = [file.relative_to(root).as_posix() for file in files_below(root)]
    assert found == sorted([*kept, "day2/d.png", "gone.png", "loop"])


def test_a_folder_that_cannot_be_read_is_no_folder_without_files(tmp_path, monkeypatch):
    (tmp_path / "closed").mkdir()
    listdir = os.listdir

    def refuse(folder):
        if str(folder).endswith("closed"):
            raise PermissionError(13, "Permission denied", folder)
        return listdir(folder)

    monkeypatch.setattr(os, "listdir", refuse)
    with pytest.raises(OSError, match="closed"):
        files_below(tmp_path)


@pytest.mark.parametrize("sign", ["x", "件"])
def test_names_are_shortened_only_if_they_are_too_long_and_stay_apart(sign):
    assert short_name("a" * 240, 15) == "a" * 240
    names = [short_name(f"{sign * 240}{end}", 19) for end in ("1", "2")]
    assert names[0] != names[1] and all(len(name.encode()) <= 236 and name.isprintable() for name in names)
