"""Weights: how they begin (tutorial §3.3; Radford et al. 2015, §4), and how they are kept.

They are normal with standard deviation 0.02, around 0 in (transposed) convolutional and fully
connected layers, around 1 for the scale of batch normalization; shifts and biases start at 0. They
are kept in safetensors files, which hold data and nothing that could be run. This is also where
Paddle is loaded, for all scripts: `from weightInit import paddle`.
"""

import contextlib
import ctypes
import hashlib
import io
import json
import os
import warnings

import numpy as np
import safetensors.numpy

from dataReader import Problem, paddle_error_text, replacing, say


def load_paddle():
    """Set what Paddle reads as it loads, except what the user has set; load and return it."""
    env = os.environ  # untold, Paddle uses one thread, and its launcher sets one for each process
    env.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))
    # glibc gives large buffers back to the kernel when they are freed, and Paddle frees one for
    # each layer: keeping them saves 17 to 47 %. M_TRIM_THRESHOLD is -1, M_MMAP_MAX -4.
    if not {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_MAX_"} & env.keys():
        ctypes.CDLL(None).mallopt(-1, 2**31 - 1)
        ctypes.CDLL(None).mallopt(-4, 0)
    env.setdefault("GLOG_minloglevel", "2")  # or it warns that a CPU has no cuDNN
    # Paddle 2.6 crashes zlib if it is loaded before PIL, which dataReader has loaded.
    with contextlib.redirect_stderr(io.StringIO()):  # it warns of threads, and of ccache
        import paddle
    warnings.filterwarnings("ignore", "When training, we now always track global mean")
    return paddle


paddle = load_paddle()

weight_initializer = paddle.nn.initializer.Normal(mean=0.0, std=0.02)
bn_initializer = paddle.nn.initializer.Normal(mean=1.0, std=0.02)


def write_tensors(path, tensors, info):
    """Save arrays by name and `info`, a dict for JSON with a "kind", as one safetensors file."""
    facts = json.dumps(info, sort_keys=True)
    # safetensors takes the memory as it lies, so it must lie in order
    tensors = {name: np.require(value, requirements="C") for name, value in tensors.items()}
    # One entry: safetensors writes several in no fixed order.
    metadata = {"dcgan": json.dumps({"sha256": checksum(tensors, facts), "info": facts})}
    with replacing(path) as file:
        file.write(safetensors.numpy.save(tensors, metadata))


def read_tensors(path, kind):
    """Read (tensors, info) from a file of `write_tensors`; a Problem if it is not a whole one."""
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            metadata = json.loads((file.metadata() or {})["dcgan"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        info = json.loads(metadata["info"])
        assert info["kind"] == kind
        assert checksum(tensors, metadata["info"]) == metadata["sha256"]
    except OSError as error:
        raise Problem(f"cannot read {path} ({error}): `python train.py` makes it") from error
    except Exception as error:  # a stranger's file can be wrong in any way
        raise Problem(f"{path} is not a {kind} that train.py saved, or is damaged") from error
    return tensors, info


def checksum(tensors, facts):
    """SHA-256 of arrays, their names, types and shapes, and of a string."""
    digest = hashlib.sha256(facts.encode())
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tensors[name].shape}".encode())
        digest.update(tensors[name])
    return digest.hexdigest()


def check_shapes(tensors, shapes, path):
    """Raise a Problem that names `path`, unless arrays are float32 and have just these shapes."""
    if ({name: (list(value.shape), str(value.dtype)) for name, value in tensors.items()}
            != {name: (list(shape), "float32") for name, shape in shapes.items()}):
        raise Problem(f"{path} holds weights of another network")


# --- the device ----------------------------------------------------------------------------------
CARDS = [61, 70, 75, 80, 86]  # compute capabilities that PyPI's Paddle 2.6.2 has kernels for


F = paddle.nn.functional


def use_device(name):
    """Have Paddle compute on the "gpu", the "cpu", or for "auto" on the GPU, if there is one.

    Raises a Problem if there is no GPU for "gpu", or one that this Paddle cannot use.
    """
    missing = fault = None
    try:
        if name == "cpu":
            missing = "not asked for"
        elif not paddle.is_compiled_with_cuda():
            missing = f"Paddle {paddle.__version__} as installed here is the build without GPU"
        elif paddle.device.cuda.device_count() == 0:
            missing = "Paddle finds no GPU or no driver"
        else:
            paddle.set_device("gpu")
            major, minor = paddle.device.cuda.get_device_capability()
            # Paddle 3 knows its own. A card runs those of its major number up to its own minor.
            cards = getattr(paddle.version, "cuda_archs", lambda: CARDS)() or [10 * major]
            if not any(major == card // 10 and minor >= card % 10 for card in cards):
                fault = f"it has no kernels for compute capability {major}.{minor}, only {cards}"
            # Without its kernels Paddle may give zeros and no error: 16 + 1 is looked at.
            elif float(F.conv2d(*[paddle.ones([1, 1, 4, 4])] * 2).sum() + 1) != 17:
                fault = "it computes wrong numbers on this card"
    except Exception as error:  # a missing library, a driver too old, ...
        fault = paddle_error_text(error)
    if fault:
        raise Problem(f"there is a GPU, but Paddle {paddle.__version__} cannot use it: {fault}."
                      " README has a table of what to install for which card; or pass --device cpu")
    if missing and name == "gpu":
        raise Problem(f"--device gpu: {missing}; README has a table of what to install")
    if missing:
        paddle.set_device("cpu")
        if name == "auto":
            say(f"using the CPU: {missing}")


def amp_type(wanted):
    """The type for mixed precision: bfloat16 on a GPU that has it, else float16; None on a CPU."""
    if wanted and paddle.get_device() != "cpu":
        return "bfloat16" if paddle.device.cuda.get_device_capability() >= (8, 0) else "float16"
    if wanted:
        say("amp is off: it is for GPUs")
    return None
