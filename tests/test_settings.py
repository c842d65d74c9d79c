"""The settings at the top of a script, its flags, and what surrounds its process."""

import dataReader
import generator
import pretreat
import train
from dataReader import PATH, YES_NO, Problem, command_line, one_of, real_number, whole_number
from weightInit import paddle, read_tensors

import ast
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, photo, run, start
from PIL import Image

SCRIPT = '''"""Does 100 % of something.

    python some.py
"""

from pathlib import Path  # what is imported or assigned here is no setting
above = 1

# --- settings (each is also a flag) --------------------------------------------------------------
# networks
{}

# --- what they may be ----------------------------------------------------------------------------
below = 2
'''
KINDS = {
    "width": whole_number(1), "rate": real_number(1e-8, 1), "flip": YES_NO, "size": one_of(32, 64),
    "noise": one_of("normal", "uniform"), "folder": PATH}
USUAL = """width = 64  # channels
rate = 0.5
flip = False
size = 64
noise = "normal"
folder = "x"
"""


@pytest.fixture
def options(tmp_path, monkeypatch):
    """A function from the text of the settings (USUAL with changes) and flags to the options."""
    def options(settings, *flags, demo=None, encoding="utf-8"):
        path = tmp_path / "some.py"
        path.write_text(settings if "coding" in settings else SCRIPT.format(settings), encoding)
        script = {"__file__": str(path), "np": np}
        exec(compile(path.read_bytes(), path, "exec"), script)
        script |= {"ALLOWED": KINDS, "DEMO": demo or {}}
        monkeypatch.setattr(sys, "argv", [str(path), *map(str, flags)])
        return command_line(script)
    return options


def with_line(name, line):
    """The usual settings with another line for one of them."""
    lines = USUAL.splitlines()
    return "\n".join(line if usual.startswith(f"{name} =") else usual for usual in lines)


@pytest.mark.parametrize(("name", "line", "value"), [
    ("width", "width=16", 16), ("width", "width  = 16", 16), ("width", "width: int = 16", 16),
    ("width", "width = 16; other = 3", 16), ("width", "width, other = 16, 3", 16),
    ("width", "width = other = 16", 16), ("width", "width = 32 / 2", 16),
    ("width", "width = (\n    16)", 16), ("width", "width = 64\nwidth = 16", 16),
    ("width", "width = 16.0", 16), ("width", "width = np.int64(16)", 16),
    ("width", "width = np.float32(16)", 16), ("width", "width = np.array(16)", 16),
    ("width", "if True:\n    width = 16", 16), ("width", "width = 15\nwidth += 1", 16),
    ("rate", "rate = np.float32(0.1)", 0.1), ("rate", "rate=1e-3", 0.001),
    ("flip", "flip = 1", True), ("flip", "flip = np.bool_(True)", True),
    ("flip", "flip = 'False'", False),
    ("size", "size = 32.0", 32), ("noise", "noise='uniform'", "uniform"),
    ("folder", "folder = Path('a') / 'b'", "a/b"), ("folder", "folder = 'a # b'  # c", "a # b")])
def test_setting_means_what_people_mean_by_it(options, name, line, value):
    found = vars(options(with_line(name, line)))[name]
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(("name", "line", "words"), [
    ("width", "width = 0", ["line 11", "0", "whole number, at least 1"]),
    ("width", "width = None", ["line 11", "None", "whole number"]),
    ("width", "width = 2.6", ["line 11", "2.6", "whole number"]),
    ("width", "width = True", ["line 11", "True", "whole number"]),
    ("width", "width = [16]", ["line 11", "[16]", "whole number"]),
    ("width", "width = float('inf')", ["line 11", "inf", "whole number"]),
    ("width", "# width = 64", ["width is None, but must be a whole number, at least 1"]),
    ("width", "width: int", ["line 11: width is None", "whole number, at least 1"]),
    ("rate", "rate = 0", ["line 12", "at least 1e-08 and less than 1"]),
    ("rate", "rate = 1e-300", ["line 12", "at least 1e-08"]),
    ("rate", "rate = 1", ["line 12", "less than 1"]),
    ("rate", "rate = float('nan')", ["line 12", "nan", "number"]),
    ("flip", "flip = 'no'", ["line 13", "'no'", "True or False"]),
    ("flip", "flip = None", ["line 13", "None", "True or False"]),
    ("size", "size = 48", ["line 14", "48", "one of 32, 64"]),
    ("noise", "noise = 1", ["line 15", "1", "one of normal, uniform"]),
    ("folder", "folder = None", ["line 16", "None", "a path"]),
    ("folder", "folder = ''", ["line 16", "''", "a path"])])
def test_what_cannot_be_meant_is_one_line(options, capsys, name, line, words):
    with pytest.raises(SystemExit) as error:
        options(with_line(name, line))
    assert error.value.code == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert printed.startswith("some.py: ")
    assert all(word in printed for word in [name, *words]), printed


@pytest.mark.parametrize(("flags", "words"), [
    (["--width", "0"], ["--width", "0", "at least 1"]), (["--width", "2.6"], ["--width", "2.6"]),
    (["--width=-inf"], ["--width", "-inf"]),
    (["--width", "many"], ["--width", "many"]), (["--rate", "nan"], ["--rate", "nan"]),
    (["--rate", "0"], ["--rate", "at least 1e-08"]), (["--size", "48"], ["--size", "32, 64"]),
    (["--noise", "odd"], ["--noise", "normal, uniform"]), (["--folder", ""], ["--folder", "path"]),
    (["--flip", "no"], ["no"]), (["--above", "3"], ["--above"]), (["--below", "3"], ["--below"]),
    (["--widt", "3"], ["--widt"])])
def test_flags_follow_the_same_rules(options, capsys, flags, words):
    with pytest.raises(SystemExit) as error:
        options(USUAL, *flags)
    assert error.value.code == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert all(word in printed for word in words), printed


def test_flag_counts_more_than_the_file(options):
    found = options(with_line("width", "width = None"), "--width", "16.0", "--flip", "--rate=1e-4",
                    "--folder", "~/photos")
    assert (found.width, found.flip, found.rate, found.noise) == (16, True, 0.0001, "normal")
    assert found.folder == dataReader.os.path.expanduser("~/photos") != "~/photos"


def test_demo_counts_more_than_the_file_and_less_than_flags(options, capsys):
    demo = {"width": 8, "folder": "demo/imgs"}
    assert vars(options(USUAL, demo=demo)) == {
        "width": 64, "rate": 0.5, "flip": False, "size": 64, "noise": "normal", "folder": "x",
        "demo": False}
    found = options(USUAL, "--width", "4", "--demo", demo=demo)
    assert (found.demo, found.width, found.folder, found.rate) == (True, 4, "demo/imgs", 0.5)
    with pytest.raises(SystemExit) as error:
        options(USUAL, "--help", demo=demo)
    assert error.value.code == 0
    assert "--width 8 --folder demo/imgs" in " ".join(capsys.readouterr().out.split())


def test_new_names_get_flags_by_their_values(options, capsys):
    new = "\nyes = True\nsteps = 3  # how many\nshare = 0.5\nname = 'a'\npair = 1, 2"
    found = options(USUAL + new, "--no-yes", "--steps", "4", "--share", "1", "--name", "b")
    assert (found.yes, found.steps, found.share, found.name) == (False, 4, 1.0, "b")
    assert not hasattr(found, "pair")
    printed = capsys.readouterr().err
    assert printed == "some.py: line 22: pair cannot be a flag, it can only be edited\n"


def test_help_has_the_comments_and_values(options, capsys):
    text = with_line("width", "width = (64 +\n    1)  # 50 % of 130 # channels")
    with pytest.raises(SystemExit):
        options(text, "--help")
    printed = " ".join(capsys.readouterr().out.split())
    assert "Does 100 % of something." in printed
    assert "--width int 50 % of 130 # channels (default: 65)" in printed
    assert "--flip, --no-flip (default: False)" in printed


def test_comments_may_be_in_gbk(options, capsys):
    text = "# coding: gbk\n" + SCRIPT.format(with_line("width", "width=16  # 通道"))
    assert options(text, encoding="gbk").width == 16
    with pytest.raises(SystemExit):
        options(text, "--help", encoding="gbk")
    assert "通道" in capsys.readouterr().out


@pytest.mark.parametrize("script", [
    "pretreat", "dataReader", "weightInit", "network", "train", "generator"])
def test_too_old_a_python_is_one_line(tmp_path, script):
    """Whatever the libraries are: here there is none."""
    ast.parse((ROOT / f"{script}.py").read_text(), feature_version=(3, 8))
    (tmp_path / "sitecustomize.py").write_text(
        "import sys; sys.version_info = (3, 9, 18); sys.version = '3.9.18 (main)'\n"
        "sys.modules.update(dict.fromkeys(['numpy', 'PIL', 'tqdm', 'paddle', 'safetensors']))")
    done = subprocess.run([sys.executable, ROOT / f"{script}.py"], cwd=tmp_path, text=True,
                          capture_output=True, env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert done.returncode == 1
    assert done.stderr == "Python 3.10 or newer is needed; this is 3.9.18\n"


def test_interrupt_while_libraries_load_is_no_traceback(tmp_path):
    (tmp_path / "tqdm.py").write_text(
        "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(5)")
    for script in "pretreat.py", "train.py":
        done = subprocess.run([sys.executable, ROOT / script], cwd=tmp_path, text=True,
                              capture_output=True, env={**os.environ, "PYTHONPATH": str(tmp_path)})
        assert done.returncode == -signal.SIGINT
        assert done.stderr == ""
    # but not in a program that only imports it
    code = ("import signal, sys\nsys.path[0] = sys.argv.pop()\nimport dataReader\n"
            "assert signal.getsignal(signal.SIGINT) is signal.default_int_handler\n"
            "assert sys.excepthook is sys.__excepthook__")
    subprocess.run([sys.executable, "-c", code, ROOT], cwd=tmp_path, check=True)


@pytest.fixture
def pictures(tmp_path):
    """A folder with a Chinese name, with three images and one file that is none."""
    folder = tmp_path / "照片"
    folder.mkdir()
    for number in range(3):
        photo(64, 64, number).save(folder / f"{number}.png")
    (folder / "不\x1b[31m.png").write_text("no image")
    return folder


@pytest.mark.parametrize("broken", ["2>&-", ">&- 2>&-", ">/dev/full 2>/dev/full", "2>&1 | true",
                                    "0<&- >&- 2>&-"])
def test_message_that_cannot_be_delivered_is_no_error(pictures, broken):
    command = f"sleep 0.2; '{sys.executable}' '{ROOT}/dataReader.py' --data_path {pictures.name}"
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(["bash", "-o", "pipefail", "-c", f"({command}) {broken}"],
                          cwd=pictures.parent, capture_output=True, text=True, env=env)
    assert (done.returncode, done.stderr) == (0, "")
    picture = pictures.parent / "Output" / "training_images.png"
    assert Image.open(picture).size == (3 * 66 + 2, 66 + 2)


def test_names_are_written_as_the_terminal_can_show_them(pictures):
    printed = run(pictures.parent, "dataReader.py", "--data_path", pictures.name, "--output_path",
                  "输出", env={**os.environ, "PYTHONIOENCODING": "latin-1"})
    assert r"\u8f93\u51fa/training_images.png" in printed
    assert r"\u4e0d\x1b[31m.png" in printed
    assert "\x1b" not in printed
    printed = run(pictures.parent, "dataReader.py", "--data_path", pictures.name, "--output_path",
                  "输出", env={**os.environ, "PYTHONIOENCODING": "utf-8"})
    assert printed.endswith("输出/training_images.png\n")


@pytest.mark.parametrize(("error", "line"), [
    (Problem("one\ntwo"), r"one\ntwo"),
    (FileNotFoundError(2, "No such file or directory", "a\x1b"),
     r"a\x1b: No such file or directory"),
    (OSError("(External) \n{\n    ==== Error message in backward of GradNodePyLayer_C(0x5)====\n"
             "    MemoryError: (ResourceExhausted) Fail to alloc memory of 8 size, error code is"
             " 12.\n  [Hint: …] (at /p.cc:4)\n    \n    At:\n      /a.py(8): backward\n"),
     "out of memory: a smaller batch_size, width or image_size needs less; MemoryError:"
     " (ResourceExhausted) Fail to alloc memory of 8 size, error code is 12."),
    (RuntimeError("(PreconditionNotMet) The third-party dynamic library (libmklml_intel.so) that"
                  " Paddle depends on is not configured correctly. (error code is libmklml_intel"
                  ".so: failed to map segment from shared object)\n  Suggestions:\n  1. Check"),
     "out of memory: a smaller batch_size, width or image_size needs less; (PreconditionNotMet)"),
    (MemoryError(), "out of memory: a smaller batch_size, width or image_size needs less;"
                    " MemoryError"),
    (RuntimeError("can't start new thread"), "out of memory"),
    (RuntimeError("could not create a memory object"), "out of memory"),  # oneDNN's
    (ImportError("libphi.so: failed to map segment from shared object"), "out of memory")])
def test_lack_of_memory_and_of_files_is_one_line(monkeypatch, capsys, error, line):
    monkeypatch.setattr(sys, "argv", ["some.py"])
    dataReader.report(type(error), error, None)
    printed = capsys.readouterr().err
    assert printed.startswith(f"some.py: {line}")
    assert "GPU" not in printed
    assert printed.count("\n") == 1


def test_mistake_of_the_code_keeps_its_traceback(capsys):
    """In a backward pass too, where Paddle makes an OSError "External" of any."""
    class Wrong(paddle.autograd.PyLayer):
        @staticmethod
        def forward(context, x):
            return x * 2

        @staticmethod
        def backward(context, gradient):
            raise ZeroDivisionError("mine")

    x = paddle.ones([2])
    x.stop_gradient = False
    with pytest.raises(OSError, match="mine") as error:
        Wrong.apply(x).sum().backward()
    dataReader.report(error.type, error.value, error.tb)
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(("files", "number"), [
    ({"cpu.max": "150000 100000\n"}, 2), ({"cpu.max": "50000 100000\n"}, 1),
    ({"cpu.max": "max 100000\n"}, 64), ({}, 64),
    ({"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 3),
    ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 64)])
def test_cores_are_those_of_the_container(tmp_path, monkeypatch, files, number):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    (tmp_path / "cpu").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert dataReader.cores(tmp_path) == number
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    assert dataReader.cores(tmp_path) == 1


def test_demo_settings_fit_together_and_every_setting_is_described():
    assert pretreat.DEMO["output"] == train.DEMO["data_path"] == dataReader.DEMO["data_path"]
    assert Path(train.DEMO["output_path"]) / "generator.safetensors" == Path(
        generator.DEMO["checkpoint"])
    for script in pretreat, dataReader, train, generator:
        settings = dataReader.read_settings(script.__file__)
        assert settings.keys() == script.ALLOWED.keys()
        assert all(comment for _, comment in settings.values())
        for name in settings:
            script.ALLOWED[name].convert(getattr(script, name))
        for name, value in script.DEMO.items():
            assert script.ALLOWED[name].convert(value) == value


def test_run_whose_terminal_has_closed_is_stopped_and_saved(pictures):
    """As by Ctrl-C on `train.py 2>&1 | tee log`, where tee dies first."""
    process = start(
        pictures.parent, "train.py", "--data_path", pictures.name, "--batch_size", 3, "--width", 4,
        "--image_size", 32, "--epochs", 10**6, "--log_every", 1, "--save_minutes", 1000)
    rows = pictures.parent / "Output" / "losses.csv"
    while process.poll() is None and not (rows.exists() and rows.read_text().count("\n") > 5):
        time.sleep(0.05)
    process.stdout.close()
    process.stderr.close()
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 128 + signal.SIGINT
    _, info = read_tensors(pictures.parent / "Output" / "checkpoint.safetensors", "checkpoint")
    assert info["step"] == rows.read_text().count("\n") - 1 > 5
