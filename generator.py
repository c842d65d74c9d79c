"""Draw faces from a trained generator (tutorial §6).

    python generator.py                                # Generate/faces.png, a grid of 100 faces
    python generator.py --count 16 --seed 7            # 16 others
    python generator.py --seeds 3,17,40-60             # those faces of the first command by number
    python generator.py --count 1000 --individual      # each in a PNG too: individual/000017.png
    python generator.py --interpolate 3 17 40          # interpolation.gif and .png, face to face
    python generator.py --compare imgs                 # real_vs_fake.png, beside training images

Face number k of a seed is the same face whatever the count, and on any device up to rounding.
"""

import re
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

import dataReader
import network
import weightInit
from dataReader import Problem, say

# --- settings (each is also a flag, e.g. --count 16) ---------------------------------------------
checkpoint = "Output/generator.safetensors"  # the generator that train.py saved
raw = False                                  # the weights of its last iteration, not their average
count = 100                                  # faces to draw, those from number 0 on
seeds = ""                                   # in place of count: faces by number, e.g. 3,17,40-60
seed = 0                                     # another seed draws other faces
individual = False                           # also write each face to a PNG: 000017.png is face 17
interpolate = []                             # numbers of faces to go between, in place of a grid
compare = ""                                 # folder of real images, to draw beside faces
output_path = "Generate"                     # where pictures are written
device = "auto"                              # "gpu", "cpu", or "auto": the GPU if there is one

# -------------------------------------------------------------------------------------------------
BATCH = 100             # faces drawn at a time
GRID_MOST = 32 * 32     # faces in faces.png; more could not be made out
LIMIT = 10**6           # numbers of faces are below: six digits in a file's name
FRAMES = 32             # from face to face of an interpolation


def parse_numbers(text):
    """Read numbers of faces: "3,17,40-42" → [3, 17, 40, 41, 42]; a Problem for another text."""
    numbers = []
    for part in text.split(","):
        bounds = re.fullmatch(r"\s*(\d{1,6})(?:-(\d{1,6}))?\s*", part)
        first, last = (int(bounds[1]), int(bounds[2] or bounds[1])) if bounds else (1, 0)
        if first > last:
            raise Problem(f"--seeds {text}: {part.strip() or 'nothing'} is neither a number below"
                          f" {LIMIT:,} nor a range like 40-60")
        numbers += range(first, last + 1)
    return numbers


def between(a, b, steps, noise):
    """Latent vectors on the way from `a` to `b`, float32 `[z_dim]`: `[steps, z_dim]`, without `b`.

    Normal latent vectors of n numbers lie close to a sphere of radius sqrt(n), and G knows no
    others: the way is the great circle. Uniform ones lie in a cube: it is a straight line.
    """
    t = np.arange(steps, dtype=np.float32)[:, None] / steps
    angle = np.arccos((a @ b / np.linalg.norm(a) / np.linalg.norm(b)).clip(-1, 1))
    if noise == "uniform" or np.sin(angle) < 1e-3:  # from a face to itself
        return (1 - t) * a + t * b
    return (np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle)


def enlarge(picture, most):
    """Enlarge a uint8 `[H, W, 3]` by the whole factor that keeps it within `most` pixels, or 8."""
    height, width, _ = picture.shape
    factor = min(8, max(1, most // max(height, width)))
    return Image.fromarray(picture).resize(
        (width * factor, height * factor), Image.Resampling.BICUBIC)


def draw_grid(draw, numbers, folder, individual):
    """Draw faces.png, and with `individual` each face into `individual/NUMBER.png` too.

    `draw` is a function from numbers of faces to uint8 `[N, 3, S, S]`, `numbers` a list or range.
    The folder `individual` holds nothing else, for programs that take a folder of faces.
    """
    if len(numbers) > GRID_MOST:
        say(f"faces.png shows the first {GRID_MOST} faces; for all there is --individual")
        numbers = numbers if individual else numbers[:GRID_MOST]
    own, shown = folder / "individual", []
    if individual:
        own.mkdir(exist_ok=True)
    for start in tqdm(range(0, len(numbers), BATCH), "drawing", unit=f" x {BATCH} img"):
        batch = numbers[start:start + BATCH]
        faces = draw(batch)
        shown += list(faces[:max(0, GRID_MOST - start)])
        for number, face in zip(batch, faces, strict=True) if individual else ():
            dataReader.save_png(own / f"{number:06d}.png", face.transpose(1, 2, 0), quick=True)
    dataReader.save_png(folder / "faces.png", enlarge(dataReader.grid(np.stack(shown)), 1400))
    if individual and (others := len(list(own.glob("*.png"))) - len(set(numbers))):
        say(f"{own} also holds {others} PNGs of other runs")


def draw_interpolation(draw, legs, folder):
    """Draw interpolation.gif, an endless way from face to face, and interpolation.png.

    `draw` is a function from latent vectors to faces, `legs` has the latent vectors of each leg,
    `[FRAMES, z_dim]`; the last leads back, the PNG has a row for each other one.
    """
    legs = [draw(leg) for leg in tqdm(legs, "drawing", unit="leg")]
    rows = [[*leg[::4], after[0]] for leg, after in zip(legs[:-1], legs[1:], strict=True)]
    strip = dataReader.grid(np.concatenate(rows), columns=len(rows[0]))
    dataReader.save_png(folder / "interpolation.png", enlarge(strip, 1400))
    dataReader.save_gif(folder / "interpolation.gif", [
        enlarge(face.transpose(1, 2, 0), 256) for leg in legs for face in leg], 50, 50)


def main():
    options = dataReader.command_line(globals(), count=[1, LIMIT + 1], seed=[0, 2**32],
                                      device=("auto", "gpu", "cpu"))
    numbers = parse_numbers(options.seeds) if options.seeds else range(options.count)
    stops = options.interpolate
    if len(stops) == 1 or any(not 0 <= number < LIMIT for number in stops):
        raise Problem(f"--interpolate takes two numbers of faces or more, from 0 to {LIMIT - 1:,}")
    if options.individual and (stops or options.compare):
        raise Problem("--individual goes with the grid of faces, not with another picture")
    weightInit.use_device(options.device)
    generator, info = network.load_generator(options.checkpoint, options.raw)
    folder = Path(options.output_path)
    folder.mkdir(parents=True, exist_ok=True)

    def latents(numbers):
        return network.face_latents(options.seed, numbers, info["z_dim"], info["noise"])

    def draw(numbers):
        return network.draw_faces(generator, latents(numbers))

    if stops:
        z = latents(stops)
        draw_interpolation(lambda z: network.draw_faces(generator, z), [
            between(a, b, FRAMES, info["noise"])
            for a, b in zip(z, np.roll(z, -1, axis=0), strict=True)], folder)
    if options.compare:
        reader = dataReader.FaceReader(options.compare, info["image_size"], 1, options.seed)
        faces = draw(numbers[:100])
        dataReader.save_grids(folder / "real_vs_fake.png",
                              Real_faces=reader.sample(len(faces)), Generated_faces=faces)
    if not stops and not options.compare:
        draw_grid(draw, numbers, folder, options.individual)
    print(f"drawn by a generator trained for {info['step']} iterations: {folder}")


if __name__ == "__main__":
    dataReader.run_script(main)
