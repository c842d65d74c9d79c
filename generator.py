"""Draw faces from a trained generator (tutorial §6).

    python generator.py                                # Generate/faces.png, a grid of 100 faces
    python generator.py --demo                         # those of train.py --demo: demo/Generate
    python generator.py --count 16 --seed 7            # 16 others
    python generator.py --seeds 3,17,40-60             # those faces of the first command by number
    python generator.py --count 1000 --individual      # each in a PNG too: individual/000017.png
    python generator.py --interpolate 3 17 40          # interpolation.gif and .png, face to face
    python generator.py --compare imgs                 # real_vs_fake.png, beside training images

Face number k of a seed is the same face whatever the count, and on any device up to rounding.
"""

import dataReader  # first: it checks the system, and Paddle 2.6 must not be loaded before Pillow
import network
import weightInit
from dataReader import PATH, YES_NO, Kind, Problem, one_of, say, whole_number

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

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

# --- what they may be, and what --demo stands for ------------------------------------------------
LIMIT = 10**6           # numbers of faces are below: six digits in a file's name


def face_numbers(value):
    """Read numbers of faces: "3,17,40-42", or [3, 17, "40-42"] → [3, 17, 40, 41, 42]."""
    text = "" if value is None else ",".join(map(str, np.atleast_1d(value)))
    if not text:
        return []
    face = whole_number(0, LIMIT)
    numbers = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        start = face.convert(first)
        stop = face.convert(last) if dash else start
        if stop < start:
            raise ValueError
        numbers += range(start, stop + 1)
    return numbers


FACES = Kind("numbers of faces below 1,000,000, such as 3,17,40-60", face_numbers,
             {"metavar": "int", "nargs": "+"})
ALLOWED = {
    "checkpoint": PATH, "raw": YES_NO, "count": whole_number(1, LIMIT + 1),
    "seeds": FACES, "seed": whole_number(0, 2**32), "individual": YES_NO, "interpolate": FACES,
    "compare": Kind("a path", lambda path: PATH.convert(path) if path else None, PATH.flag),
    "output_path": PATH, "device": one_of("auto", "gpu", "cpu")}
DEMO = {"checkpoint": "demo/Output/generator.safetensors", "output_path": "demo/Generate"}

# --- pictures ------------------------------------------------------------------------------------
BATCH = 100             # faces drawn at a time
GRID_MOST = 32 * 32     # faces in faces.png; more could not be made out
COLUMNS = None          # of them in a row; None: about a square
FRAMES = 32             # from face to face of an interpolation


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
    factor = min(8, max(1, most // max(picture.shape)))
    return ImageOps.scale(Image.fromarray(picture), factor, Image.Resampling.BICUBIC)


def draw_grid(faces_of, numbers, folder, individual):
    """Draw faces.png, and with `individual` each face into `individual/NUMBER.png` too.

    `faces_of` is a function from numbers of faces to uint8 `[N, 3, S, S]`, `numbers` a list or
    range. The folder `individual` holds nothing else, for programs that take a folder of faces.
    Returns the path of faces.png.
    """
    if len(numbers) > GRID_MOST:
        say(f"faces.png shows the first {GRID_MOST} faces; for all there is --individual")
        if not individual:
            numbers = numbers[:GRID_MOST]
    own = folder / "individual"
    if individual:
        own.mkdir(exist_ok=True)
    shown = []
    for start in tqdm(range(0, len(numbers), BATCH), "drawing", unit=f" x {BATCH} img"):
        batch = numbers[start:start + BATCH]
        faces = faces_of(batch)
        if start < GRID_MOST:
            shown.append(faces)
        if individual:
            for number, face in zip(batch, faces, strict=True):
                dataReader.save_png(own / f"{number:06d}.png", face.transpose(1, 2, 0), quick=True)
    picture = dataReader.grid(np.concatenate(shown)[:GRID_MOST], COLUMNS)
    dataReader.save_png(folder / "faces.png", enlarge(picture, 1400))
    others = len(list(own.glob("*.png"))) - len(set(numbers))
    if individual and others:
        say(f"{own} also holds {others} PNGs of other runs")
    return folder / "faces.png"


def draw_interpolation(generator, z, noise, folder):
    """Draw interpolation.gif, an endless way from face to face, and interpolation.png.

    `z` has the latent vectors of the faces, `[N, z_dim]`. The last leg of the way leads back to the
    first face; the PNG has a row for each other leg. Returns the path of the GIF.
    """
    legs = []
    for number in tqdm(range(len(z)), "drawing", unit="leg"):
        way = between(z[number], z[(number + 1) % len(z)], FRAMES, noise)
        legs.append(network.draw_faces(generator, way))

    shown = []
    for leg, next_leg in zip(legs[:-1], legs[1:], strict=True):
        shown += [*leg[::4], next_leg[0]]
    strip = dataReader.grid(np.stack(shown), columns=FRAMES // 4 + 1)
    dataReader.save_png(folder / "interpolation.png", enlarge(strip, 1400))

    frames = [enlarge(face.transpose(1, 2, 0), 256) for face in np.concatenate(legs)]
    dataReader.save_gif(folder / "interpolation.gif", frames, wait=50, rest=50)
    return folder / "interpolation.gif"


def main():
    options = dataReader.command_line(globals())
    if options.individual and (options.interpolate or options.compare):
        raise Problem("--individual goes with the grid of faces, not with another picture")
    if len(options.interpolate) == 1:
        raise Problem("--interpolate takes two numbers of faces or more")
    weightInit.use_device(options.device)
    generator, info = network.load_generator(options.checkpoint, options.raw)
    folder = Path(options.output_path)
    numbers = options.seeds or range(options.count)
    pictures = []
    if options.compare:
        dataReader.check_outside(folder, options.compare)
        reader = dataReader.FaceReader(options.compare, info["image_size"], 1, options.seed)

    def latents_of(numbers):
        return network.face_latents(options.seed, numbers, info["z_dim"], info["noise"])

    def faces_of(numbers):
        return network.draw_faces(generator, latents_of(numbers))

    folder.mkdir(parents=True, exist_ok=True)
    with dataReader.locked(folder):  # two writers of one file would spoil it
        if options.interpolate:
            z = latents_of(options.interpolate)
            pictures.append(draw_interpolation(generator, z, info["noise"], folder))
        if options.compare:
            faces = faces_of(numbers[:100])
            pictures.append(folder / "real_vs_fake.png")
            dataReader.save_grids(pictures[-1], {
                "Real faces": reader.sample(len(faces)), "Generated faces": faces})
        if not pictures:
            pictures.append(draw_grid(faces_of, numbers, folder, options.individual))
    print(f"drawn by a generator trained for {info['step']} iterations:", *pictures)


if __name__ == "__main__":
    dataReader.run_script(main)
