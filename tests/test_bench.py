"""The bench measures what it says, and trains others' recipes as they are; no speeds, no faces."""

import network
from dataReader import Problem

import sys
from types import SimpleNamespace

import bench
import dcgan_docs
import measures
import numpy as np
import pytest
import quality
import recipe


@pytest.fixture(scope="module")
def crops():
    """Smooth random images, uint8 [600, 3, 8, 8]: crops of one kind."""
    rng = np.random.default_rng(0)
    smooth = np.repeat(np.repeat(rng.normal(0, 40, [600, 3, 4, 4]), 2, axis=2), 2, axis=3)
    return (128 + smooth + rng.normal(0, 5, smooth.shape)).clip(0, 255).astype(np.uint8)


def test_distance_is_zero_for_the_same_and_grows_with_the_difference(crops):
    distance = measures.yardstick(crops[:200])
    assert distance(crops[:200]) == pytest.approx(0, abs=1e-3)
    others = distance(crops[200:400])
    assert 0 < others < distance(crops[200:400] // 2 + 64) < distance(crops[200:400] // 4)


def test_distance_is_frechet_s():
    # of mean 0 and covariance 1, exactly; then one axis has mean 3 and deviation 2
    columns = np.random.default_rng(0).normal(0, 1, [150, 65])
    columns[:, 0] = 1  # and all others become orthogonal to it
    real = np.linalg.qr(columns)[0][:, 1:] * np.sqrt(149)
    other = real.copy()
    other[:, 5] = 3 + 2 * real[:, 5]
    distance = measures.yardstick((real + 1) * 127.5)
    assert distance((other + 1) * 127.5) == pytest.approx(3**2 + (2 - 1)**2, rel=1e-3)


def test_spread_is_the_mean_distance_of_pairs():
    images = np.array([0, 255, 255], np.uint8).reshape([3, 1, 1, 1]).repeat(4, axis=1)
    assert measures.mean_distance(images) == pytest.approx(4 * 2 / 3)  # 4, 4 and 0


def test_contrast_is_the_deviation_within_an_image():
    images = np.array([[[[0, 255]]] * 3, [[[255, 255]]] * 3], np.uint8)  # deviations 1 and 0
    assert measures.contrast(images) == pytest.approx(0.5)


def test_memory_tells_what_was_drawn_by_heart(crops):
    train, held_out, others = crops[:200], crops[200:400], crops[400:]

    def memory(images):
        return (measures.distance_to_nearest(images, train)
                / measures.distance_to_nearest(images, held_out))

    nearly = (train ^ 1)[:100]
    assert memory(nearly) < 0.3
    assert memory(others) == pytest.approx(1, abs=0.1)


def test_averaged_raw_and_running_are_three_generators(tmp_path):
    path = tmp_path / "generator.safetensors"
    averaged, raw = network.Generator(width=4), network.Generator(width=4)
    network.save_generator(path, averaged, raw, "normal", 7)
    drawn = {}
    for which in "averaged", "raw", "running":
        drawn[which], step = measures.draw(path, which, 70)
        assert step == 7
        assert drawn[which].shape == (70, 3, 64, 64)
    z = network.face_latents(1, range(70), 100, "normal")
    raw.eval()
    np.testing.assert_array_equal(drawn["running"], network.draw_faces(raw, z))
    assert (drawn["raw"] != drawn["running"]).any()
    assert (drawn["averaged"] != drawn["raw"]).any()


def test_without_opencv_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(Problem, match='pip install "opencv-python-headless<5"'):
        measures.detectors()


def train_page(folder, images, *iterations, onednn=True):
    path = folder / "images.npy"
    if not path.exists():
        np.save(path, images)
    parser = recipe.flags("", batch=4)
    place = folder / f"page-{onednn}-{len(iterations)}"
    options = parser.parse_args([
        str(path), str(place), "--width", "4", "--faces", "5", "--iterations",
        *map(str, iterations)])
    with dcgan_docs.paddle.utils.unique_name.guard():  # as in a process of its own
        recipe.run(dcgan_docs.Page(0, 4, onednn), options)
    return np.load(place / f"faces-{iterations[-1]}.npy")


def test_recipe_goes_on_as_if_never_stopped(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, [10, 3, 64, 64], dtype=np.uint8)
    whole = train_page(tmp_path, images, 2, 4)
    assert whole.shape == (5, 3, 64, 64)
    train_page(tmp_path, images, 2)
    np.testing.assert_array_equal(train_page(tmp_path, images, 4), whole)
    with pytest.raises(SystemExit, match="pass another folder"):
        train_page(tmp_path, images, 3)
    plain = train_page(tmp_path, images, 2, 4, onednn=False)
    assert np.abs(plain.astype(int) - whole).max() <= 3


@pytest.mark.parametrize(("onednn", "source"), [(True, network), (False, dcgan_docs.nn)])
def test_page_s_convolutions_run_on_onednn_only_if_asked(onednn, source):
    generator = dcgan_docs.make_generator(4, onednn)
    discriminator = dcgan_docs.make_discriminator(4, onednn)
    convolutions = [type(layer) for layer in [*generator, *discriminator]
                    if hasattr(layer, "weight") and len(layer.weight.shape) == 4]
    assert convolutions == [source.Conv2DTranspose] * 5 + [source.Conv2D] * 5


def test_every_image_is_seen_once_an_epoch():
    images = np.arange(10)
    seen = np.concatenate([recipe.images_of(images, step, 5, seed=3) for step in range(2)])
    assert sorted(seen) == list(range(10))
    assert list(recipe.images_of(images, 0, 5, 3)) != list(recipe.images_of(images, 2, 5, 3))


def link_330(tmp_path):
    """Link 330 files, 000.png to 329.png, with their numbers as text; return the folder."""
    data = tmp_path / "imgs"
    data.mkdir()
    for number in range(330):
        (data / f"{number:03d}.png").write_text(str(number))
    folder = tmp_path / "quality"
    folder.mkdir()
    quality.link_crops(folder, data)
    return folder


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_last_fifth_by_name_is_held_out(tmp_path):
    folder = link_330(tmp_path)
    assert names(folder / "train") == [f"{number:03d}.png" for number in range(264)]
    assert names(folder / "held_out") == [f"{number:03d}.png" for number in range(264, 330)]
    assert (folder / "held_out" / "264.png").read_text() == "264"
    with pytest.raises(Problem, match="too few"):
        measures.held_out_count(324)


def test_of_a_large_folder_only_the_first_crops_are_trained_on(tmp_path, monkeypatch):
    monkeypatch.setattr(measures, "TRAINED_ON_AT_MOST", 100)
    folder = link_330(tmp_path)
    assert names(folder / "train") == [f"{number:03d}.png" for number in range(100)]
    assert names(folder / "held_out") == [f"{number:03d}.png" for number in range(264, 330)]


def test_equal_seconds_and_equal_iterations():
    trainings = {"page": SimpleNamespace(unit=1), "ours": SimpleNamespace(unit=50)}
    speeds = {"page": 1.0, "ours": 0.1}
    columns = quality.count_iterations(
        trainings, speeds, SimpleNamespace(minutes=1, iterations=None))
    assert columns == {"equal seconds": {"page": 60, "ours": 600},
                       "equal iterations": {"page": 50, "ours": 50}}
    columns = quality.count_iterations(
        trainings, speeds, SimpleNamespace(minutes=None, iterations=110))
    assert columns == {"equal seconds": {"page": 10, "ours": 100},
                       "equal iterations": {"page": 50, "ours": 50}}


def test_table_has_a_cell_for_each_column():
    each = {"distance": 5.0, "spread": 1.0, "contrast": 0.5, "found": [1.0] * 3, "memory": 1.0}
    found = {("averaged", 0, 4): each, ("page", 0, 4): each | {"distance": 10.0}}
    counts, speeds = ({name: value for name in ("ours", "page")} for value in (4, 15.0))
    lines = quality.table(found, counts, speeds, [0], each).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    cells = [cell.strip() for cell in lines[3].split("|")]
    assert cells[2:8] == ["1.0", "4", "5", "0.50", "1.00", "0.50"]


def test_bench_trains_what_train_py_trains():
    values = bench.trainer(2, 4)(1)
    assert values.shape == (4,)
    assert np.isfinite(values).all()
