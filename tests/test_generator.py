"""generator.py: the same face for the same number, from the file alone."""

import numpy as np
import pytest
from conftest import complaint, run
from PIL import Image


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


def test_grid_and_single_faces_are_the_same_faces(trained, tmp_path):
    checkpoint = trained / "Output" / "generator.safetensors"
    run(tmp_path, "generator.py", "--checkpoint", checkpoint, "--count", 7, "--individual")
    folder = tmp_path / "Generate"
    assert sorted(path.name for path in folder.iterdir()) == [
        *(f"{number:06d}.png" for number in range(7)), "faces.png"]
    picture = pixels(folder / "faces.png")
    assert picture.shape == (3 * 66 + 2, 3 * 66 + 2, 3)
    faces = [pixels(folder / f"{number:06d}.png") for number in range(7)]
    for number, face in enumerate(faces):
        top, left = 2 + 66 * (number // 3), 2 + 66 * (number % 3)
        np.testing.assert_array_equal(picture[top:top + 64, left:left + 64], face)
    assert len({face.tobytes() for face in faces}) == 7


def test_face_depends_on_its_seed_and_number_alone(trained, tmp_path):
    checkpoint = trained / "Output" / "generator.safetensors"
    for count, name in (3, "few"), (105, "many"):
        run(tmp_path, "generator.py", "--checkpoint", checkpoint, "--count", count,
            "--individual", "--output_path", name)
    for number in range(3):
        few, many = (pixels(tmp_path / name / f"{number:06d}.png") for name in ("few", "many"))
        assert abs(few - many).max() <= 1  # up to rounding
    run(tmp_path, "generator.py", "--checkpoint", checkpoint, "--count", 3, "--seed", 1,
        "--individual", "--output_path", "other")
    assert abs(pixels(tmp_path / "few" / "000001.png")
               - pixels(tmp_path / "other" / "000001.png")).max() > 1


def test_grid_is_that_of_the_last_epoch(trained):
    run(trained, "generator.py")
    difference = abs(pixels(trained / "Generate" / "faces.png")
                     - pixels(trained / "Output" / "0002_0006.png"))
    assert difference.max() <= 1


@pytest.mark.parametrize("what", ["missing", "text", "empty", "foreign"])
def test_what_is_no_generator_is_one_clear_line(tmp_path, what):
    path = tmp_path / "generator.safetensors"
    if what == "text":
        path.write_text("not a checkpoint")
    elif what == "empty":
        path.write_bytes(b"")
    elif what == "foreign":
        import safetensors.numpy

        safetensors.numpy.save_file({"weight": np.zeros(3, np.float32)}, path)
    line = complaint(tmp_path, "generator.py", "--checkpoint", path)
    assert str(path) in line
    assert ("python train.py" if what == "missing" else "not a generator") in line
    assert not (tmp_path / "Generate").exists()


def test_bad_settings_are_one_line(trained, tmp_path):
    checkpoint = trained / "Output" / "generator.safetensors"
    assert "count" in complaint(tmp_path, "generator.py", "--count", 0, status=2)
    (tmp_path / "file").write_text("a file")
    assert "file" in complaint(
        tmp_path, "generator.py", "--checkpoint", checkpoint, "--output_path", "file")
