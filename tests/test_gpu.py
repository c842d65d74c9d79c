"""What can be seen on a GPU alone. Skipped, with the reason, where Paddle cannot use one."""

from weightInit import read_tensors

import shutil

import numpy as np
import pytest
from conftest import WITH_GPU, link_images, run, table

FLAGS = ("--device", "gpu", "--width", 8, "--batch_size", 8, "--log_every", 5, "--save_minutes", 0)


@pytest.fixture
def place(tmp_path, demo):
    """A folder with 160 images: 20 batches an epoch."""
    if shutil.which("nvidia-smi") is None:
        pytest.skip("no nvidia-smi: no GPU of NVIDIA")
    (tmp_path / "probe.py").write_text(
        "import weightInit\ntry:\n    weightInit.use_device('gpu')\n"
        "except weightInit.Problem as problem:\n"
        "    print('cannot:', problem)")
    printed = run(tmp_path, tmp_path / "probe.py", env={**WITH_GPU, "PYTHONPATH": "."})
    if "cannot:" in printed:
        pytest.skip(printed)
    link_images(demo / "imgs", tmp_path / "imgs", 160)
    return tmp_path


@pytest.mark.parametrize("flags", [(), ("--amp",), ("--augment",), ("--amp", "--augment")])
def test_twenty_iterations_are_finite_and_near_those_of_a_cpu(place, flags):
    run(place, "train.py", *FLAGS, "--epochs", 1, *flags, env=WITH_GPU)
    rows = table(place)
    assert len(rows) == 20
    run(place, "train.py", *FLAGS, "--epochs", 1, *flags, "--device", "cpu", "--restart")
    first, of_cpu = (float(each[0]["d_loss"]) for each in (rows, table(place)))
    assert first == pytest.approx(of_cpu, rel=0.05)  # initial weights come of the GPU's own stream


def test_deterministic_run_goes_on_exactly(place):
    flags = [*FLAGS, "--deterministic"]
    run(place, "train.py", *flags, "--epochs", 1, env=WITH_GPU)
    run(place, "train.py", *flags, "--epochs", 2, env=WITH_GPU)
    run(place, "train.py", *flags, "--epochs", 2, "--output_path", "whole", env=WITH_GPU)
    one, other = (read_tensors(place / folder / "checkpoint.safetensors", "checkpoint")[0]
                  for folder in ("Output", "whole"))
    for name, value in one.items():
        np.testing.assert_array_equal(value, other[name], name)
