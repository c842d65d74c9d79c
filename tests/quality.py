"""The table of `bench.py --quality FOLDER --data IMGS`: how good faces are, ours and others'.

Every row is trained on the same crops, measured on others (see measures.py), and compared twice:
at equal seconds of training alone on the machine, and at equal iterations. Ours trains for whole
passes over the crops, so of a large folder only 8,000 are trained on. FOLDER keeps all, so that the
same command goes on where it was stopped (with changed code take another folder):

    train held_out     links to the crops to train on, and to those held out
    settings.json      what it was begun with: another folder is needed for other settings
    speed.json         seconds an iteration takes, of each recipe
    ours-0 page-0 ...  the trainings, by seed
    measures.json      what has been measured
    pictures           20 faces of a row's first seed
    table.md           the tables, as far as there is something in them
"""

import dataReader
from dataReader import Problem

import argparse
import itertools
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median

import measures
import numpy as np

ROOT = Path(__file__).parents[1]
ENV = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
SPEED_SECONDS = 4  # for which a recipe is tried, in each of its turns
SPEED_TURNS = 3


@dataclass
class Row:
    """A row of the table."""

    name: str                # of its picture
    title: str
    training: str            # whose faces they are
    which: str = "averaged"  # of ours: see `measures.draw`


ROWS = [
    Row("page", "the page in Paddle's documentation, its convolutions on oneDNN", "page"),
    Row("pytorch", "PyTorch's DCGAN example", "pytorch"),
    Row("running", "ours, last iteration's weights and running statistics", "ours", "running"),
    Row("raw", "ours, `--raw`: statistics estimated", "ours", "raw"),
    Row("averaged", "ours, the average: the default", "ours"),
    Row("g1", "the same with `--g_steps 1`, as in PyTorch's example", "ours-g1"),
    Row("uniform", "the same with `--noise uniform`", "ours-uniform"),
]
PEERS = ("page", "pytorch")


# -------------------------------------------------------------------------------------------------
# the trainings: each has a name, `unit`, of which it does a whole number of iterations, and three
# methods: seconds_per_iteration(), train(seed, counts), faces(seed, count, which)


class Recipe:
    """Another's recipe, trained by a script that recipe.py describes."""

    def __init__(self, folder, name, python, script, flags, faces):
        self.folder = folder
        self.name = name
        self.faces_drawn = faces
        self.unit = 1
        images = dataReader.FaceReader(folder / "train", 64, 1, 0).images
        self.command = [python, ROOT / "tests" / script, images.filename]
        self.flags = flags

    def run(self, place, *flags):
        """Run the script to its end; return what it printed on stdout."""
        command = [*self.command, place, *self.flags, *flags]
        done = subprocess.run([*map(str, command)], env=ENV, text=True, stdout=subprocess.PIPE)
        if done.returncode:
            raise Problem(f"{shlex.join(map(str, command))} failed: see above")
        return done.stdout

    def place(self, seed):
        return self.folder / f"{self.name}-{seed}"

    def seconds_per_iteration(self):
        return float(self.run(self.place(0), "--speed", SPEED_SECONDS))

    def train(self, seed, counts):
        self.run(self.place(seed), "--seed", seed, "--faces", self.faces_drawn,
                 "--iterations", *counts)

    def faces(self, seed, count, which):
        return np.load(self.place(seed) / f"faces-{count}.npy")


class Ours:
    """train.py with some flags."""

    def __init__(self, folder, name, flags, faces):
        import train

        self.folder = folder
        self.name = name
        self.flags = flags
        self.faces_drawn = faces
        parser = argparse.ArgumentParser(allow_abbrev=False)
        parser.add_argument("--batch_size", type=int, default=train.batch_size)
        options, _ = parser.parse_known_args(flags)
        self.unit = len(dataReader.FaceReader(folder / "train", 64, options.batch_size, 0))

    def command(self, output, *flags):
        command = [sys.executable, ROOT / "train.py", "--data_path", self.folder / "train",
                   "--output_path", output, *self.flags, *flags]
        return [*map(str, command)]

    def seconds_per_iteration(self):
        """The median time between rows of losses.csv of a run that is stopped."""
        with tempfile.TemporaryDirectory() as output, tempfile.TemporaryFile("w+") as errors:
            command = self.command(output, "--epochs", 1000, "--log_every", 1,
                                   "--save_minutes", 1e6, "--sample_every", 10**9)
            with subprocess.Popen(
                    command, env=ENV, stdout=subprocess.DEVNULL, stderr=errors) as process:
                try:
                    times = watch_rows(process, Path(output) / "losses.csv")
                finally:
                    process.kill()
            if times is None:
                errors.seek(0)
                raise Problem(f"train.py failed:\n{errors.read()[-1000:]}")
        return float(median(np.diff(times)))

    def place(self, seed):
        return self.folder / f"{self.name}-{seed}"

    def snapshot(self, seed, count):
        return self.place(seed) / f"generator-{count}.safetensors"

    def train(self, seed, counts):
        for count in counts:
            if self.snapshot(seed, count).exists():
                continue
            command = self.command(self.place(seed), "--seed", seed,
                                   "--epochs", count // self.unit)
            if subprocess.run(command, env=ENV, stdout=subprocess.DEVNULL).returncode:
                raise Problem(f"{shlex.join(command)} failed or was stopped: see above")
            copy = self.place(seed) / "generator.new"
            shutil.copy(self.place(seed) / "generator.safetensors", copy)
            copy.rename(self.snapshot(seed, count))

    def faces(self, seed, count, which):
        path = self.snapshot(seed, count)
        faces, step = measures.draw(path, which, self.faces_drawn)
        if step != count:
            raise Problem(f"{self.place(seed)} had been trained for {step} iterations already: for"
                          f" {count}, pass another folder")
        return faces


def watch_rows(process, csv):
    """Times at which a process added rows to a csv, for `SPEED_SECONDS`; None if it ended before.

    The first three are skipped: those iterations are longer, and a checkpoint is saved meanwhile.
    """
    rows = 0
    times = []
    while len(times) < 4 or times[-1] - times[0] < SPEED_SECONDS:
        if process.poll() is not None:
            return None
        time.sleep(0.002)
        rows_now = csv.read_bytes().count(b"\n") - 1 if csv.exists() else 0  # without the header
        if rows_now > max(rows, 3):
            times.append(time.perf_counter())
        rows = rows_now
    return times


def make_trainings(folder, options, faces):
    """All trainings by name; without PyTorch's example if there is no PyTorch."""
    ours = shlex.split(options.ours)
    theirs = shlex.split(options.theirs)
    trainings = {}
    trainings["page"] = Recipe(
        folder, "page", sys.executable, "dcgan_docs.py", ["--onednn", *theirs], faces)
    if options.torch:
        trainings["pytorch"] = Recipe(
            folder, "pytorch", options.torch, "dcgan_torch.py", theirs, faces)
    trainings["ours"] = Ours(folder, "ours", ours, faces)
    trainings["ours-g1"] = Ours(folder, "ours-g1", [*ours, "--g_steps", "1"], faces)
    trainings["ours-uniform"] = Ours(folder, "ours-uniform", [*ours, "--noise", "uniform"], faces)
    return trainings


# -------------------------------------------------------------------------------------------------
# what is kept in the folder


def read_json(path):
    return json.loads(path.read_text()) if path.exists() else {}


def write_json(path, value):
    with dataReader.replacing(path) as file:
        file.write(json.dumps(value, indent=1).encode())


def check_settings(folder, options):
    """Note what the folder was begun with; a Problem if it was something else."""
    path = folder / "settings.json"
    now = {"data": str(options.data.resolve()), "ours": options.ours, "theirs": options.theirs}
    before = read_json(path) or now
    for name, value in now.items():
        if before[name] != value:
            raise Problem(f"{folder} was begun with --{name} {shlex.quote(before[name])}: pass the"
                          " same, or another folder")
    write_json(path, now)


def link_crops(folder, data):
    """Link crops of `data` into folder/train and folder/held_out: the first and last by name."""
    if (folder / "train").exists():
        return
    names = dataReader.list_files(data)
    if not names:
        raise Problem(f"there are no crops in {data}: pass --data")
    train, held_out = measures.split(names)
    for part, some in ("held_out", held_out), ("train", train):
        new = folder / f"{part}.new"
        shutil.rmtree(new, ignore_errors=True)
        for name in some:
            link = new / name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to((data / name).resolve())
        new.rename(folder / part)


def measure_speeds(folder, trainings):
    """Seconds an iteration takes, by training; measured in turns, unless they are in speed.json."""
    path = folder / "speed.json"
    speeds = read_json(path)
    missing = [name for name in trainings if name not in speeds and name != "ours-uniform"]
    taken = {name: [] for name in missing}
    for _ in range(SPEED_TURNS):
        for name in missing:
            taken[name].append(trainings[name].seconds_per_iteration())
            print(f"{name}: {taken[name][-1]:.3f} s an iteration", file=sys.stderr)
    for name in missing:
        speeds[name] = median(taken[name])
    write_json(path, speeds)
    return {**speeds, "ours-uniform": speeds["ours"]}  # which does nothing else


# -------------------------------------------------------------------------------------------------
# the tables


def count_iterations(trainings, speeds, options):
    """Iterations of every training, by name, in two dicts: at equal seconds, at equal iterations.

    Ours trains for whole epochs, and the seconds are those that ours takes. The iterations that
    are equal are those that the slowest has done then, in whole epochs of ours; one at least, for
    which the slowest may have to train longer.
    """
    wanted = options.iterations
    if wanted is None:
        wanted = 60 * options.minutes / speeds["ours"]
    unit = trainings["ours"].unit
    count = max(1, round(wanted / unit)) * unit
    seconds = count * speeds["ours"]
    at_equal_seconds = {
        name: max(1, round(seconds / speeds[name] / training.unit)) * training.unit
        for name, training in trainings.items()}
    fewest = min(at_equal_seconds.values())
    common = max(1, fewest // unit) * unit
    return {"equal seconds": at_equal_seconds,
            "equal iterations": dict.fromkeys(trainings, common)}


def measure_row(folder, row, training, seed, count, reference):
    """Measures of a row's faces; kept in measures.json, and 20 faces in a picture."""
    path = folder / "measures.json"
    kept = read_json(path)
    key = f"{row.name}, seed {seed}, {count} iterations"
    if key not in kept:
        faces = training.faces(seed, count, row.which)
        picture = folder / "pictures" / f"quality_{row.name}_{count}_{seed}.png"
        picture.parent.mkdir(exist_ok=True)
        dataReader.save_png(picture, dataReader.grid(faces[:20], columns=10))
        kept[key] = measures.measure(faces, reference)
        write_json(path, kept)
        print(f"{key}: {measures.cells(kept[key])}", file=sys.stderr)
    return kept[key]


TABLE = ("| drawn by | minutes | iterations | distance | of the better peer's | spread |"
         " contrast | faces found | memory | 20 faces |\n" + "| --- " * 10 + "|")


def table(found, counts, speeds, seeds, floor):
    """Markdown; `found` has the measures by (row's name, seed, iterations), as far as they are."""
    by_row = {}
    for row in ROWS:
        some = [found.get((row.name, seed, counts.get(row.training))) for seed in seeds]
        by_row[row.name] = [each for each in some if each]
    peers = [mean(each["distance"] for each in by_row[name]) for name in PEERS if by_row[name]]
    lines = [TABLE]
    for row in ROWS:
        if not by_row[row.name]:
            continue
        count = counts[row.training]
        distances = [each["distance"] for each in by_row[row.name]]
        ratio = f"{mean(distances) / min(peers):.2f}" if peers else ""
        spread = mean(each["spread"] for each in by_row[row.name])
        contrast = mean(each["contrast"] for each in by_row[row.name])
        memory = mean(each["memory"] for each in by_row[row.name])
        shares = np.mean([each["found"] for each in by_row[row.name]], axis=0)
        lines.append(
            f"| {row.title} | {count * speeds[row.training] / 60:.1f} | {count:,} |"
            f" {', '.join(f'{distance:.0f}' for distance in distances)} | {ratio} | {spread:.2f} |"
            f" {contrast:.2f} | {', '.join(f'{share:.2f}' for share in shares)} | {memory:.2f} |"
            f" ![20 faces](quality_{row.name}_{count}_{seeds[0]}.png) |")
    lines.append(f"| real crops, as if drawn: the best there is | | | {floor['distance']:.0f} | |"
                 f" {floor['spread']:.2f} | {floor['contrast']:.2f} |"
                 f" {', '.join(f'{share:.2f}' for share in floor['found'])} |"
                 f" {floor['memory']:.2f} | |")
    return "\n".join(lines)


def describe(machine, trainings, speeds, reference, train_count, options):
    """What a reader of the tables must know, as Markdown."""
    shares = [f"{name} {share:.2f}" for name, share in reference.found.items()]
    each = [f"{name} {speeds[name]:.3g}" for name in trainings]
    theirs = "their own width and batch"
    if options.theirs:
        theirs += f", but `{options.theirs}`"
    return (f"{machine}. {train_count:,} crops to train on, {len(reference.held_out):,} held out."
            f" Ours: `train.py {options.ours}`; the others: {theirs}."
            f" Distance by seed ({', '.join(map(str, options.seeds))}), the rest in the mean."
            f" Faces found by three detectors over what they find in the held-out crops"
            f" ({', '.join(shares)}). Seconds an iteration, alone: {', '.join(each)}.")


def train_and_measure(training, seed, counts, folder, reference):
    """Train for all counts of iterations; return measures by (row's name, seed, iterations)."""
    training.train(seed, counts)
    found = {}
    for row in ROWS:
        if row.training != training.name:
            continue
        for count in counts:
            found[row.name, seed, count] = measure_row(
                folder, row, training, seed, count, reference)
    return found


def make_table(options, machine):
    """Train, measure and print the tables; `options` are those of bench.py."""
    folder = options.quality.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    measures.detectors()  # which may be missing: better known before the training than after
    check_settings(folder, options)
    link_crops(folder, options.data)
    train = dataReader.FaceReader(folder / "train", 64, 1, 0).images
    held_out = dataReader.FaceReader(folder / "held_out", 64, 1, 0).images
    trainings = make_trainings(folder, options, len(held_out))
    speeds = measure_speeds(folder, trainings)
    if options.speed:
        return
    columns = count_iterations(trainings, speeds, options)
    reference = measures.make_reference(train, held_out)
    floor = measures.measure(reference.as_if_drawn, reference)
    text = describe(machine, trainings, speeds, reference, len(train), options)

    found = {}
    for seed, name in itertools.product(options.seeds, trainings):
        counts = sorted({each[name] for each in columns.values()})
        found |= train_and_measure(trainings[name], seed, counts, folder, reference)
        tables = [f"At {title}:\n\n{table(found, each, speeds, options.seeds, floor)}"
                  for title, each in columns.items()]
        (folder / "table.md").write_text("\n\n".join([text, *tables]) + "\n")
    print((folder / "table.md").read_text())
