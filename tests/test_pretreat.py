"""pretreat.py: photos become correct upright RGB crops, and no bad file stops the others."""

from dataReader import Problem, save_png
from pretreat import crop_all, crop_face, find_photos

import io
import os
import re
import shutil
import zipfile

import numpy as np
import pytest
from conftest import complaint, photo, run, start
from PIL import Image


def crops(folder):
    return {path.name: np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))}


def reference(image):
    """The tutorial's crop, by PIL."""
    return np.asarray(image.resize((64, 78), Image.Resampling.BILINEAR).crop((0, 10, 64, 74)))


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "img_align_celeba"
    folder.mkdir()
    for number in range(4):
        photo(mark=60 * number).save(folder / f"{number:06d}.jpg", quality=95)
    return folder


def test_crop_is_pixel_exact_and_lossless(tmp_path, photos):
    printed = run(tmp_path, "pretreat.py")
    assert "imgs: 4 written, 0 already there, 0 skipped" in printed
    made = crops(tmp_path / "imgs")
    assert sorted(made) == [f"{number:06d}.png" for number in range(4)]
    for name, pixels in made.items():
        source = Image.open(photos / name.replace("png", "jpg"))
        np.testing.assert_array_equal(pixels, reference(source))


def test_zip_is_read_in_place_and_found_by_default(tmp_path, photos):
    run(tmp_path, "pretreat.py", "--output", "from_folder")
    with zipfile.ZipFile(tmp_path / "img_align_celeba.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for path in photos.iterdir():
            archive.write(path, f"img_align_celeba/{path.name}")
        archive.writestr("__MACOSX/img_align_celeba/._000000.jpg", b"finder")
    for path in photos.iterdir():
        path.unlink()
    photos.rmdir()
    assert "4 written, 0 already there, 0 skipped" in run(tmp_path, "pretreat.py")
    assert not photos.exists()
    expected = crops(tmp_path / "from_folder")
    for name, pixels in crops(tmp_path / "imgs").items():
        np.testing.assert_array_equal(pixels, expected.pop(name))
    assert not expected


def test_threads_read_one_zip_side_by_side(tmp_path):
    with zipfile.ZipFile(tmp_path / "img_align_celeba.zip", "w") as archive:
        for number in range(400):
            file = io.BytesIO()
            photo(mark=number).save(file, "PNG")
            archive.writestr(f"{number:03d}.jpg", file.getvalue())  # for its name; it is a PNG
    assert "400 written" in run(tmp_path, "pretreat.py", "--threads", 4)
    for number in range(400):
        crop = np.asarray(Image.open(tmp_path / "imgs" / f"{number:03d}.png"))
        assert (crop[..., 2] == number % 256).all()


def test_crop_leaves_the_metadata_behind(tmp_path):
    (tmp_path / "in").mkdir()
    photo().save(tmp_path / "in" / "1.jpg", icc_profile=b"profile" * 1000, comment=b"mine")
    run(tmp_path, "pretreat.py", "--input", "in")
    with Image.open(tmp_path / "imgs" / "1.png") as crop:
        assert crop.info.keys() == {"origin"}  # digests and numbers: no name, no folder
        assert re.fullmatch(r"64 [0-9a-f]{40} \d+-\d+", crop.info["origin"])


def test_two_runs_at_once_do_no_harm(tmp_path, photos):
    for number in range(4, 200):
        photo(mark=number).save(photos / f"{number:06d}.jpg")
    runs = [start(tmp_path, "pretreat.py") for _ in range(3)]
    for process in runs:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        assert "0 skipped" in out
    assert {pixels.shape for pixels in crops(tmp_path / "imgs").values()} == {(64, 64, 3)}
    assert not list((tmp_path / "imgs").glob(".*"))


def test_second_run_continues(tmp_path, photos):
    run(tmp_path, "pretreat.py")
    before = crops(tmp_path / "imgs")
    (tmp_path / "imgs" / "000002.png").unlink()
    photo().save(photos / "new.jpg")
    assert "2 written, 3 already there, 0 skipped" in run(tmp_path, "pretreat.py")
    after = crops(tmp_path / "imgs")
    assert after.pop("new.png").shape == (64, 64, 3)
    assert after.keys() == before.keys()
    np.testing.assert_array_equal(after["000002.png"], before["000002.png"])


@pytest.mark.parametrize(
    "size", [(178, 218), (300, 200), (200, 300), (500, 500), (64, 64), (20, 30)])
@pytest.mark.parametrize("image_size", [32, 64, 128])
def test_box_lies_inside_photos_of_any_shape(size, image_size):
    image = photo(*size)
    pixels = np.asarray(crop_face(image, image_size)).astype(int)
    assert pixels.shape == (image_size, image_size, 3)
    # The photo's red grows down and its green to the right: a crop that reached outside would be
    # black there; a transposed or turned one would grow the wrong way.
    assert (pixels[-1, :, 0] > pixels[0, :, 0] + 60).all()
    assert (pixels[:, -1, 1] > pixels[:, 0, 1] + 60).all()
    # centred across the width
    assert abs(pixels[:, 0, 1] + pixels[:, -1, 1] - 255).max() <= 16


def save_cmyk(path):
    photo().convert("CMYK").save(path, quality=95)


def save_grey16(path):
    levels = np.asarray(photo().convert("L")).astype(np.uint16) * 257
    Image.fromarray(levels).save(path)


def save_palette(path):
    photo().convert("P", palette=Image.Palette.ADAPTIVE, colors=256).save(path)


def save_rgba(path):
    image = photo().convert("RGBA")
    alpha = np.full((218, 178), 255, np.uint8)
    alpha[:, :89] = 0
    image.putalpha(Image.fromarray(alpha))
    image.save(path)


def save_exif(path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright: turn 90° clockwise to see it right
    photo().transpose(Image.Transpose.ROTATE_90).save(path, exif=exif, quality=95)


def white_left(pixels):
    pixels = pixels.copy()
    pixels[:, :32] = 255
    return pixels


def grey(pixels):
    return np.asarray(Image.fromarray(pixels).convert("L").convert("RGB"))


@pytest.mark.parametrize(("name", "save", "expected"), [
    ("grey.png", lambda path: photo().convert("L").save(path), grey),
    ("grey16.png", save_grey16, grey),
    ("palette.png", save_palette, None),
    ("rgba.png", save_rgba, white_left),
    ("cmyk.jpg", save_cmyk, None),
    ("exif.jpg", save_exif, None),
    ("photo.webp", lambda path: photo().save(path, quality=95), None),
])
def test_every_kind_of_image_becomes_upright_rgb(tmp_path, name, save, expected):
    (tmp_path / "in").mkdir()
    save(tmp_path / "in" / name)
    run(tmp_path, "pretreat.py", "--input", "in")
    [pixels] = crops(tmp_path / "imgs").values()
    wanted = reference(photo())
    wanted = wanted if expected is None else expected(wanted)
    difference = abs(pixels.astype(int) - wanted)
    if name == "rgba.png":
        difference[:, 30:34] = 0  # the edge of the transparent half is blended
    assert difference.max() <= 14, name  # lossy formats and palettes
    assert difference.mean() <= 3


def test_bad_files_are_named_and_left_out(tmp_path, photos):
    whole = (photos / "000001.jpg").read_bytes()
    (photos / "empty.jpg").write_bytes(b"")
    (photos / "text.jpg").write_text("not a photo")
    (photos / "cut.jpg").write_bytes(whole[:len(whole) // 2])
    photo().save(photos / "cut2.png")
    (photos / "cut2.png").write_bytes((photos / "cut2.png").read_bytes()[:-500])
    (photos / ".hidden").write_text("not looked at")
    printed = run(tmp_path, "pretreat.py")
    assert "imgs: 4 written, 0 already there, 4 skipped" in printed
    assert "skipped empty.jpg: cannot identify image file" in printed
    assert "skipped text.jpg: cannot identify image file" in printed
    assert "skipped cut.jpg: image file is truncated" in printed
    assert "skipped cut2.png: " in printed
    assert "hidden" not in printed
    assert len(crops(tmp_path / "imgs")) == 4


@pytest.mark.parametrize("place", [2000, 2])  # in the photo, in what says where it begins
def test_damage_inside_a_zip_is_named_and_left_out(tmp_path, photos, place, capsys):
    path = tmp_path / "photos.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for number in range(4):
            archive.write(photos / f"{number:06d}.jpg", f"{number:06d}.jpg")
    damaged = bytearray(path.read_bytes())
    damaged[place] ^= 255  # of the first
    path.write_bytes(damaged)
    crop_folder(path, tmp_path / "imgs")
    out, err = capsys.readouterr()
    assert "imgs: 3 written, 0 already there, 1 skipped" in out
    assert re.search("skipped 000000.jpg: Bad (CRC-32|magic number)", err)


def test_photos_of_one_name_all_survive(tmp_path):
    for mark, name in enumerate(["a/1.jpg", "b/1.jpg", "b/1.png", "b/2.jpg"], 1):
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        photo(mark=60 * mark).save(path)
    run(tmp_path, "pretreat.py", "--input", "in")
    made = crops(tmp_path / "imgs")
    assert sorted(round(pixels[:, :, 2].mean() / 60) for pixels in made.values()) == [1, 2, 3, 4]
    assert "1.png" not in made  # photos of one stem may come later
    assert "0 written, 4 already there" in run(tmp_path, "pretreat.py", "--input", "in")


def test_what_cannot_be_used_is_one_clear_line(tmp_path, photos):
    assert "--demo" in complaint(tmp_path, "pretreat.py", "--input", "nowhere")
    (tmp_path / "no.zip").write_text("not a zip")
    assert "zip" in complaint(tmp_path, "pretreat.py", "--input", "no.zip")
    (tmp_path / "file").write_text("not a folder")
    assert "file" in complaint(tmp_path, "pretreat.py", "--output", "file")
    assert "lies in" in complaint(tmp_path, "pretreat.py", "--input", ".")
    assert "48" in complaint(tmp_path, "pretreat.py", "--image_size", 48, status=2)
    assert "threads" in complaint(tmp_path, "pretreat.py", "--threads", 0, status=2)
    run(tmp_path, "pretreat.py")
    assert "64×64" in complaint(tmp_path, "pretreat.py", "--image_size", 32)
    assert {pixels.shape for pixels in crops(tmp_path / "imgs").values()} == {(64, 64, 3)}


def test_no_photo_at_all_is_an_error(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "notes.txt").write_text("not a photo")
    printed = run(tmp_path, "pretreat.py", "--input", "in", status=1)
    assert "pretreat.py: no file could be used, of 1: cannot identify image file (1)" in printed
    (tmp_path / "in" / "notes.txt").unlink()
    printed = run(tmp_path, "pretreat.py", "--input", "in", status=1)
    assert "pretreat.py: there is no photo in the input" in printed


def test_empty_and_foreign_files_in_the_output_do_no_harm(tmp_path, photos):
    run(tmp_path, "pretreat.py")
    (tmp_path / "imgs" / "000001.png").write_bytes(b"")  # as a power cut may leave it
    photo(10, 10).save(tmp_path / "imgs" / "0.png")
    assert "1 written, 3 already there" in run(tmp_path, "pretreat.py")
    assert crops(tmp_path / "imgs")["000001.png"].shape == (64, 64, 3)


def test_crops_of_other_photos_in_the_output_are_counted_too(tmp_path, photos):
    run(tmp_path, "pretreat.py")
    for path in list(photos.iterdir())[:3]:
        path.unlink()
    assert "1 already there, 0 skipped; 4 images in all" in run(tmp_path, "pretreat.py")


def test_demo_photos_are_celeba_shaped_and_varied(demo):
    made = sorted((demo / "photos").glob("*.jpg"))
    assert len(made) == len(list((demo / "imgs").glob("*.png"))) == 2000
    assert {Image.open(path).size for path in made[:50]} == {(178, 218)}
    same_face = np.stack([np.asarray(Image.open(demo / "imgs" / f"{number:04d}.png"), float)
                          for number in range(3, 2000, 100)])
    difference = abs(same_face[:, None] - same_face).mean((2, 3, 4))
    assert np.median(difference) > 4  # grey levels, between two variants of one face
    assert same_face.std() > 30
    assert "0 written, 2000 already there" in run(demo.parent, "pretreat.py", "--demo")


def test_faces_of_a_photo_are_written_again_unless_all_are_there(tmp_path, monkeypatch):
    monkeypatch.setattr("pretreat.cut_faces", lambda photo, size: [photo] * 3)
    written = []
    monkeypatch.setattr("dataReader.save_png", lambda path, *_, **__: written.append(path.name))
    (tmp_path / "in").mkdir()
    photo(64, 64).save(tmp_path / "in" / "a.jpg")
    (tmp_path / "imgs").mkdir()
    crop_all(find_photos(tmp_path / "in"), tmp_path / "imgs", 64, 1, find_faces=True)
    # a kill leaves the last ones, and the first is looked for in the next run
    assert written == ["a-face3.png", "a-face2.png", "a-face1.png"]


def crop_folder(source, target, **options):
    """What pretreat.py does with two folders, in this process."""
    target.mkdir(exist_ok=True)
    crop_all(find_photos(source), target, 64, 2, **options)


def blues(folder):
    """Which photos, by the mark of `photo`, there are crops of."""
    return sorted(round(pixels[..., 2].mean()) for pixels in crops(folder).values())


@pytest.fixture
def one(tmp_path):
    """A folder `a` with one photo, IMG_1.jpg, of mark 50, cropped into `mine`."""
    (tmp_path / "a").mkdir()
    photo(mark=50).save(tmp_path / "a" / "IMG_1.jpg", quality=95)
    crop_folder(tmp_path / "a", tmp_path / "mine")
    return tmp_path


def test_two_inputs_into_one_output_both_count_and_do_not_double(one, capsys):
    (one / "b").mkdir()
    photo(mark=150).save(one / "b" / "IMG_1.jpg", quality=95)
    for _ in range(2):
        crop_folder(one / "b", one / "mine")
        crop_folder(one / "a", one / "mine")
        assert blues(one / "mine") == [50, 150]
    assert "1 written" not in capsys.readouterr().out.splitlines()[-1]
    (one / "mine" / "IMG_1.png").unlink()  # a's: b's stays where it is
    crop_folder(one / "b", one / "mine")
    assert blues(one / "mine") == [150]


@pytest.mark.parametrize("way", ["moved", "copied", "zipped", "without text"])
def test_photos_that_are_the_same_elsewhere_do_not_double(one, way, capsys):
    source = one / "other"
    if way == "moved":
        (one / "a").rename(source)
    elif way == "copied":
        shutil.copytree(one / "a", source, copy_function=shutil.copyfile)
    elif way == "zipped":
        source = one / "other.zip"
        with zipfile.ZipFile(source, "w") as archive:
            archive.write(one / "a" / "IMG_1.jpg", "a/IMG_1.jpg")
    else:  # as before there were texts
        source = one / "a"
        Image.open(one / "mine" / "IMG_1.png").save(one / "mine" / "IMG_1.png")
    crop_folder(source, one / "mine")
    crop_folder(source, one / "mine")
    assert [line.split(";")[0].split(": ")[1] for line in capsys.readouterr().out.splitlines()] == [
        "0 written, 1 already there, 0 skipped"] * 2
    assert crops(one / "mine").keys() == {"IMG_1.png"}


def test_photo_that_was_replaced_is_cropped_again(one):
    photo(mark=150).save(one / "a" / "IMG_1.jpg", quality=95)
    os.utime(one / "a" / "IMG_1.jpg", ns=(0, 1))
    crop_folder(one / "a", one / "mine")
    assert blues(one / "mine") == [150]


def test_name_depends_on_no_other_file(tmp_path):
    (tmp_path / "in" / "2").mkdir(parents=True)
    for mark, name in enumerate(["000001.jpg", "IMG_1.png", "IMG_1.JPG", "2/000001.jpg"]):
        photo(mark=60 * mark).save(tmp_path / "in" / name, "PNG")
    (tmp_path / "in" / "IMG_1.MOV").write_text("of a Live Photo")
    crop_folder(tmp_path / "in", tmp_path / "imgs")
    before = crops(tmp_path / "imgs").keys()
    assert "000001.png" in before
    (tmp_path / "in" / "IMG_1.MOV").unlink()
    (tmp_path / "in" / "IMG_1.JPG").unlink()
    crop_folder(tmp_path / "in", tmp_path / "imgs")
    assert crops(tmp_path / "imgs").keys() == before
    assert len(before) == 4


def test_photos_of_any_name_all_survive(tmp_path):
    names = [os.fsdecode(name.encode("gbk")) + "/1.jpg" for name in "照片"]
    names += ["x" * 251 + ".jpg", "x" * 250 + "y.jpg", "照" * 83 + ".jpg"]
    for mark, name in enumerate(names):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        photo(mark=50 * mark).save(tmp_path / "in" / name, "PNG")
    for _ in range(2):
        crop_folder(tmp_path / "in", tmp_path / "imgs")
        assert blues(tmp_path / "imgs") == [0, 50, 100, 150, 200]


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def zeros(path):
    path.write_bytes(bytes(path.stat().st_size))


def hole(path):
    data = bytearray(path.read_bytes())
    third = len(data) // 3
    data[third:2 * third] = bytes(third)
    path.write_bytes(data)


@pytest.mark.parametrize("find_faces", [False, True])
@pytest.mark.parametrize("damage", [cut, zeros, hole, lambda path: path.write_bytes(b"")])
def test_damaged_crops_are_made_again(one, damage, find_faces, monkeypatch):
    monkeypatch.setattr("pretreat.cut_faces", lambda photo, size: [crop_face(photo, size)] * 2)
    if find_faces:
        shutil.rmtree(one / "mine")
    for _ in range(2):
        crop_folder(one / "a", one / "mine", find_faces=find_faces)
        for path in (one / "mine").iterdir():
            Image.open(path).load()
            damaged = path  # of two faces one, whichever
        damage(damaged)


@pytest.mark.parametrize("content", ["", "Canon EOS", " ", "64 ", "notes"])
def test_files_of_the_users_in_the_output_are_not_written_over(tmp_path, content):
    for folder in "in", "imgs":
        (tmp_path / folder).mkdir()
    photo().save(tmp_path / "in" / "1.jpg")
    users = tmp_path / "imgs" / "1.png"
    if content == "notes":
        users.write_text("see notes")  # as short as what a full disk leaves
    else:
        save_png(users, photo(64, 64, 200), origin=content)
    before = users.read_bytes()
    for _ in range(2):
        crop_folder(tmp_path / "in", tmp_path / "imgs")
        assert users.read_bytes() == before
        assert len(list((tmp_path / "imgs").iterdir())) == 2


def test_crops_of_another_size_are_noticed_whatever_their_names(one):
    (one / "mine" / "IMG_1.png").rename(one / "mine" / "IMG_9.png")
    photo(10, 10).save(one / "mine" / "0.png")  # the user's own
    with pytest.raises(Problem, match=r"mine holds crops of 64×64, not 32×32: pass another"):
        crop_all(find_photos(one / "a"), one / "mine", 32, 2)
    assert {path.name for path in (one / "mine").iterdir()} == {"0.png", "IMG_9.png"}


def test_a_disk_that_is_full_takes_no_crop_away(one, monkeypatch):
    photo(mark=150).save(one / "a" / "IMG_1.jpg", quality=95)
    os.utime(one / "a" / "IMG_1.jpg", ns=(0, 1))

    def save_png(*_, **__):
        raise Problem("cannot write")

    monkeypatch.setattr("dataReader.save_png", save_png)
    with pytest.raises(Problem, match="cannot write"):
        crop_folder(one / "a", one / "mine")
    assert blues(one / "mine") == [50]


def test_faces_of_a_photo_that_was_replaced_are_too(one, monkeypatch):
    shutil.rmtree(one / "mine")
    for time, number in enumerate([3, 2, 0]):
        monkeypatch.setattr("pretreat.cut_faces", lambda *_, n=number: [photo(64, 64, n)] * n)
        os.utime(one / "a" / "IMG_1.jpg", ns=(0, time))
        if number == 0:
            with pytest.raises(Problem, match=r"^no file could be used, of 1: no face found .1.$"):
                crop_folder(one / "a", one / "mine", find_faces=True)
        else:
            crop_folder(one / "a", one / "mine", find_faces=True)
        assert len(crops(one / "mine")) == number


@pytest.mark.parametrize("size", [(178, 218), (89, 109)])
def test_celeba_s_crop_is_the_one_it_always_was(size):
    image = Image.fromarray(
        np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))
    for image_size in 32, 64, 128:
        height = size[1] * image_size // size[0]
        resized = image.resize((image_size, height), Image.Resampling.BILINEAR)
        top = 10 * image_size // 64
        expected = resized.crop((0, top, image_size, top + image_size))
        np.testing.assert_array_equal(crop_face(image, image_size), expected)


@pytest.mark.parametrize("size", [(3, 1_000_000), (1_000_000, 3)])
def test_a_strip_takes_little_memory(size):
    at_work = []
    image = Image.new("RGB", size)
    resize = Image.Image.resize

    def watch(self, size, *flags, **more):
        at_work.append(size)
        return resize(self, size, *flags, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("PIL.Image.Image.resize", watch)
        assert crop_face(image, 64).size == (64, 64)
    assert max(width * height for width, height in at_work) <= 64 * 128


def test_a_zip_that_python_cannot_read_says_to_unpack_it(tmp_path):
    path = tmp_path / "photos.zip"
    for damage in "Deflate64", "encrypted", "names":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("照.jpg", b"")
            info = archive.getinfo("照.jpg")
        data = bytearray(path.read_bytes())
        central = data.index(b"PK\1\2")
        if damage == "Deflate64":
            data[info.header_offset + 8] = data[central + 10] = 9
        elif damage == "encrypted":
            data[info.header_offset + 6] |= 1
            data[central + 8] |= 1
        else:  # GBK, but flagged as UTF-8
            data = data.replace("照".encode(), "照".encode("gbk") + b"x")
        path.write_bytes(data)
        with pytest.raises(Problem, match="unpack it, and pass the folder as --input"):
            find_photos(path)


def test_empty_folder_beside_the_zip_does_not_hide_it(tmp_path):
    (tmp_path / "img_align_celeba").mkdir()
    (tmp_path / "img_align_celeba" / ".DS_Store").touch()  # as a Mac leaves it
    with zipfile.ZipFile(tmp_path / "img_align_celeba.zip", "w") as archive:
        file = io.BytesIO()
        photo().save(file, "JPEG")
        archive.writestr("img_align_celeba/000001.jpg", file.getvalue())
    assert "1 written" in run(tmp_path, "pretreat.py")
    assert crops(tmp_path / "imgs").keys() == {"000001.png"}
