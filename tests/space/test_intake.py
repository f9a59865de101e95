"""Nothing that a visitor sends may write, read or fill what is not theirs; and every refusal says why."""

import io
import stat
import struct
import zipfile
import zlib
from dataclasses import replace

import pytest
from PIL import Image

from diffusionad_hf.space.intake import (
    LIMITS,
    Refusal,
    Settings,
    Upload,
    collect,
    number,
    shown_name,
    upload_of,
    uploads_of,
)


def png(side=32, mode="RGB"):
    buffer = io.BytesIO()
    Image.new(mode, (side, side)).save(buffer, "PNG")
    return buffer.getvalue()


def archive(path, members, **kwargs):
    with zipfile.ZipFile(path, "w", **kwargs) as bundle:
        for name, data in members:
            bundle.writestr(name, data)
    return path


def huge_png(width, height):
    """A PNG of a few bytes that declares any number of pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "unpacked").mkdir()
    return tmp_path / "unpacked"


def test_hostile_names_are_flattened_and_never_used_as_paths(tmp_path, folder):
    names = {
        "../../evil.png": "evil.png",
        "/etc/passwd.png": "passwd.png",
        "..\\..\\win.png": "win.png",
        "a/b/c.png": "c.png",
        "c.png": "c (2).png",
        "x\u202egnp.png": "xgnp.png",
        "n\x07.png": "n.png",
    }
    path = archive(tmp_path / "in.zip", [(name, png()) for name in names])
    uploads = collect([Upload("in.zip", path)], folder)
    assert [upload.name for upload in uploads] == list(names.values())
    assert {u.path.parent for u in uploads} == {folder}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.zip", "unpacked"]


def test_links_encrypted_nested_and_damaged_members_are_rows_that_say_why(tmp_path, folder):
    path = tmp_path / "in.zip"
    link = zipfile.ZipInfo("link.png")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    inner = archive(tmp_path / "inner.zip", [("a.png", png())]).read_bytes()
    archive(path, [(link, "/etc/passwd"), ("inner.zip", inner), ("secret.png", png()), ("bad.png", b"B" * 5000)])
    data = bytearray(path.read_bytes())
    # The flags of a member, in its own header and in the archive's list, say that it is encrypted.
    for find, before_name, flags in ((data.find, 30, 6), (data.rfind, 46, 8)):
        data[find(b"secret.png") - before_name + flags] |= 1
    spoilt = data.find(b"B" * 5000)
    data[spoilt] = 0  # its checksum is wrong now
    path.write_bytes(data)
    uploads = {u.name: u for u in collect([Upload("in.zip", path)], folder)}
    assert "not followed" in uploads["link.png"].error
    assert "archive inside" in uploads["inner.zip"].error
    assert "encrypted" in uploads["secret.png"].error
    assert "damaged" in uploads["bad.png"].error
    assert not list(folder.iterdir()), "what is not used is not kept"


def test_a_zip_bomb_is_refused_before_it_is_unpacked(tmp_path, folder, monkeypatch):
    zeros = b"\0" * 1_000_000
    path = archive(tmp_path / "bomb.zip", [(f"{i}.png", zeros) for i in range(11)], compression=zipfile.ZIP_DEFLATED)
    monkeypatch.setattr("diffusionad_hf.space.intake.LIMITS", replace(LIMITS, unpacked_bytes=10_000_000))
    with pytest.raises(Refusal, match="bomb.zip: unpacks to 10 MB"):
        collect([Upload("bomb.zip", path)], folder)
    assert not list(folder.iterdir())


def test_an_archive_that_lies_about_sizes_writes_no_more_than_it_declares(tmp_path, folder):
    path = archive(tmp_path / "lie.zip", [("a.png", b"\0" * 10_000_000)], compression=zipfile.ZIP_DEFLATED)
    data = path.read_bytes()
    path.write_bytes(data.replace(struct.pack("<I", 10_000_000), struct.pack("<I", 1000)))
    (upload,) = collect([Upload("lie.zip", path)], folder)
    assert "damaged" in upload.error
    assert sum(f.stat().st_size for f in folder.iterdir()) == 0


def test_the_number_of_files_is_limited_over_archives_and_files(tmp_path, folder):
    path = archive(tmp_path / "many.zip", [(f"{i}.png", b"") for i in range(1000)])
    with pytest.raises(Refusal, match=f"More than {LIMITS.files} files"):
        collect([Upload("many.zip", path)], folder)
    with pytest.raises(Refusal, match=f"More than {LIMITS.files} files"):
        collect([Upload("x.png", path.with_name("x.png"))] * 1000, folder)


def test_nothing_usable_says_so(tmp_path, folder):
    with pytest.raises(Refusal, match="Choose images"):
        collect([], folder)
    empty = archive(tmp_path / "empty.zip", [("__MACOSX/._a.png", b"x"), (".DS_Store", b"x")])
    with pytest.raises(Refusal, match="empty.zip: the archive holds no files"):
        collect([Upload("empty.zip", empty)], folder)


def test_a_picture_with_an_archive_at_its_end_is_a_picture(tmp_path, folder):
    path = tmp_path / "both.png"
    path.write_bytes(png() + archive(tmp_path / "a.zip", [("a.txt", "x")]).read_bytes())
    (upload,) = collect([Upload("both.png", path)], folder)
    assert upload.path == path and not upload.error


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
    ],
)
def test_unusable_images_are_named_by_their_sender_s_name_and_without_the_server_s_path(tmp_path, data, reason):
    path = tmp_path / "stored-0001"
    path.write_bytes(data)
    with pytest.raises(Refusal, match=reason) as caught:
        Upload("mine.png", path).image()
    assert str(caught.value).startswith("mine.png: ")
    assert str(tmp_path) not in str(caught.value) and "stored" not in str(caught.value)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "F"])
def test_every_mode_of_image_is_read(tmp_path, mode):
    path = tmp_path / "a.tiff"
    Image.new(mode, (40, 20)).save(path)
    assert Upload("a", path).image().shape == (3, 20, 40)


def test_shown_names_are_short_and_plain():
    assert shown_name("C:\\photos\\a.png") == "a.png"
    assert len(shown_name("x" * 5000 + ".png")) <= 120 and shown_name("x" * 5000 + ".png").endswith(".png")
    assert shown_name("../..") == ".."
    assert shown_name("a\nb\x00.png") == "ab.png"


@pytest.mark.parametrize(
    ("entered", "reason"),
    [
        ({"draws": 1000}, "Noise draws must be a whole number from 1 to 16"),
        ({"draws": 0}, "Noise draws"),
        ({"seed": "-1"}, "The seed"),
        ({"small": "many"}, "The small timestep"),
        ({"big": 1e30}, "The big timestep"),
        ({"resolution": 100_000}, "The resolution"),
        ({"resolution": "100"}, "a multiple of 32"),
        ({"seed": ["5"]}, "The seed"),
    ],
)
def test_settings_out_of_range_are_refused(entered, reason):
    with pytest.raises(Refusal, match=reason):
        Settings.read(**entered)


def test_settings_that_are_left_empty_are_the_model_s():
    assert Settings.read("", 1.0, None, " ", "") == Settings()
    assert Settings.read("7", "2", "0", 999.0, "64") == Settings(7, 2, 0, 999, 64)


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan"), "0.5", None, [0.5]])
def test_other_things_are_no_numbers(value):
    assert number(1, "It", 0, 1) == 1.0
    with pytest.raises(Refusal, match="It must be a number from 0 to 1"):
        number(value, "It", 0, 1)


def test_an_upload_is_called_what_its_sender_calls_it(tmp_path):
    path = tmp_path / "stored.png"
    assert upload_of({"path": str(path), "orig_name": "C:\\mine.png"}) == Upload("mine.png", path)
    assert uploads_of([{"path": str(path)}]) == [Upload("stored.png", path)] and uploads_of(None) == []
    for nothing in (None, {}, {"path": None}):
        with pytest.raises(Refusal, match="Choose an image first"):
            upload_of(nothing)
