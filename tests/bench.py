"""How fast every stage is on this CPU and how good the faces, against what users would run instead.

    python tests/bench.py                               # minutes; run nothing else meanwhile
    python tests/bench.py --torch elsewhere/bin/python  # a Python that has PyTorch
    python tests/bench.py --peers elsewhere/peers.py    # the script that times the others

How good the faces are, on real crops of which a fifth, at most 2,000, is held out:

    python tests/bench.py --measure Output/generator.safetensors --data imgs   # a minute
    python tests/bench.py --quality folder --data imgs --speed --torch ...     # two minutes, alone
    python tests/bench.py --quality folder --data imgs --torch ...             # 1½ h; goes on

measures.py says what is measured, quality.py what is trained and what is in the folder. Two of the
detectors need a wheel that nothing else here does: python -m pip install "opencv-python-headless<5"

Ours and the peer run in turns, A B A B, since a machine's speed drifts; printed are the medians.
Each of our measurements has a process of its own: `bench.py child-NAME ...` calls `NAME_child`.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parents[1]))

import dataReader
from dataReader import FaceReader, Problem, run_script
from pretreat import make_demo_photos

import measures
import numpy as np
import quality
from quality import ENV, ROOT
from tqdm import tqdm

CORES = len(os.sched_getaffinity(0))
FACES, MANY, CELEBA = 3000, 200_000, 202_599

# -------------------------------------------------------------------------------------------------
# the children: each runs in a process of its own


def trainer(batch, width, d_steps=1, g_rate=2e-4):
    """Build what train.py trains; return a function that does iteration `step` (from 1).

    It returns an array: D's loss, G's loss, D(x), D(G(z)). On Paddle's launcher, all its processes
    train together. All that is known here of train.py's functions is in this one.
    """
    import network
    import train
    import weightInit
    from weightInit import paddle

    weightInit.use_device("cpu")
    if paddle.distributed.get_world_size() > 1:
        paddle.distributed.init_parallel_env()
    options = argparse.Namespace(seed=0, image_size=64, width=width, z_dim=100, learning_rate=2e-4,
                                 beta1=0.5, beta2=0.999)
    state = train.build(options, "float32")
    state.generator_optimizer.set_lr(g_rate)
    images = np.random.default_rng(0).integers(0, 256, [batch, 3, 64, 64], dtype=np.uint8)

    def iteration(step):
        z = network.random_array([0, step], [d_steps + 1, batch, 100], "normal")
        return train.iterate(state, paddle.to_tensor(images), paddle.to_tensor(z), None,
                             d_steps, g_steps=2).numpy()
    return iteration


def times(function, numbers):
    """Call `function(number)` for each; return (seconds of each, what the last call returned)."""
    taken = []
    for number in numbers:
        start = time.perf_counter()
        result = function(number)
        taken.append(time.perf_counter() - start)
    return taken, result


def training_child(batch, width, steps):
    """Seconds an iteration, after one more to warm up."""
    return median(times(trainer(batch, width), range(1, steps + 2))[0][1:])


def ahead_child():
    """D made to win: seconds of iterations 40-99 and 490-549, and D(G(z)) at the end.

    The early ones are those of a second pair of networks, in turns with the late ones of the first:
    the machine's speed changes more in between than an iteration's cost.
    """
    first, second = (trainer(16, 16, d_steps=3, g_rate=1e-6) for _ in range(2))
    times(first, range(1, 490))
    times(second, range(1, 40))
    early, late = [], []
    for turn in range(0, 60, 5):
        early += times(second, range(40 + turn, 45 + turn))[0]
        taken, last = times(first, range(490 + turn, 495 + turn))
        late += taken
    return median(early), median(late), float(last[3])


def reader_child(folder):
    """Seconds until a FaceReader is there; its images a second after an epoch to warm up."""
    (ready,), reader = times(lambda _: FaceReader(folder, 64, 128, 0), [0])
    epochs = 1 + 20_000 // len(reader.images)  # an epoch of 1,000 images takes milliseconds
    taken, _ = times(lambda epoch: sum(len(batch) for batch in reader.epoch(epoch)),
                     range(epochs + 1))
    return ready, epochs * len(reader) * 128 / sum(taken[1:])


def net_child(path, count):
    """Images a second of a generator alone, from ready latents to uint8 arrays.

    If it is not there, it is made: of random weights but real BN statistics, since it then draws
    noise, which takes a PNG as much work as faces, and not plain grey.
    """
    import network
    import weightInit
    from weightInit import paddle

    weightInit.use_device("cpu")
    z = network.face_latents(0, range(100), 100, "normal")
    if not Path(path).exists():
        generator = network.Generator()
        times(lambda _: generator(paddle.to_tensor(z)), range(8))
        network.save_generator(path, generator, generator, "normal", 0)
    generator, _ = network.load_generator(path)
    taken, _ = times(lambda _: network.draw_faces(generator, z), range(1 + count // 100))
    return count / sum(taken[1:])


# -------------------------------------------------------------------------------------------------
# processes


def output(*command):
    """Run a command to its end; return what it printed on stdout."""
    done = subprocess.run([*map(str, command)], env=ENV, text=True, capture_output=True)
    if done.returncode:
        raise Problem(f"{' '.join(map(str, command))} failed:\n{done.stderr[-1000:]}")
    return done.stdout


def seconds(*command):
    """Seconds that Python takes for a command, from start to end."""
    return times(lambda _: output(sys.executable, *command), [0])[0][0]


def child(name, *arguments):
    """What `NAME_child(*arguments)` returns in a fresh process."""
    return json.loads(output(
        sys.executable, __file__, f"child-{name}", *map(json.dumps, arguments)).splitlines()[-1])


def watch(command, done=lambda: False):
    """Run Python until it ends or `done()`; return its seconds and peak anonymous MB.

    Looked at every 5 ms. Pages of mapped files do not count: the system can drop them.
    """
    start, peak = time.perf_counter(), 0
    with subprocess.Popen([sys.executable, *map(str, command)], env=ENV, text=True,
                          stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        try:
            while process.poll() is None and not done():
                status = Path(f"/proc/{process.pid}/status").read_text()
                peak = max([peak, *map(int, re.findall(r"RssAnon:\s*(\d+)", status))])
                time.sleep(0.005)
            if process.poll():
                raise Problem(f"{command[0]} failed:\n{process.stderr.read()[-1000:]}")
            return time.perf_counter() - start, peak / 1000
        finally:
            process.kill()


def watch_training(data, rows):
    """Watch train.py until losses.csv has so many iterations."""
    folder = Path(tempfile.mkdtemp(dir=data.parent))
    csv = folder / "losses.csv"
    return watch([ROOT / "train.py", "--data_path", data, "--output_path", folder, "--epochs", 1,
                  "--width", 8, "--batch_size", 16, "--log_every", 1],
                 lambda: csv.exists() and csv.read_bytes().count(b"\n") > rows)


def in_turns(*measures, turns=2):
    """Call the measures A B A B; return the median of each, None for a measure that is None."""
    taken = [[measure and measure() for measure in measures] for _ in range(turns)]
    return [None if None in column else median(column) for column in zip(*taken, strict=True)]


# -------------------------------------------------------------------------------------------------
# the table


def show(number):
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def row(stage, unit, ours, peer, target, figure=None):
    """Print a row; `figure`, or else ours / peer, is held to `target`: sign, number and unit."""
    sign, limit, of = target.split()
    cells = "-", "-", "not compared"
    if peer is not None:
        figure = ours / peer if figure is None else figure
        met = figure >= float(limit) if sign == ">=" else figure <= float(limit)
        cells = show(peer), f"{figure:.3g} {of}", f"{target:10}" + ("met" if met else "MISSED")
    print(f"{f'{stage}, {unit}':56}{show(ours):>9}{cells[0]:>9}{cells[1]:>10}  {cells[2]}",
          flush=True)


def pictures(folder, peer):
    """Rows of pretreat.py and the reader; return the reader's images a second."""
    photos, crops = folder / "photos", []
    photos.mkdir()
    make_demo_photos(photos, CORES)
    for path in sorted(photos.glob("*.jpg")):  # CelebA-sized; three of each make 6,000
        for copy in "ab":
            shutil.copy(path, path.with_stem(path.stem + copy))
    count = len(list(photos.iterdir()))

    def fresh():  # a new folder, since one that has just been emptied takes longer to fill
        os.sync()
        return Path(tempfile.mkdtemp(dir=folder))

    def pretreat():
        crops.append(fresh())
        command = ROOT / "pretreat.py", "--input", photos, "--output", crops[-1]
        return count / (seconds(*command) - seconds(command[0], "--help"))

    def first():
        for path in crops[0].glob(".faces-*"):
            path.unlink()
        return count / child("reader", str(crops[0]))[0]

    theirs = peer("tutorial-pretreat", photos)
    ours, other = in_turns(pretreat, theirs and (lambda: theirs(fresh())), turns=3)
    row("pretreat.py", "img/s", ours, other, ">= 1.5 x")
    ours, other, steady = in_turns(first, peer("tutorial-reader", crops[0]),
                                   lambda: child("reader", str(crops[0]))[1], turns=3)
    row("reader, first use: packing", "img/s", ours, other, ">= 5 x")
    row("reader, steady", "img/s", steady, other, ">= 100 x")
    return steady


def training(peer, steady):
    """Rows of the training iteration; return its seconds by batch."""
    taken = {}
    for batch, steps in (16, 12), (32, 8), (128, 3):
        ours, other = in_turns(lambda b=batch, s=steps: child("training", b, 64, s),
                               peer("torch-step", "--batch", batch, "--steps", steps), turns=3)
        row(f"iteration at width 64, batch {batch} | PyTorch", "s", ours, other, "<= 1 x")
        taken[batch] = ours
    fetch = 128 / steady
    row("reader's batch | its iteration", "s", fetch, ours, "< 1 %", 100 * fetch / ours)
    early, late, fooled = child("ahead")
    row(f"iteration 500 | 50, D(G(z)) = {fooled:.0e}", "s", late, early, "<= 1.05 x")
    return taken


def together(folder):
    """Row of two processes, which share the threads of the one they are compared with."""
    def launched():
        output(sys.executable, "-m", "paddle.distributed.launch", "--nproc_per_node", 2,
               "--backend", "gloo", "--log_dir", folder / "log", __file__,
               "child-training", 32, 64, 5)
        return 64 / float((folder / "log" / "workerlog.0").read_text().splitlines()[-1])

    ours, alone = in_turns(launched, lambda: 64 / child("training", 64, 64, 5), turns=3)
    row("2 processes of batch 32 | 1 of batch 64", "img/s", ours, alone, ">= 0.9 x")


def drawing(folder):
    """Row of generator.py."""
    path, faces = folder / "generator.safetensors", folder / "faces"
    child("net", str(path), 100)  # makes it

    def draw(count):
        shutil.rmtree(faces, ignore_errors=True)
        return seconds(ROOT / "generator.py", "--count", count, "--individual",
                       "--checkpoint", path, "--output_path", faces)

    ours, net = in_turns(lambda: (FACES - 1) / (draw(FACES) - draw(1)),
                         lambda: child("net", str(path), FACES // 2))
    row("generator.py --individual | the net alone", "img/s", ours, net, ">= 0.7 x")


def make_packed(folder, count):
    """A folder as FaceReader finds it at a second start: `count` images and their packed file.

    The images are empty files, since only names, sizes and times are looked at. The packed file is
    sparse: zeros that take no disk, and as much time and memory as others.
    """
    def pack(folder, files, size, state):
        with open(folder / f".faces-{size}-{state}-0.npy", "wb") as file:
            np.lib.format.write_array_header_1_0(file, {
                "descr": "|u1", "fortran_order": False, "shape": (len(files), 3, size, size)})
            file.truncate(file.tell() + len(files) * 3 * size * size)
        return len(files)

    folder.mkdir()
    for number in tqdm(range(count), f"making {folder.name}", unit="img"):
        (folder / f"{number:06d}.png").touch()
    dataReader.pack = pack  # FaceReader names the file, so the name is the right one
    FaceReader(folder, 64, 128, 0)
    return folder


def starting(few, many):
    """Rows of train.py's start and memory."""
    # os._exit, since Python takes a third of a second to end after Paddle
    ours, bare = in_turns(lambda: watch_training(many, 1)[0],
                          lambda: seconds("-c", "import paddle, os; os._exit(0)"), turns=3)
    row(f"start to iteration 1, {MANY:,} images | import paddle", "s", ours, bare, "< 1 s",
        ours - bare)
    bare = watch([__file__, "child-training", 16, 8, 10])[1]
    for data in few, many:
        ours = watch_training(data, 11)[1]
        row(f"peak memory, {data.name} images | bare iterations", "MB", ours, bare, "< 200 MB",
            ours - bare)


def growth(by_batch, folders):
    """How seconds an iteration grow with batch and width, and the reader with its images.

    `by_batch` has the seconds that were measured before.
    """
    by_batch = by_batch | {batch: child("training", batch, 64, 2) for batch in (64, 256)}
    by_width = {width: child("training", 64, width, 2) for width in (16, 32)} | {64: by_batch[64]}
    for name, taken in ("width 64, batch", by_batch), ("batch 64, width", by_width):
        taken = dict(sorted(taken.items()))
        power = np.polyfit(np.log([*taken]), np.log([*taken.values()]), 1)[0]
        print(f"s an iteration, {name}  "
              + "  ".join(f"{at}: {show(value)}" for at, value in taken.items())
              + f"  exponent {power:.2f}", flush=True)
    for folder in folders:
        start, rate = child("reader", str(folder))
        print(f"reader, {folder.name} images  start {show(start)} s  {show(rate)} img/s")


# -------------------------------------------------------------------------------------------------
# the command line


def parse_options():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch", default=sys.executable, metavar="PYTHON")
    parser.add_argument("--peers", type=Path, default=ROOT.parent / "shared" / "peers" / "peers.py",
                        help="the script that times the others; for the speeds alone")
    parser.add_argument("--measure", type=Path, nargs="+", metavar="GENERATOR",
                        help="how good the faces of these files are")
    parser.add_argument("--quality", type=Path, metavar="FOLDER",
                        help="the table of faces, ours and others', which is made in this folder")
    of_faces = parser.add_argument_group("for --measure and --quality")
    of_faces.add_argument("--data", type=Path, default=Path("imgs"), metavar="IMGS",
                          help="folder of 64x64 crops (default: imgs)")
    of_table = parser.add_argument_group("for --quality")
    budget = of_table.add_mutually_exclusive_group()
    budget.add_argument("--minutes", type=float, default=5.0,
                        help="of training alone on the machine (default: 5)")
    budget.add_argument("--iterations", type=int,
                        help="in place of it: iterations of ours, and the others as long")
    of_table.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    of_table.add_argument("--ours", default="--width 32 --batch_size 32 --learning_rate 0.0005",
                          metavar="FLAGS", help="flags of train.py (default: %(default)s)")
    of_table.add_argument("--theirs", default="--batch 32", metavar="FLAGS",
                          help="flags of dcgan_docs.py and dcgan_torch.py (default: %(default)s;"
                               " '' for their own batches, 128 and 64)")
    of_table.add_argument("--speed", action="store_true",
                          help="only measure all speeds, in two minutes: run nothing else then")
    return parser.parse_args()


def describe_machine():
    """One line: processor, cores, Paddle, date."""
    model = re.search(r"model name\s*: (.*)|$", Path("/proc/cpuinfo").read_text())[1]
    paddle = output(sys.executable, "-c", "import paddle; print(paddle.__version__)").split()[-1]
    return f"{model or 'unknown CPU'}, {CORES} cores, Paddle {paddle}, {date.today()}"


def speed_table(peer):
    """Print the table of speeds; `peer(name, ...)` gives a function that times a peer, or None."""
    print(f"{'stage':56}{'ours':>9}{'peer':>9}{'ratio':>10}  target", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        try:
            steady = pictures(folder, peer)
            by_batch = training(peer, steady)
            together(folder)
            drawing(folder)
            few, some, many = [make_packed(folder / f"{n:,}", n) for n in (1000, 10_000, MANY)]
            starting(few, many)
            growth(by_batch, [few, some, many])
        except KeyboardInterrupt:
            time.sleep(1)  # until the workers of a killed child have ended, and write no more
            raise
    hours = CELEBA // 128 * by_batch[128] / 3600
    print(f"An epoch of CelebA at batch 128: {hours:.1f} h on this CPU;"
          f" the reader could feed a GPU {show(steady)} img/s")


def main():
    options = parse_options()
    if options.measure:
        measures.measure_generators(options.measure, options.data)
        return
    if subprocess.call([options.torch, "-c", "import torch"], stderr=subprocess.DEVNULL):
        print(f"{options.torch} has no PyTorch: not compared")
        options.torch = None
    machine = describe_machine()
    if options.quality:
        quality.make_table(options, machine)
        return
    print(machine)
    if not options.peers.exists():
        print(f"{options.peers} is not there: no peers")

    def peer(name, *arguments):
        python = options.torch if name == "torch-step" else sys.executable
        if python is None or not options.peers.exists():
            return None
        return lambda *more: float(output(python, options.peers, name, *arguments, *more))

    speed_table(peer)


if __name__ == "__main__":
    if len(sys.argv) > 1 and sys.argv[1].startswith("child-"):
        name, arguments = sys.argv[1].removeprefix("child-"), map(json.loads, sys.argv[2:])
        print(json.dumps(globals()[f"{name}_child"](*arguments)))
    else:
        run_script(main)
