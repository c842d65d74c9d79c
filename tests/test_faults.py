"""Nothing is lost: kills, full disks, damaged files, divergence, a second process."""

import dataReader
import train
from dataReader import Problem, grid
from network import Generator, draw_faces, face_latents, load_generator, save_generator
from train import iterate, main, noted_signals
from weightInit import read_tensors, write_tensors

import io
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

# A run of 12 epochs of 8 batches, a few milliseconds each.
MINI = ("--device", "cpu", "--image_size", 32, "--width", 4, "--z_dim", 8, "--batch_size", 8,
        "--epochs", 12, "--log_every", 1, "--sample_every", 20, "--keep", 3)
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
    return whole_run(tmp_path_factory, images)


def whole_run(tmp_path_factory, images, *flags):
    folder = tmp_path_factory.mktemp("untouched")
    (folder / "imgs").symlink_to(images)
    run(folder, "train.py", *MINI, *flags)
    return contents(folder)


def contents(folder):
    return {path.name: path.read_bytes() for path in (folder / "Output").iterdir()
            if path.is_file()}


def train_here(place, monkeypatch, *flags):
    """Run train.py in this process, which is much faster than another."""
    monkeypatch.chdir(place)
    monkeypatch.setattr("sys.argv", ["train.py", *map(str, (*MINI, *flags))])
    main()


def facts(folder):
    """What a checkpoint says beside its tensors."""
    return read_tensors(folder / "Output" / "checkpoint.safetensors", "checkpoint")[1]


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


@pytest.mark.parametrize(("kills", "minutes", "epochs"), [
    (3, 0.001, 12), pytest.param(20, 0.001, 40, marks=pytest.mark.slow),
    pytest.param(20, 5, 40, marks=pytest.mark.slow)])
def test_killed_run_resumes_bit_exact(
        place, untouched, kills, minutes, epochs, tmp_path_factory, images):
    if epochs != 12:
        untouched = whole_run(tmp_path_factory, images, "--epochs", epochs)
    moments = random.Random(kills)
    for _ in range(kills):
        process = start_training(place, "--save_minutes", minutes, "--epochs", epochs)
        goal = steps(place) + moments.randint(0, 14)
        wait_for(lambda goal=goal: steps(place) >= goal, process)
        time.sleep(moments.uniform(0, 0.03))
        process.kill()
        assert process.wait() == -signal.SIGKILL
    assert "going on after iteration" in run(place, "train.py", *MINI, "--epochs", epochs)
    now = contents(place)
    assert sorted(now) == sorted(untouched)
    for name, data in untouched.items():
        assert now[name] == data, name


def test_run_with_augment_and_flip_resumes_bit_exact(place, untouched, monkeypatch, capsys):
    flags = "--augment", "--flip", "--epochs", 3
    train_here(place, monkeypatch, *flags, "--output_path", "whole")
    assert "are few" not in capsys.readouterr().err
    train_here(place, monkeypatch, "--flip", "--epochs", 1, "--output_path", "flip")
    assert "64 images are few" in capsys.readouterr().err
    tables = [untouched["losses.csv"], *((place / name / "losses.csv").read_bytes()
                                         for name in ("flip", "whole"))]
    assert len({table.splitlines()[1] for table in tables}) == 3  # both do something
    for epochs in 1, 2, 3:
        train_here(place, monkeypatch, *flags, "--epochs", epochs)
    assert "going on after iteration 16" in capsys.readouterr().err
    for name in "losses.csv", "generator.safetensors":
        data = (place / "whole" / name).read_bytes()
        assert contents(place)[name] == data, name
    with pytest.raises(Problem, match=r"augment True \(now False\)"):
        train_here(place, monkeypatch, "--flip")


def test_more_epochs_extend_a_finished_run(place, untouched, monkeypatch, capsys):
    train_here(place, monkeypatch, "--epochs", 11)
    before = contents(place)
    train_here(place, monkeypatch, "--epochs", 11)
    printed = capsys.readouterr()
    assert "88 iterations done" in printed.out
    assert "no more are asked for" in printed.err
    assert contents(place) == before
    train_here(place, monkeypatch)
    now = contents(place)
    # that grid was not drawn when the run was not stopped
    other = ["0011_0008.png", "0011_0008.safetensors", "progress.gif", "checkpoint.safetensors"]
    assert {name: data for name, data in now.items() if name not in other} == {
        name: data for name, data in untouched.items() if name not in other}
    assert (read_tensors(place / "Output" / other[-1], "checkpoint")[1]["grids"][-2:]
            == ["0011_0008", "0012_0008"])


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
    train_here(place, monkeypatch, "--epochs", 1)
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


def test_other_settings_are_not_mixed_in(place, monkeypatch):
    train_here(place, monkeypatch, "--epochs", 1)
    before = contents(place)
    flags = "--width", 8, "--learning_rate", 0.001
    for change in ["--no-change"], ["--change"]:  # networks of another width are not these
        with pytest.raises(Problem) as error:
            train_here(place, monkeypatch, *flags, *change)
        assert "learning_rate 0.0002 (now 0.001), width 4 (now 8)" in str(error.value)
        assert "--output_path" in str(error.value)
        assert "--restart" in str(error.value)
        assert "--change" not in str(error.value)
        del error  # it holds the run's frame, and with it the lock on Output
        assert contents(place) == before


def test_settings_that_fit_may_change_if_told(place, monkeypatch, capsys):
    """The epoch that has begun is left, as its batches are others now."""
    train_here(place, monkeypatch, "--epochs", 1)
    stop_after(monkeypatch, 4)
    with pytest.raises(SystemExit):
        train_here(place, monkeypatch, "--epochs", 2)
    monkeypatch.setattr("train.iterate", iterate)
    flags = "--epochs", 4, "--learning_rate", 0.0001, "--batch_size", 16, "--augment"
    with pytest.raises(Problem, match="pass --change") as error:
        train_here(place, monkeypatch, *flags)
    told = "augment False (now True), batch_size 8 (now 16), learning_rate 0.0002 (now 0.0001)"
    assert told in str(error.value)
    del error
    capsys.readouterr()
    train_here(place, monkeypatch, *flags, "--change")
    assert f"changed after iteration 12: {told}" in capsys.readouterr().err
    rows = (place / "Output" / "losses.csv").read_text().splitlines()[1:]
    places = [[int(cell) for cell in row.split(",")[:3]] for row in rows]
    assert places == [*([step, 1, step] for step in range(1, 9)),
                      *([step, 2, step - 8] for step in range(9, 13)),
                      *([step, 3, step - 12] for step in range(13, 17)),
                      *([step, 4, step - 16] for step in range(17, 21))]
    assert facts(place)["changes"] == [f"iteration 12: {told}"]
    train_here(place, monkeypatch, *flags, "--epochs", 5)  # needs no --change again
    assert facts(place)["step"] == 24
    assert facts(place)["grids"] == ["0001_0008", "0004_0004", "0005_0004"]


def stop_after(monkeypatch, iterations):
    """Let a signal come in that iteration."""
    count = itertools.count(1)

    def stopped(*args):
        if next(count) == iterations:
            os.kill(os.getpid(), signal.SIGTERM)
        return iterate(*args)

    monkeypatch.setattr("train.iterate", stopped)


def test_signal_in_the_last_iteration_lets_the_run_end(place, monkeypatch, capsys):
    stop_after(monkeypatch, 8)
    train_here(place, monkeypatch, "--epochs", 1)
    said = capsys.readouterr()
    assert "8 iterations done" in said.out
    assert "stopped after" not in said.err
    assert (place / "Output" / "real_vs_fake.png").exists()


def test_restart_moves_what_a_run_wrote_and_nothing_else(place, monkeypatch, capsys):
    """Out of a folder that is a link, too."""
    (place / "disk").mkdir()
    (place / "Output").symlink_to("disk")
    train_here(place, monkeypatch, "--epochs", 3)
    before = contents(place)
    own = {"notes.txt": b"mine", "1_1.png": b"no grid", "other/checkpoint.safetensors": b"run"}
    for name, data in own.items():
        (place / "disk" / name).parent.mkdir(exist_ok=True)
        (place / "disk" / name).write_bytes(data)
    for number in 1, 2:
        train_here(place, monkeypatch, "--epochs", 1, "--restart", "--seed", number)
        assert f"the run in Output is now in Output/earlier-{number}" in capsys.readouterr().err
    moved = {path.name: path.read_bytes() for path in (place / "disk" / "earlier-1").iterdir()}
    assert moved == before
    assert "0003_0004.safetensors" in moved
    for name, data in own.items():
        assert (place / "disk" / name).read_bytes() == data
    assert (place / "Output").is_symlink()
    assert facts(place)["step"] == 8


def test_grids_that_are_not_this_runs_are_left_alone(place, monkeypatch):
    """Foreign pictures, those of a run that did not come to a checkpoint; and a column of others'.
    """
    output = place / "Output"
    output.mkdir()
    for name in "1_1.png", "0000_0001.png", "0001_0001.png":
        (output / name).write_bytes(b"no grid")
    (output / "losses.csv").write_text("step,epoch,batch\n1,1,1,9,9,9,9\n")
    train_here(place, monkeypatch, "--epochs", 3)
    with Image.open(output / "progress.gif") as animation:
        assert animation.n_frames == 2
    table = output / "losses.csv"
    before = table.read_bytes()
    rows = before.decode().splitlines()
    assert rows[1] != "1,1,1,9,9,9,9"
    table.write_text("".join(f"{row},{number}\r\n" for number, row in enumerate(rows)))
    train_here(place, monkeypatch, "--epochs", 3)
    assert table.read_bytes() == before


def test_every_grid_keeps_its_generator(place, monkeypatch):
    """At most `keep`, spread over the run; which ones, a kill at any moment does not change."""
    flags = "--epochs", 3, "--sample_every", 2
    train_here(place, monkeypatch, *flags, "--keep", 20)
    output = place / "Output"
    grids = facts(place)["grids"]
    assert len(grids) == 12
    z = face_latents(0, range(100), 8, "normal")
    for name in grids:
        generator, info = load_generator(output / f"{name}.safetensors")
        drawn = grid(draw_faces(generator, z))
        np.testing.assert_array_equal(drawn, np.asarray(Image.open(output / f"{name}.png")))
        assert info["step"] == 8 * (int(name[:4]) - 1) + int(name[5:])
    tensors, _ = read_tensors(output / f"{grids[0]}.safetensors", "generator")
    assert not any(name.startswith("raw.") for name in tensors)

    train_here(place, monkeypatch, *flags, "--keep", 5, "--output_path", "five")
    kept = sorted(path.stem for path in (place / "five").glob("0*.safetensors"))
    assert kept == grids[3::4]
    assert len(list((place / "five").glob("0*.png"))) == 12


def test_picture_that_fails_is_a_line(place, monkeypatch, capsys):
    """And what is worth most is written first."""
    written = []
    monkeypatch.setattr("train.draw_curves", lambda *_: 1 / 0)
    monkeypatch.setattr("dataReader.save_grids", lambda *_, **__: Image.open("no such file"))
    replacing = dataReader.replacing

    def noted(path, sync=True):
        written.append(path.name)
        return replacing(path, sync)

    monkeypatch.setattr("dataReader.replacing", noted)
    monkeypatch.setattr("weightInit.replacing", noted)
    train_here(place, monkeypatch, "--epochs", 1)
    told = capsys.readouterr().err
    assert "Output/losses.png could not be written: division by zero" in told
    assert "Output/real_vs_fake.png could not be written: " in told
    assert written[-3:] == ["checkpoint.safetensors", "generator.safetensors", "progress.gif"]
    assert facts(place)["step"] == 8


def test_kill_between_checkpoint_and_generator_leaves_no_old_generator(place, monkeypatch):
    train_here(place, monkeypatch, "--epochs", 1)
    before = contents(place)
    for name in "generator.safetensors", "losses.png", "progress.gif":
        (place / "Output" / name).write_bytes(b"old")
    train_here(place, monkeypatch, "--epochs", 1)
    assert contents(place) == before


def test_output_inside_the_images_is_refused(place, monkeypatch):
    with pytest.raises(Problem, match="imgs/out lies in imgs"):
        train_here(place, monkeypatch, "--output_path", "imgs/out")
    assert not (place / "imgs" / "out").exists()


def test_other_images_are_not_mixed_in(place, demo, monkeypatch):
    train_here(place, monkeypatch, "--epochs", 1)
    (place / "other").mkdir()
    for path in sorted((demo / "imgs").glob("*.png"))[100:172]:
        (place / "other" / path.name).symlink_to(path)
    with pytest.raises(Problem, match="images 64 of digest"):
        train_here(place, monkeypatch, "--data_path", "other")
    shutil.copytree(place / "imgs", place / "copy", ignore=shutil.ignore_patterns(".*"))
    train_here(place, monkeypatch, "--epochs", 2, "--data_path", "copy")
    train_here(place, monkeypatch, "--epochs", 3, "--data_path", "other", "--change")
    assert facts(place)["step"] == 2 * 8 + 9  # 72 images


def test_lost_table_of_losses_does_not_stop_a_run(place, monkeypatch):
    train_here(place, monkeypatch, "--epochs", 1)
    for epochs, damage in (1, b""), (2, b"\xff\xfe\n1,1,1,1,0.5,1e-05,0.5\n2,1,2,1.2.3,1,1\n3,1,"):
        (place / "Output" / "losses.csv").write_bytes(damage)
        train_here(place, monkeypatch, "--epochs", epochs)
    rows = (place / "Output" / "losses.csv").read_bytes().split(b"\n")[1:-1]
    assert [int(row.split(b",")[0]) for row in rows] == [1, *range(9, 17)]


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


def test_checkpoint_names_the_settings_that_change_the_result(place, monkeypatch):
    train_here(place, monkeypatch, "--epochs", 1)
    assert sorted(facts(place)["settings"]) == [
        "amp", "augment", "batch_size", "beta1", "beta2", "d_steps", "ema_decay",
        "flip", "g_steps", "image_size", "images", "learning_rate", "noise", "processes", "seed",
        "width", "z_dim"]


def test_generator_without_checkpoint_is_not_overwritten(place, monkeypatch, capsys):
    train_here(place, monkeypatch, "--epochs", 1)
    (place / "Output" / "checkpoint.safetensors").unlink()
    before = contents(place)
    train_here(place, monkeypatch, "--epochs", 1, "--seed", 1)
    told = "the run in Output has no checkpoint and is now in Output/earlier-1"
    assert told in capsys.readouterr().err
    aside = place / "Output" / "earlier-1"
    assert {path.name: path.read_bytes() for path in aside.iterdir()} == before
    assert facts(place)["step"] == 8


def test_signals_that_ask_for_an_end_are_noted_and_handlers_put_back():
    """SIGHUP of a closed terminal and SIGUSR1 of Slurm too; what nohup ignores stays ignored."""
    asking = signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1
    before = [signal.getsignal(number) for number in asking]
    for number in asking:
        with noted_signals() as noted:
            os.kill(os.getpid(), number)
            time.sleep(0.01)
            assert noted == [number]
        assert [signal.getsignal(number) for number in asking] == before
    old = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with noted_signals() as noted:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not noted
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, old)


def test_stop_is_saved_though_nobody_hears_it(place, monkeypatch):
    """The terminal closes: whatever is written to it from then on is an error."""
    done, tqdm, closed = [], train.tqdm, os.dup(2)

    class Terminal(io.StringIO):
        def write(self, text):
            if len(done) == 3:
                raise BrokenPipeError

    def iterate_until_closed(*args):
        done.append(iterate(*args))
        if len(done) == 3:
            os.close(2)
            os.kill(os.getpid(), signal.SIGHUP)
        return done[-1]

    monkeypatch.setattr("train.iterate", iterate_until_closed)
    monkeypatch.setattr(
        "train.tqdm", lambda **named: tqdm(**named, file=Terminal(), mininterval=0))
    try:
        with pytest.raises((SystemExit, BrokenPipeError)):
            train_here(place, monkeypatch)
    finally:
        os.dup2(closed, 2)
        os.close(closed)
    assert facts(place)["step"] == steps(place) == 3


def test_divergence_is_named_and_the_advice_can_be_followed(place, monkeypatch):
    """A loss, then a weight, that is no number at iteration 11 of a run that saves every log."""
    flags = "--save_minutes", 0

    def poison(loss, weight):
        count = itertools.count(1)

        def poisoned(state, *others):
            values = iterate(state, *others)
            if next(count) == 11:
                values = values * loss
                parameter = state.discriminator.parameters()[0]
                parameter.set_value(parameter * weight)
            return values
        return poisoned

    for loss, weight, log_every, saved, word in (
            (np.nan, 1, 3, 9, "loss of iteration 11 is not"),
            (1, np.inf, 1, 10, "finite at iteration 11")):
        monkeypatch.setattr("train.iterate", poison(loss, weight))
        drawn = []
        monkeypatch.setattr("train.draw_curves", lambda _, drawn=drawn: drawn.append(steps(place)))
        with pytest.raises(Problem, match=word) as error:
            train_here(place, monkeypatch, *flags, "--restart", "--log_every", log_every)
        advice = str(error.value)
        del error  # it holds the run's frame, and with it the lock on Output
        assert facts(place)["step"] == saved
        assert steps(place) == 10 + (loss == 1)  # all that were finite
        assert loss == 1 or drawn[-1] == 10
    monkeypatch.setattr("train.iterate", iterate)
    advised = re.findall(r"(--change --\w+ [\d.]+)", advice)
    assert advised == ["--change --learning_rate 0.0001", "--change --g_steps 3"]
    for number, tried in enumerate(advised, 2):
        train_here(place, monkeypatch, *flags, *tried.split(), "--epochs", number)
        assert facts(place)["step"] == 8 * number


def test_second_process_on_the_same_output_stops(place, untouched):
    process = start_training(place)
    process.send_signal(signal.SIGSTOP)
    line = complaint(place, "train.py", *MINI)
    assert "another train.py is writing to Output" in line
    process.send_signal(signal.SIGCONT)
    process.communicate(timeout=60)
    assert process.returncode == 0
    assert contents(place) == untouched


def test_full_disk_leaves_the_checkpoint_whole(place, monkeypatch):
    train_here(place, monkeypatch, "--epochs", 1)
    before = contents(place)
    told = run(place, "train.py", *MINI, "--epochs", 2, "--save_minutes", 0, status=1,
               preexec_fn=disk_full)
    assert "Output/training_images.png could not be written: cannot write" in told
    assert told.splitlines()[-1].startswith("train.py: cannot write Output/checkpoint.safetensors")
    assert "Traceback" not in told
    after = contents(place)
    assert after["checkpoint.safetensors"] == before["checkpoint.safetensors"]
    assert after["generator.safetensors"] == before["generator.safetensors"]
    assert not [name for name in after if name.endswith(".tmp")]
    train_here(place, monkeypatch, "--epochs", 2)


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
        photo(mark=number).save(tmp_path / "in" / f"{number}.jpg", "PNG")

    def tiny_disk():
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))

    (tmp_path / "in" / "4.jpg").rename(tmp_path / "4.jpg")
    run(tmp_path, "pretreat.py", "--input", "in")
    for number in range(3):
        (tmp_path / "imgs" / f"{number}.png").unlink()
    (tmp_path / "4.jpg").rename(tmp_path / "in" / "4.jpg")
    line = complaint(tmp_path, "pretreat.py", "--input", "in", preexec_fn=tiny_disk)
    assert "cannot write imgs/" in line
    assert [path.name for path in (tmp_path / "imgs").iterdir()] == ["3.png"]
    assert "4 written, 1 already there" in run(tmp_path, "pretreat.py", "--input", "in")
    assert len(list((tmp_path / "imgs").iterdir())) == 5


def test_killed_pretreat_continues(tmp_path, demo):
    (tmp_path / "photos").symlink_to(demo / "photos")
    moments = random.Random(0)
    for number in signal.SIGKILL, signal.SIGINT, signal.SIGKILL:
        there = len(list(tmp_path.glob("imgs/*.png")))
        process = start(tmp_path, "pretreat.py", "--input", "photos")
        goal = there + moments.randint(1, 150)
        wait_for(lambda goal=goal: len(list(tmp_path.glob("imgs/*.png"))) >= goal, process)
        process.send_signal(number)
        _, err = process.communicate()
        assert process.returncode == -number
        assert ("Traceback" in err, err.endswith("pretreat.py: interrupted\n")) == (
            False, number == signal.SIGINT)
        for path in tmp_path.glob("imgs/*.png"):
            Image.open(path).load()
    assert "already there, 0 skipped" in run(tmp_path, "pretreat.py", "--input", "photos")
    made, whole = ({path.name: Image.open(path).tobytes() for path in folder.glob("[0-9]*")}
                   for folder in (tmp_path / "imgs", demo / "imgs"))
    assert made == whole


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


def test_files_from_strangers_are_only_data(checkpoint, tmp_path, monkeypatch):
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
            with pytest.raises(Problem, match=r"checkpoint\.safetensors.*--restart"):
                train_here(folder, monkeypatch)
            assert contents(folder) == before
        foreign.write_bytes(pickle.dumps(Trap()))
        complaint(tmp_path, "generator.py", "--device", "cpu", "--checkpoint", foreign)
    finally:
        checkpoint.path.write_bytes(checkpoint.data)
    assert not trap.exists()
    pickle.loads(pickle.dumps(Trap())).close()
    assert trap.exists()  # the trap works


def test_checkpoint_of_another_network_is_refused(checkpoint, monkeypatch):
    tensors, info = read_tensors(checkpoint.path, "checkpoint")
    first = "D.layers.0.weight"
    without_adam = {name: value for name, value in tensors.items() if "moment1" not in name}
    try:
        for other in {**tensors, first: tensors[first][:, :1]}, without_adam:
            write_tensors(checkpoint.path, other, info)
            with pytest.raises(Problem, match="another network"):
                train_here(checkpoint.folder, monkeypatch)
        older = {name: value for name, value in info.items() if name != "origin_step"}
        for other in {**info, "step": "three"}, {**info, "settings": None}, older:
            write_tensors(checkpoint.path, tensors, other)
            with pytest.raises(Problem, match="cannot go on from") as error:
                train_here(checkpoint.folder, monkeypatch)
        assert "lacks 'origin_step', so another version" in str(error.value)  # of the last, older
    finally:
        checkpoint.path.write_bytes(checkpoint.data)
