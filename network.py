"""The two networks, their loss, and a generator's file (tutorial §3.4 to §3.7).

    from network import Discriminator, Generator, load_generator, loss

    G = Generator(z_dim=100, image_size=64, width=64)
    D = Discriminator(image_size=64, width=64)
    images = G(paddle.randn([16, 100]))      # [16, 3, 64, 64] in [-1, 1]
    loss(D(images), 1)                       # how far D is from calling them real

    G, info = load_generator("Output/generator.safetensors")
"""

import contextlib
import ctypes
import hashlib
import io
import json
import os
import warnings
from pathlib import Path

# Paddle reads these as it loads. It uses one thread unless told otherwise, and on AMD processors
# its MKL picks the slowest kernels; 9 are those for AVX-512, 5 for AVX2. Measured on 2 AMD cores,
# batch 128, Paddle 3.3: 19 s an iteration without, 5 s with 5, 4 s with 9. What the user has set
# stays, except for 1 thread on Paddle's launcher, which hands down a 1 that nobody has set: the
# processes of a machine are to share its cores.
_places = os.environ.get("PADDLE_TRAINER_ENDPOINTS", "").split(",")
_here = os.environ.get("PADDLE_CURRENT_ENDPOINT", "").split(":")[0]
if _here and os.environ.get("OMP_NUM_THREADS") == "1":
    del os.environ["OMP_NUM_THREADS"]
_processes = max(1, sum(place.split(":")[0] == _here for place in _places))
os.environ.setdefault(
    "OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // _processes)))
_cpu = Path("/proc/cpuinfo").read_text()
if "AuthenticAMD" in _cpu:
    os.environ.setdefault("MKL_DEBUG_CPU_TYPE", "9" if "avx512_vnni" in _cpu else "5")
# glibc gives large buffers back to the kernel when they are freed, and Paddle frees one for each
# layer: keeping them saves a tenth of an iteration. M_TRIM_THRESHOLD is -1, M_MMAP_MAX -4.
if not {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_MAX_"} & os.environ.keys():
    ctypes.CDLL(None).mallopt(-1, 2**31 - 1)
    ctypes.CDLL(None).mallopt(-4, 0)
os.environ.setdefault("GLOG_minloglevel", "2")  # or it warns that a CPU has no cuDNN
# PIL loads zlib, which crashes when Paddle 2.6's own copy has been loaded before it.
from dataReader import SIZES, Problem, replacing, say

with contextlib.redirect_stderr(io.StringIO()):  # it warns of more than one thread, and of ccache
    import paddle

from weightInit import bn_initializer, conv_initializer

import numpy as np
import safetensors
import safetensors.numpy
from paddle import nn
from paddle.nn import functional as F

warnings.filterwarnings("ignore", "When training, we now always track global mean")

# -------------------------------------------------------------------------------------------------
# building blocks (§3.4); N images, C channels, S height and width


# On a CPU Paddle convolves image by image; where images are small, one matrix product over unfolded
# patches is faster: a whole iteration takes about a tenth less.
SMALL = 16  # height of the larger of a layer's two images, pixels; above it, only memory is lost


class _Conv(nn.Conv2D):
    """Convolution 4×4 of stride 2 and padding 1."""

    def forward(self, images):
        count, _, size, _ = images.shape
        if size > SMALL or not images.place.is_cpu_place():
            return super().forward(images)
        patches = F.unfold(images, 4, strides=2, paddings=1)       # [N, C·4·4, S/2·S/2]
        kernels = self.weight.reshape([self.weight.shape[0], -1])  # [C', C·4·4]
        return paddle.matmul(kernels, patches).reshape([count, -1, size // 2, size // 2])


class _Deconv(nn.Conv2DTranspose):
    """Transposed convolution 4×4 of stride 2 and padding 1."""

    def forward(self, images):
        count, channels, size, _ = images.shape
        if 2 * size > SMALL or not images.place.is_cpu_place():
            return super().forward(images)
        kernels = self.weight.reshape([channels, -1])              # [C, C'·4·4]
        patches = paddle.matmul(                                   # [N, C'·4·4, S·S]
            kernels, images.reshape([count, channels, -1]), transpose_x=True)
        return F.fold(patches, [2 * size, 2 * size], 4, strides=2, paddings=1)


def conv(channels_in, channels_out):
    """Convolution that halves the image: `[N, C, S, S]` → `[N, C', S/2, S/2]`.

    Strided, in place of the pooling that §1.2 abolishes.
    """
    return _Conv(channels_in, channels_out, 4, stride=2, padding=1,
                 weight_attr=conv_initializer, bias_attr=False)


def deconv(channels_in, channels_out, stride=2, padding=1):
    """Transposed convolution that doubles the image: `[N, C, S, S]` → `[N, C', 2S, 2S]`.

    With stride 1 and padding 0 it makes the first 4×4 image of a single pixel.
    """
    kind = _Deconv if (stride, padding) == (2, 1) else nn.Conv2DTranspose
    return kind(channels_in, channels_out, 4, stride=stride, padding=padding,
                weight_attr=conv_initializer, bias_attr=False)


def bn(channels):
    """Batch normalization of `[N, C, S, S]`; running = 0.5·running + 0.5·batch (§3.5, §3.6)."""
    return nn.BatchNorm2D(channels, momentum=0.5, weight_attr=bn_initializer)


def fc(features_in, features_out):
    """Fully connected layer: `[N, features_in]` → `[N, features_out]`."""
    return nn.Linear(features_in, features_out, weight_attr=conv_initializer)


def conv_bn(channels_in, channels_out):
    """`conv`, `bn` and LeakyReLU(0.2): the discriminator's block."""
    return nn.Sequential(conv(channels_in, channels_out), bn(channels_out), nn.LeakyReLU(0.2))


def deconv_bn(channels_in, channels_out, stride=2, padding=1):
    """`deconv`, `bn` and ReLU: the generator's block."""
    return nn.Sequential(
        deconv(channels_in, channels_out, stride, padding), bn(channels_out), nn.ReLU())


def _channels(image_size, width):
    """Channels after each halving of the image down to 4×4; 64 and 64 → [64, 128, 256, 512].

    Raises:
        ValueError: no network is built for `image_size`.
    """
    if image_size not in SIZES:
        raise ValueError(f"image_size is {image_size}, but can be {', '.join(map(str, SIZES))}")
    return [width * 2**i for i in range(image_size.bit_length() - 3)]


# -------------------------------------------------------------------------------------------------
# the two networks; shapes beside the layers are those of image_size=64, width=64


class Discriminator(nn.Layer):
    """Tells real images from generated ones (§3.5).

    Args:
        image_size: height and width S of an image: 32, 64 or 128.
        width: channels after the first convolution.

    Shape:
        images `[N, 3, S, S]` in [-1, 1] → logits `[N, 2]` for the labels 0 (generated) and
        1 (real).

    Raises:
        ValueError: another `image_size`.
    """

    def __init__(self, image_size=64, width=64):
        super().__init__()
        first, *rest = _channels(image_size, width)
        layers = [conv(3, first), nn.LeakyReLU(0.2)]       # [N, 64, 32, 32]
        for channels in rest:                              # [N, 128, 16, 16], [N, 256, 8, 8],
            layers.append(conv_bn(channels // 2, channels))                # [N, 512, 4, 4]
        layers.append(nn.Flatten())                        # [N, 8192]
        layers.append(fc(([first] + rest)[-1] * 4 * 4, 2))  # [N, 2]
        self.layers = nn.Sequential(*layers)

    def forward(self, images):
        return self.layers(images)


class Generator(nn.Layer):
    """Makes images of latent vectors (§3.6).

    Args:
        z_dim: length of a latent vector.
        image_size: height and width S of an image: 32, 64 or 128.
        width: channels before the last transposed convolution.

    Shape:
        z `[N, z_dim]` or `[N, z_dim, 1, 1]` → images `[N, 3, S, S]` in [-1, 1].

    Raises:
        ValueError: another `image_size`.
    """

    def __init__(self, z_dim=100, image_size=64, width=64):
        super().__init__()
        self.config = {"z_dim": z_dim, "image_size": image_size, "width": width}
        first, *rest = reversed(_channels(image_size, width))
        layers = [deconv_bn(z_dim, first, stride=1, padding=0)]    # [N, 512, 4, 4]
        for channels in rest:                              # [N, 256, 8, 8], [N, 128, 16, 16],
            layers.append(deconv_bn(channels * 2, channels))              # [N, 64, 32, 32]
        layers += [deconv(width, 3), nn.Tanh()]            # [N, 3, 64, 64]
        self.layers = nn.Sequential(*layers)

    def forward(self, z):
        return self.layers(z.reshape([z.shape[0], -1, 1, 1]))      # [N, 100, 1, 1]


def margin(logits):
    """Logits `[N, 2]` → float32 `[N]`, the log-odds of real; `sigmoid` of it is D(x)."""
    logits = logits.astype("float32")
    return logits[:, 1] - logits[:, 0]


def loss(logits, label):
    """Binary cross-entropy of the predicted probability of real (§3.7).

    The probability is softmax(logits)[:, 1] = sigmoid(margin(logits)); the loss is computed from
    the margin, so it does not overflow however sure D is.

    Args:
        logits: `[N, 2]`, from `Discriminator`.
        label: 1 where the images are to be called real, 0 where generated; a number or `[N]`.

    Returns:
        0-D tensor, the mean over the batch, in nats.
    """
    odds = margin(logits)
    if isinstance(label, paddle.Tensor):
        label = label.reshape([-1]).astype(odds.dtype)
    return F.binary_cross_entropy_with_logits(odds, paddle.ones_like(odds) * label)


# -------------------------------------------------------------------------------------------------
# the generator to sample with


@paddle.no_grad()
def average_weights(averaged, generator, decay):
    """Move the weights of an averaged generator towards those of the one in training.

    averaged = decay·averaged + (1 − decay)·generator; BN statistics stay as they are, see
    `estimate_statistics`.

    Args:
        averaged, generator: two `Generator`s of one shape.
        decay: from 0, which copies the weights, to below 1.
    """
    for mean, value in zip(averaged.parameters(), generator.parameters(), strict=True):
        if value.stop_gradient:
            continue
        if decay == 0:  # lerp_ would round
            paddle.assign(value, mean)
        else:
            mean.lerp_(value, 1.0 - decay)


@paddle.no_grad()
def estimate_statistics(generator, noise):
    """Estimate a generator's BN statistics afresh and put it in eval mode.

    The running statistics are those of the last two batches or so (momentum 0.5), and those of an
    averaged generator were never computed. Here the mean and variance of many batches are averaged
    with equal weights. The latent vectors are always the same ones, so the result is too.

    Args:
        generator: a `Generator` that is not in training; its BN statistics are replaced.
        noise: "normal" or "uniform", what it was trained on.
    """
    norms = [layer for layer in generator.sublayers() if isinstance(layer, nn.BatchNorm2D)]
    momenta = [norm._momentum for norm in norms]
    generator.train()
    for batch in range(5):
        # few large batches, since the variance in a small one is too small: on a full-size net the
        # mean of faces was off by 4% of their spread with 20 batches of 64, and by 1% with these
        for norm in norms:
            norm._momentum = batch / (batch + 1)  # running = the mean of all batches so far
        generator(paddle.to_tensor(
            latent([0, 0, 0, batch + 1], [256, generator.config["z_dim"]], noise)))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm._momentum = momentum
    generator.eval()


# -------------------------------------------------------------------------------------------------
# latent vectors, images, device


NOISES = ("normal", "uniform")


def latent(key, shape, noise):
    """Draw latent vectors, the same for the same key on every machine.

    Args:
        key: list of integers ≥ 0, a seed and a place in the run; there is no other state.
        shape: of the array, e.g. `[N, z_dim]`.
        noise: "normal" for N(0, 1) (§1.1) or "uniform" for U[0, 1) (§3.6).

    Returns:
        float32 numpy array.
    """
    rng = np.random.default_rng(key)
    draw = {"normal": rng.standard_normal, "uniform": rng.random}[noise]
    return draw(shape, dtype=np.float32)


def face_latents(seed, numbers, z_dim, noise):
    """Latent vectors of faces by number: face k of a seed is the same face in any company.

    Args:
        seed: integer ≥ 0.
        numbers: the k of each face, integers ≥ 0.
        z_dim: length of a latent vector.
        noise: "normal" or "uniform".

    Returns:
        float32 array `[len(numbers), z_dim]`.
    """
    return np.stack([latent([seed, number], [z_dim], noise) for number in numbers])


@paddle.no_grad()
def draw_faces(generator, z):
    """Images of latent vectors for people to look at.

    Args:
        generator: a `Generator`, in eval mode for an image to depend on its own z only.
        z: float32 array `[N, z_dim]`.

    Returns:
        uint8 array `[N, 3, S, S]`.
    """
    images = generator(paddle.to_tensor(z))
    return (images * 127.5 + 128).clip(0, 255).astype("uint8").numpy()


def use_device(name):
    """Have Paddle compute on a device.

    Args:
        name: "gpu", "cpu", or "auto": the GPU if there is one for this Paddle, else the CPU.

    Raises:
        Problem: no GPU for "gpu"; or a GPU that fails when it is used.
    """
    if not paddle.is_compiled_with_cuda():
        missing = f"Paddle {paddle.__version__} as installed here is the build without GPU"
    elif paddle.device.cuda.device_count() == 0:
        missing = "Paddle finds no GPU or no driver"
    else:
        missing = None
    if name == "cpu" or (name == "auto" and missing):
        if missing and name == "auto":
            say(f"using the CPU: {missing}")
        paddle.set_device("cpu")
        return
    if missing:
        raise Problem(f"--device gpu: {missing}; README has a table of what to install")
    try:
        paddle.set_device("gpu")
        F.conv2d(paddle.ones([1, 1, 4, 4]), paddle.ones([1, 1, 4, 4])).numpy()
    except Exception as error:  # a missing library, a card too new or too old for this Paddle, ...
        reason = str(error).split("Error Message Summary:")[-1].strip(" -\n").split("\n")[0]
        raise Problem(
            f"there is a GPU, but Paddle {paddle.__version__} cannot use it: {reason} Install the"
            " CUDA and cuDNN it was built for, or the Paddle for your card (README has a table),"
            " or pass --device cpu") from error


# -------------------------------------------------------------------------------------------------
# files: tensors and the facts that go with them, nothing that could be run


def write_tensors(path, tensors, info):
    """Save arrays and facts as one safetensors file, whole or not at all.

    Args:
        path: of the file.
        tensors: arrays by name.
        info: dict that JSON can hold; {"kind": ...} says what the file is.

    Raises:
        Problem: the file cannot be written.
    """
    facts = json.dumps(info, sort_keys=True)
    # safetensors takes the memory as it lies, so it must lie in order
    tensors = {name: np.require(value, requirements="C") for name, value in tensors.items()}
    # One entry: safetensors writes several in no fixed order.
    metadata = {"dcgan": json.dumps({"sha256": _sha256(tensors, facts), "info": facts})}
    with replacing(path) as file:
        file.write(safetensors.numpy.save(tensors, metadata))


def read_tensors(path, kind):
    """Read a file of `write_tensors`.

    Returns:
        (tensors, info): arrays by name, and the facts.

    Raises:
        Problem: it is not there, is not such a file, is of another kind, or is damaged.
    """
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            metadata = json.loads((file.metadata() or {})["dcgan"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            intact = _sha256(tensors, metadata["info"]) == metadata["sha256"]
            info = dict(json.loads(metadata["info"]))
    except FileNotFoundError as error:
        raise Problem(f"{path} is not there: `python train.py` makes it") from error
    except OSError as error:
        raise Problem(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:  # a stranger's file can be wrong in any way
        raise Problem(f"{path} is not a {kind} that train.py saved, or is damaged") from error
    if not intact:
        raise Problem(f"{path} is damaged: its checksum does not match")
    if info.get("kind") != kind:
        raise Problem(f"{path} is a {info.get('kind')}, not a {kind}")
    return tensors, info


def _sha256(tensors, facts):
    digest = hashlib.sha256(facts.encode())
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tensors[name].shape}".encode())
        digest.update(tensors[name])
    return digest.hexdigest()


def check_shapes(tensors, shapes, path):
    """Check that arrays are float32 and have just these names and shapes.

    Raises:
        Problem: they are not; `path` is named.
    """
    if ({name: (list(value.shape), str(value.dtype)) for name, value in tensors.items()}
            != {name: (list(shape), "float32") for name, shape in shapes.items()}):
        raise Problem(f"{path} holds weights of another network")


def load_state(layer, tensors, path):
    """Set a network's weights and BN statistics from arrays.

    Raises:
        Problem: a name is missing or too many, or a shape or type differs; `path` is named.
    """
    check_shapes(tensors, {name: value.shape for name, value in layer.state_dict().items()}, path)
    layer.set_state_dict({name: paddle.to_tensor(value) for name, value in tensors.items()})


def save_generator(path, generator, raw, noise, step):
    """Save all that sampling needs: weights, BN statistics, z_dim, image_size, width, noise, step.

    Args:
        path: of the file, e.g. `generator.safetensors`.
        generator: the averaged `Generator`, its statistics estimated.
        raw: the one in training; it is in the file too.
        noise: "normal" or "uniform", what they were trained on.
        step: iterations they were trained for.
    """
    tensors = {name: value.numpy() for name, value in generator.state_dict().items()}
    tensors |= {f"raw.{name}": value.numpy() for name, value in raw.state_dict().items()}
    write_tensors(path, tensors,
                  {"kind": "generator", **generator.config, "noise": noise, "step": step})


def load_generator(path, raw=False):
    """Rebuild a generator from its file alone.

    Args:
        path: of the file.
        raw: take the generator as training left it, in place of the average over its iterations;
            its BN statistics are estimated here.

    Returns:
        (generator, info): a `Generator` in eval mode, and a dict of z_dim, image_size, width,
        noise, step.

    Raises:
        Problem: the file is missing, foreign or damaged.
    """
    tensors, info = read_tensors(path, "generator")
    prefix = "raw." if raw else ""
    tensors = {name.removeprefix(prefix): value for name, value in tensors.items()
               if name.startswith("raw.") == raw}
    try:
        # before a network of any size is built
        first = tensors["layers.0.0.weight"].shape
        assert first == (info["z_dim"], _channels(info["image_size"], info["width"])[-1], 4, 4)
        assert info["noise"] in NOISES
        assert info["step"] >= 0
    except Exception as error:  # a stranger's file can be wrong in any way
        raise Problem(f"{path} holds weights of another network") from error
    generator = Generator(info["z_dim"], info["image_size"], info["width"])
    load_state(generator, tensors, path)
    if raw:
        estimate_statistics(generator, info["noise"])
    generator.eval()
    return generator, info
