"""What the tests share: the scripts run as a user runs them, and small real photos."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))


def start(folder, script, *flags, **popen):
    """Start a script in a folder, on the CPU, as `python script flags`."""
    return subprocess.Popen(
        [sys.executable, ROOT / script, *map(str, flags)], cwd=folder, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, **popen)


def run(folder, script, *flags, status=0, **popen):
    """Run a script to its end, check its exit status; return what it printed, stdout + stderr."""
    process = start(folder, script, *flags, **popen)
    out, err = process.communicate(timeout=300)
    assert process.returncode == status, out + err
    return out + err


def complaint(folder, script, *flags, status=1):
    """Run a script that must fail; return its one line on stderr."""
    process = start(folder, script, *flags)
    out, err = process.communicate(timeout=300)
    assert process.returncode == status, out + err
    lines = [line for line in err.splitlines()
             if line and "%|" not in line and "using the CPU" not in line]
    assert len(lines) == 1, err
    assert lines[0].startswith(f"{script}: ")
    return lines[0]


def photo(width=178, height=218, mark=0):
    """A smooth picture with an up, a left and a colour: red grows down, green grows right."""
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([y * 255 / height, x * 255 / width, np.full_like(x, mark % 256)], 2)
    return Image.fromarray(pixels.astype(np.uint8))


@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    """A folder in which `pretreat.py --demo` has run."""
    folder = tmp_path_factory.mktemp("demo")
    run(folder, "pretreat.py", "--demo")
    return folder


TINY = ("--width", 8, "--batch_size", 16, "--sample_every", 4, "--log_every", 3)


@pytest.fixture(scope="session")
def trained(demo, tmp_path_factory):
    """A folder in which a tiny net has been trained for two epochs of six batches."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "imgs").mkdir()
    for crop in sorted((demo / "imgs").glob("*.png"))[:100]:
        (folder / "imgs" / crop.name).symlink_to(crop)
    run(folder, "train.py", "--epochs", 2, *TINY)
    return folder
