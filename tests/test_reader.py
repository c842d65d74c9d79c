"""dataReader.py: every image once an epoch, in an order that can be reached anywhere at once."""

import dataReader
from dataReader import (
    FaceReader,
    Problem,
    check_outside,
    grid,
    in_threads,
    list_files,
    locked,
    read_image,
    replacing,
)

import errno
import fcntl
import inspect
import os
import re
import shutil
import struct
import sys
import threading
import time
import warnings
import weakref
import zipfile
import zlib
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import complaint, photo, run, start
from PIL import Image
from PIL.ImageCms import ImageCmsProfile, createProfile
from PIL.PngImagePlugin import PngInfo


@pytest.fixture
def folder(tmp_path):
    """Ten 16×16 images; the blue of image k is 20·k."""
    (tmp_path / "imgs" / "more").mkdir(parents=True)
    for number in range(10):
        photo(16, 16, 20 * number).save(
            tmp_path / "imgs" / ("more" if number > 6 else "") / f"{number}.png")
    return tmp_path / "imgs"


def marks(batches):
    """Which images the batches hold, by their blue."""
    return [int(image[2, 0, 0]) // 20 for batch in batches for image in batch]


def test_batches_are_the_images(folder):
    reader = FaceReader(folder, 16, 5, seed=0)
    [first, second] = reader.epoch(1)
    assert first.shape == (5, 3, 16, 16)
    assert first.dtype == np.uint8
    for image in [*first, *second]:
        mark = int(image[2, 0, 0])
        np.testing.assert_array_equal(
            image.transpose(1, 2, 0), np.asarray(photo(16, 16, mark)))


def test_every_epoch_shows_every_image_once_in_its_own_order(folder):
    reader = FaceReader(folder, 16, 2, seed=0)
    orders = [marks(reader.epoch(epoch)) for epoch in (1, 2, 3)]
    assert [sorted(order) for order in orders] == [list(range(10))] * 3
    assert orders[0] != orders[1] != orders[2]
    assert marks(reader.epoch(2)) == orders[1]
    assert marks(FaceReader(folder, 16, 2, seed=1).epoch(1)) != orders[0]


def test_any_batch_can_be_reached_at_once(folder):
    reader = FaceReader(folder, 16, 2, seed=0)
    assert marks(reader.epoch(4, start=3)) == marks(reader.epoch(4))[6:]
    assert list(reader.epoch(4, start=5)) == []


@pytest.mark.parametrize("flip", [False, True])
def test_a_batch_is_reached_by_its_number_alone(folder, flip):
    reader = FaceReader(folder, 16, 2, seed=3, rank=1, world_size=2, flip=flip)
    for epoch, number in [(4, 1), (4, 0), (9, 1), (4, 1), (0, 0)]:
        # what an epoch's order and mirroring are, written out
        rng = np.random.default_rng([3, epoch])
        chosen = rng.permutation(10)[1::2][2 * number:2 * number + 2]
        mirrored = rng.random(10) < 0.5
        expected = [reader.images[k][:, :, ::-1] if flip and mirrored[k] else reader.images[k]
                    for k in chosen]
        np.testing.assert_array_equal(reader.batch(epoch, number), expected)
        np.testing.assert_array_equal(next(reader.epoch(epoch, number)), expected)


def test_flip_mirrors_half_of_the_images_others_in_each_epoch(folder):
    def mirrored(epoch, start=0):
        batches = list(FaceReader(folder, 16, 2, seed=0, flip=True).epoch(epoch, start))
        plain = list(FaceReader(folder, 16, 2, seed=0).epoch(epoch, start))
        found = []
        for image, old in zip(np.concatenate(batches), np.concatenate(plain), strict=True):
            found.append(not (image == old).all())
            np.testing.assert_array_equal(image, old[..., ::-1] if found[-1] else old)
        return found

    flips = [mirrored(epoch) for epoch in range(1, 21)]
    assert 0.35 < np.mean(flips) < 0.65
    assert len({tuple(epoch) for epoch in flips}) > 15
    assert mirrored(4, start=3) == flips[3][6:]
    both = [FaceReader(folder, 16, 1, 0, rank, 2, flip=True).epoch(1) for rank in range(2)]
    for one, rank in zip(FaceReader(folder, 16, 1, 0, flip=True).epoch(1), [0, 1] * 5, strict=True):
        np.testing.assert_array_equal(one, next(both[rank]))


def test_last_partial_batch_is_dropped(folder):
    reader = FaceReader(folder, 16, 4, seed=0)
    assert len(reader) == 2
    assert len(list(reader.epoch(1))) == 2


def test_ranks_share_an_epoch_without_overlap(folder):
    whole = marks(FaceReader(folder, 16, 1, seed=0).epoch(1))
    shares = [marks(FaceReader(folder, 16, 1, seed=0, rank=rank, world_size=3).epoch(1))
              for rank in range(3)]
    assert [len(share) for share in shares] == [3, 3, 3]
    assert [mark for step in zip(*shares, strict=True) for mark in step] == whole[:9]


def test_packed_file_is_used_again_and_noticed_when_stale(folder):
    def packs():
        return {path.name: path.stat().st_ino for path in folder.glob(".faces-*")}

    FaceReader(folder, 16, 5, seed=0)
    first = packs()
    FaceReader(folder, 16, 2, seed=1)
    assert packs() == first
    FaceReader(folder, 8, 2, seed=1)  # another size has a file of its own
    assert len(packs()) == 2
    assert first.items() <= packs().items()

    kill_leaves = ".faces-16.npy", "..faces-16.npy.tmp"
    users_own = ".my-faces-16-notes", ".faces-16-of-mine.npy"
    for name in kill_leaves + users_own:
        (folder / name).touch()
    photo(16, 16, 200).save(folder / "3.png")  # changed
    assert sorted(marks(FaceReader(folder, 16, 10, seed=0).epoch(1))) == [
        0, 1, 2, 4, 5, 6, 7, 8, 9, 10]
    for name in users_own:  # are left alone
        assert (folder / name).exists()
    (folder / users_own[1]).unlink()
    assert len(packs()) == 2
    assert not list(folder.glob(".*.tmp"))
    (folder / "3.png").unlink()  # removed
    assert len(FaceReader(folder, 16, 1, seed=0).images) == 9
    shutil.copy(folder / "4.png", folder / "44.png")  # added
    assert len(FaceReader(folder, 16, 1, seed=0).images) == 10


def test_images_of_any_size_are_resized_without_squashing(tmp_path):
    (tmp_path / "imgs").mkdir()
    # A white disc on black, in a wide photo and a tall one.
    for name, (width, height) in {"wide": (300, 200), "tall": (150, 400)}.items():
        y, x = np.mgrid[:height, :width]
        radius = min(width, height) * 0.4
        disc = (y - height / 2) ** 2 + (x - width / 2) ** 2 < radius**2
        Image.fromarray(np.where(disc, 255, 0).astype(np.uint8)).save(
            tmp_path / "imgs" / f"{name}.png")
    [batch] = FaceReader(tmp_path / "imgs", 32, 2, seed=0).epoch(1)
    for image in batch:
        lit = image[0] > 127
        assert abs(lit.any(0).sum() - 0.8 * 32) <= 1.5
        assert abs(lit.any(1).sum() - 0.8 * 32) <= 1.5
        assert ((image > 20) & (image < 235)).any()  # anti-aliased at the edge


def test_images_that_cannot_be_decoded_are_named_and_left_out(tmp_path, folder):
    (folder / "bad.png").write_bytes((folder / "1.png").read_bytes()[:60])
    (folder / "notes.txt").write_text("not an image")
    printed = run(tmp_path, "dataReader.py")
    assert "skipped imgs/bad.png: " in printed
    assert "skipped imgs/notes.txt: cannot identify image file" in printed
    assert "10 of 10 images" in printed


def test_folder_of_which_nothing_can_be_used_says_why_by_count(tmp_path):
    (tmp_path / "imgs").mkdir()
    for name in "notes.txt", "more.txt":
        (tmp_path / "imgs" / name).write_text("not an image")
    photo(16, 16).save(tmp_path / "imgs" / "cut.png")
    (tmp_path / "imgs" / "cut.png").write_bytes((tmp_path / "imgs" / "cut.png").read_bytes()[:60])
    for _ in range(2):
        with pytest.raises(Problem, match=r"imgs: no file could be used, of 3: cannot identify"
                                          r" image file \(2\), image file is truncated \(1\)$"):
            FaceReader(tmp_path / "imgs", 64, 1, seed=0)


@pytest.mark.parametrize("number", [0, 1, 50])
def test_too_few_images_are_counted_in_one_line(tmp_path, number):
    (tmp_path / "imgs").mkdir()
    for k in range(number):
        photo(64, 64, k).save(tmp_path / "imgs" / f"{k}.png")
    with pytest.raises(Problem) as error:
        FaceReader(tmp_path / "imgs", 64, 128, seed=0)
    message = str(error.value)
    assert "\n" not in message
    if number:
        assert f"{number} images" in message
        assert "128" in message
        assert f"--batch_size {number}" in message
    else:
        assert "--demo" in message
    assert not list((tmp_path / "imgs").glob(".*.tmp"))


def test_grid_is_near_square_upright_and_in_order():
    images = np.stack([np.asarray(photo(8, 8, 20 * k)).transpose(2, 0, 1) for k in range(7)])
    picture = grid(images)
    assert picture.shape == (3 * 10 + 2, 3 * 10 + 2, 3)
    for k in range(7):
        top, left = 2 + 10 * (k // 3), 2 + 10 * (k % 3)
        np.testing.assert_array_equal(
            picture[top:top + 8, left:left + 8], np.asarray(photo(8, 8, 20 * k)))
    assert (picture[-10:, 12:] == 255).all()  # the missing cells


def test_training_grid_shows_what_the_networks_see(tmp_path, demo):
    (tmp_path / "imgs").symlink_to(demo / "imgs")
    cells = []
    for flags in [], ["--flip"]:
        run(tmp_path, "dataReader.py", *flags)
        picture = np.asarray(Image.open(tmp_path / "Output" / "training_images.png"))
        assert picture.shape == (662, 662, 3)
        cells.append([picture[top:top + 64, left:left + 64]
                      for top in range(2, 662, 66) for left in range(2, 662, 66)])
    plain, flipped = cells
    known = {np.asarray(Image.open(path)).tobytes() for path in (demo / "imgs").glob("*.png")}
    assert len({cell.tobytes() for cell in plain} & known) == 100
    is_flipped = [not (cell == before).all() for cell, before in zip(flipped, plain, strict=True)]
    assert 30 < sum(is_flipped) < 70
    for before, cell, other in zip(plain, flipped, is_flipped, strict=True):
        np.testing.assert_array_equal(cell, before[:, ::-1] if other else before)


def test_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail():
        with replacing(path) as file:
            file.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert path.read_bytes() == b"old"
    with replacing(path) as file:
        file.write(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_two_processes_may_pack_at_once(tmp_path, demo):
    (tmp_path / "imgs").mkdir()
    for path in list((demo / "imgs").glob("*.png"))[:500]:
        shutil.copy(path, tmp_path / "imgs")
    processes = [start(tmp_path, "dataReader.py", "--output_path", f"Output{k}") for k in (1, 2)]
    for process in processes:
        assert "100 of 500 images" in process.communicate(timeout=60)[0]
    assert (Image.open(tmp_path / "Output1" / "training_images.png").tobytes()
            == Image.open(tmp_path / "Output2" / "training_images.png").tobytes())
    assert [path.suffix for path in (tmp_path / "imgs").glob(".*")] == [".npy"]


def test_digest_tells_datasets_apart_and_damage_is_one_line(folder, tmp_path):
    first = FaceReader(folder, 16, 10, seed=0)
    shutil.copytree(folder, tmp_path / "copy", ignore=shutil.ignore_patterns(".*"))
    assert FaceReader(tmp_path / "copy", 16, 10, seed=0).digest == first.digest
    photo(16, 16, 200).save(tmp_path / "copy" / "3.png")
    assert FaceReader(tmp_path / "copy", 16, 10, seed=0).digest != first.digest
    [pack] = folder.glob(".faces-*")
    assert np.load(pack, mmap_mode="r").shape == (10, 3, 16, 16)
    assert pack.stem.endswith(first.digest)
    whole = pack.read_bytes()
    for damaged in b"", whole[:100], whole[:-1]:
        pack.write_bytes(damaged)
        with pytest.raises(Problem, match="is damaged: remove it"):
            FaceReader(folder, 16, 10, seed=0)


def test_links_in_the_folder(folder, tmp_path, capsys):
    (folder / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (folder / "more" / "up").symlink_to(folder)
    (tmp_path / "other").mkdir()
    photo(16, 16, 200).save(tmp_path / "other" / "10.png")
    (folder / "linked.png").symlink_to(tmp_path / "other" / "10.png")
    images = FaceReader(folder, 16, 1, seed=0).images
    assert sorted(images[:, 2, 0, 0] // 20) == list(range(11))
    assert [line for line in capsys.readouterr().err.splitlines() if "skipped" in line] == [
        f"skipped {folder}/gone.png: No such file or directory"]


def test_only_regular_files_are_read_and_what_cannot_be_read_is_named(folder, tmp_path, capsys):
    os.mkfifo(folder / "pipe.png")
    # a reader of it would wait for ever: so that the test fails then, and does not hang
    writer = threading.Timer(10, lambda: os.close(os.open(folder / "pipe.png", os.O_RDWR)))
    writer.start()
    (folder / "null.png").symlink_to("/dev/zero")
    (folder / "self.png").symlink_to("self.png")
    assert len(FaceReader(folder, 16, 1, seed=0).images) == 10
    writer.cancel()
    printed = capsys.readouterr().err
    for name, why in [("pipe", "not a regular file"), ("null", "not a regular file"),
                      ("self", "Too many levels of symbolic links")]:
        assert f"skipped {folder}/{name}.png: {why}" in printed


def test_folders_may_be_nested_deeper_than_python_calls_itself(folder):
    names = ["d"] * 300
    (folder / "/".join(names)).mkdir(parents=True)
    photo(16, 16, 200).save(folder / "/".join([*names, "deep.png"]))
    usual = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack()) + 100)
    try:
        paths = list_files(folder)
    finally:
        sys.setrecursionlimit(usual)
    assert "/".join([*names, "deep.png"]) in paths
    assert len(paths) == 11


def test_folders_that_cannot_be_read_are_named(folder, monkeypatch, capsys):
    def scandir(path, real=os.scandir):  # root may look into any folder, so no mode forbids it
        if str(path).rstrip("/").endswith("more"):
            raise PermissionError(13, "Permission denied", path)
        return real(path)

    (folder / "more").rename(folder / "\033[31mmore")
    monkeypatch.setattr("os.scandir", scandir)
    assert list_files(folder) == [f"{number}.png" for number in range(7)]
    assert r"skipped the folder \x1b[31mmore: Permission denied" in capsys.readouterr().err
    with pytest.raises(PermissionError):
        list_files(folder / "\033[31mmore")


def test_files_that_may_not_be_looked_at_are_named_and_the_others_read(
        folder, monkeypatch, capsys):
    def stat(path, *flags, real=os.stat, **more):  # as in a folder of mode 444
        if "more/" in str(path):
            raise PermissionError(13, "Permission denied", path)
        return real(path, *flags, **more)

    monkeypatch.setattr("os.stat", stat)
    assert len(FaceReader(folder, 16, 1, seed=0).images) == 7
    assert f"skipped {folder}/more/7.png: Permission denied" in capsys.readouterr().err


def test_images_that_come_while_it_waits_for_the_lock_are_packed_too(folder):
    with locked(folder):
        process = start(folder.parent, "dataReader.py")
        wait_for_line(process.stderr, "waiting for another process")
        photo(16, 16, 200).save(folder / "10.png")
    assert "11 of 11 images" in process.communicate(timeout=60)[0]


def wait_for_line(file, text):
    for line in file:
        if text in line:
            return
    pytest.fail(f"no line with {text}")


def test_file_system_without_locks_is_used_and_named(folder, monkeypatch, capsys):
    def flock(descriptor, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", flock)
    assert len(FaceReader(folder, 16, 1, seed=0).images) == 10
    assert "cannot be locked (No locks available): start no second" in capsys.readouterr().err


@pytest.mark.parametrize("output", ["imgs", "imgs/more/out", "linked/out"])
def test_output_among_the_images_is_refused(folder, output, monkeypatch):
    monkeypatch.chdir(folder.parent)
    Path("linked").symlink_to("imgs")
    with pytest.raises(Problem, match=f"{output} lies in imgs: "):
        check_outside(output, "imgs")
    check_outside("imgs2", "imgs")
    assert "lies in" in complaint(folder.parent, "dataReader.py", "--output_path", output)


def test_names_in_any_encoding_are_read_and_printed(tmp_path):
    folder = tmp_path / os.fsdecode("照片".encode() + "人".encode("gbk"))
    folder.mkdir()
    for number in range(2):  # two names that are one where bytes that are not UTF-8 become "?"
        photo(16, 16, 20 * number).save(folder / os.fsdecode(bytes([200 + number]) + b".png"))
    printed = run(tmp_path, "dataReader.py", "--data_path", folder, "--output_path", folder.name
                  + "out", env={**os.environ, "PYTHONIOENCODING": "latin-1"})
    assert r"2 of 2 images in \u7167" in printed


def test_missing_folder_is_one_line_that_says_how_to_get_data(tmp_path):
    line = complaint(tmp_path, "dataReader.py")
    assert "imgs is no folder of images" in line
    assert "python pretreat.py --demo" in line


def png_chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, rest, colour_type=2, bits=8):
    """A PNG's bytes, its header chunk followed by others."""
    header = struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + rest + png_chunk(b"IEND", b"")


def test_postscript_under_another_name_is_not_run(tmp_path):
    (tmp_path / "photo.jpg").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n")
    with pytest.raises(ValueError, match="^cannot identify image file$"):
        read_image(tmp_path / "photo.jpg")


def test_heic_is_read_by_pillow_heif_or_says_that_it_is_needed(tmp_path, monkeypatch):
    path = tmp_path / "IMG_1.HEIC"
    path.write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        archive.write(path, "photos/IMG_1.HEIC")
    dataReader.formats.cache_clear()
    monkeypatch.setitem(sys.modules, "pillow_heif", None)  # as if not installed
    monkeypatch.delitem(Image.OPEN, "HEIF", raising=False)
    with zipfile.ZipFile(tmp_path / "photos.zip") as archive:
        for source in path, archive.open("photos/IMG_1.HEIC"):
            with pytest.raises(ValueError, match="HEIC, .* `python -m pip install pillow-heif`"):
                read_image(source)

    def register_heif_opener():  # a stand-in for the package
        Image.register_open("HEIF", lambda file, name: photo(16, 16, 200),
                            lambda start: start[4:12] == b"ftypheic")

    monkeypatch.setitem(
        sys.modules, "pillow_heif", SimpleNamespace(register_heif_opener=register_heif_opener))
    dataReader.formats.cache_clear()
    np.testing.assert_array_equal(read_image(path), photo(16, 16, 200))
    dataReader.formats.cache_clear()


def test_metadata_decides_nothing_but_the_orientation(tmp_path):
    info = PngInfo()
    info.add_text("workflow", "x" * 2_000_000, zip=True)
    photo().save(tmp_path / "text.png", pnginfo=info)
    np.testing.assert_array_equal(read_image(tmp_path / "text.png"), photo())
    photo().save(tmp_path / "profile.png", icc_profile=bytes(2_000_000))
    np.testing.assert_array_equal(read_image(tmp_path / "profile.png"), photo())
    # a resolution below 0, which cannot be written again, and orientation 6
    exif = b"Exif\0\0" + struct.pack("<2sHIHHHIHHHHIIIii", b"II", 42, 8, 2, 0x0112, 3, 1, 6, 0,
                                      0x011a, 10, 1, 38, 0, -1, 1)
    photo().transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    np.testing.assert_array_equal(read_image(tmp_path / "turned.png"), photo())
    photo().transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.jpg", exif=exif,
                                                      quality=95)
    difference = np.asarray(read_image(tmp_path / "turned.jpg")).astype(int) - np.asarray(photo())
    assert abs(difference).max() < 10
    photo().save(tmp_path / "damaged.png", exif=b"Exif\0\0damaged")
    np.testing.assert_array_equal(read_image(tmp_path / "damaged.png"), photo())


def test_too_large_an_image_is_left_out_by_name_before_it_is_decoded(folder, capsys):
    (folder / "huge.png").write_bytes(png(100_000, 100_000, png_chunk(b"IDAT", b"")))
    assert len(FaceReader(folder, 16, 1, seed=0).images) == 10
    assert re.search(r"huge.png: its 100000×100000 pixels are too many for this computer's memory"
                     r" \(\d+ megapixels at most\)", capsys.readouterr().err)


@pytest.mark.parametrize(("memory", "address_space", "container", "megapixels"), [
    (2**33, -1, "max", 2**28 // 10**6),  # of a 200-megapixel phone: 8 GB
    (2**40, -1, "max", 2**29 // 10**6),
    (2**33, 3_200_000_000, "max", 100),
    (2**33, -1, "1600000000", 50),
])
def test_limit_of_pixels_goes_by_the_memory(
        memory, address_space, container, megapixels, monkeypatch):
    sizes = {"SC_PHYS_PAGES": memory // 4096, "SC_PAGE_SIZE": 4096}
    monkeypatch.setattr("os.sysconf", sizes.get)
    monkeypatch.setattr("resource.getrlimit", lambda _: (address_space, -1))
    monkeypatch.setattr("pathlib.Path.read_text", lambda path: f"{container}\n")
    assert dataReader.most_pixels.__wrapped__() // 10**6 == megapixels


@pytest.mark.parametrize(("large", "memory", "expected"), [
    (2**25, 2**28, 4), (16 * 16 - 1, 2**28, 1), (2**25, 8 * 16 * 16 - 1, 1)])
def test_large_images_are_decoded_one_at_a_time(folder, large, memory, expected, monkeypatch):
    at_work = []
    most = []
    meeting = threading.Barrier(expected)

    def to_rgb(image):
        at_work.append(image)
        meeting.wait(timeout=60)
        time.sleep(0.01)
        most.append(len(at_work))
        meeting.wait(timeout=60)
        at_work.pop()
        return photo(16, 16)

    monkeypatch.setattr("dataReader.to_rgb", to_rgb)
    monkeypatch.setattr("dataReader.THREADS", 4)
    monkeypatch.setattr("dataReader.LARGE", large)
    monkeypatch.setattr("dataReader.most_pixels", lambda: memory)
    files = [*(f"{k}.png" for k in range(7)), "more/7.png"]
    dataReader.pack(folder, files, 16, ".faces")
    assert max(most) == expected
    assert len(most) == len(files)


def test_an_icon_is_refused_before_its_image_is_decoded(tmp_path):
    photo(64, 64).save(tmp_path / "favicon.ico")
    with pytest.raises(ValueError, match="^cannot identify image file$"):
        read_image(tmp_path / "favicon.ico")


def test_packed_file_is_opened_while_no_other_process_may_remove_it(folder, monkeypatch):
    def load(path, real=np.load, **flags):
        descriptor = os.open(folder, os.O_RDONLY)
        with pytest.raises(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(descriptor)
        return real(path, **flags)

    monkeypatch.setattr("numpy.load", load)
    assert len(FaceReader(folder, 16, 1, seed=0).images) == 10


def test_lack_of_memory_ends_packing_and_names_the_image(folder, monkeypatch):
    def read(path, real=read_image):
        if path.endswith("5.png"):
            raise MemoryError
        return real(path)

    monkeypatch.setattr("dataReader.read_image", read)
    with pytest.raises(Problem, match=r"^memory ran out at \S*/5.png: end other programs, or"
                                      " move that file elsewhere$"):
        FaceReader(folder, 16, 1, seed=0)
    assert not list(folder.glob(".*"))


RAMP = np.linspace(0, 1, 256).reshape(16, 16)


@pytest.mark.parametrize(("levels", "expected"), [
    (RAMP.astype(np.float32), RAMP * 255),
    ((RAMP * 255).astype(np.float32), RAMP * 255),
    ((RAMP * 65535).astype(np.float32), RAMP * 255),
    ((RAMP * 3).astype(np.float32), RAMP * 255),             # light above white
    ((RAMP / 100).astype(np.float32), RAMP * 255),
    ((RAMP * 2 - 1).astype(np.float32), RAMP * 255),         # as a GAN's
    (np.where(RAMP > 0.5, np.nan, RAMP).astype(np.float32), np.where(RAMP > 0.5, 0, RAMP * 510)),
    ((RAMP * 65535).astype(np.uint16), RAMP * 255),
    ((RAMP * 30000).astype(np.uint16), RAMP * 30000 / 257),  # a dark photo stays dark
    ((RAMP * 4095).astype(np.uint16), RAMP * 255),
    ((RAMP * 1023).astype(np.uint16), RAMP * 255),
    ((RAMP * 255).astype(np.uint16), RAMP * 255),
    ((RAMP * 255).astype(np.int32), RAMP * 255),
    ((RAMP * 65535).astype(np.int32), RAMP * 255),
    ((RAMP * 2e9).astype(np.int32), RAMP * 255),
])
def test_levels_of_any_depth_are_scaled_by_what_they_hold(tmp_path, levels, expected):
    if levels.dtype == np.float32 and np.isnan(levels).any():
        expected = expected / 2  # up to 0.5 only: a range of 0 to 1
    Image.fromarray(levels).save(tmp_path / "levels.tif")
    read = np.asarray(read_image(tmp_path / "levels.tif")).astype(float)
    assert abs(read - expected[..., None]).max() <= 1.1


def test_all_levels_of_16_bits_are_rounded_as_before(tmp_path):
    levels = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    Image.fromarray(levels).save(tmp_path / "levels.png")
    expected = (levels / 257 + 0.5).astype(np.uint8)
    np.testing.assert_array_equal(np.asarray(read_image(tmp_path / "levels.png"))[..., 0], expected)


def test_images_that_come_out_nearly_black_are_named(folder, capsys):
    for name in "dark.png", "more/night.png":
        Image.new("RGB", (16, 16), (15, 3, 9)).save(folder / name)
    lit = Image.new("RGB", (16, 16))
    lit.putpixel((0, 15), (0, 16, 0))
    lit.save(folder / "lit.png")
    FaceReader(folder, 16, 1, seed=0)
    lines = [line for line in capsys.readouterr().err.splitlines() if "nearly black" in line]
    assert sorted(lines) == [
        f"{folder}/dark.png: it is nearly black", f"{folder}/more/night.png: it is nearly black"]


def test_transparent_colour_of_16_bits_shows_white(tmp_path):
    levels = np.full((16, 16), 30000, np.uint16)
    levels[:, :8] = 12345
    Image.fromarray(levels).save(tmp_path / "grey.png", transparency=12345)
    grey = np.asarray(read_image(tmp_path / "grey.png"))
    assert (grey[:, :8] == 255).all()
    assert (grey[:, 8:] == round(30000 / 257)).all()
    rows = (b"\0" + struct.pack(">3H", 12345, 20000, 40000) * 8
            + struct.pack(">3H", 1000, 65535, 30000) * 8) * 16
    (tmp_path / "colour.png").write_bytes(png(16, 16, png_chunk(
        b"tRNS", struct.pack(">3H", 12345, 20000, 40000)) + png_chunk(b"IDAT", zlib.compress(rows)),
        bits=16))
    colour = np.asarray(read_image(tmp_path / "colour.png"))
    assert (colour[:, :8] == 255).all()
    assert (abs(colour[:, 8:].astype(int) - [1000 // 257, 255, 30000 // 257]) <= 1).all()


SRGB = np.array([[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061],
                 [0.01392, 0.09708, 0.71410]])  # to XYZ under D50, the columns red, green, blue
DISPLAY_P3 = np.array([[0.51512, 0.29198, 0.15710], [0.24120, 0.69225, 0.06657],
                       [-0.00105, 0.04189, 0.78407]])


def profile_of(primaries, name):
    """Pillow's sRGB profile with other primaries, and a name of 13 letters."""
    data = ImageCmsProfile(createProfile("sRGB")).tobytes()
    assert data.count("sRGB built-in".encode("utf-16-be")) == 1
    data = bytearray(data.replace(
        "sRGB built-in".encode("utf-16-be"), name.encode("utf-16-be")))
    for number, tag in enumerate([b"rXYZ", b"gXYZ", b"bXYZ"]):
        entry = data.index(tag, 128)
        start = int.from_bytes(data[entry + 4:entry + 8], "big")
        data[start + 8:start + 20] = (primaries[:, number] * 65536).round().astype(">i4").tobytes()
    return bytes(data)


def test_colours_are_converted_to_srgb(tmp_path):
    # a photo in Display P3, as iPhones write, of colours that sRGB has too
    seen = np.random.default_rng(0).integers(60, 190, (32, 32, 3)) / 255
    linear = np.where(seen <= 0.04045, seen / 12.92, ((seen + 0.055) / 1.055) ** 2.4)
    linear = linear @ SRGB.T @ np.linalg.inv(DISPLAY_P3).T
    encoded = np.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055)
    image = Image.fromarray((encoded * 255).round().astype(np.uint8))
    seen = (seen * 255).round()
    assert abs(np.asarray(image) - seen).mean() > 3
    p3 = profile_of(DISPLAY_P3, "Display P3   ")
    for name, saved in [("rgb.png", image), ("alpha.png", image.convert("RGBA")),
                        ("lossy.webp", image)]:
        saved.save(tmp_path / name, icc_profile=p3, lossless=True)
        assert abs(np.asarray(read_image(tmp_path / name)) - seen).mean() < 0.6, name
    for profile in profile_of(SRGB, "sRGB of yours"), b"damaged":  # changes nothing
        image.save(tmp_path / "plain.png", icc_profile=profile)
        np.testing.assert_array_equal(read_image(tmp_path / "plain.png"), image)


def test_warnings_name_their_image(folder, capsys):
    def decode(path):
        if path.endswith(("5.png", "7.png")):
            warnings.warn("Corrupt EXIF data", stacklevel=1)
        return path

    before = warnings.showwarning
    paths = [f"{folder}/{number}.png" for number in range(10)]
    assert list(in_threads(decode, paths, "reading", 2, Counter())) == paths
    printed = capsys.readouterr().err
    assert f"{folder}/5.png: Corrupt EXIF data" in printed
    assert f"{folder}/7.png: Corrupt EXIF data" in printed
    assert warnings.showwarning is before


def test_what_an_item_had_decoded_is_gone_when_it_has_failed():
    class Decoded:
        pass

    decoded = []
    gone = threading.Event()

    def decode(path):
        if path == "first.png":  # the others wait for it, as results come in order
            assert gone.wait(20)
            return path
        image = Decoded()
        decoded.append(weakref.ref(image, lambda _: gone.set()))
        raise ValueError("no image")

    assert list(in_threads(decode, ["first.png", "a.png", "b.png"], "reading", 2, Counter())) == [
        "first.png"]
    assert len(decoded) == 2


def test_an_error_without_a_text_is_counted_by_its_kind(capsys):
    def decode(path):
        raise EOFError

    reasons = Counter()
    assert not list(in_threads(decode, ["a.png", "b.png"], "reading", 1, reasons))
    assert "skipped a.png: EOFError" in capsys.readouterr().err
    assert reasons == {"EOFError": 2}
