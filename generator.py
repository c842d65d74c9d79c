"""Draw faces from a trained generator (tutorial §6).

    python generator.py                                # Generate/faces.png, a grid of 100 faces
    python generator.py --count 16 --seed 7            # 16 others
    python generator.py --count 1000 --individual      # and each in a PNG of its own
    python generator.py --checkpoint elsewhere/generator.safetensors --output_path elsewhere

Face number k of a seed is the same face whatever the count, and on any device up to rounding.
"""

from dataReader import command_line, grid, make_folder, run, save_png, say
from network import draw_faces, face_latents, load_generator, use_device

import numpy as np
from tqdm import tqdm

# -------------------------------------------------------------------------------------------------
# settings (each is also a flag, e.g. --count 16)

checkpoint = "Output/generator.safetensors"  # the generator that train.py saved
count = 100                                  # faces to draw
seed = 0                                     # another seed draws other faces
individual = False                           # also write each face to a PNG: 000017.png is face 17
output_path = "Generate"                     # where the PNGs are written
device = "auto"                              # "gpu", "cpu", or "auto": the GPU if there is one

# -------------------------------------------------------------------------------------------------

BATCH = 100             # faces drawn at a time
GRID_MOST = 32 * 32     # faces in faces.png; more could not be made out


def main():
    options = command_line(globals(), count=1, seed=[0, 2**32], device=("auto", "gpu", "cpu"))
    use_device(options.device)
    generator, info = load_generator(options.checkpoint)
    folder = make_folder(options.output_path)

    count = options.count
    if count > GRID_MOST:
        say(f"faces.png shows the first {GRID_MOST} faces"
            + ("" if options.individual else "; for all, pass --individual too"))
        count = count if options.individual else GRID_MOST
    shown = []
    with tqdm(total=count, desc="drawing", unit="img") as bar:
        for start in range(0, count, BATCH):
            numbers = range(start, min(start + BATCH, count))
            z = face_latents(options.seed, numbers, info["z_dim"], info["noise"])
            faces = draw_faces(generator, z)
            if start < GRID_MOST:
                shown.append(faces[:GRID_MOST - start])
            if options.individual:
                for number, face in zip(numbers, faces, strict=True):
                    save_png(folder / f"{number:06d}.png", face.transpose(1, 2, 0), quick=True)
            bar.update(len(faces))
    save_png(folder / "faces.png", grid(np.concatenate(shown)))
    if options.individual and (others := len(list(folder.glob("*.png"))) - count - 1):
        say(f"{folder} also holds {others} PNGs of other runs")
    print(f"{count} faces of a generator trained for {info['step']} iterations: {folder}")


if __name__ == "__main__":
    run(main)
