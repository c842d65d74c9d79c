"""What is done on a GPU, with a stand-in for the card: tests must pass where there is none."""

import dataReader
import network
import train
import weightInit
from dataReader import Problem
from weightInit import paddle

import os
import re
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT

NO_CUDNN = RuntimeError(
    "\n\n--------------\nError Message Summary:\n--------------\nPreconditionNotMetError: Cannot"
    " load cudnn shared library. Cannot invoke method\n  cudnnGetVersion.\n  [Hint: it"
    " should not be null.] (at /paddle/phi/backends/dynload/cudnn.cc:64)\n")


@pytest.fixture
def card(monkeypatch):
    """Stands in for a card: what Paddle tells of it can be set; `on` is the device in use."""
    card = SimpleNamespace(built=True, count=1, capability=(8, 6), kernel=16.0, on="cpu",
                           libraries={"libcuda.so", "libcudnn.so", "libcublas.so"})

    def conv2d(*_):
        if isinstance(card.kernel, Exception):
            raise card.kernel
        return paddle.full([1, 1, 1, 1], card.kernel)

    monkeypatch.setattr(paddle, "is_compiled_with_cuda", lambda: card.built)
    monkeypatch.setattr(paddle.device.cuda, "device_count", lambda: card.count)
    monkeypatch.setattr(paddle.device.cuda, "get_device_capability", lambda: card.capability)
    monkeypatch.setattr(paddle.device.cuda, "get_device_name", lambda: "NVIDIA A10")
    monkeypatch.setattr(weightInit, "loads", lambda library: library in card.libraries)
    monkeypatch.setattr(paddle, "set_device", lambda name: setattr(card, "on", name))
    monkeypatch.setattr(paddle, "get_device", lambda: card.on)
    monkeypatch.setattr(paddle.version, "cuda_archs", lambda: weightInit.CARDS, raising=False)
    monkeypatch.setattr(network.nn.functional, "conv2d", conv2d)
    return card


def test_good_card_is_used(card, capsys):
    for name in "auto", "gpu":
        card.on = "cpu"
        weightInit.use_device(name)
        assert card.on == "gpu"
    weightInit.use_device("cpu")
    assert card.on == "cpu"
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("facts", "words"), [
    ({"built": False}, "build without GPU"), ({"count": 0}, "no GPU or no driver")])
def test_without_a_gpu_auto_takes_the_cpu_and_says_so(card, capsys, facts, words):
    vars(card).update(facts, on="gpu")
    weightInit.use_device("auto")
    assert card.on == "cpu"
    assert words in capsys.readouterr().err
    with pytest.raises(Problem, match=f"--device gpu: .*{words}"):
        weightInit.use_device("gpu")


@pytest.mark.parametrize(("facts", "words"), [
    ({"kernel": NO_CUDNN}, "PreconditionNotMetError: Cannot load cudnn shared library. Cannot"
                           " invoke method cudnnGetVersion"),
    ({"kernel": 0.0}, "wrong numbers"),  # as of a card without kernels, whatever it says of itself
    ({"capability": (9, 0)}, "compute capability 9.0"), ({"capability": (6, 0)}, "capability 6.0"),
    ({"capability": (12, 0)}, "compute capability 12.0")])
@pytest.mark.parametrize("name", ["auto", "gpu"])
def test_card_that_this_paddle_cannot_use_is_one_line(card, name, facts, words):
    vars(card).update(facts)
    with pytest.raises(Problem) as error:
        weightInit.use_device(name)
    message = str(error.value)
    assert words in message
    assert "README has a table" in message
    assert "--device cpu" in message
    assert not any(text in message for text in ("\n", "Hint", "/paddle/"))


def test_driver_too_old_is_one_line_and_the_cpu_can_be_used(card, monkeypatch):
    def count():
        raise OSError("(External) CUDA error(35), CUDA driver version is insufficient for CUDA"
                      " runtime version. \n  [Hint: 'cudaErrorInsufficientDriver'.] (at /p/x.cc:1)")

    monkeypatch.setattr(paddle.device.cuda, "device_count", count)
    with pytest.raises(Problem, match=r"error\(35\), CUDA driver version is insufficient .*README"):
        weightInit.use_device("auto")
    weightInit.use_device("cpu")
    assert card.on == "cpu"


def test_no_kernel_runs_on_a_card_without_them(card):
    """It could end the process."""
    card.capability, card.kernel = (9, 0), AssertionError("it ran")
    with pytest.raises(Problem, match="capability 9.0"):
        weightInit.use_device("auto")


@pytest.mark.parametrize("capability", [(6, 1), (7, 0), (7, 5), (8, 0), (8, 9)])
def test_kernels_run_on_later_cards_of_their_major_number(card, capability):
    card.capability = capability
    weightInit.use_device("gpu")
    assert card.on == "gpu"


def test_paddle_that_does_not_tell_its_kernels_is_tried(card, monkeypatch):
    card.capability = (12, 0)
    monkeypatch.setattr(paddle.version, "cuda_archs", list, raising=False)
    weightInit.use_device("gpu")
    monkeypatch.delattr(paddle.version, "cuda_archs")  # as in 2.6, which has those of CARDS
    with pytest.raises(Problem, match="capability 12.0"):
        weightInit.use_device("gpu")


@pytest.mark.parametrize(("library", "remedy"), [
    ("libcuda.so", "a link to libcuda.so.1"), ("libcublas.so", "nvidia-cudnn-cu11==8.9.6.50"),
    ("libcudnn.so", "pip install nvidia-cudnn-cu11==8.9.6.50, or set LD_LIBRARY_PATH")])
def test_library_without_which_paddle_2_6_dies_is_named(card, monkeypatch, library, remedy):
    card.libraries.remove(library)
    monkeypatch.setattr(paddle, "__version__", "3.3.1")  # brings its own, of other names
    weightInit.use_device("gpu")
    card.on = "cpu"
    monkeypatch.setattr(paddle, "__version__", "2.6.2")
    with pytest.raises(Problem, match=f"finds no {library}: .*{remedy}.*README.*--device cpu"):
        weightInit.use_device("auto")
    assert card.on == "cpu"  # nothing was tried
    card.capability = (9, 0)
    with pytest.raises(Problem, match=r"capability 9\.0"):  # else they would be installed in vain
        weightInit.use_device("auto")


def test_device_is_named(card):
    assert weightInit.device_name() == f"CPU, OMP_NUM_THREADS {os.environ['OMP_NUM_THREADS']}"
    weightInit.use_device("auto")
    assert weightInit.device_name() == "NVIDIA A10 (compute capability 8.6)"


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Stands in for what pip installs beside Paddle 2.6, and a driver; `site` is its folder."""
    packages = SimpleNamespace(site=tmp_path, version="2.6.2", driver=True)
    for path in ("cudnn/lib/libcudnn.so.8", "cublas/lib/libcublasLt.so.11", "cublas/__init__.py",
                 "cuda_nvrtc/lib/libnvrtc-builtins.so.11.8", "cudnn/lib/__init__.py",
                 "cublas/lib/libcublas.so.12", "nccl/lib/libnccl.so.2"):  # of another CUDA
        (tmp_path / "nvidia" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "nvidia" / path).write_text(path)
    (tmp_path / "paddle" / "libs").mkdir(parents=True)
    packages.locate_file = tmp_path.joinpath
    monkeypatch.setattr(weightInit.metadata, "distribution", lambda name: packages)
    monkeypatch.setattr(weightInit, "loads", lambda name: packages.driver)
    return packages


def test_pips_cudnn_is_linked_where_paddle_2_6_looks(packages):
    libs = packages.site / "paddle" / "libs"
    (libs / "libcudnn.so").write_text("of another's making")
    for _ in range(2):
        weightInit.link_cuda_libraries()
    assert {path.name: path.read_text() for path in libs.iterdir()} == {
        "libcudnn.so": "of another's making", "libcudnn.so.8": "cudnn/lib/libcudnn.so.8",
        "libcublasLt.so": "cublas/lib/libcublasLt.so.11",
        "libcublasLt.so.11": "cublas/lib/libcublasLt.so.11",
        "libnvrtc-builtins.so": "cuda_nvrtc/lib/libnvrtc-builtins.so.11.8",
        "libnvrtc-builtins.so.11.8": "cuda_nvrtc/lib/libnvrtc-builtins.so.11.8"}


@pytest.mark.parametrize("facts", [{"version": "3.3.0"}, {"driver": False}, {"gone": True}])
def test_nothing_is_linked_in_vain_nor_a_folder_missed(packages, facts):
    vars(packages).update(facts)
    libs = packages.site / "paddle" / "libs"
    if "gone" in facts:  # as good as a folder that may not be written, even for root
        libs.rmdir()
    weightInit.link_cuda_libraries()
    assert not libs.exists() or not list(libs.iterdir())


@pytest.mark.parametrize(("found", "left"), [
    ({"PADDLE_TRAINER_ID": "1"}, {}), ({"PADDLE_TRAINERS_NUM": "2"}, {}), ({}, {}),
    *[(dict.fromkeys(("PADDLE_TRAINER_ID", "PADDLE_TRAINERS_NUM", "PADDLE_CURRENT_ENDPOINT"),
                     "1"),) * 2]])
def test_variables_of_a_launcher_count_together_only(monkeypatch, capsys, found, left):
    for name in "PADDLE_TRAINER_ID", "PADDLE_TRAINERS_NUM", "PADDLE_CURRENT_ENDPOINT":
        monkeypatch.delenv(name, raising=False)
    for name, value in found.items():
        monkeypatch.setenv(name, value)
    weightInit.ignore_stale_launcher()
    assert {name: os.environ[name] for name in found if name in os.environ} == left
    assert capsys.readouterr().err.count("\n") == (found != left)


def test_loading_paddle_leaves_the_process_as_it_was(tmp_path):
    """The script's path cannot be decoded, and a launcher has left one of its variables behind."""
    (tmp_path / "probe.py").write_text("""
import dataReader, logging, signal, sys, warnings

def facts():
    status = open("/proc/self/status").read()
    caught = int(status.split("SigCgt:")[1].split()[0], 16)
    return (sys.argv, [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
            caught >> (signal.SIGTERM - 1) & 1, caught >> (signal.SIGINT - 1) & 1,
            logging.root.level, logging.root.handlers,
            [rule for rule in warnings.filters if "global mean" not in str(rule[1])])

before = str(facts())
import weightInit
assert str(facts()) == before, (before, facts())
print(sys.argv[1:], weightInit.paddle.distributed.get_rank())""")
    folder = os.fsencode(tmp_path) + b"/\xd6\xd0"  # a name in GBK
    os.rename(tmp_path / "probe.py", folder + b".py")
    done = subprocess.run(
        [sys.executable, folder + b".py", "--count", "3"], capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PADDLE_TRAINER_ID": "1"})
    assert done.stdout == "['--count', '3'] 0\n", done.stderr
    assert done.stderr.count("\n") == 1
    assert "ignoring PADDLE_TRAINER_ID" in done.stderr


def test_ctrl_c_while_paddle_loads_ends_without_a_word(tmp_path):
    loading = subprocess.Popen(
        [sys.executable, "-c", "import dataReader; print('now', flush=True); import weightInit"],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert loading.stdout.readline() == "now\n"
    time.sleep(0.4)
    loading.send_signal(signal.SIGINT)
    _, err = loading.communicate(timeout=60)
    assert loading.returncode in (-signal.SIGINT, 130)
    assert err == ""


def test_file_that_cannot_be_read_is_told_as_it_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a folder").mkdir()
    with pytest.raises(Problem, match="^there is no a folder/net; .*--output_path 'a folder'$"):
        weightInit.read_tensors("a folder/net", "generator")
    with pytest.raises(Problem, match="^cannot read a folder: Is a directory$"):
        weightInit.read_tensors(tmp_path.relative_to(tmp_path) / "a folder", "generator")


def test_files_are_checked_without_asserts_too(tmp_path):
    """With python -O there are none: weightInit is run as it is compiled then."""
    source = (ROOT / "weightInit.py").read_text()
    optimized = {"__name__": "optimized"}
    exec(compile(source, "weightInit.py", "exec", optimize=1), optimized)
    optimized["write_tensors"](tmp_path / "net", {"a": np.zeros(3, "float32")}, {"kind": "net"})
    read = optimized["read_tensors"]
    assert read(tmp_path / "net", "net")[1] == {"kind": "net"}
    data = (tmp_path / "net").read_bytes()
    (tmp_path / "net").write_bytes(data[:-1] + b"\1")
    for kind in "net", "generator":
        with pytest.raises(Problem, match=f"is not a {kind} that train.py saved, or is damaged"):
            read(tmp_path / "net", kind)
        (tmp_path / "net").write_bytes(data)  # whole, but of another kind


@pytest.mark.parametrize("tensors", [
    {"a": np.zeros([2, 3], "float32")}, {"b": np.zeros(2, "float32")}, {}, {"a": np.zeros(2)},
    {"a": np.zeros(2, "float32"), "b": np.zeros(1, "float32")}])
def test_weights_of_another_network_are_refused(tensors):
    weightInit.check_shapes({"a": np.zeros(2, "float32")}, {"a": [2]}, "net")
    with pytest.raises(Problem, match="^net holds weights of another network"):
        weightInit.check_shapes(tensors, {"a": [2]}, "net")


def test_type_of_mixed_precision_is_the_cards(card, capsys):
    card.on = "gpu:0"
    assert weightInit.amp_type(False) == "float32"
    for card.capability, expected in ((7, 5), "float16"), ((8, 0), "bfloat16"):
        assert weightInit.amp_type(True) == expected
    card.on = "cpu"
    assert weightInit.amp_type(True) == "float32"
    assert "amp is off" in capsys.readouterr().err


@pytest.mark.parametrize(("wanted", "users", "exact"), [
    (False, False, False), (True, False, True), (False, True, True)])
def test_cudnn_searches_unless_it_is_to_be_deterministic(card, monkeypatch, wanted, users, exact):
    """Both at once makes every convolution an error."""
    flags = {"FLAGS_cudnn_deterministic": users, "FLAGS_cudnn_exhaustive_search": False}
    monkeypatch.setattr(paddle, "get_flags", lambda name: {name: flags[name]})
    monkeypatch.setattr(paddle, "set_flags", flags.update)
    monkeypatch.setattr(dataReader, "FaceReader", lambda *_: SimpleNamespace(
        digest="", images=range(5000)))
    options = SimpleNamespace(data_path="", image_size=64, batch_size=1, seed=0, device="gpu",
                              amp=True, deterministic=wanted, augment=False, flip=False)
    _, amp = train.set_up(options)
    assert amp == "bfloat16"
    assert flags == {"FLAGS_cudnn_deterministic": exact, "FLAGS_cudnn_exhaustive_search": not exact}


def test_copies_to_the_gpu_are_not_waited_for(card, monkeypatch):
    """From page-locked memory, which Paddle itself keeps until the copy has been done."""
    def to_tensor(array, place):
        assert place == "pinned"
        return SimpleNamespace(cuda=lambda blocking: ("on its way", array, blocking))

    assert train.to_device(None) is None
    assert train.to_device(np.ones(3)).numpy().tolist() == [1, 1, 1]
    card.on = "gpu:0"
    monkeypatch.setattr(paddle, "to_tensor", to_tensor)
    monkeypatch.setattr(paddle, "CUDAPinnedPlace", lambda: "pinned")
    assert train.to_device("array") == ("on its way", "array", False)


@pytest.mark.parametrize(("error", "line"), [
    (OSError("(External) CUDA error(700), an illegal memory access was encountered. \n  [Hint: Look"
             " for the error code(700) on website (https://docs.nvidia.com)] (at /p/x.cc:178)"),
     "the GPU failed: (External) CUDA error(700), an illegal memory access was encountered."),
    (OSError("(External) NCCL error(2), unhandled system error.\n  [Hint: …] (at /paddle/y.cc:1)"),
     "the GPU failed: (External) NCCL error(2), unhandled system error."),
    (MemoryError("\n\n-----\nError Message Summary:\n-----\nResourceExhaustedError:"
                 " \n\nOut of memory error on GPU 0. Cannot allocate 3.6GB memory on GPU 0, 21.1GB"
                 " memory has been allocated.\n\nPlease check whether there is any other process"
                 " using GPU 0.\n1. If yes, please stop them.\n (at /paddle/cuda_allocator.cc:95)"),
     "out of memory: a smaller batch_size, width or image_size needs less; ResourceExhaustedError:"
     " Out of memory error on GPU 0. Cannot allocate 3.6GB memory on GPU 0, 21.1GB memory has been"
     " allocated."),
    (OSError(28, "No space left on device", "External/x"), "External/x: No space left on device"),
    (OSError("not of the GPU"), "input/output: not of the GPU")])
def test_errors_of_paddle_are_one_line(error, line):
    assert dataReader.error_line(error) == line


def test_paddles_own_errors_are_told_like_that():
    """The real texts of this Paddle: out of memory, and an operator that is used wrongly."""
    with pytest.raises(Exception, match="Fail to alloc") as error:
        paddle.empty([10**13])
    line = dataReader.error_line(error.value)
    assert re.match("out of memory: .*Fail to alloc", line)
    assert "\n" not in line
    assert "(at" not in line
    with pytest.raises(Exception, match="matmul") as error:
        paddle.matmul(paddle.ones([2, 3]), paddle.ones([2, 3]))
    assert "\n" not in dataReader.paddle_error_text(error.value)


def test_other_systems_are_told_what_they_need(monkeypatch, tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.platform = 'win32'")
    for script in "pretreat.py", "dataReader.py", "train.py", "generator.py":
        done = subprocess.run([sys.executable, ROOT / script], cwd=tmp_path, text=True,
                              capture_output=True, env={**os.environ, "PYTHONPATH": str(tmp_path)})
        assert done.returncode == 1
        assert done.stderr.count("\n") == 1, done.stderr
        assert "WSL2" in done.stderr


def test_digits_of_the_probe_are_exact():
    """On the CPU, with Paddle's own convolution."""
    ones = paddle.ones([1, 1, 4, 4])
    assert float(paddle.nn.functional.conv2d(ones, ones).sum() + 1) == 17
