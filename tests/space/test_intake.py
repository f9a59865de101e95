"""Nothing that a visitor sends may write, read or fill what is not theirs; and every refusal says why."""

import io
import os
import stat
import struct
import zipfile
import zlib
from dataclasses import replace
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZipInfo

import numpy as np
import pytest
from PIL import Image

from diffusionad_hf.space import decoding
from diffusionad_hf.space.intake import (
    LIMITS,
    Refusal,
    Settings,
    Upload,
    admit,
    collect,
    number,
    read_card,
    upload_of,
    uploads_of,
)
from diffusionad_hf.visualization import save_image
from tests.space.conftest import archive, png


def huge_png(width, height):
    """A PNG of a few bytes that declares any number of pixels."""
    data = bytearray(png())
    data[16:24] = struct.pack(">II", width, height)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


def written(kind):
    """An image in a format that is not accepted."""
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32)).save(buffer, kind)
    return buffer.getvalue()


def test_an_image_that_takes_too_long_is_given_up(tmp_path, monkeypatch):
    path = tmp_path / "slow.png"
    Image.new("RGB", (5000, 5000)).save(path, compress_level=1)
    monkeypatch.setattr(decoding, "_SECONDS", 0.001)
    with pytest.raises(Refusal, match="slow.png: takes too long or too much memory"):
        Upload("slow.png", path).image()


@pytest.fixture
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("unpacked")


def collected(folder, *paths):
    return collect([Upload(path.name, path) for path in paths], folder)


def test_hostile_names_are_flattened_shortened_and_never_used_as_paths(tmp_path, folder):
    names = {
        "../../evil.png": "evil.png",
        "/etc/passwd.png": "passwd.png",
        "..\\..\\win.png": "win.png",
        "a/b/c.png": "c.png",
        "c.png": "c (2).png",
        "x\u202egnp.png": "xgnp.png",
        "n\n\x07.png": "n.png",
        "x" * 5000 + ".png": "x" * 80 + "…" + "x" * 35 + ".png",
        "../..": "..",
    }
    uploads = collected(folder, archive(tmp_path / "in.zip", [(name, png()) for name in names]))
    assert [upload.name for upload in uploads] == list(names.values())
    assert {u.path.parent for u in uploads} == {folder}
    assert [path.name for path in tmp_path.iterdir()] == ["in.zip"]


def test_links_encrypted_nested_and_damaged_members_are_rows_that_say_why(tmp_path, folder):
    path = tmp_path / "in.zip"
    link = ZipInfo("link.png")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    inner = archive(tmp_path / "inner.zip", [("a.png", png())]).read_bytes()
    archive(path, [(link, "/etc/passwd"), ("inner.zip", inner), ("secret.png", png()), ("bad.png", b"B" * 5000)])
    data = bytearray(path.read_bytes())
    # The flags of a member, in its own header and in the archive's list, say that it is encrypted.
    for find, before_name, flags in ((data.find, 30, 6), (data.rfind, 46, 8)):
        data[find(b"secret.png") - before_name + flags] |= 1
    data[data.find(b"B" * 5000)] = 0  # its checksum is wrong now
    path.write_bytes(data)
    said = {"link.png": "not followed", "inner.zip": "archive inside", "secret.png": "encrypted", "bad.png": "damaged"}
    assert all(said.pop(upload.name) in upload.error for upload in collected(folder, path)) and not said
    assert not list(folder.iterdir()), "what is not used is not kept"


def test_all_archives_of_a_batch_share_one_budget(tmp_path, folder, monkeypatch):
    zeros = [(f"{i}.png", b"\0" * 1_000_000) for i in range(3)]
    path = archive(tmp_path / "bomb.zip", zeros, compression=ZIP_DEFLATED)
    monkeypatch.setattr("diffusionad_hf.space.intake.LIMITS", replace(LIMITS, unpacked_bytes=5_000_000))
    uploads = collected(folder, *[path] * 20)
    assert ["beyond the" in upload.error for upload in uploads] == [False] * 5 + [True] * 55
    assert sum(file.stat().st_size for file in folder.iterdir()) == 5_000_000


def test_lists_of_far_too_many_members_are_not_read(tmp_path, folder, monkeypatch):
    path = archive(tmp_path / "many.zip", [(f"{i:0200d}", b"") for i in range(5000)])
    monkeypatch.setattr(zipfile.ZipFile, "__init__", lambda *_, **__: pytest.fail("reads the list"))
    with pytest.raises(Refusal, match="many.zip: lists far more than 500 files"):
        collected(folder, path)
    # The same list, told of by the record for large archives alone; and a size that looks like the record's own mark.
    large, end = path.read_bytes()[:-22], path.read_bytes()[-22:]
    size, offset = struct.unpack("<2L", end[12:20])
    record = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, 5000, 5000, size, offset)
    locator = struct.pack("<4sLQL", b"PK\6\7", 0, len(large), 1)
    path.write_bytes(large + record + locator + end[:12] + struct.pack("<2L", 0, 0) + end[20:])
    with pytest.raises(Refusal, match="lists far more"):
        collected(folder, path)
    path.write_bytes(large + end[:12] + b"PK\5\6" + end[16:])
    with pytest.raises(Refusal, match="lists far more"):
        collected(folder, path)
    with pytest.raises(Refusal, match="More than 20 archives"):
        collected(folder, *[path] * 21)


def test_one_bad_archive_stops_no_other_file(tmp_path, folder):
    (tmp_path / "broken.zip").write_bytes(b"PK\x05\x06 and no more")
    (tmp_path / "a.png").write_bytes(png())
    good, many = archive(tmp_path / "good.zip", [("b.png", png())]), [(f"{i:0200d}", b"") for i in range(5000)]
    paths = [
        tmp_path / "broken.zip",
        tmp_path / "a.png",
        good,
        archive(tmp_path / "many.zip", many),
        tmp_path / "gone.png",
    ]
    said = {upload.name: upload.error[:22] for upload in collected(folder, *paths)}
    assert said == {
        "broken.zip": "the archive is damaged",
        "a.png": "",
        "b.png": "",
        "many.zip": "lists far more than 50",
        "gone.png": "",
    }
    with pytest.raises(Refusal, match="gone.png: no longer kept"):
        Upload("gone.png", tmp_path / "gone.png").image()


def test_members_without_a_name_or_packed_in_unusual_ways_are_rows(tmp_path, folder):
    nameless = ZipInfo("x")
    nameless.filename = ""
    path = archive(tmp_path / "in.zip", [(nameless, png()), ("a.png", png())])
    with zipfile.ZipFile(path, "a", zipfile.ZIP_BZIP2) as bundle:
        bundle.writestr("b.png", b"\0" * 1_000_000)
    uploads = collected(folder, path)
    assert {u.name: bool(u.path) for u in uploads} == {"unnamed": True, "a.png": True, "b.png": False}
    assert "unusual way" in uploads[-1].error


def test_an_archive_that_lies_about_sizes_writes_no_more_than_it_declares(tmp_path, folder):
    path = archive(tmp_path / "lie.zip", [("a.png", b"\0" * 10_000_000)], compression=ZIP_DEFLATED)
    path.write_bytes(path.read_bytes().replace(struct.pack("<I", 10_000_000), struct.pack("<I", 1000)))
    (upload,) = collected(folder, path)
    assert "damaged" in upload.error and not list(folder.iterdir())


def test_batches_of_nothing_or_of_too_many_files_are_refused(tmp_path, folder):
    many = archive(tmp_path / "many.zip", [(f"{i}.png", b"") for i in range(1000)])
    empty = archive(tmp_path / "empty.zip", [("__MACOSX/._a.png", b"x"), (".DS_Store", b"x")])
    broken = tmp_path / "broken.zip"
    broken.write_bytes(many.read_bytes()[-22:])  # the end of an archive
    too_many = f"More than {LIMITS.files} files"
    nothing = {"Choose images": [], "empty.zip: the archive holds no files": [empty], "is damaged": [broken]}
    for reason, sent in (*nothing.items(), (too_many, [many]), (too_many, [tmp_path / "x.png"] * 1000)):
        with pytest.raises(Refusal, match=reason):
            collected(folder, *sent)


def test_litter_in_an_archive_is_no_row(tmp_path, folder):
    litter = ["__MACOSX/a.png", ".ipynb_checkpoints/a-checkpoint.png", "day\\._a.png", "day/@eaDir/a.png", "Thumbs.db"]
    kept = ["./a.png", "day/b.png", "../c.png", "d..png"]
    path = archive(tmp_path / "in.zip", [(name, png()) for name in [*litter, *kept]])
    assert [upload.name for upload in collected(folder, path)] == ["a.png", "b.png", "c.png", "d..png"]


def test_hidden_files_are_left_out_among_others_and_refused_alone(tmp_path, upload):
    file, (hidden, index) = {"path": str(upload)}, (upload.with_name(name) for name in ("._photo.png", "Thumbs.db"))
    for litter in (hidden, index):
        litter.write_bytes(png())
        with pytest.raises(Refusal, match="^A hidden file, .* give it another name.$"):
            admit({"path": str(litter)}, tmp_path, True)
    given = [{"path": str(hidden)}, file, {"path": str(index)}]
    assert [kept["path"] for kept in admit(given, tmp_path, True)] == [str(upload)]


def test_pictures_of_an_inspection_in_an_archive_of_photos_are_no_rows(tmp_path, folder):
    own = save_image(Image.new("RGB", (32, 32)), tmp_path / "a_figure.png").read_bytes()
    # Not by their names alone.
    photos = [("p/a.png", png()), ("p/a_mask.png", png())]
    pictures = [("p/report/a_figure.png", own), ("p/report/a-map.png", own)]
    found = collected(folder, archive(tmp_path / "in.zip", [*photos, *pictures]))
    assert [upload.name for upload in found] == ["a.png", "a_mask.png"]
    with pytest.raises(Refusal, match="only hidden ones and pictures of inspections"):
        collected(folder, archive(tmp_path / "own.zip", pictures))


@pytest.mark.parametrize(
    ("stored", "shown"),
    [
        ("零件.png".encode(), "零件.png"),
        ("Größe.png".encode("cp437"), "Größe.png"),
        (b"\xc1\xe3.png", "┴π.png"),  # in no encoding that could be known
    ],
)
def test_names_in_archives_are_read_whatever_made_them(tmp_path, folder, stored, shown):
    """Programs of macOS and Linux write UTF-8 without the flag that says so, older ones of Windows a code page."""
    path = archive(tmp_path / "in.zip", [("A" * len(stored), png()), ("plain.png", png())])
    path.write_bytes(path.read_bytes().replace(b"A" * len(stored), stored))
    assert [upload.name for upload in collected(folder, path)] == [shown, "plain.png"]
    flagged = archive(tmp_path / "flagged.zip", [(shown, png())])
    assert [upload.name for upload in collected(folder, flagged)] == [shown]


def test_a_picture_with_an_archive_at_its_end_is_a_picture(tmp_path, folder):
    path = tmp_path / "both.png"
    path.write_bytes(png() + archive(tmp_path / "a.zip", [("a.txt", "x")]).read_bytes())
    assert collected(folder, path) == [Upload("both.png", path)]


def test_equal_names_are_told_apart(tmp_path, folder):
    (tmp_path / "a").write_bytes(png())
    sent = ["a.png", "A.PNG", "a (2).png", "a.png", "noext", "noext"]
    names = [upload.name for upload in collect([Upload(name, tmp_path / "a") for name in sent], folder)]
    assert names == ["a.png", "A (2).PNG", "a (2) (2).png", "a (3).png", "noext", "noext (2)"]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"just some text", "not an image"),
        (b"", "empty"),
        (png()[:60], "damaged|not an image"),
        (b"RIFF\x00\x00\x00\x00WEBPVP8 ", "damaged|not an image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image"),
        (huge_png(60_000, 60_000), "px"),
        (huge_png(10_000, 6_000), "10000 x 6000 pixels"),
        (png(4), "too small"),
        (written("ICO"), "not an image"),
        (written("PCX"), "not an image"),
        (written("TGA"), "not an image"),
    ],
)
def test_unusable_images_are_named_by_their_sender_s_name_and_without_the_server_s_path(tmp_path, data, reason):
    path = tmp_path / "stored-0001"
    path.write_bytes(data)
    with pytest.raises(Refusal, match=reason) as caught:
        Upload("mine.png", path).image()
    assert str(caught.value).startswith("mine.png: ")
    assert str(tmp_path) not in str(caught.value) and "stored" not in str(caught.value)


@pytest.mark.parametrize("suffix", [".png", ".tiff"])
def test_values_of_a_camera_of_fewer_bits_are_said_to_be_read_as_dark(tmp_path, suffix):
    values, path = np.linspace(0, 1000, 64 * 64).reshape(64, 64).astype(np.uint16), tmp_path / f"grey{suffix}"
    Image.fromarray(values).save(path)
    note = Upload("camera", path).image()[1]
    assert "reaches only 1000 of 65535" in note and "values of 10 bits by 64" in note
    assert Upload("camera", path).image(1023)[1] == "", "it was told"
    Image.fromarray(values * 64).save(path)
    assert Upload("camera", path).image()[1] == ""
    path.write_bytes(b"P5 64 64 1023\n" + values.astype(">u2").tobytes())
    assert Upload("camera", path).image()[1] == "", "the file says what is white"


def test_what_a_model_is_told_of_its_camera_holds_for_uploads_too(tmp_path):
    path = tmp_path / "0001"
    Image.fromarray(np.full((20, 40), 4095, np.uint16)).save(path, "PNG")
    assert Upload("a.png", path).image()[0].max() == 16 and Upload("a.png", path).image(4095)[0].min() == 255
    path.write_bytes(written("TGA"))  # which only a name tells
    assert Upload("a.tga", path).image()[0].shape == (3, 32, 32)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "F"])
def test_every_mode_of_image_is_read(tmp_path, mode):
    Image.new(mode, (40, 20)).save(tmp_path / "a.tiff")
    assert Upload("a", tmp_path / "a.tiff").image()[0].shape == (3, 20, 40)


def test_settings_are_whole_numbers_in_range_or_left_to_the_model():
    assert Settings.read("", 1.0, None, " ", "") == Settings()
    assert Settings.read("7", "2", "0", 999.0, "64") == Settings(7, 2, 0, 999, 64)
    wrong = {"draws": (1000, 0), "seed": ("-1", ["5"]), "small": ("many",), "big": (1e30,), "resolution": (1e5, "100")}
    for name, value in [(name, value) for name, values in wrong.items() for value in values]:
        with pytest.raises(Refusal, match=rf"(?i){name}.* must be a"):
            Settings.read(**{name: value})


def test_other_things_are_no_numbers():
    assert number(1, "It", 0, 1) == 1.0
    for value in (True, -0.1, 1.1, float("nan"), "0.5", None, [0.5]):
        with pytest.raises(Refusal, match="It must be a number from 0 to 1"):
            number(value, "It", 0, 1)


def test_an_upload_is_called_what_its_sender_calls_it():
    path = Path("stored.png")
    assert upload_of({"path": str(path), "orig_name": "C:\\mine.png"}) == Upload("mine.png", path)
    assert uploads_of([{"path": str(path)}]) == [Upload("stored.png", path)] and uploads_of(None) == []
    for nothing in (None, {}, {"path": None}):
        with pytest.raises(Refusal, match="Choose an image first"):
            upload_of(nothing)


@pytest.fixture
def upload(tmp_path):
    path = tmp_path / ("0" * 64) / "photo.png"
    path.parent.mkdir()
    path.write_bytes(png())
    return path


def test_only_uploads_are_files_and_nothing_tells_what_else_is_there(tmp_path, upload):
    assert admit({"path": str(upload), "size": 3, "url": "x"}, tmp_path, True) == {
        "path": str(upload),
        "orig_name": None,
        "meta": {"_type": "gradio.FileData"},
    }
    secret = tmp_path / "secret.png"
    secret.write_bytes(png())
    (upload.parent / "link.png").symlink_to(secret)
    os.mkfifo(upload.parent / "pipe.png")
    elsewhere = tmp_path / "elsewhere" / ("0" * 64)
    elsewhere.mkdir(parents=True)
    (elsewhere / "photo.png").write_bytes(png())
    (tmp_path / ("1" * 64)).symlink_to(elsewhere)
    (tmp_path / "tmpabc").write_bytes(png())  # an upload that is not finished
    others = ["link.png", "pipe.png", "no-such.png", "../secret.png", "../" + "0" * 64 + "/photo.png", ".", "a\0b"]
    with open(upload) as opened:
        paths = [str(upload.parent / name) for name in others]
        paths += [f"/proc/self/fd/{opened.fileno()}", f"/proc/self/root{upload}", f"{upload.parent}", f"/{upload}"]
        paths += [str(elsewhere / "photo.png"), str(tmp_path / ("1" * 64) / "photo.png")]
        paths += [
            str(secret),
            str(tmp_path / "tmpabc"),
            "/etc/passwd",
            "/no/such",
            "",
            "x" * 5000,
            "file://" + str(upload),
        ]
        for path in paths:
            for value in ({"path": path}, [{"path": str(upload)}, {"path": path}]):
                with pytest.raises(Refusal, match="^This file is not among your uploads. Upload it again.$"):
                    admit(value, tmp_path, True)


def test_values_are_of_plain_types_and_files_where_files_belong(tmp_path, upload):
    for value in (None, True, 3, 0.5, "text"):
        assert admit(value, tmp_path, False) == value
    file = {"path": str(upload)}
    for value in (file, [1], {}, "x" * 5000, "a\ud800", "a\0", [[]], {"value": file}):
        with pytest.raises(Refusal, match="must be a number or a text"):
            admit(value, tmp_path, False)
    for value in ("text", 3, [file, "text"], [[file]], {"path": [str(upload)]}, {"path": {"path": str(upload)}}, {}):
        with pytest.raises(Refusal, match="must be given as an upload"):
            admit(value, tmp_path, True)
    with pytest.raises(Refusal, match="More than 500 files"):
        admit([file] * 501, tmp_path, True)


def test_cards_are_cut_where_they_would_take_a_parser_for_ever(tmp_path):
    card = tmp_path / "README.md"
    card.write_text("---\n" + "\n" * 100_000 + "a\r\r\r\rb")
    assert read_card(card) == "---\n\na\n\nb"
    card.write_text("x" * 300_000)
    with pytest.raises(ValueError, match="larger than 200 kB"):
        read_card(card)
