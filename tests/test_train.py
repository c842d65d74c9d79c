"""train.py: the algorithm of §4, and the files a run leaves behind."""

import network
from dataReader import FaceReader, grid
from network import (
    Discriminator,
    Generator,
    draw_faces,
    face_latents,
    load_generator,
    loss,
    margin,
    random_array,
)
from train import (
    State,
    code_digest,
    d_step,
    descend,
    draw_curves,
    draw_training_images,
    g_step,
    iterate,
    load,
    main,
    make_optimizer_state,
    random_numbers,
    save,
    tensors_by_name,
    train,
)
from weightInit import paddle, read_tensors

import os
import re
import shutil
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT, TINY, complaint, photo, run, table
from PIL import Image

F = paddle.nn.functional
SCALER = paddle.amp.GradScaler(False)


@pytest.fixture
def state():
    """Two small networks about to be trained."""
    paddle.seed(1)
    G, D = Generator(5, 32, 4), Discriminator(32, 4)
    optimizers = []
    for net in G, D:
        network.join_weights(net)
        optimizers.append(paddle.optimizer.Adam(0.01, 0.5, 0.999, parameters=[net.vector]))
    return State(G, D, None, *optimizers, SCALER, "float32")


def weights(net):
    return [value.numpy().copy() for value in net.parameters() if not value.stop_gradient]


def changed(before, net):
    return [bool((old != new).any()) for old, new in zip(before, weights(net), strict=True)]


def test_d_step_teaches_d_and_leaves_g(state):
    G, D = state.generator, state.discriminator
    real, z = paddle.rand([8, 3, 32, 32]) * 2 - 1, paddle.randn([8, 5])
    g_before, d_before = weights(G), weights(D)

    def step():
        values = d_step(D, state.discriminator_optimizer, SCALER, real, G(z))
        return [float(value) for value in values]

    first = step()
    assert not any(changed(g_before, G))
    assert all(value.grad is None for value in G.parameters())
    assert all(changed(d_before, D))
    for _ in range(20):
        last = step()
    assert last[0] < first[0]
    assert last[1] > 0.8  # D(x)
    assert last[2] < 0.2  # D(G(z))


def test_d_loss_is_the_sum_of_both(state):
    G, D = state.generator, state.discriminator
    real, fake = paddle.rand([8, 3, 32, 32]) * 2 - 1, G(paddle.randn([8, 5]))
    expected = float(loss(D(real), 1) + loss(D(fake), 0))
    found = d_step(D, state.discriminator_optimizer, SCALER, real, fake)[0]
    assert float(found) == pytest.approx(expected, rel=1e-5)


def test_g_step_teaches_g_and_leaves_d(state):
    G, D = state.generator, state.discriminator
    z = paddle.randn([8, 5])
    g_before, d_before = weights(G), weights(D)
    first = float(g_step(G, D, state.generator_optimizer, SCALER, G(z)))
    assert all(changed(g_before, G))
    assert not any(changed(d_before, D))
    assert all(value.grad is None for value in D.parameters())
    assert len(weights(D)) == len(d_before)  # D can be taught again
    for _ in range(20):
        last = float(g_step(G, D, state.generator_optimizer, SCALER, G(z)))
    assert last < first


def test_steps_are_adams_of_each_weight_to_the_bit(state):
    """Though it is given all weights as one vector."""
    D = state.discriminator
    twin = copy_of(D)
    adam = paddle.optimizer.Adam(0.01, 0.5, 0.999, parameters=twin.parameters())
    for _ in range(3):
        real, fake = paddle.rand([8, 3, 32, 32]) * 2 - 1, paddle.rand([8, 3, 32, 32])
        d_step(D, state.discriminator_optimizer, SCALER, real, fake)
        (loss(twin(real), 1) + loss(twin(fake), 0)).backward()
        adam.step()
        adam.clear_grad()
    for value, expected in zip(weights(D), weights(twin), strict=True):
        np.testing.assert_array_equal(value, expected)


@pytest.mark.parametrize("optimizer", [paddle.optimizer.Adam, paddle.optimizer.RMSProp])
def test_checkpoint_has_all_that_an_optimizer_keeps(tmp_path, monkeypatch, optimizer):
    """Whichever it is; loading sets what the optimizer has made itself, where it has made it.

    Paddle's `set_state_dict` would put Adam's powers of beta on a GPU.
    """
    def step_twice(state):
        for number in range(2):
            z = paddle.to_tensor(random_array([number], [1, 8, 5], "normal"))
            images = paddle.full([8, 3, 32, 32], 100 * number, "uint8")
            iterate(state, images, z, None, d_steps=1, g_steps=1)

    def renewed():
        networks = Generator(5, 32, 4), Discriminator(32, 4), Generator(5, 32, 4)
        for net in networks:
            network.join_weights(net)
        optimizers = [optimizer(0.01, parameters=[net.vector]) for net in networks[:2]]
        return State(*networks, *optimizers, SCALER, "float32")

    first, second = renewed(), renewed()
    step_twice(first)
    save(tmp_path / "checkpoint.safetensors", first)
    made = []

    def make(net, optimizer):
        make_optimizer_state(net, optimizer)
        made.extend(optimizer.state_dict().values())

    monkeypatch.setattr("train.make_optimizer_state", make)
    monkeypatch.setattr(optimizer, "set_state_dict", lambda *_: pytest.fail("its places are lost"))
    load(tmp_path / "checkpoint.safetensors", second, change=False)
    assert len(made) >= 2 * 3
    loaded = tensors_by_name(second)
    assert all(any(tensor is own for tensor in loaded.values()) for own in made)
    for again in first, second:
        step_twice(again)
    for name, tensor in tensors_by_name(second).items():
        np.testing.assert_array_equal(tensor.numpy(), tensors_by_name(first)[name].numpy(), name)


def test_overflow_in_float16_skips_the_step_and_halves_the_scale(state, monkeypatch):
    """On a CPU a scaler does nothing, so what it asks about the device has an answer of ours."""
    tracer = SimpleNamespace(_expected_place=SimpleNamespace(is_gpu_place=lambda: True))
    monkeypatch.setattr("paddle.amp.grad_scaler._dygraph_tracer", lambda: tracer)
    monkeypatch.setattr("paddle.amp.grad_scaler.amp_global_state",
                        lambda: SimpleNamespace(amp_dtype="float16"))
    D, scaler = state.discriminator, paddle.amp.GradScaler(True)
    scale = float(scaler.state_dict()["scale"].item())
    before, images = weights(D), paddle.rand([8, 3, 32, 32])
    descend(loss(D(images), 1) * np.inf, D, state.discriminator_optimizer, scaler)
    assert not any(changed(before, D))
    assert float(scaler.state_dict()["scale"].item()) == scale / 2
    descend(loss(D(images), 1), D, state.discriminator_optimizer, scaler)
    assert all(changed(before, D))


def test_one_iteration_is_one_d_step_and_two_g_steps(state, monkeypatch):
    calls = []
    for name, optimizer in (("G", state.generator_optimizer), ("D", state.discriminator_optimizer)):
        step = optimizer.step
        monkeypatch.setattr(
            optimizer, "step", lambda step=step, name=name: (calls.append(name), step()))
    images, z = paddle.randint(0, 256, [8, 3, 32, 32]).astype("uint8"), paddle.randn([3, 8, 5])
    values = iterate(state, images, z[:2], None, d_steps=1, g_steps=2)
    assert calls == ["D", "G", "G"]
    assert values.shape == [4]
    iterate(state, images, z, None, d_steps=3, g_steps=1)
    assert calls[3:] == ["D", "D", "D", "G"]


def test_numbers_of_iterate_are_those_of_the_last_steps(state):
    """D's loss, G's loss, D(x), D(G(z)), in this order; D knows real images."""
    G, D = state.generator, state.discriminator
    real, z = paddle.full([8, 3, 32, 32], 255, "uint8"), paddle.randn([3, 8, 5])
    for _ in range(10):
        d_step(D, state.discriminator_optimizer, SCALER, paddle.ones([8, 3, 32, 32]), G(z[0]))
    twin = copy_of(D)
    odds = [margin(twin(images)) for images in (paddle.ones([8, 3, 32, 32]), G(z[0]))]
    d_loss, g_loss, d_real, d_fake = iterate(
        state, real, z[:1], None, d_steps=1, g_steps=1).numpy()
    assert d_real == pytest.approx(float(F.sigmoid(odds[0]).mean()), rel=1e-4)
    assert d_fake == pytest.approx(float(F.sigmoid(odds[1]).mean()), rel=1e-4)
    assert d_real > d_fake + 0.2
    expected = F.softplus(-odds[0]).mean() + F.softplus(odds[1]).mean()
    assert d_loss == pytest.approx(float(expected), rel=1e-4)
    assert g_loss > 2 * d_loss


def copy_of(D):
    twin = Discriminator(32, 4)
    twin.set_state_dict(D.state_dict())
    return twin


def test_latents_are_new_for_every_step_and_process():
    options = SimpleNamespace(seed=3, z_dim=5, noise="uniform", d_steps=1, g_steps=3, augment=False,
                              batch_size=16)
    drawn = [random_numbers(options, step, rank) for step in (1, 2, 9) for rank in (0, 1)]
    assert all(draws is None for _, draws in drawn)
    z = np.stack([latents for latents, _ in drawn])
    assert z.shape == (6, 3, 16, 5)
    assert len(np.unique(z)) == z.size
    np.testing.assert_array_equal(z[4, 1], random_array([3, 9, 0, 2], [16, 5], "uniform"))


def test_what_d_sees_is_augmented_with_draws_of_its_own(state, monkeypatch):
    """Real and generated images alike, in all steps, by draws that (seed, step) give."""
    options = SimpleNamespace(seed=3, z_dim=5, noise="normal", d_steps=2, g_steps=2, augment=True,
                              batch_size=16)
    drawn = [random_numbers(options, step, 0) for step in range(1, 7)]
    draws = np.stack([each for _, each in drawn])
    assert draws.shape == (6, 2 * 2 + 2, 16, 7)
    assert 0 <= draws.min() < 0.01 < 0.99 < draws.max() < 1
    assert len(np.unique(draws)) > 0.99 * draws.size

    seen, augment = [], network.augment
    monkeypatch.setattr(network, "augment", lambda images, draws: (
        seen.append((images, draws.numpy())), augment(images, draws))[1])
    before = weights(state.generator)
    images = paddle.randint(0, 256, [16, 3, 32, 32]).astype("uint8")
    iterate(state, images, paddle.to_tensor(drawn[0][0]), paddle.to_tensor(draws[0]), 2, 2)
    np.testing.assert_array_equal(np.stack([given for _, given in seen]), draws[0])
    real = [bool((images == seen[0][0]).all()) for images, _ in seen]
    assert real == [True, False, True, False, False, False]
    assert all(changed(before, state.generator))  # by a gradient that came through it


def test_images_are_scaled_to_the_range_of_tanh(state, monkeypatch):
    seen = []
    monkeypatch.setattr("train.d_step", lambda D, optimizer, scaler, real, fake: (
        seen.append(real.numpy()), *paddle.zeros([3]))[1:])
    monkeypatch.setattr("train.g_step", lambda *_: paddle.zeros([]))
    images = np.zeros([2, 3, 32, 32], np.uint8)
    images[1] = 255
    iterate(
        state, paddle.to_tensor(images), paddle.randn([1, 2, 5]), None, d_steps=1, g_steps=1)
    [real] = seen
    assert real.dtype == np.float32
    assert (real[0] == -1).all()
    assert (real[1] == 1).all()


def test_device_is_read_only_when_the_log_is_written(trained, tmp_path, monkeypatch):
    """On a GPU every read of a tensor waits until all that was begun is done."""
    (tmp_path / "imgs").symlink_to(trained / "imgs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [
        "train.py", *map(str, TINY), "--batch_size", "4", "--epochs", "1", "--log_every", "10",
        "--sample_every", "1000"])
    network.onednn_works()  # which reads, once in a process
    events = []
    for name in "numpy", "item", "tolist", "__array__", "__float__", "__int__", "__bool__":
        read = getattr(paddle.Tensor, name)
        monkeypatch.setattr(paddle.Tensor, name, lambda *args, read=read, **named: (
            events.append("read"), read(*args, **named))[1])
    monkeypatch.setattr("train.iterate", lambda *args: (
        iterate(*args), events.append("iteration"))[0])
    main()
    told = "".join(event[0] for event in events).split("i")  # reads before each iteration
    assert len(told) == 26
    del told[0]  # before the first iteration Paddle 2.6 reads what it copies to the average
    assert [step for step, reads in enumerate(told, 1) if reads] == [10, 20, 25]
    assert told[19] == "r"  # at 10 the first checkpoint is saved


def test_run_leaves_what_the_docstring_lists(trained):
    output = trained / "Output"
    assert sorted(path.name for path in output.iterdir()) == [
        "0001_0004.png", "0001_0004.safetensors", "0002_0002.png", "0002_0002.safetensors",
        "0002_0006.png", "0002_0006.safetensors",
        "checkpoint.safetensors", "generator.safetensors", "losses.csv", "losses.png",
        "progress.gif", "real_vs_fake.png", "training_images.png"]
    rows = table(trained)
    assert list(rows[0]) == ["step", "epoch", "batch", "d_loss", "g_loss", "d_real", "d_fake"]
    assert [(int(row["step"]), int(row["epoch"]), int(row["batch"])) for row in rows] == [
        (6 * epoch + batch, epoch + 1, batch) for epoch in (0, 1) for batch in range(1, 7)]
    assert all(np.isfinite([float(row["d_loss"]), float(row["g_loss"])]).all() for row in rows)
    assert all(0 < float(row[name]) < 1 for row in rows for name in ("d_real", "d_fake"))
    for path in output.glob("0*.png"):
        pixels = np.asarray(Image.open(path))
        assert pixels.shape == (662, 662, 3)
        assert len(np.unique(pixels)) > 20


def test_progress_is_the_first_faces_of_the_grids(trained):
    output = trained / "Output"
    with Image.open(output / "progress.gif") as animation:
        assert animation.n_frames == 3
        for frame, name in enumerate(("0001_0004", "0002_0002", "0002_0006")):
            animation.seek(frame)
            shown = np.asarray(animation.convert("RGB")).astype(int)
            assert shown.shape == (6 * 66 + 2, 6 * 66 + 2, 3)
            grid = np.asarray(Image.open(output / f"{name}.png"))[:398, :398]
            assert abs(shown - grid).mean() < 8  # 256 colours


def test_grids_do_not_depend_on_when_checkpoints_are_saved(trained, tmp_path):
    (tmp_path / "imgs").symlink_to(trained / "imgs")
    run(tmp_path, "train.py", "--epochs", 2, *TINY, "--save_minutes", 0)
    for path in (trained / "Output").glob("0*.png"):
        assert path.read_bytes() == (tmp_path / "Output" / path.name).read_bytes()


def test_average_changes_nothing_in_training(trained, tmp_path):
    (tmp_path / "imgs").symlink_to(trained / "imgs")
    run(tmp_path, "train.py", "--epochs", 2, *TINY, "--ema_decay", 0)
    assert table(tmp_path) == table(trained)
    tensors, other = (read_tensors(folder / "Output" / "generator.safetensors", "generator")[0]
                      for folder in (tmp_path, trained))
    name = "layers.1.0.weight"
    np.testing.assert_array_equal(tensors[f"raw.{name}"], other[f"raw.{name}"])
    np.testing.assert_array_equal(tensors[name], tensors[f"raw.{name}"])  # no average
    assert abs(other[name] - other[f"raw.{name}"]).max() > 1e-4


def test_average_in_the_file_is_that_over_the_iterations(trained, tmp_path, monkeypatch):
    """Of G as it is after each iteration, newer ones weighing more, (1 + t) / (10 + t)."""
    (tmp_path / "imgs").symlink_to(trained / "imgs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["train.py", *map(str, TINY), "--epochs", "1",
                                     "--ema_decay", "0.5"])
    seen = []
    monkeypatch.setattr("train.iterate", lambda state, *rest: (
        seen or seen.append(state.generator.layers[1][0].weight.numpy().copy()),
        iterate(state, *rest),
        seen.append(state.generator.layers[1][0].weight.numpy().copy()))[1])
    main()
    mean = seen[0]
    for step, weight in enumerate(seen[1:], 1):
        decay = min(0.5, (1 + step) / (10 + step))
        mean = decay * mean + (1 - decay) * weight
    assert len(seen) == 7
    tensors, _ = read_tensors(tmp_path / "Output" / "generator.safetensors", "generator")
    np.testing.assert_allclose(tensors["layers.1.0.weight"], mean, atol=1e-6)


def test_eval_faces_have_mean_and_spread_of_train_faces(trained):
    """With the statistics in the file; those that run along with batches of 4 do not do."""
    path = trained / "Output" / "generator.safetensors"
    z = paddle.to_tensor(random_array([5], [1000, 100], "normal"))

    def levels(net):
        with paddle.no_grad():
            faces = net(z).numpy()
        return np.array([faces.mean(), faces.std(axis=0).mean()])

    def off(net):
        net.eval()
        found = levels(net)
        net.train()
        mean, spread = levels(net)
        return abs(found - [mean, spread]) / spread

    for raw in False, True:
        generator, _ = load_generator(path, raw)
        assert (off(generator) < 0.02).all()
        for step in range(8):
            generator(paddle.to_tensor(random_array([0, step], [4, 100], "normal")))
        assert (off(generator) > 0.04).any()


def test_line_says_when_d_has_won(trained, tmp_path, monkeypatch, capsys):
    (tmp_path / "imgs").symlink_to(trained / "imgs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("train.D_WON_AFTER", 15)
    for name, fooled, said in ("won", 0.001, 2), ("once", 0.02, 1):
        values = iter(paddle.to_tensor(np.stack(
            [np.ones(36), np.ones(36), np.ones(36),
             np.where(np.arange(36) == 10, fooled, 0.001)], 1).astype(np.float32)))
        monkeypatch.setattr(
            "train.iterate", lambda *args, values=values: (iterate(*args), next(values))[1])
        monkeypatch.setattr("sys.argv", [
            "train.py", *map(str, TINY), "--epochs", "6", "--output_path", name])
        main()
        assert capsys.readouterr().err.count("D has won") == said, name


def colours(picture, box):
    """The share of a box, in tenths of the picture, that has each of matplotlib's colours."""
    pixels = np.asarray(picture.convert("RGB")).astype(int)
    height, width, _ = pixels.shape
    left, top, right, bottom = box
    part = pixels[height * top // 10:height * bottom // 10, width * left // 10:width * right // 10]
    named = {"blue": (31, 119, 180), "orange": (255, 127, 14), "green": (44, 160, 44),
             "red": (214, 39, 40)}
    return {name: (abs(part - color).sum(2) < 30).mean() for name, color in named.items()}


def test_losses_are_drawn_however_many(tmp_path):
    """Each curve is in its panel, from left to right, in less than a second."""
    for count in 1, 30, 12_000, 1_000_000:
        rng = np.random.default_rng(0)
        step = np.arange(1, count + 1)
        curves = [rng.normal(mean, 0.01, count) for mean in (0.5, 2.0, 0.8, 0.2)]
        rows = np.stack([step, step, step, *curves], 1)
        np.savetxt(tmp_path / "losses.csv", rows, "%g", ",", header="step,epoch", comments="")
        if count == 30:  # and an eighth column since the run went on
            lines = (tmp_path / "losses.csv").read_text().splitlines()
            lines[20:] = [f"{line},0.5" for line in lines[20:]]
            (tmp_path / "losses.csv").write_text("\n".join(lines) + "\n")
        start = time.perf_counter()
        draw_curves(tmp_path / "losses.png")
        assert time.perf_counter() - start < 5
        with Image.open(tmp_path / "losses.png") as picture:
            if count == 1:
                continue  # a point is no line
            for left in 1, 4, 8:
                above = colours(picture, (left, 0, left + 1, 5))
                below = colours(picture, (left, 5, left + 1, 10))
                assert min(above["blue"], above["orange"]) > 0.002
                assert min(below["green"], below["red"]) > 0.002
                assert max(above["green"], above["red"], below["blue"], below["orange"]) < 0.001
            higher = colours(picture, (4, 0, 6, 2))  # G's loss, 2.0, of at most 2.7
            assert higher["blue"] > higher["orange"] == 0


def test_the_codes_digest_is_taken_before_images_are_packed(tmp_path, monkeypatch):
    code_digest.cache_clear()
    monkeypatch.setattr("train.set_up", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(SimpleNamespace(data_path=tmp_path / "imgs", output_path=tmp_path / "Output"))
    assert code_digest.cache_info().currsize == 1


def test_pictures_show_what_they_should(trained):
    """Each picture is compared with images that are made here."""
    output = trained / "Output"
    generator, info = load_generator(output / "generator.safetensors")
    z = face_latents(0, range(100), 100, "normal")
    faces = grid(draw_faces(generator, z))
    drawn = np.asarray(Image.open(output / "0002_0006.png"))
    np.testing.assert_array_equal(drawn, faces)
    other = grid(draw_faces(Generator(100, 64, 8), z))
    assert abs(drawn.astype(int) - other).mean() > 4  # an untrained net's would be noise
    reader = FaceReader(trained / "imgs", 64, 16, seed=0)
    given = np.concatenate([reader.batch(1, number) for number in range(6)])
    np.testing.assert_array_equal(
        np.asarray(Image.open(output / "training_images.png")), grid(given))

    both = Image.open(output / "real_vs_fake.png").convert("RGB")
    for panel, images in enumerate((reader.sample(100), draw_faces(generator, z))):
        shown = both.crop((panel * both.width // 2, 0, (panel + 1) * both.width // 2, both.height))
        expected = Image.fromarray(grid(images))
        box = find_panel(shown)
        shown = np.asarray(shown.crop(box).resize((60, 60), Image.Resampling.BOX)).astype(float)
        expected = np.asarray(expected.resize((60, 60), Image.Resampling.BOX)).astype(float)
        assert abs(shown - expected).mean() < 12, panel


def find_panel(picture):
    """The box of the large square in a white picture with a title above."""
    dark = np.asarray(picture).min(2) < 250
    columns = np.flatnonzero(dark.mean(0) > 0.5)
    rows = np.flatnonzero(dark[:, columns[0]:columns[-1]].mean(1) > 0.5)
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def test_training_images_are_drawn_as_d_sees_them(trained, tmp_path):
    """Mirrored with flip, varied with augment."""
    plain, flipped = (FaceReader(trained / "imgs", 64, 64, 0, flip=flip) for flip in (False, True))
    drawn = {}
    for name, reader, augment in (
            ("plain", plain, False), ("flip", flipped, False), ("augment", plain, True)):
        draw_training_images(tmp_path / f"{name}.png", reader, augment)
        drawn[name] = np.asarray(Image.open(tmp_path / f"{name}.png"))
    np.testing.assert_array_equal(drawn["plain"], grid(plain.batch(1, 0), 10))
    np.testing.assert_array_equal(drawn["flip"], grid(flipped.batch(1, 0), 10))
    assert (drawn["flip"] != drawn["plain"]).any()
    varied = drawn["augment"].astype(int)
    assert varied.shape == drawn["plain"].shape
    assert 10 < abs(varied - drawn["plain"]).mean() < 100
    cut_out = (abs(varied - 128) < 1).all(2).mean()
    assert 0.1 < cut_out < 0.5  # a quarter, less what lies outside, and the shifts' edges


def test_losses_are_those_of_the_algorithm(trained):
    """The csv of the run, against the algorithm written out once more.

    Only its first iterations: on Paddle 2.6 the two round differently, 1e-6 at the first, and a
    GAN doubles such a difference with every iteration.
    """
    paddle.seed(0)
    G, D = Generator(100, 64, 8), Discriminator(64, 8)
    d_optimizer, g_optimizer = (
        paddle.optimizer.Adam(0.0002, 0.5, 0.999, parameters=net.parameters()) for net in (D, G))
    reader = FaceReader(trained / "imgs", 64, 16, seed=0)
    rows = table(trained)
    for step, images in zip((1, 2, 3), reader.epoch(1), strict=False):
        # G's first step is on the latent vectors of D's
        latents = [random_array([0, step, 0, k], [16, 100], "normal") for k in (1, 1, 2)]
        z = [paddle.to_tensor(latent) for latent in latents]
        real = paddle.to_tensor(images / np.float32(127.5) - 1)
        d_loss = loss(D(real), 1) + loss(D(G(z[0]).detach()), 0)
        d_loss.backward()
        d_optimizer.step()
        d_optimizer.clear_grad()
        for k in 1, 2:
            g_loss = loss(D(G(z[k])), 1)
            g_loss.backward()
            g_optimizer.step()
            d_optimizer.clear_grad()
            g_optimizer.clear_grad()
        assert float(rows[step - 1]["d_loss"]) == pytest.approx(float(d_loss), rel=1e-4)
        assert float(rows[step - 1]["g_loss"]) == pytest.approx(float(g_loss), rel=1e-4)


def test_threads_change_rounding_only(trained, tmp_path, monkeypatch):
    (tmp_path / "imgs").symlink_to(trained / "imgs")
    threads = "3" if os.environ.get("OMP_NUM_THREADS") == "2" else "2"
    monkeypatch.setenv("OMP_NUM_THREADS", threads)
    shown = subprocess.run(
        [sys.executable, "-c", "import weightInit, os; print(os.environ['OMP_NUM_THREADS'])"],
        cwd=ROOT, text=True, capture_output=True)
    assert shown.stdout.split() == [threads]  # the user's choice is kept
    run(tmp_path, "train.py", "--epochs", 1, *TINY)
    for row, other in zip(table(tmp_path)[:3], table(trained), strict=False):
        for name in "d_loss", "g_loss":
            assert float(row[name]) == pytest.approx(float(other[name]), rel=1e-3)


def test_environments_that_others_left_change_nothing(trained, tmp_path):
    """A notebook's backend, a matplotlibrc that wants LaTeX, a rank of a launcher; and amp."""
    (tmp_path / "imgs").symlink_to(trained / "imgs")
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\nfigure.dpi: 3\n")
    env = {**os.environ, "MPLBACKEND": "module://no_such.backend", "PADDLE_TRAINER_ID": "1"}
    printed = run(tmp_path, "train.py", "--epochs", 1, *TINY, "--amp", env=env)
    assert "amp is off" in printed
    assert "could not" not in printed
    assert re.search(r"CPU.*float32: 100 images, [\d,]{6,} weights in G, .* 6 iterations", printed)
    assert table(tmp_path) == table(trained)[:6]
    sizes = [Image.open(folder / "Output" / "losses.png").size for folder in (trained, tmp_path)]
    assert sizes[0] == sizes[1]
    assert "going on after" in run(tmp_path, "train.py", "--epochs", 2, *TINY, env=env)
    assert ((tmp_path / "Output" / "generator.safetensors").read_bytes()
            == (trained / "Output" / "generator.safetensors").read_bytes())
    assert "no more are asked for" in run(tmp_path, "train.py", "--epochs", 1, *TINY)


def test_error_while_a_batch_is_read_ends_the_run(trained, tmp_path, monkeypatch):
    (tmp_path / "imgs").symlink_to(trained / "imgs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["train.py", *map(str, TINY)])
    batch = FaceReader.batch

    def broken(self, epoch, number):
        if number == 2:
            raise OSError("read error")
        return batch(self, epoch, number)

    monkeypatch.setattr("dataReader.FaceReader.batch", broken)
    with pytest.raises(OSError, match="read error"):
        main()


def test_last_epoch_is_saved(trained):
    printed = run(trained, "generator.py", "--count", 1)
    assert "trained for 12 iterations" in printed


def test_same_seed_same_run_and_other_seed_another(trained, tmp_path):
    (tmp_path / "imgs").symlink_to(trained / "imgs")
    flags = ["--epochs", 2, *TINY]
    run(tmp_path, "train.py", *flags)
    assert ((tmp_path / "Output" / "generator.safetensors").read_bytes()
            == (trained / "Output" / "generator.safetensors").read_bytes())
    assert table(tmp_path) == table(trained)
    run(tmp_path, "train.py", "--epochs", 1, *TINY, "--seed", 1, "--restart")
    assert table(tmp_path) != table(trained)[:6]


def test_settings_in_the_file_and_flags_do_the_same(trained, tmp_path):
    """`run` joins the script's path to ROOT, so an absolute one runs a copy."""
    (tmp_path / "imgs").symlink_to(trained / "imgs")
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    text = (tmp_path / "train.py").read_text()
    for name, line in {
            "epochs": "epochs = 2", "width": "width = 8 # narrow", "batch_size": "batch_size=16",
            "beta1": "beta1 = 0.5", "sample_every": "sample_every = 4  # often",
            "log_every": "log_every = 3", "g_steps": "g_steps = 2"}.items():
        text, count = re.subn(rf"^{name} = .*$", line.replace("=16", " = 16"), text, flags=re.M)
        assert count == 1
    (tmp_path / "train.py").write_text(text)
    run(tmp_path, tmp_path / "train.py", "--beta2", "0.999")
    assert table(tmp_path) == table(trained)
    broken = re.sub("^batch_size = .*$", "batch_size = 0", text, flags=re.M)
    (tmp_path / "train.py").write_text(broken)
    assert "batch_size" in complaint(tmp_path, tmp_path / "train.py", status=2)
    whole = re.sub("^beta1 = .*$", "beta1 = 0", text, flags=re.M)  # 0 for 0.0
    (tmp_path / "train.py").write_text(whole)
    assert "beta1 0.5 (now 0.4)" in complaint(tmp_path, tmp_path / "train.py", "--beta1", 0.4)


def test_help_lists_the_settings_of_the_text(tmp_path):
    printed = run(tmp_path, "train.py", "--help")
    for name, value in {
            "learning_rate": 0.0002, "image_size": 64, "epochs": 8, "batch_size": 128,
            "z_dim": 100, "beta1": 0.5, "beta2": 0.999, "d_steps": 1, "g_steps": 2}.items():
        assert re.search(rf"--{name} \w+\s.*?\(default:\s+{value}\)", printed, re.DOTALL), name


@pytest.mark.parametrize(("flags", "words"), [
    (["--image_size", 48], ["image_size", "48", "32, 64, 128"]),
    (["--batch_size", 0], ["batch_size", "0", "at least 1"]),
    (["--noise", "gaussian"], ["noise", "gaussian", "normal, uniform"]),
    (["--learning_rate", "nan"], ["learning_rate", "nan"]),
    (["--beta1", "1"], ["beta1", "less than 1"]),
    (["--seed", "99999999999999999999"], ["seed"]),
    (["--epochs", "many"], ["epochs", "many"]),
    (["--no_such_flag", 1], ["no_such_flag"]),
])
def test_bad_flags_are_one_line_and_status_2(tmp_path, flags, words):
    line = complaint(tmp_path, "train.py", *flags, status=2)
    assert all(word in line for word in words), line
    assert not list(tmp_path.iterdir())


def test_missing_data_says_how_to_get_it(tmp_path):
    line = complaint(tmp_path, "train.py", "--device", "cpu")
    assert "imgs" in line
    assert "celeba" in line.lower()
    assert "python pretreat.py --demo" in line
    (tmp_path / "imgs").mkdir()
    for number in range(50):
        photo(64, 64, number).save(tmp_path / "imgs" / f"{number}.png")
    line = complaint(tmp_path, "train.py", "--device", "cpu")
    assert "50 images" in line
    assert "128" in line
    assert "--batch_size 50" in line
    assert not (tmp_path / "Output").exists()


def test_what_cannot_be_written_or_used_is_one_line(trained, tmp_path):
    (tmp_path / "imgs").symlink_to(trained / "imgs")
    (tmp_path / "Output").write_text("a file")
    assert "Output" in complaint(tmp_path, "train.py", "--device", "cpu", *TINY)
    assert "--device gpu" in complaint(tmp_path, "train.py", "--device", "gpu", *TINY)
