"""What the tests share: the scripts run as a user runs them, and small real photos.

    python -m pytest -q tests           # what breaks a promise
    python -m pytest -q tests --slow    # and what takes long to show it, e.g. 40 kills
"""

import csv
import importlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
# a shell's & has SIGINT ignored, nohup SIGHUP, by all processes below: a handler of Python's is not
# inherited by them
signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN or "PYTEST_XDIST_WORKER" in os.environ:
    signal.signal(signal.SIGHUP, lambda *_: None)
WITH_GPU = dict(os.environ)
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # read when Paddle loads: all but test_gpu.py is on the CPU
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the nets are tiny, and tests run two by two
importlib.import_module("weightInit")  # loads Paddle as the scripts do, before a test would
locked = importlib.import_module("dataReader").locked


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the slow tests too")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: runs only with --slow")


def pytest_collection_modifyitems(config, items):
    for item in items:
        if item.get_closest_marker("slow") and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="slow: pass --slow"))


def start(folder, script, *flags, **popen):
    """Start a script in a folder, on the CPU, as `python script flags`."""
    return subprocess.Popen(
        [sys.executable, ROOT / script, *map(str, flags)], cwd=folder, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, **popen)


def run(folder, script, *flags, status=0, **popen):
    """Run a script to its end, check its exit status; return what it printed, stdout + stderr."""
    process = start(folder, script, *flags, **popen)
    out, err = process.communicate(timeout=300)
    assert process.returncode == status, out + err
    return out + err


def complaint(folder, script, *flags, status=1, **popen):
    """Run a script that must fail; return its one line on stderr."""
    process = start(folder, script, *flags, **popen)
    out, err = process.communicate(timeout=300)
    assert process.returncode == status, out + err
    # progress, not complaints
    usual = "%|", "using the CPU", "going on after", "are few", "iterations in all"
    lines = [line for line in err.splitlines()
             if line.strip() and not any(word in line for word in usual)]
    assert len(lines) == 1, err
    assert lines[0].startswith(f"{Path(script).name}: ")
    return lines[0]


def photo(width=178, height=218, mark=0):
    """A smooth picture with an up, a left and a colour: red grows down, green grows right."""
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([y * 255 / height, x * 255 / width, np.full_like(x, mark % 256)], 2)
    return Image.fromarray(pixels.astype(np.uint8))


def made_once(tmp_path_factory, name, make):
    """A folder that `make` has filled: once, though pytest-xdist has several processes."""
    parent = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        parent = parent.parent
    finished = parent / f"{name}.finished"
    with locked(parent):
        if not finished.exists():
            (parent / name).mkdir()
            make(parent / name)
            finished.touch()
    return parent / name


@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    """The folder demo that `pretreat.py --demo` makes."""
    return made_once(
        tmp_path_factory, "with_demo", lambda folder: run(folder, "pretreat.py", "--demo")) / "demo"


def link_images(source, target, number):
    """Put the first images of one folder into another."""
    target.mkdir()
    for path in sorted(source.glob("*.png"))[:number]:
        (target / path.name).symlink_to(path)


def table(folder):
    """Rows of a run's losses.csv."""
    with open(folder / "Output" / "losses.csv") as file:
        return list(csv.DictReader(file))


TINY = ("--width", 8, "--batch_size", 16, "--sample_every", 4, "--log_every", 3)


@pytest.fixture(scope="session")
def trained(demo, tmp_path_factory):
    """A folder in which a tiny net has been trained for two epochs of six batches."""
    def make(folder):
        link_images(demo / "imgs", folder / "imgs", 100)
        run(folder, "train.py", "--epochs", 2, *TINY)

    return made_once(tmp_path_factory, "trained", make)
