"""train.py on Paddle's launcher: two processes on the CPU (gloo) that train one model."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

from dataReader import FaceReader
from network import Discriminator, latent, loss, read_tensors
from train import Batches

import numpy as np
import paddle
import pytest
from conftest import ROOT, complaint, link_images, run, table

FLAGS = ("--device", "cpu", "--image_size", 32, "--width", 4, "--z_dim", 8, "--batch_size", 8,
         "--log_every", 1)


def launch(folder, processes, script, *flags):
    """Start a script on the launcher."""
    env = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    return subprocess.Popen(
        [sys.executable, "-m", "paddle.distributed.launch", "--nproc_per_node", str(processes),
         "--backend", "gloo", str(script), *map(str, flags)], cwd=folder, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env={**env, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)})


def train(folder, processes, *flags, status=0):
    """Run train.py on the launcher to its end; return what it printed."""
    process = launch(folder, processes, ROOT / "train.py", *FLAGS, *flags)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == status, out
    return out


def ranks(folder):
    """Process numbers by rank of all that a launcher started in a folder."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if os.readlink(path / "cwd") == str(folder) and (path / "cmdline").read_bytes():
                facts = (path / "environ").read_bytes().split(b"\0")
                found |= {int(fact.split(b"=")[1]): int(path.name) for fact in facts
                          if fact.startswith(b"PADDLE_TRAINER_ID=")}
        except OSError:
            continue  # it has ended
    return found


def wait_for(condition, seconds):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.fixture
def place(tmp_path, demo):
    """A folder with 70 images: eight batches for one process, four for each of two."""
    link_images(demo / "imgs", tmp_path / "imgs", 70)
    return tmp_path


def test_two_processes_train_one_model_and_go_on(place):
    out = train(place, 2, "--epochs", 2)
    assert "8 iterations done" in out
    assert "it 8/8: 100%" in out
    assert "128/128" in out  # images of both
    other = (place / "log" / "workerlog.1").read_text()
    assert "waiting for the first process" in other
    assert "packing" in out
    assert "packing" not in other
    assert "%|" not in other
    assert [(row["epoch"], row["batch"]) for row in table(place)] == [
        (epoch, batch) for epoch in "12" for batch in "1234"]
    assert sorted(path.name for path in (place / "Output").iterdir()) == [
        ".lock", "0001_0004.png", "0002_0004.png", "checkpoint.safetensors",
        "generator.safetensors", "losses.csv", "losses.png", "real_vs_fake.png"]

    assert "going on after iteration 8 of 12" in train(place, 2, "--epochs", 3)
    train(place, 2, "--epochs", 3, "--output_path", "whole")
    for name in "checkpoint.safetensors", "generator.safetensors", "losses.csv", "0003_0004.png":
        assert (place / "Output" / name).read_bytes() == (place / "whole" / name).read_bytes()

    # Between two epochs the number of processes may change; then 8 batches are an epoch.
    assert "going on after iteration 12 of 20" in run(place, "train.py", *FLAGS, "--epochs", 4)
    assert [(int(row["step"]), row["epoch"], row["batch"]) for row in table(place)[11:14]] == [
        (12, "3", "4"), (13, "4", "1"), (14, "4", "2")]


def test_one_process_on_the_launcher_is_plain_training(place):
    """At a width where the number of threads shows in the result."""
    flags = "--epochs", 1, "--width", 32
    run(place, "train.py", *FLAGS, *flags, "--output_path", "plain")
    train(place, 1, *flags)
    assert sorted(os.listdir(place / "plain")) == sorted(os.listdir(place / "Output"))
    for path in (place / "plain").iterdir():
        assert path.read_bytes() == (place / "Output" / path.name).read_bytes(), path.name


@pytest.mark.parametrize(("victim", "number"), [
    (0, signal.SIGKILL), (1, signal.SIGKILL), ("launcher", signal.SIGINT),
    ("launcher", signal.SIGKILL)])
def test_dead_process_ends_the_run_and_it_can_go_on(place, victim, number):
    process = launch(place, 2, ROOT / "train.py", *FLAGS, "--epochs", 10_000, "--save_every", 3)
    checkpoint = place / "Output" / "checkpoint.safetensors"
    wait_for(lambda: checkpoint.exists() and len(table(place)) > 9, 60)
    assert sorted(ranks(place)) == [0, 1]
    os.kill(ranks(place).get(victim, process.pid), number)
    process.communicate(timeout=60)
    assert process.returncode != 0
    wait_for(lambda: not ranks(place), 30)
    _, info = read_tensors(checkpoint, "checkpoint")
    step, epochs = info["step"], info["step"] // 4 + 1
    assert step % 3 == 0 or step % 4 == 0
    if step % 4:
        assert (f"had 2 processes, not 1, and is at batch {step % 4} of 4"
                in complaint(place, "train.py", *FLAGS))
    assert f"going on after iteration {step} of" in train(place, 2, "--epochs", epochs)


SCRIPT = """
import numpy as np
import paddle
import paddle.distributed as dist
from network import Discriminator, loss
from train import average, check_same
from dataReader import Problem

dist.init_parallel_env()
paddle.seed(0)
D = Discriminator(32, 4)
D.eval()
images = np.load("images.npy")[8 * dist.get_rank():][:8]
loss(D(paddle.to_tensor(images)), 1).backward()
calls, reduce = [], dist.all_reduce
dist.all_reduce = lambda *args: (calls.append(1), reduce(*args))
parameters = [value for value in D.parameters() if not value.stop_gradient]
average([value.grad for value in parameters])
assert len(calls) == 1, calls
np.savez(f"rank{dist.get_rank()}.npz", *[value.grad.numpy() for value in parameters])
check_same("one", "they")
try:
    check_same(dist.get_rank(), "they")
    raise SystemExit("not seen")
except Problem as problem:
    assert str(problem) == "they differ between the processes", problem
"""


def test_gradient_of_two_processes_is_that_of_all_images(tmp_path):
    """BN in eval mode, since in train mode its statistics are those of each process."""
    images = np.random.default_rng(0).uniform(-1, 1, [16, 3, 32, 32]).astype(np.float32)
    np.save(tmp_path / "images.npy", images)
    (tmp_path / "script.py").write_text(SCRIPT)
    process = launch(tmp_path, 2, "script.py")
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0, out

    paddle.seed(0)
    D = Discriminator(32, 4)
    D.eval()
    loss(D(paddle.to_tensor(images)), 1).backward()
    expected = [value.grad.numpy() for value in D.parameters() if not value.stop_gradient]
    first, second = (np.load(tmp_path / f"rank{rank}.npz") for rank in (0, 1))
    assert len(first.files) == len(expected) == 9
    for name, value in zip(first.files, expected, strict=True):
        np.testing.assert_array_equal(first[name], second[name])
        np.testing.assert_allclose(first[name], value, rtol=0, atol=1e-6)
        assert np.abs(value).max() > 1e-4  # so that the tolerance says something
