"""Photos in, 64×64 face crops out (tutorial §2.3).

    python pretreat.py                              # img_align_celeba/ (or its .zip) → imgs/
    python pretreat.py --input img_align_celeba.zip # CelebA's own archive, read without unpacking
    python pretreat.py --input photos --output mine # any folder, with the folders in it
    python pretreat.py --demo                       # no CelebA at hand: stand-in faces → imgs/

A run that was stopped goes on where it was. Files that are no photos are named and left out.
"""

import hashlib
import os
import zipfile
from collections import Counter
from pathlib import Path

from dataReader import (
    SIZES,
    Problem,
    command_line,
    in_processes,
    list_files,
    make_folder,
    read_image,
    replacing,
    run,
    save_png,
    say,
    why_unreadable,
)

import numpy as np
from PIL import Image

# -------------------------------------------------------------------------------------------------
# settings (each is also a flag, e.g. --threads 16)

input = "img_align_celeba"                # photos: a folder, or CelebA's zip
output = "imgs"                           # the folder of crops that train.py reads
image_size = 64                           # height and width of a crop, pixels
threads = len(os.sched_getaffinity(0))    # photos worked on at a time, each by a process
demo = False                              # make stand-in photos in demo_faces/, use them as input

# -------------------------------------------------------------------------------------------------

DEMO_PHOTOS = 2000


def crop_face(photo, size):
    """Cut the face out of a photo framed like CelebA's.

    The short side is resized to `size` (bilinear; the long one floored), then the tutorial's box
    (0, 10)–(64, 74) is cut, scaled with `size`. In a photo of another shape than CelebA's 178×218
    the box is centred across the width and moved up as far as it must to lie inside.

    Args:
        photo: PIL image.
        size: height and width of the crop, pixels.

    Returns:
        PIL image, `size`×`size`, of the mode of `photo`.
    """
    short = min(photo.size)
    width, height = photo.width * size // short, photo.height * size // short
    left, top = (width - size) // 2, min(10 * size // 64, height - size)
    resized = photo.resize((width, height), Image.Resampling.BILINEAR)
    return resized.crop((left, top, left + size, top + size))


def find_photos(path):
    """List the files of a folder (with the folders in it) or of a zip.

    Returns:
        A list of (name, open), where `open()` gives a binary file or a path to decode.

    Raises:
        Problem: there is no such folder, or it is no zip, or empty.
    """
    if path.is_dir():
        photos = [(name, lambda name=name: path / name) for name in list_files(path)]
    elif path.is_file():
        try:
            archive = zipfile.ZipFile(path)
        except (zipfile.BadZipFile, NotImplementedError) as error:
            raise Problem(f"{path} is neither a folder nor a whole zip: {error}") from error

        def reopen():  # a worker process needs a place in the file of its own
            archive.fp = open(path, "rb")  # noqa: SIM115

        os.register_at_fork(after_in_child=reopen)
        items = {item.filename: item for item in archive.infolist()}  # the last of one name counts
        photos = [(name, lambda item=item: archive.open(item)) for name, item in items.items()
                  if not item.is_dir() and not name.startswith("__MACOSX/")
                  and not Path(name).name.startswith(".")]
    else:
        raise Problem(
            f"{path} is not there: download img_align_celeba.zip (\"Align&Cropped Images\") from"
            " https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html into this folder, or try"
            " `python pretreat.py --demo`, which needs no download")
    if not photos:
        raise Problem(f"{path} has no files in it")
    return photos


def crop_names(names):
    """Name the crops of photos: `a/1.jpg` → `1.png`.

    Photos that would share a name (`a/1.jpg`, `b/1.jpg`, `b/1.webp`) are told apart by a digest
    of their path.
    """
    stems = Counter(Path(name).stem for name in names)
    return [Path(name).stem + (f"-{sha1(name)}" if stems[Path(name).stem] > 1 else "") + ".png"
            for name in names]


def sha1(text):
    return hashlib.sha1(text.encode(errors="replace"), usedforsecurity=False).hexdigest()[:10]


def crop_all(photos, folder, size, threads):
    """Crop photos into a folder, leaving out those that are there and those that cannot be read.

    Args:
        photos: list of (name, open) of `find_photos`.
        folder: where the crops go, one `NAME.png` a photo.
        size: height and width of a crop, pixels.
        threads: photos worked on at a time.

    Raises:
        Problem: the folder holds crops of another size, cannot be written, or is empty at the end.
    """
    folder = make_folder(folder)
    there = {entry.name for entry in os.scandir(folder)
             if entry.name.endswith(".png") and entry.stat().st_size > 0}
    names = crop_names([name for name, _ in photos])
    for name in sorted(there.intersection(names))[:1]:
        with Image.open(folder / name) as found:
            if found.size != (size, size):
                raise Problem(f"{folder} holds crops of {found.width}×{found.height}, not"
                              f" {size}×{size}: pass another --output, or remove it")
    todo = [(*photo, crop) for photo, crop in zip(photos, names, strict=True) if crop not in there]

    def crop(photo):
        name, opened, crop = photo
        try:
            image = crop_face(read_image(opened()), size)
        except Exception as error:  # PIL raises almost anything for a damaged file
            return f"skipped {name}: {why_unreadable(error)}"
        save_png(folder / crop, image, quick=True)
        return None

    skipped = 0
    if todo:
        for reason in filter(None, in_processes(crop, todo, "cropping", threads)):
            say(reason)
            skipped += 1
    written, kept = len(todo) - skipped, len(photos) - len(todo)
    print(f"{folder}: {written} written, {kept} already there, {skipped} skipped")
    if written + kept == 0:
        raise Problem("none of the files is a photo")
    if there - set(names):
        say(f"{folder} also holds {len(there - set(names))} images that are not from this input;"
            " train.py would learn from them too")


def make_demo_photos(folder, threads):
    """Build stand-in photos in CelebA's geometry, 178×218 JPEG, from scikit-image's own faces.

    The 100 real faces of `skimage.data.lfw_subset` (LFW, 25×25 grey) are enlarged to where
    CelebA has its faces, and varied by mirror, shift, rotation, zoom and light.

    Args:
        folder: where the photos go.
        threads: photos worked on at a time.
    """
    from skimage.data import lfw_subset  # 1 s to import, and only the demo needs them
    from skimage.transform import AffineTransform, warp

    faces = lfw_subset()[:100]  # the other 100 are patches without a face
    folder = make_folder(folder)
    todo = [number for number in range(DEMO_PHOTOS) if not (folder / f"{number:04d}.jpg").exists()]

    def draw(number):
        rng = np.random.default_rng([0, number])
        face = faces[number % len(faces)][:, ::rng.choice([-1, 1])]
        zoom = 178 / 25 * rng.uniform(0.95, 1.15)
        # from a pixel of the photo to one of the face, each around the middle of its face
        place = (AffineTransform(translation=rng.uniform(-8, 8, 2) - (88.5, 117))
                 + AffineTransform(rotation=np.deg2rad(rng.uniform(-8, 8)), scale=1 / zoom)
                 + AffineTransform(translation=(12, 12)))
        photo = warp(face, place, output_shape=(218, 178), order=3, mode="edge")
        photo = photo ** rng.uniform(0.8, 1.25) * rng.uniform(0.85, 1.1)
        photo = Image.fromarray((photo * 255).clip(0, 255).astype(np.uint8)).convert("RGB")
        with replacing(folder / f"{number:04d}.jpg", sync=False) as file:
            photo.save(file, "JPEG", quality=95)

    if todo:
        for _ in in_processes(draw, todo, f"making {folder}", threads):
            pass


def main():
    options = command_line(globals(), image_size=SIZES, threads=1)
    source, target = Path(options.input), Path(options.output)
    if options.demo:
        source = Path("demo_faces")
        make_demo_photos(source, options.threads)
    elif not source.exists() and Path(f"{source}.zip").exists():
        source = Path(f"{source}.zip")
    if source.resolve() in [target.resolve(), *target.resolve().parents]:
        raise Problem(f"{target} lies in {source}: pass an --output elsewhere, or the crops would"
                      " be cropped again the next time")
    crop_all(find_photos(source), target, options.image_size, options.threads)


if __name__ == "__main__":
    run(main)
