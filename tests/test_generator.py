"""generator.py: the same face for the same number, from the file alone."""

from dataReader import Problem, error_line, locked
from generator import FRAMES, between, face_numbers, main

import numpy as np
import pytest
from conftest import ROOT, complaint, run, start
from PIL import Image
from safetensors.numpy import save


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


@pytest.fixture
def draw(trained, tmp_path, monkeypatch):
    """A function that runs generator.py in this process, which is much faster than another."""
    def draw(*flags, checkpoint=trained / "Output" / "generator.safetensors"):
        flags = "--checkpoint", checkpoint, *flags
        monkeypatch.setattr("sys.argv", ["generator.py", *map(str, flags)])
        main()

    monkeypatch.chdir(tmp_path)
    return draw


def test_grid_and_single_faces_are_the_same_faces(trained, tmp_path):
    checkpoint = trained / "Output" / "generator.safetensors"
    run(tmp_path, "generator.py", "--checkpoint", checkpoint, "--count", 7, "--individual")
    folder = tmp_path / "Generate"
    assert sorted(path.name for path in folder.iterdir()) == ["faces.png", "individual"]
    assert sorted(path.name for path in (folder / "individual").iterdir()) == [
        f"{number:06d}.png" for number in range(7)]
    picture = Image.open(folder / "faces.png")
    assert picture.size == (7 * (3 * 66 + 2),) * 2  # enlarged to be looked at
    picture = np.asarray(picture.reduce(7)).astype(int)
    faces = [pixels(folder / "individual" / f"{number:06d}.png") for number in range(7)]
    for number, face in enumerate(faces):
        top, left = 2 + 66 * (number // 3), 2 + 66 * (number % 3)
        # but at the edges, which the white gaps run into
        difference = picture[top:top + 64, left:left + 64] - face
        assert abs(difference[2:-2, 2:-2]).mean() < 4
    assert len({face.tobytes() for face in faces}) == 7


def test_face_depends_on_its_seed_and_number_alone(tmp_path, draw):
    for count, name in (3, "few"), (105, "many"):
        draw("--count", count, "--individual", "--output_path", name)
    for number in range(3):
        few, many = (pixels(tmp_path / name / "individual" / f"{number:06d}.png")
                     for name in ("few", "many"))
        assert abs(few - many).max() <= 1  # up to rounding
    draw("--count", 3, "--seed", 1, "--individual", "--output_path", "other")
    assert abs(pixels(tmp_path / "few" / "individual" / "000001.png")
               - pixels(tmp_path / "other" / "individual" / "000001.png")).max() > 1
    draw("--seeds", "104, 0-1", "--individual", "--output_path", "picked")
    picked = tmp_path / "picked" / "individual"
    assert sorted(path.name for path in picked.iterdir()) == [
        "000000.png", "000001.png", "000104.png"]
    draw("--seeds", ",".join(["1"] * 90), "--individual", "--output_path", "repeated")
    assert len(list((tmp_path / "repeated" / "individual").iterdir())) == 1
    for path in picked.iterdir():
        assert abs(pixels(path) - pixels(tmp_path / "many" / "individual" / path.name)).max() <= 1


def test_faces_are_those_of_the_last_grid(trained, tmp_path, draw):
    draw("--individual")
    last = pixels(trained / "Output" / "0002_0006.png")
    draw("--individual", "--raw", "--output_path", "raw")
    for number in 0, 42, 99:
        top, left = 2 + 66 * (number // 10), 2 + 66 * (number % 10)
        shown = last[top:top + 64, left:left + 64]
        name = f"individual/{number:06d}.png"
        assert abs(pixels(tmp_path / "Generate" / name) - shown).max() <= 1
        assert abs(pixels(tmp_path / "raw" / name) - shown).max() > 1


def test_interpolation_is_a_loop_through_the_faces(tmp_path, draw, capsys):
    draw("--interpolate", 3, 17, 40)
    assert "iterations: Generate/interpolation.gif\n" in capsys.readouterr().out
    draw("--seeds", "3,17,40", "--individual", "--output_path", "faces")
    folder = tmp_path / "Generate"
    assert sorted(path.name for path in folder.iterdir()) == [
        "interpolation.gif", "interpolation.png"]
    with Image.open(folder / "interpolation.gif") as animation:
        assert animation.n_frames == 3 * FRAMES
        assert animation.size == (256, 256)
        assert animation.info["loop"] == 0
        frames = []
        for frame in range(animation.n_frames):
            animation.seek(frame)
            frames.append(np.asarray(animation.convert("RGB").reduce(4)).astype(int))
    for leg, number in enumerate((3, 17, 40)):
        face = pixels(tmp_path / "faces" / "individual" / f"{number:06d}.png")
        assert abs(frames[leg * FRAMES] - face).mean() < 8  # 256 colours
    steps = [abs(frames[at] - frames[at - 1]).mean() for at in range(len(frames))]
    faces = [abs(frames[leg * FRAMES] - frames[leg * FRAMES - FRAMES]).mean() for leg in range(3)]
    assert max(steps) < min(faces) / 2  # smooth, from the last to the first frame too
    strip = pixels(folder / "interpolation.png")
    assert strip.shape == (2 * (2 * 66 + 2), 2 * (9 * 66 + 2), 3)


def test_way_between_latents_is_a_great_circle_or_a_straight_line():
    a, b = np.random.default_rng(0).standard_normal([2, 100]).astype(np.float32)
    way = between(a, b, 8, "normal")
    assert way.shape == (8, 100)
    assert way.dtype == np.float32
    np.testing.assert_allclose(way[0], a, atol=1e-6)
    norms = np.linalg.norm(way, axis=1)
    assert (norms > 0.95 * min(np.linalg.norm(a), np.linalg.norm(b))).all()
    steps = way[:-1] / norms[:-1, None] * way[1:] / norms[1:, None]
    assert np.ptp(np.arccos(steps.sum(1))) < 0.02  # radians, of 0.2 each
    np.testing.assert_allclose(between(a, b, 4, "uniform")[2], (a + b) / 2, atol=1e-6)
    np.testing.assert_allclose(between(a, a, 4, "normal"), np.tile(a, [4, 1]), atol=1e-5)


def test_demo_waits_for_another_process_and_names_the_picture_last(trained, tmp_path):
    """So that two drawing into one folder do not spoil each other's pictures."""
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "Output").symlink_to(trained / "Output")
    folder = tmp_path / "demo" / "Generate"
    folder.mkdir()
    with locked(folder):
        process = start(tmp_path, "generator.py", "--demo", "--count", 4)
        for line in process.stderr:
            if "waiting for another process" in line:
                break
        assert list(folder.iterdir()) == []
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert out.splitlines()[-1].endswith("iterations: demo/Generate/faces.png")
    assert Image.open(folder / "faces.png").size == (8 * (2 * 66 + 2),) * 2


def test_comparison_shows_real_and_generated_faces(trained, tmp_path, draw, capsys):
    draw("--compare", trained / "imgs")
    assert "iterations: Generate/real_vs_fake.png\n" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "Generate").iterdir()] == ["real_vs_fake.png"]
    difference = abs(pixels(tmp_path / "Generate" / "real_vs_fake.png")
                     - pixels(trained / "Output" / "real_vs_fake.png"))
    assert difference.max() <= 1


def test_what_is_no_generator_is_one_clear_line(tmp_path, draw):
    line = complaint(tmp_path, "generator.py", "--checkpoint", "net")
    assert "there is no net; this makes it: python train.py" in line
    foreign = save({"weight": np.zeros(3, np.float32)})
    for content in b"not a checkpoint", b"", foreign:
        (tmp_path / "net").write_bytes(content)
        with pytest.raises(Problem, match="^net is not a generator"):
            draw(checkpoint="net")
    assert not (tmp_path / "Generate").exists()


def test_bad_settings_are_one_line(tmp_path, draw):
    assert "count" in complaint(tmp_path, "generator.py", "--count", 0, status=2)
    for flags, words in [
            (["--interpolate", 3], "--interpolate takes two"),
            (["--individual", "--compare", "imgs"], "--individual goes with"),
            (["--compare", "nowhere"], "nowhere is no folder of images"),
            (["--compare", ".", "--output_path", "out"], "out lies in .")]:
        with pytest.raises(Problem, match=f"^{words}"):
            draw(*flags)
    (tmp_path / "file").write_text("a file")
    with pytest.raises(FileExistsError) as error:
        draw("--output_path", "file")
    assert error_line(error.value) == "file: File exists"


@pytest.mark.parametrize(("value", "numbers"), [
    ("3,17,40-42", [3, 17, 40, 41, 42]), ("104, 0-1", [104, 0, 1]), (17, [17]), (17.0, [17]),
    ([1, 2.0, "5-6"], [1, 2, 5, 6]), (np.array([3, 4]), [3, 4]), (range(2), [0, 1]), ("", []),
    ([], []), (None, []), ("999999", [999999])])
def test_numbers_of_faces_are_texts_or_lists(value, numbers):
    assert face_numbers(value) == numbers


@pytest.mark.parametrize(
    "value", ["5-3", "3,,4", "1000000", "-1", "a", "1.5", True, [None], [[1, 2]], "1-", "nan"])
def test_what_is_no_number_of_a_face_is_refused(value):
    with pytest.raises(ValueError):  # noqa: PT011
        face_numbers(value)


def test_trained_generator_still_draws_the_faces_of_the_readme(tmp_path):
    """Whatever the Paddle, the processor and the year, up to rounding."""
    kept = pixels(ROOT / ".github" / "celeba_faces.png")  # faces 0 to 48
    run(tmp_path, "generator.py", "--checkpoint", ROOT / ".github" / "celeba.safetensors",
        "--count", 49, "--individual")
    faces = [pixels(path) for path in sorted((tmp_path / "Generate" / "individual").iterdir())]
    assert len(faces) == 49
    for number, face in enumerate(faces):
        top, left = 2 + 66 * (number // 7), 2 + 66 * (number % 7)
        assert abs(kept[top:top + 64, left:left + 64] - face).max() <= 2
