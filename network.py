"""The two networks, their loss, and a generator's file (tutorial §3.4 to §3.7).

    G, D = Generator(z_dim=100, image_size=64, width=64), Discriminator(image_size=64, width=64)
    images = G(paddle.randn([16, 100]))      # [16, 3, 64, 64] in [-1, 1]
    loss(D(images), 1)                       # how far D is from calling them real
    G, info = load_generator("Output/generator.safetensors")
"""

import weightInit
from dataReader import CHANNELS, SIZES, Problem
from weightInit import bn_initializer, paddle, weight_initializer  # Paddle, made ready there

import functools
import itertools

import numpy as np

nn = paddle.nn
core = paddle.base.core


# --- the two networks; shapes beside the layers are those of image_size=64, width=64 -------------
class Discriminator(nn.Layer):
    """Images `[N, 3, S, S]` in [-1, 1] → logits `[N, 2]` of being generated, of being real (§3.5).

    `image_size`, S, is 32, 64 or 128, `width` the channels after the first convolution.
    """

    def __init__(self, image_size=64, width=64):
        super().__init__()
        channels = channels_by_layer(image_size, width)     # [64, 128, 256, 512]
        # Without the bias D could not see contrast: in a batch of images that are half as far from
        # gray all features would be half as large, and the next BN would double them. Then nothing
        # kept drawn faces from turning pale.
        layers = [conv(CHANNELS, channels[0]),              # [N, 64, 32, 32]
                  Bias(channels[0]), nn.LeakyReLU(0.2)]
        for before, after in itertools.pairwise(channels):  # [N, 128, 16, 16], [N, 256, 8, 8],
            layers.append(conv_bn(before, after))           # [N, 512, 4, 4]
        self.layers = nn.Sequential(*layers)
        self.fc = nn.Linear(channels[-1] * 4 * 4, 2, weight_attr=weight_initializer())

    def forward(self, images):
        # not flatten(1), which cannot be differentiated twice, as a gradient penalty needs
        features = self.layers(images).reshape([images.shape[0], -1])  # [N, 8192]
        return self.fc(features)                                       # [N, 2]


class Generator(nn.Layer):
    """Latent vectors `[N, z_dim]` or `[N, z_dim, 1, 1]` → images `[N, 3, S, S]` in [-1, 1] (§3.6).

    `image_size`, S, is 32, 64 or 128, `width` the channels before the last layer.
    """

    def __init__(self, z_dim=100, image_size=64, width=64):
        super().__init__()
        self.config = {"z_dim": z_dim, "image_size": image_size, "width": width}
        channels = channels_by_layer(image_size, width)[::-1]      # [512, 256, 128, 64]
        layers = [deconv_bn(z_dim, channels[0], stride=1, padding=0)]  # [N, 512, 4, 4]
        for before, after in itertools.pairwise(channels):  # [N, 256, 8, 8], [N, 128, 16, 16],
            layers.append(deconv_bn(before, after))         # [N, 64, 32, 32]
        layers += [deconv(channels[-1], CHANNELS), nn.Tanh()]      # [N, 3, 64, 64]
        self.layers = nn.Sequential(*layers)

    def forward(self, z):
        pixels = z.reshape([z.shape[0], -1, 1, 1])          # [N, 100, 1, 1]
        return self.layers(pixels)


def channels_by_layer(image_size, width):
    """Channels of the images of S/2, S/4, ..., 4 pixels: `[64, 128, 256, 512]` for S=64."""
    if image_size not in SIZES:
        raise ValueError(f"image_size is {image_size}, but can be {', '.join(map(str, SIZES))}")
    halvings = int(np.log2(image_size // 4))  # from S to 4 pixels
    return [width * 2**layer for layer in range(halvings)]


# --- building blocks (§3.4); N images, C channels, S height and width ----------------------------
def conv(channels_in, channels_out):
    """Convolution that halves the image (§1.2): `[N, C, S, S]` → `[N, C', S/2, S/2]`."""
    return Conv2D(channels_in, channels_out, 4, stride=2, padding=1,
                  weight_attr=weight_initializer(), bias_attr=False)


def deconv(channels_in, channels_out, stride=2, padding=1):
    """Transposed convolution that doubles the image: `[N, C, S, S]` → `[N, C', 2S, 2S]`.

    With stride 1 and padding 0 it makes the first 4×4 image of a single pixel.
    """
    return Conv2DTranspose(channels_in, channels_out, 4, stride=stride, padding=padding,
                           weight_attr=weight_initializer(), bias_attr=False)


class Bias(nn.Layer):
    """A learned number for each channel, added to images `[N, C, S, S]` in their own precision.

    A convolution with a bias of its own would not run on oneDNN, and make float32 of bfloat16.
    """

    def __init__(self, channels):
        super().__init__()
        self.bias = self.create_parameter([channels], is_bias=True)  # begins at 0

    def forward(self, images):
        bias = self.bias.astype(images.dtype).reshape([-1, 1])
        # [N, C, S·S] + [C, 1]; to add [1, C, 1] or [1, C, 1, 1] a CPU takes 10 times as long
        rows = images.reshape([*images.shape[:2], -1]) + bias
        return rows.reshape(images.shape)


MOMENTUM = 0.5  # of BN: running = 0.5·running + 0.5·batch (§3.5, §3.6)


def bn(channels):
    """Batch normalization, which keeps running statistics for eval mode."""
    return nn.BatchNorm2D(channels, momentum=MOMENTUM, weight_attr=bn_initializer())


def conv_bn(channels_in, channels_out):
    """The discriminator's block: `[N, C, S, S]` → `[N, C', S/2, S/2]`."""
    return nn.Sequential(conv(channels_in, channels_out), bn(channels_out), nn.LeakyReLU(0.2))


def deconv_bn(channels_in, channels_out, stride=2, padding=1):
    """The generator's block: `[N, C, S, S]` → `[N, C', 2S, 2S]`, or as `deconv` says."""
    return nn.Sequential(
        deconv(channels_in, channels_out, stride, padding), bn(channels_out), nn.ReLU())


# --- the loss ------------------------------------------------------------------------------------
def margin(logits):
    """Logits `[N, 2]` → float32 `[N]`, the log-odds of real; `sigmoid` of it is D(x)."""
    of_generated, of_real = logits.astype("float32").unbind(1)
    return of_real - of_generated


def loss(logits, label):
    """Binary cross-entropy of the predicted probability of real (§3.7), in nats, mean of the batch.

    `label` is 1 where the images are to be called real, 0 where generated; a number or float32
    `[N]`. The probability is softmax(logits)[:, 1] = sigmoid(margin(logits)); the loss is computed
    from the margin, so it does not overflow however sure D is. G's loss is the same with label 1.
    For another loss, such as hinge, start from `margin` in train.py's `d_step` and `g_step`.
    """
    margins = margin(logits)
    labels = paddle.ones_like(margins) * label
    return nn.functional.binary_cross_entropy_with_logits(margins, labels)


# --- differentiable augmentation (Zhao et al. 2020, arXiv:2006.10738) -----------------------------
@paddle.amp.auto_cast(False)  # in float32 throughout: in bfloat16 `shift` would round the pixels
def augment(images, draws):
    """Vary images `[N, 3, S, S]` in [-1, 1] at random, real and generated ones alike, for D.

    `draws`, random numbers `[N, 7]` in [0, 1), say how: 3 are for `vary_color`, 2 for `shift`, 2
    for `cut_out`. The gradient flows into `images`.
    """
    images = vary_color(images.astype("float32"), draws[:, :3])
    images = shift(images, draws[:, 3:5])
    return cut_out(images, draws[:, 5:])


def vary_color(images, draws):
    """Vary brightness (by ±0.5), saturation (0 to 2 times) and contrast (0.5 to 1.5 times)."""
    brightness, saturation, contrast = draws.T.reshape([3, -1, 1, 1, 1])
    images = images + (brightness - 0.5)
    gray = images.mean([1], keepdim=True)
    images = images * (2 * saturation) + gray * (1 - 2 * saturation)
    level = images.mean([1, 2, 3], keepdim=True)
    return images * (contrast + 0.5) + level * (1 - (contrast + 0.5))


def shift(images, draws):
    """Move each image by -S/8 to S/8 whole pixels down, and as many right; zeros move in."""
    size = images.shape[2]
    distances = (draws * (size // 4 + 1)).floor() - size // 8
    down, right = distances.T.reshape([2, -1, 1, 1, 1])
    # Each image has its own matrices of zeros and ones, [N, 1, S, S]. `rows`, at its left, has ones
    # where row i of the result is row j of the image; `columns`, at its right, where column j is
    # the image's column i. To slice instead, the host would have to wait for the distances.
    i = paddle.arange(size, dtype="float32").reshape([size, 1])
    j = i.T
    rows = (i - j == down).astype("float32")
    columns = (j - i == right).astype("float32")
    # expanded to all channels, since Paddle would have a GPU multiply them one by one
    return rows.expand(images.shape) @ images @ columns.expand(images.shape)


def cut_out(images, draws):
    """Set a square of S/2 by S/2 pixels to zero; it may reach over the edge.

    `draws`, `[N, 2]`, are y and x of its middle, as fractions of S.
    """
    size = images.shape[2]
    middle_y, middle_x = (size * draws).T.reshape([2, -1, 1, 1, 1])
    x = paddle.arange(size, dtype="float32") + 0.5
    y = x.reshape([size, 1])
    is_row = ((y - middle_y).abs() < size / 4).astype("float32")
    is_column = ((x - middle_x).abs() < size / 4).astype("float32")
    return images * (1 - is_row * is_column)


# --- latent vectors ------------------------------------------------------------------------------
NOISES = {"normal": np.random.Generator.standard_normal, "uniform": np.random.Generator.random}


def random_array(key, shape, noise):
    """Draw random numbers, a float32 array, the same for the same key on every machine.

    `noise` is "normal" for N(0, 1) (§1.1) or "uniform" for U[0, 1) (§3.6). The key is a list of
    integers ≥ 0; there is no other state. It is called with these:

        [seed, k]                           latent vector of face k
        [seed, step, process, turn + 1]     latent vectors of an iteration; step is 1 or more
        [seed, step, process, 0, 1]         its numbers for `augment`
        [seed, 0, 0, 0, 1]                  the same for training_images.png
        [0, 0, 0, batch + 1]                latent vectors of `estimate_statistics`

    NumPy fills a key of fewer than 4 numbers with zeros, so [1, 2] draws what [1, 2, 0, 0] does: a
    key of more than 2 must not end with 0, or it could be that of a face.
    """
    draw = NOISES[noise]
    return draw(np.random.default_rng(key), shape, dtype=np.float32)


def face_latents(seed, numbers, z_dim, noise):
    """Latent vectors of faces by number, float32 `[N, z_dim]`: face k of a seed stays the same."""
    return np.stack([random_array([seed, number], [z_dim], noise) for number in numbers])


# --- all weights of a network in one vector ------------------------------------------------------
# An optimizer, or the average, then needs a few operators a network, not a few for each weight. Of
# an iteration's 405 launches of GPU kernels those were 77, counted on a stand-in for the driver.
def join_weights(net):
    """Move a network's weights into one vector, `net.vector`: changing it changes them.

    It is what an optimizer is given; `net.weights` is the list of them, in their order. A network's
    `state_dict` has the weights, not the vector. A `copy.deepcopy` of the network separates them.
    """
    # Paddle has BN's statistics among the parameters, with stop_gradient
    net.weights = [value for value in net.parameters() if not value.stop_gradient]
    net.vector = paddle.concat([weight.flatten() for weight in net.weights]).detach()
    start = 0
    for weight in net.weights:
        part = net.vector.get_tensor()._slice(start, start + weight.size)  # a view, no copy
        part._set_dims(weight.shape)
        weight.get_tensor()._share_data_with(part)
        start += weight.size
    net.vector.stop_gradient = False  # an optimizer leaves out what needs no gradient


# --- the generator to draw with ------------------------------------------------------------------
@paddle.no_grad()
def average_weights(averaged, generator, decay):
    """Set the weights of an averaged generator to decay·averaged + (1 − decay)·generator."""
    # not lerp_: it takes 35 ms longer on a CPU, and on a GPU the host waits for it
    averaged.vector.scale_(decay).add_(generator.vector.scale(1.0 - decay))


@paddle.no_grad()
def estimate_statistics(generator, noise, batches=5):
    """Estimate a generator's BN statistics afresh and put it in eval mode.

    The running statistics are those of the last two batches or so (momentum 0.5), and those of an
    averaged generator were never computed. Here the means and variances of several batches are
    averaged with equal weights, always on the same latent vectors (`noise`: "normal" or "uniform").
    """
    norms = [layer for layer in generator.sublayers() if isinstance(layer, nn.BatchNorm2D)]
    generator.train()
    for batch in range(batches):
        # few large batches, since the variance in a small one is too small: on a full-size net the
        # mean of faces was off by 4% of their spread with 20 batches of 64, and by 1% with 5 of 256
        z = random_array([0, 0, 0, batch + 1], [256, generator.config["z_dim"]], noise)
        for norm in norms:
            norm._momentum = batch / (batch + 1)  # running = the mean of all batches so far
        generator(paddle.to_tensor(z))
    for norm in norms:
        norm._momentum = MOMENTUM
    generator.eval()


@paddle.no_grad()
def draw_faces(generator, z):
    """Images of latent vectors, float32 array `[N, z_dim]` → uint8 array `[N, 3, S, S]`.

    The generator should be in eval mode, for an image to depend on its own z only.
    """
    # In eval mode Paddle's BN leaves two outputs unwritten, in which this check finds NaN.
    checked = paddle.get_flags("FLAGS_check_nan_inf")
    paddle.set_flags({"FLAGS_check_nan_inf": False})
    try:
        images = generator(paddle.to_tensor(z))
    finally:
        paddle.set_flags(checked)
    return to_levels(images)


def to_levels(images):
    """A tensor of images in [-1, 1] → a uint8 array of the same shape, 0 to 255."""
    # + 127.5, and 0.5 more since astype cuts the fraction off
    return (images * 127.5 + 128).clip(0, 255).astype("uint8").numpy()


# --- a generator's file --------------------------------------------------------------------------
def save_generator(path, generator, raw, noise, step, half=False):
    """Save all that sampling needs: weights, BN statistics, z_dim, image_size, width, noise, step.

    `generator` is the averaged one, its statistics estimated, `raw` the one in training, or None to
    leave it out. With `half` all is stored in float16: half the bytes, and 1.5 % of the values in a
    full-size net's faces change by 1 of 255.
    """
    tensors = generator.state_dict()
    if raw is not None:
        tensors |= {f"raw.{name}": value for name, value in raw.state_dict().items()}
    dtype = "float16" if half else "float32"
    arrays = {name: value.numpy().astype(dtype) for name, value in tensors.items()}
    info = {"kind": "generator", **generator.config, "noise": noise, "step": step}
    weightInit.write_tensors(path, arrays, info)


def load_generator(path, raw=False):
    """Rebuild a generator, in eval mode, from its file alone; with `raw`, the one in training.

    Whether the file is in float32 or float16, it computes in float32. Returns it and a dict of
    z_dim, image_size, width, noise, step; raises a Problem if the file is missing, foreign or
    damaged, or has no raw weights though asked for.
    """
    arrays, info = weightInit.read_tensors(path, "generator")
    wanted = {name.removeprefix("raw."): value for name, value in arrays.items()
              if name.startswith("raw.") == raw}
    if raw and not wanted:
        raise Problem(f"{path} has the averaged weights alone: draw without --raw")
    for name, value in wanted.items():
        if value.dtype == np.float16:
            wanted[name] = value.astype("float32")
    check_generator(wanted, info, path)
    generator = Generator(info["z_dim"], info["image_size"], info["width"])
    generator.set_state_dict({name: paddle.to_tensor(value) for name, value in wanted.items()})
    if raw:
        estimate_statistics(generator, info["noise"])
    generator.eval()
    return generator, info


def check_generator(arrays, info, path):
    """Raise a Problem unless a file's arrays are those of a generator as its info describes it."""
    z_dim, image_size, width, step = (
        info.get(name) for name in ("z_dim", "image_size", "width", "step"))
    are_whole = all(type(value) is int for value in (z_dim, image_size, width, step))
    # bounds against absurd sizes; NOISES in a list, since a stranger's "noise" may be unhashable
    if not (are_whole and 0 < z_dim < 2**27 and 0 < width < 2**27 and image_size in SIZES
            and step >= 0 and info.get("noise") in list(NOISES)):
        raise Problem(f"{path} holds weights of another network")
    with paddle.LazyGuard():  # takes no memory: what the info says may be far too large
        described = Generator(z_dim, image_size, width).state_dict()
    shapes = {name: value.shape for name, value in described.items()}
    weightInit.check_shapes(arrays, shapes, path)
    for name, value in arrays.items():
        if not np.isfinite(value).all():
            raise Problem(f"{path} cannot be drawn with: {name} is not finite")
        if name.endswith("_variance") and (value < 0).any():
            raise Problem(f"{path} cannot be drawn with: {name}, a variance, is negative")


# --- a faster convolution on CPUs; skip this -----------------------------------------------------
# On a CPU Paddle convolves image by image. It also carries oneDNN, with which an iteration takes
# 0.72 of the time, but uses it in static programs only. So oneDNN's operators are run here, one by
# one. The results are those of nn.Conv2D and nn.Conv2DTranspose, up to rounding.
#
# A convolution makes a small image of a large one, here S → S/2. Its gradient by the large image
# goes the other way, and that is also what a transposed convolution does. So three operations
# suffice, named by what they make:
#
#     made       from                convolution          transposed convolution
#     "small"    large, kernels      forward              backward, for its inputs
#     "large"    small, kernels      backward, for its    forward
#                                    inputs
#     "kernels"  large, small        backward             backward
#
# large is [N, C, S, S], small [N, C', S', S'], kernels are [C', C, K, K]. Backward, the gradient by
# a layer's output takes the place of that output.
ONEDNN = True  # with False Paddle's own are used; a gradient penalty needs them


class Conv2D(nn.Conv2D):
    """Paddle's own, by oneDNN where that works."""

    def forward(self, images):
        if runs_on_onednn(self, images):
            # Paddle keeps a list of two strides, but the padding as it was given
            return Convolution.apply(images, self.weight, False, self._stride[0], self._padding)
        return super().forward(images)


class Conv2DTranspose(nn.Conv2DTranspose):
    """Paddle's own, by oneDNN where that works."""

    def forward(self, inputs):
        if runs_on_onednn(self, inputs):
            return Convolution.apply(inputs, self.weight, True, self._stride[0], self._padding)
        return super().forward(inputs)


def runs_on_onednn(layer, inputs):
    """Whether oneDNN convolves `inputs`: on a CPU, if the layer is like those above.

    All else is left to Paddle, so that no edit of a layer is ignored: a bias, groups, dilation,
    kernels, strides or paddings that differ by axis, output padding, another padding mode, layout
    or precision.
    """
    if not (ONEDNN and inputs.place.is_cpu_place() and onednn_works()):
        return False
    has_no_more = (
        layer.bias is None and layer._groups == 1 and layer._dilation == [1, 1]
        and layer.output_padding == 0 and layer._padding_mode == "zeros"
        and layer._data_format == "NCHW")
    is_square = (
        layer._kernel_size[0] == layer._kernel_size[1] and layer._stride[0] == layer._stride[1]
        and isinstance(layer._padding, int))
    return has_no_more and is_square and inputs.dtype == layer.weight.dtype == paddle.float32


class Convolution(paddle.autograd.PyLayer):
    """A convolution or a transposed one, with its gradients."""

    @staticmethod
    def forward(ctx, inputs, kernels, is_transposed, stride, padding):
        ctx.save_for_backward(inputs, kernels)
        ctx.is_transposed, ctx.stride, ctx.padding = is_transposed, stride, padding
        ctx.inputs_are_constant = inputs.stop_gradient
        ctx.kernels_are_constant = kernels.stop_gradient
        if not is_transposed:
            return run_onednn("small", inputs, kernels, None, stride, padding)
        sides = [(side - 1) * stride - 2 * padding + kernels.shape[2] for side in inputs.shape[2:]]
        # zeros though only the shape counts: Paddle's check for NaN may find some in `empty`
        large = paddle.zeros([inputs.shape[0], kernels.shape[1], *sides])
        return run_onednn("large", large, kernels, inputs, stride, padding)

    @staticmethod
    def backward(ctx, gradient):
        if paddle.is_grad_enabled():  # only if the gradient is to have a gradient
            raise NotImplementedError("for second gradients set network.ONEDNN = False")
        inputs, kernels = ctx.saved_tensor()
        if ctx.is_transposed:
            large, small, inputs_are = gradient, inputs, "small"
        else:
            large, small, inputs_are = inputs, gradient, "large"
        by_inputs = by_kernels = None
        if not ctx.inputs_are_constant:
            by_inputs = run_onednn(inputs_are, large, kernels, small, ctx.stride, ctx.padding)
        if not ctx.kernels_are_constant:
            by_kernels = run_onednn("kernels", large, kernels, small, ctx.stride, ctx.padding)
        return by_inputs, by_kernels


def run_onednn(target, large, kernels, small, stride, padding):
    """Make the `target`, "small", "large" or "kernels", from the other two, by oneDNN.

    `large` and `kernels` are given even as the target, for their shapes; `small` as the target may
    be None.
    """
    # Paddle keeps what oneDNN compiles, under the names of the large image and the kernels, and the
    # shape of the large image. Layers that differ in the kernels' shape, stride or padding would
    # get each other's: so these are in the kernels' name.
    kernels_name = f"kernels {kernels.shape} {stride} {padding}"
    scope, tensors, operators = onednn_operators(target, kernels_name, stride, padding)
    given = {"large": large, kernels_name: kernels}
    if small is not None:
        given["small"] = small
    for name, tensor in given.items():
        contiguous = tensor.contiguous()  # named, so that a copy lives until it is shared
        tensors[name]._share_data_with(contiguous.get_tensor())
    for operator in operators:
        operator.run(scope, core.CPUPlace())
    result = paddle.zeros([1])  # an empty shell; paddle.Tensor(variable) leaks on 3.3
    result.get_tensor()._share_data_with(tensors["plain"])
    for kept in tensors.values():  # or they would hold memory until the next call
        kept._clear()
    scope.drop_kids()  # frees the copies that Paddle made from one layout to the other
    return result


@functools.cache  # making them takes as long as a small convolution
def onednn_operators(target, kernels_name, stride, padding):
    """Paddle's operators for a target and layer: (scope, its tensors by name, operators)."""
    program = core.ProgramDesc()  # owns the block; the operators no longer need it
    block = program.block(0)
    convolve = block.append_op()
    convolve.set_type("conv2d" if target == "small" else "conv2d_grad")
    convolve.set_input("Input", ["large"])
    convolve.set_input("Filter", [kernels_name])
    if target != "small":
        convolve.set_input("Output@GRAD", ["small"])
    result = {"small": "Output", "large": "Input@GRAD", "kernels": "Filter@GRAD"}[target]
    convolve.set_output(result, ["blocked"])
    attributes = {
        "strides": [stride] * 2, "paddings": [padding] * 2, "dilations": [1, 1], "groups": 1,
        "padding_algorithm": "EXPLICIT", "data_format": "NCHW", "use_mkldnn": True}
    for name, value in attributes.items():
        convolve._set_attr(name, value)
    # oneDNN leaves a result in memory in blocks. Paddle makes a plain one of it as soon as another
    # operator, not oneDNN's, reads it: share_data does that, and nothing else.
    make_plain = block.append_op()
    make_plain.set_type("share_data")
    make_plain.set_input("X", ["blocked"])
    make_plain.set_output("Out", ["plain"])
    operators = []
    for description in convolve, make_plain:
        # without this the variables are looked up by their names in each run, 0.1 ms in all
        description._set_attr("@ENABLE_CACHE_RUNTIME_CONTEXT@", True)
        operators.append(core.Operator.create(description.serialize_to_string()))
    scope = core.Scope()
    names = "large", kernels_name, "small", "blocked", "plain"
    tensors = {name: scope.var(name).get_tensor() for name in names}
    return scope, tensors, operators


@functools.cache
def onednn_works():
    """Whether this Paddle can do all that: each target is tried on ones."""
    try:
        large = paddle.ones([1, 1, 8, 8])
        kernels = small = paddle.ones([1, 1, 4, 4])
        for target in "large", "kernels", "small":
            result = run_onednn(target, large, kernels, small, 2, 1)
            # along an axis the four kernels cover 3, 4, 4 and 3 of the 8 pixels
            if float(result.sum()) != (3 + 4 + 4 + 3)**2:
                return False
    except Exception:  # another Paddle may lack any of it
        return False
    return True
