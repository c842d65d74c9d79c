"""Nothing is lost: kills, full disks, damaged files, divergence, a second process."""

import itertools
import os
import pickle
import random
import re
import resource
import shutil
import signal
import time
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT, complaint, link_images, photo, run, start
from PIL import Image

from dataReader import Problem
from network import Generator, save_generator
from train import iterate, main
from weightInit import read_tensors, write_tensors

# A run of 40 epochs of 8 batches, a few milliseconds each.
MINI = ("--device", "cpu", "--image_size", 32, "--width", 4, "--z_dim", 8, "--batch_size", 8,
        "--epochs", 40, "--log_every", 1, "--sample_every", 20)
LIMIT = 20_000  # bytes; of a file when the disk is full, in these tests


def disk_full():
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, LIMIT))


@pytest.fixture(scope="module")
def images(tmp_path_factory, demo):
    """A folder of 64 images, packed."""
    folder = tmp_path_factory.mktemp("faults") / "imgs"
    link_images(demo / "imgs", folder, 64)
    run(folder.parent, "dataReader.py", "--image_size", 32)
    return folder


@pytest.fixture
def place(tmp_path, images):
    """A folder to train in."""
    (tmp_path / "imgs").symlink_to(images)
    return tmp_path


@pytest.fixture(scope="module")
def untouched(tmp_path_factory, images):
    """What the files are like after a run that was never stopped."""
    folder = tmp_path_factory.mktemp("untouched")
    (folder / "imgs").symlink_to(images)
    run(folder, "train.py", *MINI)
    return contents(folder)


def contents(folder):
    return {path.name: path.read_bytes() for path in (folder / "Output").iterdir()}


def steps(folder):
    path = folder / "Output" / "losses.csv"
    return len(path.read_text().splitlines()) - 1 if path.exists() else 0


def wait_for(condition, process):
    for _ in range(6000):
        if condition():
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    raise TimeoutError


def start_training(folder, *flags):
    """Start a run and wait until it has come further than the one before."""
    process = start(folder, "train.py", *MINI, *flags)
    path = folder / "Output" / "losses.csv"
    before = path.stat().st_ino if path.exists() else None
    # losses.csv is a new file when a run starts or goes on
    wait_for(lambda: path.exists() and path.stat().st_ino != before, process)
    return process


@pytest.mark.parametrize(("kills", "minutes"), [
    (3, 0.001), pytest.param(20, 0.001, marks=pytest.mark.slow),
    pytest.param(20, 5, marks=pytest.mark.slow)])
def test_killed_run_resumes_bit_exact(place, untouched, kills, minutes):
    moments = random.Random(kills)
    for _ in range(kills):
        process = start_training(place, "--save_minutes", minutes)
        goal = steps(place) + moments.randint(0, 14)
        wait_for(lambda goal=goal: steps(place) >= goal, process)
        time.sleep(moments.uniform(0, 0.03))
        process.kill()
        assert process.wait() == -signal.SIGKILL
    assert "going on after iteration" in run(place, "train.py", *MINI)
    now = contents(place)
    assert sorted(now) == sorted(untouched)
    for name, data in untouched.items():
        assert now[name] == data, name


def test_run_with_augment_and_flip_resumes_bit_exact(place, untouched):
    flags = *MINI, "--augment", "--flip", "--epochs", 6
    assert "are few" not in run(place, "train.py", *flags, "--output_path", "whole")
    assert "64 images are few" in run(
        place, "train.py", *MINI, "--flip", "--epochs", 1, "--output_path", "flip")
    tables = [untouched["losses.csv"], *((place / name / "losses.csv").read_bytes()
                                         for name in ("flip", "whole"))]
    assert len({table.splitlines()[1] for table in tables}) == 3  # both do something
    for epochs in 1, 4:
        run(place, "train.py", *flags, "--epochs", epochs)
    assert "going on after iteration 32" in run(place, "train.py", *flags)
    for name in "losses.csv", "generator.safetensors":
        data = (place / "whole" / name).read_bytes()
        assert contents(place)[name] == data, name
    assert "augment True (now False)" in complaint(place, "train.py", *MINI, "--flip")


def test_more_epochs_extend_a_finished_run(place, untouched):
    run(place, "train.py", *MINI, "--epochs", 38)
    before = contents(place)
    printed = run(place, "train.py", *MINI, "--epochs", 38)
    assert "304 iterations done" in printed
    assert contents(place) == before
    run(place, "train.py", *MINI)
    now = contents(place)
    del now["0038_0008.png"], now["progress.gif"]  # which has that grid too
    assert now == {name: data for name, data in untouched.items() if name in now}
    assert len(now) == len(untouched) - 1


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_saves_and_leaves(place, untouched, number, status):
    process = start_training(place)
    wait_for(lambda: steps(place) > 3, process)
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == status
    assert "stopped after iteration" in err
    assert "Traceback" not in err
    _, info = read_tensors(place / "Output" / "checkpoint.safetensors", "checkpoint")
    assert info["step"] == steps(place)
    run(place, "train.py", *MINI)
    assert contents(place) == untouched


def test_second_signal_leaves_at_once(place):
    process = start_training(place, "--image_size", 128, "--width", 64, "--batch_size", 64)
    process.send_signal(signal.SIGINT)  # noted, but the iteration takes ten seconds
    assert any("stopping after this iteration" in line for line in process.stderr)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=5) == -signal.SIGINT


def test_changed_code_is_said_and_a_run_goes_on(place, monkeypatch, tmp_path):
    """Comments, docstrings and settings are no code."""
    run(place, "train.py", *MINI, "--epochs", 1)
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    source = (tmp_path / "train.py").read_text()
    flags = *MINI, "--output_path", place / "Output"
    edited = re.sub("^epochs = .*$", "epochs = 3  # other words", source, flags=re.MULTILINE)
    edited = edited.replace('"""One optimizer step', '# a comment\n    """A step', 1)
    assert edited.count("other words") == edited.count("# a comment\n") == 1
    for changed, text in (False, edited), (True, source.replace("/ 127.5 - 1", "/ 127.0 - 1", 1)):
        assert text != source
        (tmp_path / "train.py").write_text(text)
        printed = run(place, tmp_path / "train.py", *flags, "--epochs", 2 + changed)
        assert f"going on after iteration {8 + 8 * changed} of" in printed
        said = f"the code of network.py or train.py has changed since iteration {8 + 8 * changed}"
        assert (said in printed) == changed
    _, info = read_tensors(place / "Output" / "checkpoint.safetensors", "checkpoint")
    assert info["step"] == 24


def test_other_settings_are_not_mixed_in(place):
    run(place, "train.py", *MINI, "--epochs", 1)
    before = contents(place)
    line = complaint(place, "train.py", *MINI, "--width", 8, "--learning_rate", 0.001)
    assert "width 4 (now 8)" in line
    assert "learning_rate 0.0002 (now 0.001)" in line
    assert "--output_path" in line
    assert "--restart" in line
    assert contents(place) == before
    printed = run(place, "train.py", *MINI, "--epochs", 1, "--width", 8, "--restart")
    assert "Output is now in Output.1" in printed
    (place / "Output").rename(place / "new")
    (place / "Output.1").rename(place / "Output")
    assert contents(place) == before


def test_other_images_are_not_mixed_in(place, demo):
    run(place, "train.py", *MINI, "--epochs", 1)
    (place / "other").mkdir()
    for path in sorted((demo / "imgs").glob("*.png"))[100:164]:
        (place / "other" / path.name).symlink_to(path)
    assert "images 64 of digest" in complaint(place, "train.py", *MINI, "--data_path", "other")
    shutil.copytree(place / "imgs", place / "copy", ignore=shutil.ignore_patterns(".*"))
    run(place, "train.py", *MINI, "--epochs", 2, "--data_path", "copy")


def test_lost_table_of_losses_does_not_stop_a_run(place):
    run(place, "train.py", *MINI, "--epochs", 1)
    for epochs, damage in (1, b""), (2, b"\xff\xfe\n1,1,1,1,0.5,1e-05,0.5\n2,1,2,1.2.3,1,1\n3,1,"):
        (place / "Output" / "losses.csv").write_bytes(damage)
        run(place, "train.py", *MINI, "--epochs", epochs)
    rows = (place / "Output" / "losses.csv").read_bytes().split(b"\n")[1:-1]
    assert [int(row.split(b",")[0]) for row in rows][-8:] == list(range(9, 17))
    assert b"3,1," not in rows


def test_signal_while_a_grid_is_drawn_waits_for_the_next_iteration(place, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.setattr("sys.argv", ["train.py", *map(str, MINI), "--sample_every", "3"])

    def save(path, picture):
        if path.name == "training_images.png":
            return
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.2)

    monkeypatch.setattr("dataReader.save_png", save)
    with pytest.raises(SystemExit) as error:
        main()
    assert error.value.code == 130
    _, info = read_tensors(place / "Output" / "checkpoint.safetensors", "checkpoint")
    assert info["step"] == steps(place) == 4


def test_checkpoint_names_the_settings_that_change_the_result(place):
    run(place, "train.py", *MINI, "--epochs", 1)
    _, info = read_tensors(place / "Output" / "checkpoint.safetensors", "checkpoint")
    assert sorted(info["settings"]) == [
        "amp", "augment", "batch_size", "beta1", "beta2", "d_steps", "ema_decay",
        "flip", "g_steps", "image_size", "images", "learning_rate", "noise", "processes", "seed",
        "width", "z_dim"]


def test_generator_without_checkpoint_is_not_overwritten(place):
    run(place, "train.py", *MINI, "--epochs", 1)
    (place / "Output" / "checkpoint.safetensors").unlink()
    before = contents(place)
    assert "--restart" in complaint(place, "train.py", *MINI)
    assert contents(place) == before


def test_divergence_is_named_and_the_checkpoint_kept(place, monkeypatch):
    """A loss, then a weight, that is no number at iteration 11 of a run that saves every 2."""
    monkeypatch.chdir(place)
    monkeypatch.setattr("sys.argv", ["train.py", *map(str, MINI), "--save_minutes", "0"])
    monkeypatch.setattr("train.draw_curves", lambda *_: None)

    def poison(loss, weight, step):
        steps = itertools.count(step + 1)

        def poisoned(state, *others):
            values = iterate(state, *others)
            if next(steps) == 11:
                values = values * loss
                parameter = state.discriminator.parameters()[0]
                parameter.set_value(parameter * weight)
            return values
        return poisoned

    checkpoint = place / "Output" / "checkpoint.safetensors"
    for loss, weight, step, word in (
            (np.nan, 1, 0, "loss of iteration 11"), (1, np.inf, 10, "finite at iteration 11")):
        monkeypatch.setattr("train.iterate", poison(loss, weight, step))
        with pytest.raises(Problem, match=word) as error:
            main()
        assert "--learning_rate" in str(error.value)
        _, info = read_tensors(checkpoint, "checkpoint")
        assert info["step"] == 10
        del error  # it holds the run's frame, and with it the lock on Output


def test_second_process_on_the_same_output_stops(place, untouched):
    process = start_training(place)
    line = complaint(place, "train.py", *MINI)
    assert "another train.py is writing to Output" in line
    process.communicate(timeout=60)
    assert process.returncode == 0
    assert contents(place) == untouched


def test_full_disk_leaves_the_checkpoint_whole(place):
    run(place, "train.py", *MINI, "--epochs", 1)
    before = contents(place)
    line = complaint(
        place, "train.py", *MINI, "--epochs", 2, "--save_minutes", 0, preexec_fn=disk_full)
    assert "cannot write Output/" in line
    after = contents(place)
    assert after["checkpoint.safetensors"] == before["checkpoint.safetensors"]
    assert after["generator.safetensors"] == before["generator.safetensors"]
    assert not [name for name in after if name.endswith(".tmp")]
    run(place, "train.py", *MINI, "--epochs", 2)


def test_full_disk_leaves_the_generator_whole(tmp_path):
    path = tmp_path / "generator.safetensors"
    save_generator(path, *[Generator(8, 32, 4)] * 2, "normal", 1)
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        with pytest.raises(Problem, match="cannot write .*generator.safetensors"):
            save_generator(path, *[Generator(8, 32, 4)] * 2, "normal", 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    assert path.read_bytes() == before


def test_full_disk_while_packing(tmp_path, demo):
    link_images(demo / "imgs", tmp_path / "imgs", 64)
    line = complaint(tmp_path, "dataReader.py", preexec_fn=disk_full)
    assert "cannot write imgs/.faces" in line
    assert not list((tmp_path / "imgs").glob(".*"))
    run(tmp_path, "dataReader.py")


def test_full_disk_while_cropping(tmp_path):
    (tmp_path / "in").mkdir()
    for number in range(5):
        photo(mark=number).save(tmp_path / "in" / f"{number}.png")

    def tiny_disk():
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))

    (tmp_path / "in" / "4.png").rename(tmp_path / "4.png")
    run(tmp_path, "pretreat.py", "--input", "in")
    for number in range(3):
        (tmp_path / "imgs" / f"{number}.png").unlink()
    (tmp_path / "4.png").rename(tmp_path / "in" / "4.png")
    line = complaint(tmp_path, "pretreat.py", "--input", "in", preexec_fn=tiny_disk)
    assert "cannot write imgs/" in line
    assert [path.name for path in (tmp_path / "imgs").iterdir()] == ["3.png"]
    assert "4 written, 1 already there" in run(tmp_path, "pretreat.py", "--input", "in")
    assert len(list((tmp_path / "imgs").iterdir())) == 5


def test_killed_pretreat_continues(tmp_path, demo):
    (tmp_path / "photos").symlink_to(demo / "photos")
    moments = random.Random(0)
    for _ in range(4):
        there = len(list(tmp_path.glob("imgs/*.png")))
        process = start(tmp_path, "pretreat.py", "--input", "photos")
        goal = there + moments.randint(1, 150)
        wait_for(lambda goal=goal: len(list(tmp_path.glob("imgs/*.png"))) >= goal, process)
        process.kill()
        process.communicate()
        for path in tmp_path.glob("imgs/*.png"):
            Image.open(path).load()
    assert "already there, 0 skipped" in run(tmp_path, "pretreat.py", "--input", "photos")
    made = {path.name: path.read_bytes() for path in (tmp_path / "imgs").iterdir()}
    assert made == {path.name: path.read_bytes() for path in (demo / "imgs").glob("[0-9]*")}


def test_killed_packing_continues(tmp_path, demo):
    link_images(demo / "imgs", tmp_path / "imgs", 2000)
    process = start(tmp_path, "dataReader.py")
    wait_for(lambda: list((tmp_path / "imgs").glob(".*.tmp")), process)
    process.kill()
    process.communicate()
    assert not list((tmp_path / "imgs").glob(".faces-*.npy"))
    assert "of 2000 images" in run(tmp_path, "dataReader.py")
    assert [path.suffix for path in (tmp_path / "imgs").glob(".*")] == [".npy"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, images):
    folder = tmp_path_factory.mktemp("checkpoint")
    (folder / "imgs").symlink_to(images)
    run(folder, "train.py", *MINI, "--epochs", 1)
    return SimpleNamespace(folder=folder, path=folder / "Output" / "checkpoint.safetensors",
                           data=(folder / "Output" / "checkpoint.safetensors").read_bytes())


def test_damage_anywhere_is_noticed(checkpoint, tmp_path):
    data = checkpoint.data
    header = 8 + int.from_bytes(data[:8], "little")
    places = random.Random(0)
    flips = [*range(8), *places.sample(range(8, header), 400),
             *places.sample(range(header, len(data)), 100), header, len(data) - 1]
    damaged = [data[:at] + bytes([data[at] ^ 1 << places.randrange(8)]) + data[at + 1:]
               for at in flips]
    damaged += [data[:length] for length in (0, 4, 8, 100, header - 1, header, header + 1,
                                             len(data) // 2, len(data) - 4, len(data) - 1)]
    damaged += [data + b"\0", b"", b"text", b"\xff" * 100]
    path = tmp_path / "checkpoint.safetensors"
    for number, content in enumerate(damaged):
        path.write_bytes(content)
        with pytest.raises(Problem) as error:
            read_tensors(path, "checkpoint")
        assert "damaged" in str(error.value), number
        assert "\n" not in str(error.value)


def test_files_from_strangers_are_only_data(checkpoint, tmp_path):
    trap = tmp_path / "trap"

    class Trap:
        def __reduce__(self):
            return open, (str(trap), "w")

    folder = checkpoint.folder
    foreign = tmp_path / "generator.safetensors"
    save_generator(foreign, *[Generator(8, 32, 4)] * 2, "normal", 1)
    try:
        for content in pickle.dumps(Trap()), checkpoint.data[:-1], foreign.read_bytes():
            checkpoint.path.write_bytes(content)
            before = contents(folder)
            line = complaint(folder, "train.py", *MINI)
            assert "checkpoint.safetensors" in line
            assert "--restart" in line
            assert contents(folder) == before
        foreign.write_bytes(pickle.dumps(Trap()))
        complaint(tmp_path, "generator.py", "--device", "cpu", "--checkpoint", foreign)
    finally:
        checkpoint.path.write_bytes(checkpoint.data)
    assert not trap.exists()
    pickle.loads(pickle.dumps(Trap())).close()
    assert trap.exists()  # the trap works


def test_checkpoint_of_another_network_is_refused(checkpoint):
    tensors, info = read_tensors(checkpoint.path, "checkpoint")
    first = "D.layers.0.weight"
    without_adam = {name: value for name, value in tensors.items() if "moment1" not in name}
    try:
        for other in {**tensors, first: tensors[first][:, :1]}, without_adam:
            write_tensors(checkpoint.path, other, info)
            assert "another network" in complaint(checkpoint.folder, "train.py", *MINI)
        for change in {"step": "three"}, {"settings": None}:
            write_tensors(checkpoint.path, tensors, {**info, **change})
            assert "cannot go on from" in complaint(checkpoint.folder, "train.py", *MINI)
    finally:
        checkpoint.path.write_bytes(checkpoint.data)
