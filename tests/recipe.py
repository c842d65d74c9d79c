"""The training loop that dcgan_docs.py and dcgan_torch.py share; it needs numpy alone.

A recipe is an object with four methods: `iterate(images, latents)` trains on uint8 images
`[batch, 3, 64, 64]`, where each call of `latents()` gives new N(0, 1) vectors, float32
`[batch, 100]`; `draw(z)` gives uint8 images; `save(path, step)` keeps all it has learnt, and
`load(path)` takes it up and returns the step.

After each of the `--iterations` the faces that it draws are in FOLDER/faces-COUNT.npy, uint8
[FACES, 3, 64, 64]. Started again, it goes on, five minutes back at most, and does as if never
stopped: the order of the images and all latent vectors follow from the seed and the iteration.
"""

import argparse
import os
import sys
import time
from pathlib import Path
from statistics import median

import numpy as np

SAVE_SECONDS = 300
DRAWN_AT_A_TIME = 100


def flags(description, batch):
    """The parser of a recipe's script, with the recipe's own `batch`."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path, help="an .npy file, uint8 [N, 3, 64, 64]")
    parser.add_argument("folder", type=Path, help="where everything is written")
    parser.add_argument("--iterations", type=int, nargs="+", default=[310])
    parser.add_argument("--batch", type=int, default=batch)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--faces", type=int, default=2000)
    parser.add_argument("--speed", type=float, metavar="SECONDS",
                        help="only print the median seconds an iteration takes, tried for so long")
    return parser


def images_of(images, step, batch, seed):
    """The images of an iteration, counted from 0; partial batches are dropped."""
    batches = len(images) // batch
    epoch, number = divmod(step, batches)
    order = np.random.default_rng([seed, epoch]).permutation(len(images))
    return images[order[number * batch:(number + 1) * batch]]


def latents_of(step, batch, seed):
    """A function whose every call gives new latent vectors of an iteration."""
    generator = np.random.default_rng([seed, step, 1])
    return lambda: generator.standard_normal([batch, 100], dtype=np.float32)


def draw(recipe, count):
    """Draw uint8 faces `[count, 3, 64, 64]`, the same latent vectors each time."""
    generator = np.random.default_rng([0, 0, 2])
    parts = []
    for _ in range(0, count, DRAWN_AT_A_TIME):
        z = generator.standard_normal([DRAWN_AT_A_TIME, 100], dtype=np.float32)
        parts.append(recipe.draw(z))
    return np.concatenate(parts)[:count]


def seconds_per_iteration(iterate, seconds):
    """Median seconds of `iterate(step)`, after one to warm up; three at least are tried."""
    iterate(0)
    taken = []
    while len(taken) < 3 or sum(taken) < seconds:
        start = time.perf_counter()
        iterate(len(taken) + 1)
        taken.append(time.perf_counter() - start)
    return median(taken)


def save_faces(path, faces):
    """Write an array to an .npy file, which gets its name only when it is whole."""
    temporary = path.with_name("faces.new")
    with open(temporary, "wb") as file:
        np.save(file, faces)
    os.replace(temporary, path)


def train(recipe, iterate, options):
    """Train until the faces of every count in `options.iterations` are written."""
    options.folder.mkdir(parents=True, exist_ok=True)
    checkpoint = options.folder / "checkpoint"
    paths = {count: options.folder / f"faces-{count}.npy" for count in options.iterations}
    missing = sorted(count for count in paths if not paths[count].exists())
    step = recipe.load(checkpoint) if checkpoint.exists() else 0

    def save():
        temporary = checkpoint.with_name("checkpoint.new")
        recipe.save(temporary, step)
        os.replace(temporary, checkpoint)
        print(f"{options.folder}: {step} of {max(paths)} iterations", file=sys.stderr)

    saved = time.monotonic()
    for count in missing:
        if step > count:
            sys.exit(f"{options.folder} has been trained for {step} iterations already: for faces"
                     f" after {count}, pass another folder")
        while step < count:
            iterate(step)
            step += 1
            if time.monotonic() > saved + SAVE_SECONDS:
                save()
                saved = time.monotonic()
        save()
        save_faces(paths[count], draw(recipe, options.faces))


def run(recipe, options):
    """Train a recipe as the options of `flags` say, or measure how fast it trains."""
    images = np.load(options.images, mmap_mode="r")

    def iterate(step):
        recipe.iterate(images_of(images, step, options.batch, options.seed),
                       latents_of(step, options.batch, options.seed))

    if options.speed is None:
        train(recipe, iterate, options)
    else:
        print(seconds_per_iteration(iterate, options.speed))
