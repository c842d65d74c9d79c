"""Weights: how they begin (tutorial §3.3), and how they are kept; here Paddle is loaded too.

`from weightInit import paddle` is what all scripts do. Weights are kept in safetensors files, which
hold data and nothing that could be run.
"""

from dataReader import Problem, cores, paddle_error_text, replacing, say

import contextlib
import ctypes
import hashlib
import io
import json
import logging
import os
import shlex
import signal
import sys
import threading
import warnings
from importlib import metadata
from pathlib import Path

import numpy as np
import safetensors.numpy


# --- how weights begin (tutorial §3.3; Radford et al. 2015, §4); shifts and biases start at 0 -----
def weight_initializer():
    """N(0, 0.02), for (transposed) convolutional and fully connected layers."""
    return paddle.nn.initializer.Normal(mean=0.0, std=0.02)


def bn_initializer():
    """N(1, 0.02), for the scale of batch normalization."""
    return paddle.nn.initializer.Normal(mean=1.0, std=0.02)


# --- loading Paddle ------------------------------------------------------------------------------
def ignore_stale_launcher():
    """Remove variables of a launcher that is not there, by which Paddle would wait for others."""
    launcher = "PADDLE_TRAINER_ID", "PADDLE_TRAINERS_NUM", "PADDLE_CURRENT_ENDPOINT"  # it sets all
    found = [name for name in launcher if name in os.environ]
    if 0 < len(found) < len(launcher):
        say(f"ignoring {' and '.join(found)}: Paddle's launcher would have set more than that")
        for name in found:
            del os.environ[name]


def loads(library):
    """Whether a shared library, a name or a path, can be loaded."""
    try:
        ctypes.CDLL(str(library))
    except OSError:
        return False
    return True


def link_cuda_libraries():
    """Put links to pip's cuDNN and cuBLAS into paddle/libs, where Paddle 2.6 looks for libcudnn.so.

    pip's is nvidia/cudnn/lib/libcudnn.so.8; those of another CUDA, as PyTorch brings, are left
    alone. If no link can be made, `use_device` says what helps.
    """
    try:
        package = metadata.distribution("paddlepaddle-gpu")
    except metadata.PackageNotFoundError:
        return
    if not package.version.startswith("2.6") or not loads("libcuda.so.1"):  # the driver
        return
    libs = Path(package.locate_file("paddle/libs"))
    nvidia = Path(package.locate_file("nvidia"))
    wanted = [*nvidia.glob("cudnn/lib/*.so.8"), *nvidia.glob("cublas/lib/*.so.11")]
    for library in [*wanted, *nvidia.glob("cuda_nvrtc/lib/*.so.11*")]:
        for name in library.name, library.name.split(".so")[0] + ".so":
            with contextlib.suppress(OSError):  # it is there, or the folder cannot be written
                (libs / name).symlink_to(library)


def import_paddle():
    """Import Paddle; put back what that changes: sys.argv, SIGTERM's handler, warnings, logging.

    sys.argv becomes [""] if the script's path cannot be decoded; SIGTERM's new handler can hang.
    """
    argv = sys.argv
    log = logging.getLogger()
    log_level, log_handlers = log.level, log.handlers[:]
    sigterm = signal.getsignal(signal.SIGTERM)
    # Paddle 2.6 crashes zlib if it is loaded before PIL, which dataReader has loaded.
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):  # of ccache, threads
        import paddle
    sys.argv = argv
    log.setLevel(log_level)
    log.handlers[:] = log_handlers
    if threading.current_thread() is threading.main_thread():  # another one may not set it
        signal.signal(signal.SIGTERM, sigterm)
    return paddle


def load_paddle():
    """Set what Paddle reads as it loads, except what the user has set; load and return it."""
    ignore_stale_launcher()
    link_cuda_libraries()
    env = os.environ  # untold, Paddle uses one thread, and its launcher sets one for each process
    env.setdefault("OMP_NUM_THREADS", str(cores()))
    # glibc gives large buffers back to the kernel when they are freed, and Paddle frees one for
    # each layer: keeping them saves 17 to 47 %. M_TRIM_THRESHOLD is -1, M_MMAP_MAX -4.
    if not {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_MAX_"} & env.keys():
        ctypes.CDLL(None).mallopt(-1, 2**31 - 1)
        ctypes.CDLL(None).mallopt(-4, 0)
    env.setdefault("GLOG_minloglevel", "2")  # or it warns that a CPU has no cuDNN
    paddle = import_paddle()
    warnings.filterwarnings("ignore", "When training, we now always track global mean")
    return paddle


paddle = load_paddle()


# --- files of weights ----------------------------------------------------------------------------
def write_tensors(path, tensors, info):
    """Save arrays by name and `info`, a dict for JSON with a "kind", as one safetensors file."""
    facts = json.dumps(info, sort_keys=True)
    # safetensors takes the memory as it lies, so it must lie in order
    tensors = {name: np.require(value, requirements="C") for name, value in tensors.items()}
    # One entry: safetensors writes several in no fixed order.
    entry = json.dumps({"sha256": checksum(tensors, facts), "info": facts})
    with replacing(path) as file:
        file.write(safetensors.numpy.save(tensors, {"dcgan": entry}))


def read_tensors(path, kind):
    """Read (tensors, info) from a file of `write_tensors`; a Problem if it is not a whole one."""
    try:
        open(path, "rb").close()  # safetensors says "No such file" whatever the reason
    except FileNotFoundError as error:
        command = f"python train.py --output_path {shlex.quote(str(Path(path).parent))}"
        raise Problem(f"there is no {path}; this makes it: {command}") from error
    except OSError as error:
        raise Problem(f"cannot read {path}: {error.strerror}") from error
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            entry = json.loads(file.metadata()["dcgan"])
        info = json.loads(entry["info"])
        is_good = info["kind"] == kind and checksum(tensors, entry["info"]) == entry["sha256"]
    except Exception:  # a stranger's file can be wrong in any way
        is_good = False
    if not is_good:
        raise Problem(f"{path} is not a {kind} that train.py saved, or is damaged")
    return tensors, info


def checksum(tensors, facts=""):
    """SHA-256 of arrays, their names, types and shapes, and of a string."""
    digest = hashlib.sha256(facts.encode())
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tensors[name].shape}".encode())
        digest.update(tensors[name])
    return digest.hexdigest()


def check_shapes(tensors, shapes, path):
    """Raise a Problem that names `path`, unless arrays are float32 and have just these shapes."""
    wrong = tensors.keys() ^ shapes.keys()
    for name in tensors.keys() & shapes.keys():
        if tensors[name].shape != tuple(shapes[name]) or tensors[name].dtype != np.float32:
            wrong.add(name)
    if wrong:
        raise Problem(f"{path} holds weights of another network, e.g. in {min(wrong)}")


# --- the device ----------------------------------------------------------------------------------
CARDS = [61, 70, 75, 80, 86]  # compute capabilities that PyPI's Paddle 2.6.2 has kernels for
# Paddle 2.6 dies without a word where one of these is missing; the texts say what helps.
CUDNN = "python -m pip install nvidia-cudnn-cu11==8.9.6.50, or set LD_LIBRARY_PATH to its folder"
NEEDED = {"libcuda.so": "make it a link to libcuda.so.1, which is there, in the same folder",
          "libcudnn.so": CUDNN, "libcublas.so": CUDNN}


def use_device(name):
    """Have Paddle compute on the "gpu", the "cpu", or for "auto" on the GPU, if there is one.

    Raises a Problem if there is no GPU for "gpu", or one that this Paddle cannot use.
    """
    if name == "cpu":
        paddle.set_device("cpu")
        return
    absence = None
    try:
        if not paddle.is_compiled_with_cuda():
            absence = f"Paddle {paddle.__version__} as installed here is the build without GPU"
        elif paddle.device.cuda.device_count() == 0:
            absence = "Paddle finds no GPU or no driver"
        else:
            try_gpu()
    except Exception as error:  # of `try_gpu`, or Paddle's: a driver too old, no memory, ...
        raise Problem(
            f"there is a GPU, but Paddle {paddle.__version__} cannot use it:"
            f" {paddle_error_text(error)}. README has a table of what to install for which card;"
            " or pass --device cpu") from error
    if absence and name == "gpu":
        raise Problem(f"--device gpu: {absence}; README has a table of what to install")
    if absence:
        say(f"using the CPU: {absence}")
        paddle.set_device("cpu")


def try_gpu():
    """Have Paddle compute on the GPU; raise a Problem, or Paddle's own error, if it cannot."""
    major, minor = paddle.device.cuda.get_device_capability()
    # Paddle 3 knows its own. A card runs those of its major number up to its own minor.
    cards = getattr(paddle.version, "cuda_archs", lambda: CARDS)() or [10 * major]
    if not any(major == card // 10 and minor >= card % 10 for card in cards):
        raise Problem(f"it has no kernels for compute capability {major}.{minor}, only {cards}")
    own = Path(paddle.__file__).parent / "libs"
    if paddle.__version__.startswith("2.6"):
        for library, remedy in NEEDED.items():
            places = own / library, library, f"/usr/local/cuda/lib64/{library}"
            if not any(map(loads, places)):
                raise Problem(f"it finds no {library}: {remedy}")
    paddle.set_device("gpu")
    # Without its kernels Paddle may give zeros and no error: 16 + 1 is looked at.
    ones = paddle.ones([1, 1, 4, 4])
    if float(paddle.nn.functional.conv2d(ones, ones).sum() + 1) != 17:
        raise Problem("it computes wrong numbers on this card")


def device_name():
    """The device in use: "NVIDIA A100 (compute capability 8.0)" or "CPU, OMP_NUM_THREADS 2"."""
    if paddle.get_device() == "cpu":
        return f"CPU, OMP_NUM_THREADS {os.environ['OMP_NUM_THREADS']}"
    major, minor = paddle.device.cuda.get_device_capability()
    return f"{paddle.device.cuda.get_device_name()} (compute capability {major}.{minor})"


def amp_type(wanted):
    """The precision to train in: "bfloat16" on a GPU that has it, or "float16"; else "float32"."""
    if wanted and paddle.get_device() != "cpu":
        return "bfloat16" if paddle.device.cuda.get_device_capability() >= (8, 0) else "float16"
    if wanted:
        say("amp is off: it is for GPUs")
    return "float32"
