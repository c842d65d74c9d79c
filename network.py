"""The two networks, their loss, and a generator's file (tutorial §3.4 to §3.7).

    G, D = Generator(z_dim=100, image_size=64, width=64), Discriminator(image_size=64, width=64)
    images = G(paddle.randn([16, 100]))      # [16, 3, 64, 64] in [-1, 1]
    loss(D(images), 1)                       # how far D is from calling them real
    G, info = load_generator("Output/generator.safetensors")
"""

import functools

import numpy as np

import weightInit
from dataReader import SIZES, Problem
from weightInit import bn_initializer, paddle, weight_initializer

nn, F, core = paddle.nn, paddle.nn.functional, paddle.base.core

# --- building blocks (§3.4); N images, C channels, S height and width ----------------------------
# On a CPU Paddle convolves image by image. It carries oneDNN too, which an iteration takes 0.72 of
# the time with, but only static programs use it: so its operators are run here, one by one. You can
# read on at `Conv`: this computes what nn.Conv2D and nn.Conv2DTranspose do, up to rounding.
ONEDNN = True  # set it False for R1: paddle.grad by the images alone is an error with it
GIVEN = {"outputs": ("images", "kernels"), "images": ("outputs", "kernels"),
         "kernels": ("images", "outputs")}


class Convolution(paddle.autograd.PyLayer):
    """One of the images, kernels and outputs of a convolution, `wanted`, from the two others.

    sum(convolution(images, kernels) · outputs) is linear in each of the three, and this is its
    gradient by one: by the outputs the convolution, by the images the transposed convolution. So
    the way back is the same again.
    """

    @staticmethod
    def forward(ctx, wanted, first, second, stride, padding):
        ctx.save_for_backward(first, second)
        ctx.wanted, ctx.way = wanted, (stride, padding)
        ctx.needed = [not tensor.stop_gradient for tensor in (first, second)]
        return run_onednn(wanted, first, second, stride, padding)

    @staticmethod
    def backward(ctx, gradient):
        names = GIVEN[ctx.wanted]
        have = {ctx.wanted: gradient, **dict(zip(names, ctx.saved_tensor(), strict=True))}
        return tuple(
            Convolution.apply(name, *(have[given] for given in GIVEN[name]), *ctx.way)
            if needed else None for name, needed in zip(names, ctx.needed, strict=True))


@functools.cache
def operators(wanted, filters, stride, padding):
    """Paddle's operator for `Convolution`, and one that undoes oneDNN's order in memory."""
    program = core.ProgramDesc()  # which owns the two
    convolve, order = (program.block(0).append_op() for _ in range(2))
    convolve.set_type("conv2d" if wanted == "outputs" else "conv2d_grad")
    convolve.set_input("Input", ["images"])
    convolve.set_input("Filter", [filters])
    if wanted != "outputs":
        convolve.set_input("Output@GRAD", ["outputs"])
    convolve.set_output({"outputs": "Output", "images": "Input@GRAD", "kernels": "Filter@GRAD"}[
        wanted], ["ordered"])
    for name, value in {
            "strides": [stride] * 2, "paddings": [padding] * 2, "dilations": [1, 1], "groups": 1,
            "padding_algorithm": "EXPLICIT", "data_format": "NCHW", "use_mkldnn": True}.items():
        convolve._set_attr(name, value)
    order.set_type("share_data")  # Paddle reorders what an operator is given that is not oneDNN's
    order.set_input("X", ["ordered"])
    order.set_output("Out", ["result"])
    return [core.Operator.create(each.serialize_to_string()) for each in (convolve, order)]


def run_onednn(wanted, first, second, stride, padding):
    """Run `operators` on the two that `GIVEN` names; the third is given for its shape."""
    have, made = dict(zip(GIVEN[wanted], (first, second), strict=True)), paddle.empty([1])
    if wanted == "images":
        size = (first.shape[2] - 1) * stride - 2 * padding + second.shape[2]
        have["images"] = made = paddle.empty([first.shape[0], second.shape[1], size, size])
    elif wanted == "kernels":
        have["kernels"] = made = paddle.empty([second.shape[1], first.shape[1], 4, 4])
    # Paddle keeps what oneDNN compiles by the inputs' names and the images' shape: name the rest.
    filters = f"kernels {have['kernels'].shape} {stride} {padding}"
    scope = core.Scope()
    for name, tensor in have.items():
        scope.var(filters if name == "kernels" else name).get_tensor()._share_data_with(
            tensor.contiguous().get_tensor())
    _, result = (scope.var(name).get_tensor() for name in ("ordered", "result"))
    for operator in operators(wanted, filters, stride, padding):
        operator.run(scope, core.CPUPlace())
    made.get_tensor()._share_data_with(result)  # paddle.Tensor(result) leaks on 3.3
    scope._remove_from_pool()  # frees it
    return made


@functools.cache
def onednn_works():
    """Whether this Paddle can do all that: the sum in `Convolution` is tried in its three ways."""
    ones = {"images": paddle.ones([1, 1, 8, 8]), "kernels": paddle.ones([1, 1, 4, 4]),
            "outputs": paddle.ones([1, 1, 4, 4])}
    try:
        return all(float(run_onednn(wanted, *(ones[name] for name in GIVEN[wanted]), 2, 1).sum())
                   == 14**2 for wanted in GIVEN)  # along an axis 3 + 4 + 4 + 3 pixels are covered
    except Exception:  # another Paddle may lack any of it
        return False


class Conv(nn.Conv2D):
    """Convolution that halves the image (§1.2): `[N, C, S, S]` → `[N, C', S/2, S/2]`."""

    def __init__(self, channels_in, channels_out):
        super().__init__(channels_in, channels_out, 4, stride=2, padding=1,
                         weight_attr=weight_initializer, bias_attr=False)

    def forward(self, images):
        if not (ONEDNN and images.place.is_cpu_place() and onednn_works()):
            return super().forward(images)
        return Convolution.apply("outputs", images, self.weight, 2, 1)


class Deconv(nn.Conv2DTranspose):
    """Transposed convolution that doubles the image: `[N, C, S, S]` → `[N, C', 2S, 2S]`.

    With stride 1 and padding 0 it makes the first 4×4 image of a single pixel.
    """

    def __init__(self, channels_in, channels_out, stride=2, padding=1):
        super().__init__(channels_in, channels_out, 4, stride=stride, padding=padding,
                         weight_attr=weight_initializer, bias_attr=False)
        self.way = stride, padding

    def forward(self, images):
        if not (ONEDNN and images.place.is_cpu_place() and onednn_works()):
            return super().forward(images)
        return Convolution.apply("images", images, self.weight, *self.way)


MOMENTUM = 0.5  # running = 0.5·running + 0.5·batch (§3.5, §3.6)


def bn(channels):
    """Batch normalization of `[N, C, S, S]`."""
    return nn.BatchNorm2D(channels, momentum=MOMENTUM, weight_attr=bn_initializer)


def fc(features_in, features_out):
    """Fully connected layer: `[N, features_in]` → `[N, features_out]`."""
    return nn.Linear(features_in, features_out, weight_attr=weight_initializer)


class Flatten(nn.Layer):
    """`[N, C, S, S]` → `[N, C·S·S]`; Paddle's own has no second gradient."""

    def forward(self, images):
        return images.reshape([images.shape[0], -1])


def conv_bn(channels_in, channels_out):
    """The discriminator's block: `Conv`, `bn` and LeakyReLU(0.2)."""
    return nn.Sequential(Conv(channels_in, channels_out), bn(channels_out), nn.LeakyReLU(0.2))


def deconv_bn(channels_in, channels_out, stride=2, padding=1):
    """The generator's block: `Deconv`, `bn` and ReLU."""
    return nn.Sequential(
        Deconv(channels_in, channels_out, stride, padding), bn(channels_out), nn.ReLU())


def _channels(image_size, width):
    """Channels after each halving of an image, of `dataReader.SIZES`, down to 4×4: [64, …, 512]."""
    if image_size not in SIZES:
        raise ValueError(f"image_size is {image_size}, but can be {', '.join(map(str, SIZES))}")
    return [width * 2**i for i in range(image_size.bit_length() - 3)]


# --- the two networks; shapes beside the layers are those of image_size=64, width=64 -------------
class Discriminator(nn.Layer):
    """Images `[N, 3, S, S]` in [-1, 1] → logits `[N, 2]` for 0, generated, and 1, real (§3.5).

    `image_size`, S, is 32, 64 or 128, `width` the channels after the first convolution.
    """

    def __init__(self, image_size=64, width=64):
        super().__init__()
        first, *rest = _channels(image_size, width)
        layers = [Conv(3, first), nn.LeakyReLU(0.2)]       # [N, 64, 32, 32]
        for channels in rest:                              # [N, 128, 16, 16], [N, 256, 8, 8],
            layers.append(conv_bn(channels // 2, channels))                # [N, 512, 4, 4]
        layers.append(Flatten())                           # [N, 8192]
        layers.append(fc(([first] + rest)[-1] * 4 * 4, 2))  # [N, 2]
        self.layers = nn.Sequential(*layers)

    def forward(self, images):
        return self.layers(images)


class Generator(nn.Layer):
    """Latent vectors `[N, z_dim]` or `[N, z_dim, 1, 1]` → images `[N, 3, S, S]` in [-1, 1] (§3.6).

    `image_size`, S, is 32, 64 or 128, `width` the channels before the last layer.
    """

    def __init__(self, z_dim=100, image_size=64, width=64):
        super().__init__()
        self.config = {"z_dim": z_dim, "image_size": image_size, "width": width}
        first, *rest = reversed(_channels(image_size, width))
        layers = [deconv_bn(z_dim, first, stride=1, padding=0)]    # [N, 512, 4, 4]
        for channels in rest:                              # [N, 256, 8, 8], [N, 128, 16, 16],
            layers.append(deconv_bn(channels * 2, channels))              # [N, 64, 32, 32]
        layers += [Deconv(width, 3), nn.Tanh()]            # [N, 3, 64, 64]
        self.layers = nn.Sequential(*layers)

    def forward(self, z):
        return self.layers(z.reshape([z.shape[0], -1, 1, 1]))      # [N, 100, 1, 1]


def margin(logits):
    """Logits `[N, 2]` → float32 `[N]`, the log-odds of real; `sigmoid` of it is D(x)."""
    logits = logits.astype("float32")
    return logits[:, 1] - logits[:, 0]


def loss(logits, label):
    """Binary cross-entropy of the predicted probability of real (§3.7), in nats, mean of the batch.

    `label` is 1 where the images are to be called real, 0 where generated; a number or float32
    `[N]`. The probability is softmax(logits)[:, 1] = sigmoid(margin(logits)); the loss is computed
    from the margin, so it does not overflow however sure D is. G's is the same with label 1; a loss
    in which it is another, as hinge, belongs on `margin` in train.py's `d_step` and `g_step`.
    """
    odds = margin(logits)
    return F.binary_cross_entropy_with_logits(odds, paddle.ones_like(odds) * label)


# --- differentiable augmentation (Zhao et al. 2020, arXiv:2006.10738) -----------------------------
@paddle.amp.auto_cast(False)
def augment(images, draws):
    """Vary images `[N, 3, S, S]` in [-1, 1] at random, real and generated ones alike, for D.

    `draws`, `[N, 7]` in [0, 1), are of brightness (±0.5), saturation (0 to 2 times), contrast (0.5
    to 1.5 times), a shift (±S/8 down and right, zeros move in), and the middle of a square of S/2
    that is set to zero. The gradient flows into `images`. With None they are returned unchanged.
    """
    if draws is None:
        return images
    size, at = images.shape[2], paddle.arange(images.shape[2], dtype="float32")
    light, color, contrast, *shifts, y, x = draws.T.reshape([7, -1, 1, 1, 1])
    images = images.astype("float32") + (light - 0.5)
    for axes, strength in ([1], 2 * color), ([1, 2, 3], contrast + 0.5):
        images = images * strength + images.mean(axes, keepdim=True) * (1 - strength)
    # Shifts are products with matrices: each image has its own, and nothing waits for a GPU.
    rows, columns = ((at.reshape([-1, 1]) - at == (shift * (size // 4 + 1)).floor() - size // 8)
                     .astype("float32") for shift in shifts)
    images = rows @ images @ columns.transpose([0, 1, 3, 2])
    y, x = (((at + 0.5 - size * middle).abs() < size / 4).astype("float32") for middle in (y, x))
    return images * (1 - y.transpose([0, 1, 3, 2]) * x)


# --- latent vectors ------------------------------------------------------------------------------
NOISES = {"normal": np.random.Generator.standard_normal, "uniform": np.random.Generator.random}


def latent(key, shape, noise):
    """Draw latent vectors, a float32 array, the same for the same key on every machine.

    The key is a list of integers ≥ 0, a seed and a place in the run; there is no other state. Zeros
    at its end change nothing, so a key that is to differ from shorter ones ends with another.
    `noise` is "normal" for N(0, 1) (§1.1) or "uniform" for U[0, 1) (§3.6).
    """
    return NOISES[noise](np.random.default_rng(key), shape, dtype=np.float32)


def face_latents(seed, numbers, z_dim, noise):
    """Latent vectors of faces by number, float32 `[N, z_dim]`: face k of a seed stays the same."""
    return np.stack([latent([seed, number], [z_dim], noise) for number in numbers])


# --- the generator to draw with ------------------------------------------------------------------
@paddle.no_grad()
def average_weights(averaged, generator, decay):
    """Set the weights of an averaged generator to decay·averaged + (1 − decay)·generator."""
    for mean, value in zip(averaged.parameters(), generator.parameters(), strict=True):
        if not value.stop_gradient:  # as a statistic of BN is: see `estimate_statistics`
            # lerp_ takes 40 ms on a CPU for all, this 5, and would have a GPU waited for
            mean.scale_(decay).add_(value * (1.0 - decay))


@paddle.no_grad()
def estimate_statistics(generator, noise, batches=5):
    """Estimate a generator's BN statistics afresh and put it in eval mode.

    The running statistics are those of the last two batches or so (momentum 0.5), and those of an
    averaged generator were never computed. Here the mean and variance of many batches are averaged
    with equal weights, always on the same latent vectors, of `noise` "normal" or "uniform".
    """
    norms = [layer for layer in generator.sublayers() if isinstance(layer, nn.BatchNorm2D)]
    generator.train()
    for batch in range(batches):
        # few large batches, since the variance in a small one is too small: on a full-size net the
        # mean of faces was off by 4% of their spread with 20 batches of 64, and by 1% with 5 of 256
        for norm in norms:
            norm._momentum = batch / (batch + 1)  # running = the mean of all batches so far
        generator(paddle.to_tensor(
            latent([0, 0, 0, batch + 1], [256, generator.config["z_dim"]], noise)))
    for norm in norms:
        norm._momentum = MOMENTUM
    generator.eval()


@paddle.no_grad()
def draw_faces(generator, z):
    """Images of latent vectors, float32 array `[N, z_dim]` → uint8 array `[N, 3, S, S]`.

    The generator should be in eval mode, for an image to depend on its own z only.
    """
    images = generator(paddle.to_tensor(z))
    return (images * 127.5 + 128).clip(0, 255).astype("uint8").numpy()


def save_generator(path, generator, raw, noise, step):
    """Save all that sampling needs: weights, BN statistics, z_dim, image_size, width, noise, step.

    `generator` is the averaged one, its statistics estimated, `raw` the one in training.
    """
    tensors = {name: value.numpy() for name, value in generator.state_dict().items()}
    tensors |= {f"raw.{name}": value.numpy() for name, value in raw.state_dict().items()}
    weightInit.write_tensors(
        path, tensors, {"kind": "generator", **generator.config, "noise": noise, "step": step})


def load_generator(path, raw=False):
    """Rebuild a generator, in eval mode, from its file alone; with `raw`, the one in training.

    Returns it and a dict of z_dim, image_size, width, noise, step; raises a Problem if the file is
    missing, foreign or damaged.
    """
    tensors, info = weightInit.read_tensors(path, "generator")
    tensors = {name.removeprefix("raw."): value for name, value in tensors.items()
               if name.startswith("raw.") == raw}
    try:  # before a network of any size is built
        first = tensors["layers.0.0.weight"].shape
        assert first == (info["z_dim"], _channels(info["image_size"], info["width"])[-1], 4, 4)
        assert info["noise"] in NOISES
        assert info["step"] >= 0
    except Exception as error:  # a stranger's file can be wrong in any way
        raise Problem(f"{path} holds weights of another network") from error
    generator = Generator(info["z_dim"], info["image_size"], info["width"])
    weightInit.check_shapes(
        tensors, {name: value.shape for name, value in generator.state_dict().items()}, path)
    generator.set_state_dict({name: paddle.to_tensor(value) for name, value in tensors.items()})
    if raw:
        estimate_statistics(generator, info["noise"])
    generator.eval()
    return generator, info
