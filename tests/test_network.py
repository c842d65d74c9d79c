"""network.py and weightInit.py: the shapes, weights, loss and files that the tutorial describes."""

import network
from dataReader import Problem
from network import (
    Discriminator,
    Generator,
    augment,
    average_weights,
    draw_faces,
    estimate_statistics,
    face_latents,
    load_generator,
    loss,
    margin,
    random_array,
    save_generator,
)
from weightInit import paddle, read_tensors, write_tensors

import json
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.numpy


def layer_shapes(net, kinds):
    return [layer.weight.shape for layer in net.sublayers() if isinstance(layer, kinds)]


def test_layers_are_those_of_the_text():
    convs = paddle.nn.Conv2D, paddle.nn.Linear
    assert layer_shapes(Discriminator(), convs) == [
        [64, 3, 4, 4], [128, 64, 4, 4], [256, 128, 4, 4], [512, 256, 4, 4], [8192, 2]]
    assert layer_shapes(Generator(), paddle.nn.Conv2DTranspose) == [
        [100, 512, 4, 4], [512, 256, 4, 4], [256, 128, 4, 4], [128, 64, 4, 4], [64, 3, 4, 4]]
    for net, count in (Discriminator(), 3), (Generator(), 4):
        norms = [layer for layer in net.sublayers() if isinstance(layer, paddle.nn.BatchNorm2D)]
        assert len(norms) == count
    assert not any("Pool" in type(layer).__name__ for layer in Discriminator().sublayers())


@pytest.mark.parametrize("size", [32, 64, 128])
def test_shapes_and_range(size):
    G, D = Generator(7, size, 8), Discriminator(size, 8)
    images = G(paddle.randn([3, 7]))
    assert images.shape == [3, 3, size, size]
    assert float(images.min()) >= -1
    assert float(images.max()) <= 1
    assert D(images).shape == [3, 2]
    z = paddle.randn([3, 7])
    G.eval()
    np.testing.assert_array_equal(G(z).numpy(), G(z.reshape([3, 7, 1, 1])).numpy())


def test_discriminator_can_learn_to_see_contrast():
    """Images that differ in nothing else; every batch of them has one contrast."""
    paddle.seed(0)
    D = Discriminator(32, 8)
    optimizer = paddle.optimizer.Adam(0.01, beta1=0.5, parameters=D.parameters())
    for _ in range(40):
        images = paddle.randn([2, 16, 3, 32, 32]) * 0.4
        (loss(D(images[0]), 1) + loss(D(images[1] * 0.5), 0)).backward()
        optimizer.step()
        optimizer.clear_grad()
    images = paddle.randn([16, 3, 32, 32]) * 0.4
    assert float(margin(D(images)).mean()) > 1
    assert float(margin(D(images * 0.5)).mean()) < -1


@pytest.mark.parametrize("precision", ["float32", "float64"])  # a CPU cannot add in bfloat16
def test_a_bias_is_added_to_each_channel_in_the_images_precision(precision):
    layer, images = network.Bias(3), paddle.randn([2, 3, 4, 5]).astype(precision)
    layer.bias.set_value(paddle.to_tensor([1.0, 2, 4]))
    made = layer(images)
    assert made.dtype == images.dtype
    expected = images.numpy() + np.array([1, 2, 4], precision).reshape([3, 1, 1])
    np.testing.assert_array_equal(made.numpy(), expected)


@pytest.fixture(autouse=True)
def trial_of_its_own():
    network.onednn_works.cache_clear()
    yield
    network.onednn_works.cache_clear()


@pytest.mark.parametrize(("size", "batch"), [(32, 3), (64, 1), (64, 16), (128, 5)])
def test_onednn_computes_what_paddles_own_layers_do(size, batch, monkeypatch):
    """Images, logits and all gradients, with D trained and D frozen."""
    paddle.seed(0)
    G, D, z = Generator(7, size, 8), Discriminator(size, 8), paddle.randn([2, batch, 7])
    of_g, of_d = ([value for value in net.parameters() if not value.stop_gradient]
                  for net in (G, D))

    def results(frozen):
        for value in of_g + of_d:
            value.clear_gradient(False)
        for value in of_d:
            value.stop_gradient = frozen
        images = G(z[1])  # not at the beginning of its memory
        logits = D(images)
        loss(logits, 1).backward()
        return [images.numpy(), logits.numpy(),
                *(value.grad.numpy() for value in (of_g if frozen else of_g + of_d))]

    for frozen in False, True:
        monkeypatch.setattr("network.ONEDNN", True)
        ours, again = results(frozen), results(frozen)
        assert network.onednn_works()
        monkeypatch.setattr("network.ONEDNN", False)
        theirs = results(frozen)
        assert len(ours) == len(theirs) > 10
        for one, repeated, other in zip(ours, again, theirs, strict=True):
            np.testing.assert_array_equal(one, repeated)
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-4 * np.abs(other).max())


@pytest.mark.parametrize("size", [32, 64, 128])
def test_all_our_layers_run_on_onednn(size):
    for net in Generator(7, size, 8), Discriminator(size, 8):
        layers = [layer for layer in net.sublayers() if hasattr(layer, "_kernel_size")]
        assert len(layers) >= 3
        assert all(network.runs_on_onednn(layer, paddle.zeros([1])) for layer in layers)


def test_a_layer_in_double_precision_is_paddle_s():
    layer = network.conv(3, 4).astype("float64")
    assert not network.runs_on_onednn(layer, paddle.zeros([1], "float64"))


EDITS = [
    {}, {"kernel_size": 5, "padding": 2}, {"kernel_size": 3}, {"stride": 1, "padding": 2},
    {"bias_attr": None}, {"groups": 2}, {"dilation": 3}, {"padding": "VALID"}, {"padding": [1, 2]},
    {"kernel_size": [4, 2]}, {"stride": [2, 1]}, {"data_format": "NHWC"}]


@pytest.mark.parametrize(("kind", "edit"), [
    *((kind, edit) for kind in ("Conv2D", "Conv2DTranspose") for edit in EDITS),
    ("Conv2D", {"padding_mode": "reflect"}), ("Conv2DTranspose", {"output_padding": 1})], ids=str)
def test_an_edited_layer_is_what_paddle_makes_of_it(kind, edit):
    """Image, and the gradients by inputs and weights: no setting of a layer is ignored."""
    settings = {"kernel_size": 4, "stride": 2, "padding": 1, "bias_attr": False} | edit
    layers = [getattr(source, kind)(4, 6, **settings) for source in (network, paddle.nn)]
    weights = [paddle.randn(value.shape) for value in layers[0].parameters()]
    images, results = paddle.randn([2, 4, 12, 10]), []
    if edit == {"data_format": "NHWC"}:
        images = images.transpose([0, 2, 3, 1])
    for layer in layers:
        for parameter, weight in zip(layer.parameters(), weights, strict=True):
            parameter.set_value(weight)
        inputs = images.detach()
        inputs.stop_gradient = False
        made = layer(inputs)
        (made * made).sum().backward()
        results.append([made, *(value.grad for value in (inputs, *layer.parameters()))])
    for ours, theirs in zip(*results, strict=True):
        largest = float(theirs.abs().max())
        np.testing.assert_allclose(ours.numpy(), theirs.numpy(), rtol=0, atol=1e-5 * largest)


def test_onednn_takes_images_that_do_not_lie_in_order():
    images = paddle.randn([3, 32, 32, 8]).transpose([0, 3, 1, 2])
    assert not images.is_contiguous()
    layer = network.conv(8, 16)
    expected = layer(paddle.to_tensor(images.numpy())).numpy()
    np.testing.assert_array_equal(layer(images).numpy(), expected)


def test_onednn_is_used_though_first_asked_for_without_gradients():
    with paddle.no_grad():
        assert network.onednn_works()


@pytest.mark.parametrize("broken", ["Operator", "ProgramDesc", "Scope"])
def test_paddle_without_onednn_uses_its_own_layers(broken, monkeypatch):
    paddle.seed(0)
    G, z = Generator(7, 32, 8), paddle.randn([2, 7])
    monkeypatch.setattr("network.ONEDNN", False)
    expected = G(z).numpy()
    monkeypatch.setattr("network.ONEDNN", True)
    monkeypatch.delattr(network.core, broken)
    network.onednn_operators.cache_clear()
    np.testing.assert_array_equal(G(z).numpy(), expected)


def test_wrong_numbers_of_onednn_are_not_used(monkeypatch):
    monkeypatch.setattr("network.run_onednn", lambda *_: paddle.zeros([1, 2, 4, 4]))
    assert not network.onednn_works()


def test_nothing_of_onednn_runs_on_a_gpu(monkeypatch):
    images = SimpleNamespace(place=SimpleNamespace(is_cpu_place=lambda: False))
    for name in "onednn_works", "run_onednn", "Convolution":
        monkeypatch.delattr(f"network.{name}")
    for kind, layer in (paddle.nn.Conv2D, network.conv(3, 4)), (
            paddle.nn.Conv2DTranspose, network.deconv(3, 4)):
        monkeypatch.setattr(kind, "forward", lambda self, images: "Paddle's own")
        assert layer(images) == "Paddle's own"


def test_onednns_results_are_apart_and_no_memory_is_held():
    """One operator serves all calls of a layer's shape, with batches of any size between them."""
    paddle.seed(0)
    G, D = Generator(7, 32, 8), Discriminator(32, 8)
    batches = [paddle.randn([count, 7]) for count in (3, 5, 3, 1)]
    of_g, of_d = G.layers[0][0].weight, D.layers[0].weight

    def gradients(z):
        loss(D(G(z)), 1).backward()
        found = of_g.grad.numpy(), of_d.grad.numpy()
        G.clear_gradients()
        D.clear_gradients()
        return found

    alone = [gradients(z) for z in batches]
    images = [G(z) for z in batches]  # all graphs are there before the first gradient
    logits = [D(batch) for batch in images]
    kept = [(one.numpy().copy(), other.numpy().copy())
            for one, other in zip(images, logits, strict=True)]
    for number in 2, 0, 3, 1:
        loss(logits[number], 1).backward()
        for weight, expected in zip((of_g, of_d), alone[number], strict=True):
            np.testing.assert_array_equal(weight.grad.numpy(), expected)
        G.clear_gradients()
        D.clear_gradients()
    for found, expected in zip(zip(images, logits, strict=True), kept, strict=True):
        np.testing.assert_array_equal(found[0].numpy(), expected[0])
        np.testing.assert_array_equal(found[1].numpy(), expected[1])
    _, tensors, _ = network.onednn_operators("small", "kernels [8, 3, 4, 4] 2 1", 2, 1)
    assert len(tensors) == 5
    for tensor in tensors.values():
        assert not tensor._is_initialized()


def test_second_gradient_by_onednn_is_refused():
    """It would be left out without a word."""
    D, images = Discriminator(32, 8), paddle.randn([2, 3, 32, 32])
    images.stop_gradient = False
    score = margin(D(images)).sum()
    with pytest.raises(Exception, match="set network.ONEDNN = False"):
        paddle.grad(score, [images, D.layers[0].weight], create_graph=True)


def test_gradient_penalty_is_possible(monkeypatch):
    """R1, its gradient by a weight against a difference; tanh, since LeakyReLU's has jumps."""
    monkeypatch.setattr("network.ONEDNN", False)
    monkeypatch.setattr("network.nn.LeakyReLU", lambda _: paddle.nn.Tanh())
    paddle.seed(0)
    D, images = Discriminator(32, 8), paddle.randn([4, 3, 32, 32])
    images.stop_gradient = False

    def penalty():
        [gradient] = paddle.grad(margin(D(images)).sum(), [images], create_graph=True)
        return (gradient**2).sum()

    penalty().backward()
    weight = D.layers[0].weight
    before, values = weight.numpy().copy(), []
    for step in 1e-3, -1e-3:
        moved = before.copy()
        moved[0, 0, 1, 1] += step
        weight.set_value(moved)
        values.append(float(penalty()))
    assert float(weight.grad[0, 0, 1, 1]) == pytest.approx((values[0] - values[1]) / 2e-3, rel=0.02)


@pytest.mark.parametrize("build", [Discriminator, Generator])
def test_other_sizes_are_refused(build):
    with pytest.raises(ValueError, match="48.*32, 64, 128"):
        build(image_size=48)


def test_weights_start_normal():
    paddle.seed(0)
    for net in Discriminator(), Generator():
        for name, value in net.named_parameters():
            if value.stop_gradient:
                continue  # a running statistic
            value = value.numpy()
            if name.endswith("bias"):
                assert (value == 0).all(), name
            else:
                center, error = float(value.ndim == 1), 0.02 / value.size**0.5
                assert value.mean() == pytest.approx(center, abs=4 * error), name
                assert value.std() == pytest.approx(0.02, abs=4 * error), name


def test_running_statistics_take_half_of_each_batch():
    norm = next(layer for layer in Generator(width=8).sublayers()
                if isinstance(layer, paddle.nn.BatchNorm2D))
    for _ in range(2):
        norm(paddle.full([2, 64, 4, 4], 4.0))
    np.testing.assert_allclose(norm._mean.numpy(), 0.5 * (0.5 * 0 + 0.5 * 4) + 0.5 * 4)


def test_loss_is_bce_of_the_probability_of_real():
    logits = paddle.to_tensor([[0.3, -1.2], [2.0, 0.5], [-0.7, 1.9]])
    real = paddle.nn.functional.softmax(logits)[:, 1].numpy()
    np.testing.assert_allclose(float(loss(logits, 1)), -np.log(real).mean(), rtol=1e-6)
    np.testing.assert_allclose(float(loss(logits, 0)), -np.log(1 - real).mean(), rtol=1e-6)
    labels = paddle.to_tensor([1.0, 0.0, 1.0])
    expected = -(np.log(real[0]) + np.log(1 - real[1]) + np.log(real[2])) / 3
    np.testing.assert_allclose(float(loss(logits, labels)), expected, rtol=1e-6)
    np.testing.assert_allclose(
        float(loss(logits, labels)),
        float(paddle.nn.functional.cross_entropy(logits, labels.astype("int64"))), rtol=1e-6)
    np.testing.assert_allclose(
        paddle.nn.functional.sigmoid(margin(logits)).numpy(), real, rtol=1e-6)


def test_loss_does_not_overflow():
    logits = paddle.to_tensor([[500.0, -500.0]])
    logits.stop_gradient = False
    value = loss(logits, 1)
    assert float(value) == 1000
    value.backward()
    np.testing.assert_allclose(logits.grad.numpy(), [[1, -1]])


def test_latents_depend_on_their_key_alone():
    normal = random_array([0, 5, 0, 1], [1000, 100], "normal")
    assert normal.dtype == np.float32
    np.testing.assert_array_equal(normal, random_array([0, 5, 0, 1], [1000, 100], "normal"))
    assert abs(normal.mean()) < 0.02
    assert normal.std() == pytest.approx(1, abs=0.02)
    assert (normal[0] != random_array([0, 6, 0, 1], [1, 100], "normal")).any()
    uniform = random_array([0, 5], [1000, 100], "uniform")
    assert uniform.min() >= 0
    assert uniform.max() < 1
    assert uniform.mean() == pytest.approx(0.5, abs=0.01)
    np.testing.assert_array_equal(
        face_latents(3, range(10), 100, "normal")[7], face_latents(3, [7], 100, "normal")[0])


def test_faces_use_the_whole_range_of_levels():
    z = np.zeros([2, 1], np.float32)
    levels = {-1.0: 0, -0.5: 64, 0.0: 128, 0.5: 191, 1.0: 255}
    for value, level in levels.items():
        faces = draw_faces(lambda z, value=value: paddle.full([2, 3, 8, 8], value), z)
        assert faces.dtype == np.uint8
        assert (faces == level).all()
    every = np.arange(256, dtype=np.float32).reshape(1, 1, 16, 16)
    faces = draw_faces(lambda z: paddle.to_tensor(every / 127.5 - 1), z)
    np.testing.assert_array_equal(faces, every)  # real images survive the way there and back


def test_generator_comes_back_from_its_file_alone(tmp_path):
    G, raw = Generator(7, 32, 8), Generator(7, 32, 8)
    for net in G, raw:
        for _ in range(3):
            net(paddle.randn([8, 7]))  # moves the running statistics
    save_generator(tmp_path / "g", G, raw, "uniform", 12)
    again, info = load_generator(tmp_path / "g")
    assert info == {"kind": "generator", "z_dim": 7, "image_size": 32, "width": 8,
                    "noise": "uniform", "step": 12}
    assert not again.training
    G.eval()
    z = paddle.randn([4, 7])
    np.testing.assert_array_equal(G(z).numpy(), again(z).numpy())
    save_generator(tmp_path / "h", again, raw, "uniform", 12)
    estimate_statistics(raw, "uniform")
    np.testing.assert_array_equal(
        raw(z).numpy(), load_generator(tmp_path / "g", raw=True)[0](z).numpy())
    assert (tmp_path / "g").read_bytes() == (tmp_path / "h").read_bytes()


def test_augment_does_to_each_image_what_its_numbers_say():
    """Against the definition, image by image and pixel by pixel (Zhao et al. 2020)."""
    rng = np.random.default_rng(0)
    images = rng.uniform(-1, 1, [6, 3, 32, 32]).astype(np.float32)
    numbers = rng.random([6, 7], dtype=np.float32)
    numbers[0, 3:5] = 0  # the farthest shifts
    numbers[1, 3:5] = 1 - 2**-20
    found = augment(paddle.to_tensor(images), paddle.to_tensor(numbers)).numpy()
    for image, (light, color, contrast, down, right, y, x), result in zip(
            images, numbers, found, strict=True):
        image = image + light - 0.5
        image = image.mean(0) + 2 * color * (image - image.mean(0))
        image = image.mean() + (contrast + 0.5) * (image - image.mean())
        down, right = int(down * 9) - 4, int(right * 9) - 4
        expected = np.zeros_like(image)
        for row in range(max(0, down), min(32, 32 + down)):
            for column in range(max(0, right), min(32, 32 + right)):
                expected[:, row, column] = image[:, row - down, column - right]
        for row in range(32):
            for column in range(32):
                if abs(row + 0.5 - 32 * y) < 8 and abs(column + 0.5 - 32 * x) < 8:
                    expected[:, row, column] = 0
        np.testing.assert_allclose(result, expected, atol=1e-5)


def test_gradient_flows_through_augment():
    images = paddle.rand([2, 3, 32, 32])
    images.stop_gradient = False
    numbers = paddle.to_tensor(np.array([[0.7, 0.4, 0.8, 0.2, 0.9, 0.1, 0.6]] * 2, np.float32))
    weight = paddle.randn(images.shape)
    (augment(images, numbers) * weight).sum().backward()
    step = paddle.randn(images.shape)
    # it is linear in the images but for the brightness, so this is exact up to rounding
    change = augment(images + step, numbers) - augment(images, numbers)
    assert float((images.grad * step).sum()) == pytest.approx(float((change * weight).sum()), 1e-3)


def test_no_product_of_augment_is_broadcast(monkeypatch):
    """On a GPU Paddle multiplies the matrices of such a product one by one: 4,608 launches."""
    shapes = []
    product = paddle.Tensor.__matmul__

    def multiply(one, other):
        shapes.append((list(one.shape[:-2]), list(other.shape[:-2])))
        return product(one, other)

    monkeypatch.setattr(paddle.Tensor, "__matmul__", multiply)
    augment(paddle.zeros([5, 3, 32, 32]), paddle.zeros([5, 7]))
    assert shapes == [([5, 3], [5, 3])] * 2


def joined():
    """A small generator with its weights in one vector."""
    G = Generator(7, 32, 4)
    network.join_weights(G)
    return G


def test_average_of_weights_moves_by_its_decay():
    averaged, G = joined(), joined()
    before, state = [{name: value.numpy().copy() for name, value in net.state_dict().items()}
                     for net in (averaged, G)]
    average_weights(averaged, G, 0.75)
    for name, value in averaged.state_dict().items():
        statistics = name.endswith(("_mean", "_variance"))
        np.testing.assert_allclose(value.numpy(), before[name] if statistics else
                                   0.75 * before[name] + 0.25 * state[name], rtol=1e-5, atol=1e-7)
    for name, value in G.state_dict().items():
        np.testing.assert_array_equal(value.numpy(), state[name])
    average_weights(averaged, G, 0)
    for value, copied in zip(G.parameters(), averaged.parameters(), strict=True):
        if not value.stop_gradient:
            np.testing.assert_array_equal(copied.numpy(), value.numpy())


def test_weights_are_parts_of_one_vector_and_stay_it():
    """Restoring a checkpoint sets them one by one, `set_state_dict` all at once."""
    averaged, G = joined(), joined()
    average_weights(averaged, G, 0)
    for value in averaged.parameters():
        value.set_value(2 * value.numpy())
    np.testing.assert_array_equal(averaged.vector[:8].numpy(), 2 * G.parameters()[0].flatten()[:8])
    averaged.set_state_dict(
        {name: paddle.to_tensor(value.numpy()) for name, value in G.state_dict().items()})
    before = {name: value.numpy().copy() for name, value in averaged.state_dict().items()}
    average_weights(averaged, joined(), 0.5)
    for name, value in averaged.named_parameters():
        if name.endswith("weight"):
            assert (value.numpy() != before[name]).any(), name


def test_estimated_statistics_are_means_over_all_batches():
    G = Generator(7, 32, 4)
    estimate_statistics(G, "normal")
    assert not G.training
    deconv, norm, _ = G.layers[0]
    assert norm._momentum == 0.5
    latents = [random_array([0, 0, 0, batch], [256, 7, 1, 1], "normal") for batch in range(1, 6)]
    images = [deconv(paddle.to_tensor(z)).numpy() for z in latents]
    for found, expected in (norm._mean, np.mean), (norm._variance, np.var):
        np.testing.assert_allclose(found.numpy(), np.mean(
            [expected(batch, axis=(0, 2, 3)) for batch in images], axis=0), rtol=1e-3, atol=1e-7)


def test_file_without_raw_weights_and_in_float16(tmp_path):
    G, z = Generator(7, 32, 8), np.zeros([4, 7], np.float32)
    estimate_statistics(G, "normal")
    save_generator(tmp_path / "whole", G, None, "normal", 12)
    save_generator(tmp_path / "half", G, None, "normal", 12, half=True)
    expected = draw_faces(G, z)
    np.testing.assert_array_equal(draw_faces(load_generator(tmp_path / "whole")[0], z), expected)
    half, _ = load_generator(tmp_path / "half")
    assert {value.dtype for value in half.state_dict().values()} == {paddle.float32}
    assert np.abs(draw_faces(half, z).astype(int) - expected).max() <= 1
    assert (tmp_path / "half").stat().st_size < 0.6 * (tmp_path / "whole").stat().st_size
    for name in "whole", "half":
        with pytest.raises(Problem, match="averaged weights alone: draw without --raw") as error:
            load_generator(tmp_path / name, raw=True)
        assert "\n" not in str(error.value)


def test_foreign_and_damaged_files_are_one_clear_line(tmp_path, monkeypatch):
    def message(data):
        (tmp_path / "file").write_bytes(data)
        with pytest.raises(Problem) as error:
            load_generator(tmp_path / "file")
        assert "\n" not in str(error.value)
        return str(error.value)

    save_generator(tmp_path / "g", *[Generator(7, 32, 8)] * 2, "normal", 12)
    good = (tmp_path / "g").read_bytes()
    for data in b"", b"text", good[:-1], good[:100], good + b"x":
        assert "is not a generator that train.py saved, or is damaged" in message(data)
    assert "damaged" in message(good[:-1] + bytes([good[-1] ^ 1]))
    foreign = safetensors.numpy.save({"weight": np.zeros(3, np.float32)}, {"format": "pt"})
    assert "is not a generator" in message(foreign)
    write_tensors(tmp_path / "c", {"weight": np.zeros(3, np.float32)}, {"kind": "checkpoint"})
    assert "is not a generator" in message((tmp_path / "c").read_bytes())
    tensors, info = read_tensors(tmp_path / "g", "generator")
    for change in ({"width": 16}, {"z_dim": 8}, {"z_dim": "many"}, {"image_size": 48},
                   {"z_dim": 10**10}, {"noise": "cauchy"}, {"noise": [1]}, {"step": None},
                   {"step": -1}, {"width": -1}, {"width": 0}, {"width": 8.0}, {"width": 10**100},
                   {"width": 2**27 - 1, "z_dim": 2**27 - 1, "image_size": 128},
                   {"image_size": 32.0}):
        write_tensors(tmp_path / "other", tensors, {**info, **change})
        assert "another network" in message((tmp_path / "other").read_bytes())
    as_double = tensors["layers.3.weight"].astype(np.float64)
    for change in {"layers.3.bias": np.zeros(3, np.float32)}, {
            "layers.1.0.weight": np.zeros([2, 2], np.float32)}, {"layers.3.weight": as_double}:
        write_tensors(tmp_path / "other", {**tensors, **change}, info)
        assert "another network" in message((tmp_path / "other").read_bytes())
    for name, value, words in (
            ("layers.3.weight", np.nan, "layers.3.weight is not finite"),
            ("layers.0.1.bias", np.inf, "layers.0.1.bias is not finite"),
            ("layers.1.1._variance", -1e-9, "layers.1.1._variance, a variance, is negative")):
        spoiled = tensors[name].copy()
        spoiled.flat[-1] = value
        write_tensors(tmp_path / "other", {**tensors, name: spoiled}, info)
        assert words in message((tmp_path / "other").read_bytes())
    first = {"layers.0.0.weight": np.zeros([1, 4096, 4, 4], np.float32)}  # all that is as claimed
    write_tensors(tmp_path / "other", {**tensors, **first},
                  {**info, "z_dim": 1, "image_size": 64, "width": 512})
    with monkeypatch.context() as patch:
        # nothing is built: 512 MB of weights, whose first and last are as the file says
        patch.delattr(paddle.nn.initializer.Normal.__base__, "forward")
        assert "another network" in message((tmp_path / "other").read_bytes())
    for metadata in "3", "[" * 100_000, '{"sha256": 1, "info": 3}', '{"sha256": "", "info": "[]"}':
        foreign = safetensors.numpy.save({"weight": np.zeros(3)}, {"dcgan": metadata})
        assert "damaged" in message(foreign)
    write_tensors(tmp_path / "strided", {"weight": np.eye(4)[:, 1:3]}, {"kind": "test"})
    np.testing.assert_array_equal(
        read_tensors(tmp_path / "strided", "test")[0]["weight"], np.eye(4)[:, 1:3])
    assert json.dumps(info) == json.dumps(read_tensors(tmp_path / "g", "generator")[1])


def test_paddles_check_for_nan_finds_no_memory_that_was_never_written():
    G, D = Generator(8, 32, 4), Discriminator(32, 4)
    z = np.zeros([4, 8], np.float32)
    paddle.set_flags({"FLAGS_check_nan_inf": True})
    try:
        for _ in range(10):
            for size in 4, 8, 16, 4 * 3 * 32 * 32:  # left behind for whoever takes memory next
                paddle.to_tensor(np.full(size, np.nan, np.float32))
            G.train()
            loss(D(G(paddle.to_tensor(z))), 1).backward()
            G.eval()
            draw_faces(G, z)
        assert paddle.get_flags("FLAGS_check_nan_inf")["FLAGS_check_nan_inf"]
    finally:
        paddle.set_flags({"FLAGS_check_nan_inf": False})
