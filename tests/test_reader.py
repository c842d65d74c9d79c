"""dataReader.py: every image once an epoch, in an order that can be reached anywhere at once."""

import errno
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import complaint, photo, run, start
from PIL import Image

from dataReader import FaceReader, Problem, check_outside, grid, list_files, locked, replacing


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

    kill_leaves = ".faces-16-0123456789abcdef.npy", "..faces-16-0123456789abcdef.npy.tmp"
    users_own = [".my-faces-16-notes", ".faces-16-of-mine.npy", ".faces-16-0123456789abcdef-a.npy"]
    for name in kill_leaves + tuple(users_own[:2]):
        (folder / name).touch()
    (folder / users_own[2]).mkdir()
    photo(16, 16, 200).save(folder / "3.png")  # changed
    assert sorted(marks(FaceReader(folder, 16, 10, seed=0).epoch(1))) == [
        0, 1, 2, 4, 5, 6, 7, 8, 9, 10]
    for name in users_own:  # are left alone
        assert (folder / name).exists()
    (folder / users_own[1]).unlink()
    (folder / users_own[2]).rmdir()
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


def test_folder_without_an_image_is_no_folder_of_images(tmp_path):
    (tmp_path / "imgs").mkdir()
    (tmp_path / "imgs" / "notes.txt").write_text("not an image")
    for _ in range(2):
        with pytest.raises(Problem, match="imgs is no folder of images: .*--demo"):
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


def test_training_grid_shows_the_images(tmp_path, demo):
    (tmp_path / "imgs").symlink_to(demo / "imgs")
    run(tmp_path, "dataReader.py")
    picture = np.asarray(Image.open(tmp_path / "Output" / "training_images.png"))
    assert picture.shape == (662, 662, 3)
    known = {np.asarray(Image.open(path)).tobytes() for path in (demo / "imgs").glob("*.png")}
    cells = {picture[top:top + 64, left:left + 64].tobytes()
             for top in range(2, 662, 66) for left in range(2, 662, 66)}
    assert len(cells) == 100
    assert cells <= known


def test_training_grid_shows_what_the_networks_see(tmp_path, demo):
    (tmp_path / "imgs").symlink_to(demo / "imgs")
    cells = []
    for flags in [], ["--flip"]:
        run(tmp_path, "dataReader.py", *flags)
        picture = np.asarray(Image.open(tmp_path / "Output" / "training_images.png"))
        cells.append([picture[top:top + 64, left:left + 64]
                      for top in range(2, 662, 66) for left in range(2, 662, 66)])
    flipped = [not (cell == plain).all() for plain, cell in zip(*cells, strict=True)]
    assert 30 < sum(flipped) < 70
    for plain, cell, other in zip(*cells, flipped, strict=True):
        np.testing.assert_array_equal(cell, plain[:, ::-1] if other else plain)


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
    assert len(FaceReader(folder, 16, 1, seed=0).images) == 11
    assert "skipped" in capsys.readouterr().err


def test_what_cannot_be_read_is_named(folder, tmp_path, capsys):
    (folder / "self.png").symlink_to("self.png")
    deep = folder
    for _ in range(1200):  # deeper than Python calls itself
        deep = deep / "d"
        deep.mkdir()
    photo(16, 16, 200).save(deep / "deep.png")
    assert len(FaceReader(folder, 16, 1, seed=0).images) == 11
    printed = capsys.readouterr().err
    assert f"skipped {folder}/self.png: [Errno 40] Too many levels of symbolic links" in printed
    (deep / "deep.png").unlink()
    while deep != folder:  # shutil.rmtree gives up at this depth
        deep.rmdir()
        deep = deep.parent


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
