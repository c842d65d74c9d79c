"""train.py on Paddle's launcher: two processes on the CPU (gloo) that train one model."""

from dataReader import FaceReader
from network import Discriminator, Generator, loss, random_array
from weightInit import paddle, read_tensors

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, complaint, link_images, run, table

FLAGS = ("--device", "cpu", "--image_size", 32, "--width", 4, "--z_dim", 8, "--batch_size", 8,
         "--log_every", 1)


def launch(folder, processes, script, *flags):
    """Start a script on the launcher; with --backend it is Paddle's old one."""
    env = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    return subprocess.Popen(
        [sys.executable, "-m", "paddle.distributed.launch", "--nproc_per_node", str(processes),
         *(["--backend", "gloo"] if processes > 1 else []), str(script), *map(str, flags)],
        cwd=folder, text=True,
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
    """Wait until it is true; fail after so many seconds, plenty on a busy machine."""
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
    out = train(place, 2, "--epochs", 1)
    assert "4 iterations done" in out
    assert "it 4/4: 100%" in out
    assert "64.0/64.0" in out  # images of both
    other = (place / "log" / "workerlog.1").read_text()
    assert ("packing" in out) != ("packing" in other)  # one of them does, the other waits
    assert "it 4/4" not in other
    check_algorithm(place)

    assert "going on after iteration 4 of 8" in train(place, 2, "--epochs", 2)
    assert sorted(path.name for path in (place / "Output").iterdir()) == [
        "0001_0004.png", "0001_0004.safetensors", "0002_0004.png", "0002_0004.safetensors",
        "checkpoint.safetensors",
        "generator.safetensors", "losses.csv", "losses.png", "progress.gif",
        "real_vs_fake.png", "training_images.png"]
    train(place, 2, "--epochs", 2, "--output_path", "whole")
    for name in "generator.safetensors", "losses.csv", "0002_0004.png", "0002_0004.safetensors":
        assert (place / "Output" / name).read_bytes() == (place / "whole" / name).read_bytes()
    tensors, others = (read_tensors(place / folder / "checkpoint.safetensors", "checkpoint")[0]
                       for folder in ("Output", "whole"))  # beside them it names the grids drawn
    for name, value in tensors.items():
        np.testing.assert_array_equal(value, others[name])

    line = complaint(place, "train.py", *FLAGS, "--epochs", 3)
    assert "processes 2 (now 1)" in line


def check_algorithm(place):
    """Check an epoch of two processes against the algorithm written out in one.

    Gradients are means over both ranks, each with images, noise and BN statistics of its own.
    """
    readers = [FaceReader(place / "imgs", 32, 8, 0, rank, 2) for rank in (0, 1)]
    nets = []
    for _ in readers:
        paddle.seed(0)
        nets.append((Generator(8, 32, 4), Discriminator(32, 4)))
    optimizers = [[paddle.optimizer.Adam(0.0002, 0.5, 0.999, parameters=net.parameters())
                   for net in pair] for pair in nets]

    def descend(losses, which):
        for value in losses:
            value.backward()
        for both in zip(*(pair[which].parameters() for pair in nets), strict=True):
            if not both[0].stop_gradient:
                mean = (both[0].grad + both[1].grad) / 2
                for parameter in both:
                    paddle.assign(mean, parameter.grad)
        for pair in optimizers:
            pair[which].step()
            for optimizer in pair:
                optimizer.clear_grad()
        return sum(map(float, losses)) / 2

    for step, batches in enumerate(zip(*(reader.epoch(1) for reader in readers), strict=True), 1):
        z = [[paddle.to_tensor(random_array([0, step, rank, draw], [8, 8], "normal"))
              for draw in (1, 2)] for rank in (0, 1)]
        d_loss = descend([
            loss(D(paddle.to_tensor(images / np.float32(127.5) - 1)), 1)
            + loss(D(G(z[0]).detach()), 0)
            for (G, D), images, z in zip(nets, batches, z, strict=True)], 1)
        # the images of D's step; BN's statistics see them once
        g_loss = descend([loss(D(G(z[0])), 1)
                          for (G, D), z in zip(nets, z, strict=True)], 0)
        g_loss = descend([loss(D(G(z[1])), 1)
                          for (G, D), z in zip(nets, z, strict=True)], 0)
        row = table(place)[step - 1]
        assert float(row["d_loss"]) == pytest.approx(d_loss, rel=1e-4)
        assert float(row["g_loss"]) == pytest.approx(g_loss, rel=1e-4)
    tensors, _ = read_tensors(place / "Output" / "checkpoint.safetensors", "checkpoint")
    D = [pair[1].state_dict() for pair in nets]
    for name in D[0]:
        np.testing.assert_allclose(tensors[f"D.{name}"], D[0][name], rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_one_process_on_the_launcher_is_plain_training(place):
    """With settings for which the number of threads shows in the result: the launcher sets one."""
    flags = "--epochs", 1, "--width", 16, "--batch_size", 16, "--z_dim", 100
    own = {**os.environ, "OMP_NUM_THREADS": "1"}
    run(place, "train.py", *FLAGS, *flags, "--output_path", "plain", env=own)
    train(place, 1, *flags)
    assert sorted(os.listdir(place / "plain")) == sorted(os.listdir(place / "Output"))
    for path in (place / "plain").iterdir():
        assert path.read_bytes() == (place / "Output" / path.name).read_bytes(), path.name

    process = launch(place, 1, ROOT / "train.py", *FLAGS, *flags, "--epochs", 10_000)
    before = len(table(place))
    wait_for(lambda: len(table(place)) > before + 2, 240)
    process.send_signal(signal.SIGINT)  # the launcher sends SIGTERM on, more than once
    process.communicate(timeout=60)
    wait_for(lambda: not ranks(place), 10)
    _, info = read_tensors(place / "Output" / "checkpoint.safetensors", "checkpoint")
    assert info["step"] == len(table(place))


@pytest.mark.parametrize("kills", [
    [(1, signal.SIGKILL)],
    pytest.param([(0, signal.SIGKILL)], marks=pytest.mark.slow),
    pytest.param([("launcher", number) for number in (
        signal.SIGINT, signal.SIGKILL, signal.SIGTERM)], marks=pytest.mark.slow)])
def test_dead_process_ends_the_run_and_it_can_go_on(place, kills):
    checkpoint = place / "Output" / "checkpoint.safetensors"
    step = 0
    for victim, number in kills:
        process = launch(place, 2, ROOT / "train.py", *FLAGS, "--epochs", 10_000,
                         "--save_minutes", 0.02)
        wait_for(lambda step=step: checkpoint.exists() and read_tensors(
            checkpoint, "checkpoint")[1]["step"] >= step + 8, 240)
        assert sorted(ranks(place)) == [0, 1]
        os.kill(ranks(place).get(victim, process.pid), number)
        process.communicate(timeout=240)
        assert process.returncode or victim == "launcher"
        wait_for(lambda: not ranks(place), 60)
        log = (place / "log" / "workerlog.0").read_text()
        assert (f"going on after iteration {step} of" in log) == (step > 0)
        step = read_tensors(checkpoint, "checkpoint")[1]["step"]
        assert step >= 8
    assert f"going on after iteration {step} of" in train(place, 2, "--epochs", step // 4 + 1)


SCRIPT = """
import sys

import numpy as np
import train
from dataReader import Problem
from network import Discriminator, join_weights, loss
from weightInit import paddle

dist = paddle.distributed


def problem(*flags):
    sys.argv = ["train.py", *FLAGS, "--epochs", "1", *flags]
    try:
        train.main()
    except Problem as problem:
        return str(problem)


class Keep:
    step = lambda self: np.save(f"rank{rank}.npy", D.vector.grad.numpy())
    clear_grad = lambda self, set_to_zero: None


dist.init_parallel_env()
rank = dist.get_rank()
paddle.seed(0)
D = Discriminator(32, 4)
D.eval()
join_weights(D)
images = np.load("images.npy")[8 * rank:][:8]
calls, reduce = [], dist.all_reduce
paddle.distributed.all_reduce = lambda *args, **named: (calls.append(1), reduce(*args, **named))
train.descend(loss(D(paddle.to_tensor(images)), 1), D, Keep(), paddle.amp.GradScaler(False))
assert len(calls) == 1, calls

different = problem("--log_every", str(1 + rank))
assert "the settings, the code, the images or" in different
assert different.endswith("differ between the processes")
seed = paddle.seed
paddle.seed = lambda number: seed(number + rank)
assert problem() is None
paddle.distributed.all_reduce = lambda *_: None
drifted = problem("--epochs", "2")
assert drifted == "the networks at iteration 5 differ between the processes", drifted
"""


def test_gradients_and_weights_are_the_same_on_all_processes(place):
    """The gradient is that of all images at once; with BN in eval mode, else its statistics differ.

    Weights that began otherwise are replaced by the first's; a drift, or other settings, are seen.
    """
    images = np.random.default_rng(0).uniform(-1, 1, [16, 3, 32, 32]).astype(np.float32)
    np.save(place / "images.npy", images)
    (place / "script.py").write_text(f"FLAGS = {list(map(str, FLAGS))}\n{SCRIPT}")
    process = launch(place, 2, "script.py")
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0, out

    paddle.seed(0)
    D = Discriminator(32, 4)
    D.eval()
    loss(D(paddle.to_tensor(images)), 1).backward()
    expected = [value.grad.numpy().ravel() for value in D.parameters() if not value.stop_gradient]
    assert len(expected) == 10
    first, second = (np.load(place / f"rank{rank}.npy") for rank in (0, 1))
    np.testing.assert_array_equal(first, second)
    np.testing.assert_allclose(first, np.concatenate(expected), rtol=0, atol=1e-6)
    for value in expected:
        assert np.abs(value).max() > 1e-5  # so that the tolerance says something
