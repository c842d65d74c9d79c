"""Photos in, 64×64 face crops out (tutorial §2.3).

    python pretreat.py                              # img_align_celeba/ (or its .zip) → imgs/
    python pretreat.py --input img_align_celeba.zip # CelebA's own archive, read without unpacking
    python pretreat.py --input photos --output mine # any folder, with the folders in it
    python pretreat.py --input photos --output mine --find_faces    # any faces in any photos
    python pretreat.py --demo                       # no CelebA at hand: stand-ins → demo/imgs/

A run that was stopped goes on where it was. Files that are no photos are named and left out.
"""

import hashlib
import os
import re
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

import dataReader
from dataReader import Problem, say

# --- settings (each is also a flag, e.g. --threads 16) -------------------------------------------
input = "img_align_celeba"      # photos: a folder, or CelebA's zip
output = "imgs"                 # the folder of crops that train.py reads
image_size = 64                 # height and width of a crop, pixels
threads = dataReader.THREADS    # photos worked on at a time: one per core, but 8 at most
find_faces = False              # find all faces, and cut each out as CelebA frames it
demo = False                    # make stand-in photos in demo/photos/, crop them to demo/imgs/

# -------------------------------------------------------------------------------------------------


def crop_face(photo, size):
    """Cut the face out of a photo framed like CelebA's: PIL image → PIL image, `size`×`size`.

    The short side is resized to `size` pixels (bilinear; the long one floored), then the tutorial's
    box (0, 10)–(64, 74) is cut, scaled with `size`. CelebA's 178×218 is 64×78 then, so it could
    move down by 4 pixels only. In other shapes it is centred, and moved up to lie inside.
    """
    short = min(photo.size)
    width, height = photo.width * size // short, photo.height * size // short
    left, top = (width - size) // 2, min(10 * size // 64, height - size)
    resized = photo.resize((width, height), Image.Resampling.BILINEAR)
    return resized.crop((left, top, left + size, top + size))


SEARCHED = 400  # pixels of the long side of what is searched; 512 found more false faces


def cut_faces(photo, size, cascade):
    """Cut out every face as CelebA frames it: PIL image → list of PIL images, largest face first.

    `cascade` is a `skimage.feature.Cascade` of frontal, upright faces. It searches the photo at
    `SEARCHED` pixels, so a face must be 24 of those wide, and in the photo half of `size`. A crop
    that reaches out of the photo is filled with its mirror image.
    """
    scale = max(1, max(photo.size) / SEARCHED)
    small = photo.resize([max(1, int(side / scale)) for side in photo.size],
                         Image.Resampling.BILINEAR, reducing_gap=2)
    found = cascade.detect_multi_scale(
        np.asarray(small), scale_factor=1.1, step_ratio=1, min_size=(24, 24),
        max_size=(min(small.size),) * 2, min_neighbor_number=12)
    kept, pixels = [], np.asarray(photo)
    for face in sorted(found, key=lambda face: -face["width"]):
        # to the middle of the crop; by the eyes of the demo's faces and of skimage's astronaut
        width = face["width"] * scale
        x, y = face["c"] * scale + 0.52 * width, face["r"] * scale + 0.44 * width
        if width >= size / 2 and all(
                max(abs(x - x0), abs(y - y0)) > 0.6 * width0 for x0, y0, width0 in kept):
            kept.append((x, y, width))

    def along(middle, width, length):  # pixels of a crop along one axis, those outside mirrored
        half = 2.35 * width / 2
        at = np.arange(round(middle - half), round(middle + half)) % (2 * length)
        return np.minimum(at, 2 * length - 1 - at)

    return [Image.fromarray(pixels[along(y, width, photo.height)][:, along(x, width, photo.width)])
            .resize((size, size), Image.Resampling.BILINEAR) for x, y, width in kept]


def find_photos(path):
    """List (name, open) of the files of a folder (with the folders in it) or of a zip.

    `open()` gives a binary file or a path to decode. Raises a Problem if there are no files.
    """
    if path.is_dir():
        photos = [(name, lambda name=name: path / name) for name in dataReader.list_files(path)]
    elif path.is_file():
        try:
            archive = zipfile.ZipFile(path)
        except (zipfile.BadZipFile, NotImplementedError) as error:
            raise Problem(f"{path} is neither a folder nor a whole zip: {error}") from error
        items = {item.filename: item for item in archive.infolist()}  # the last of one name counts
        photos = [(name, lambda item=item: archive.open(item)) for name, item in items.items()
                  if not item.is_dir() and not name.startswith("__MACOSX/")
                  and not Path(name).name.startswith(".")]
    else:
        raise Problem(f"{path} is not there: download img_align_celeba.zip (Align&Cropped Images)"
                      " from https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html into this folder, or"
                      " try `python pretreat.py --demo`, which needs no download")
    if not photos:
        raise Problem(f"{path} has no files in it")
    return photos


def crop_names(names):
    """Name the crops of photos, `a/1.jpg` → `1.png`; a digest of their paths tells equals apart."""
    def name_of(name):
        stem, digest = Path(name).stem, hashlib.sha1(name.encode(errors="replace")).hexdigest()
        return f"{stem}-{digest[:10]}.png" if stems[stem] > 1 else f"{stem}.png"

    stems = Counter(Path(name).stem for name in names)
    return [name_of(name) for name in names]


def crop_all(photos, folder, size, threads, cascade=None):
    """Crop the photos of `find_photos` to `NAME.png`, `size`×`size`, in a folder.

    With the cascade of `cut_faces` they are those of its faces, `NAME-face1.png` and so on. Those
    that are there, and those that cannot be read, are left out. Raises a Problem if the
    folder holds crops of another size, cannot be written, or is empty at the end.
    """
    def crop(photo):
        (name, opened), target = photo
        try:
            image = dataReader.read_image(opened())
            images = cut_faces(image, size, cascade) if cascade else [crop_face(image, size)]
        except Exception as error:
            return f"skipped {name}: {str(error) or type(error).__name__}"
        for number, image in reversed(list(enumerate(images, 1))):  # if the first is there, all are
            own = target if number == 1 else target.removesuffix("1.png") + f"{number}.png"
            dataReader.save_png(folder / own, image, quick=True)
        return len(images) or f"skipped {name}: no face found"

    there = {entry.name for entry in os.scandir(folder)
             if entry.name.endswith(".png") and entry.stat().st_size > 0}
    names = crop_names([name for name, _ in photos])
    if cascade:
        names = [name.removesuffix(".png") + "-face1.png" for name in names]
    for name in sorted(there.intersection(names))[:1]:
        with Image.open(folder / name) as found:
            if found.size != (size, size):
                raise Problem(f"{folder} holds crops of {found.width}×{found.height}, not"
                              f" {size}×{size}: pass another --output, or remove it")
    todo = [pair for pair in zip(photos, names, strict=True) if pair[1] not in there]
    written = skipped = 0
    for result in dataReader.in_threads(crop, todo, "cropping", threads):
        if isinstance(result, str):
            say(result)
            skipped += 1
        else:
            written += result
    kept = len(photos) - len(todo)
    print(f"{folder}: {written} written, {kept} already there, {skipped} skipped")
    if len(photos) == skipped:
        raise Problem("no face was found" if cascade else "none of the files is a photo")
    firsts, face = set(names), re.compile(r"-face\d+\.png$")
    others = [name for name in there if face.sub("-face1.png", name) not in firsts]
    if others:
        say(f"{folder} also holds {len(others)} images that are not from this input;"
            " train.py would learn from them too")


def make_demo_photos(folder, threads):
    """Build 2,000 stand-in photos in CelebA's geometry, 178×218 JPEG, from scikit-image's faces.

    The 100 real faces of `skimage.data.lfw_subset` (LFW, 25×25 grey) are enlarged to where CelebA
    has its faces, and varied from a fixed seed: by mirror, light, and the shift, rotation and zoom
    that are left in CelebA's aligned photos, about.
    """
    from skimage.data import lfw_subset  # 1 s to import, and only the demo needs them
    from skimage.transform import AffineTransform, warp

    faces = lfw_subset()[:100]  # the other 100 are patches without a face

    def draw(path):
        number = int(path.stem)
        rng = np.random.default_rng([0, number])
        face = faces[number % len(faces)][:, ::rng.choice([-1, 1])]
        zoom = 178 / 25 * rng.uniform(1.02, 1.08)
        # from a pixel of the photo to one of the face, each around the middle of its face
        place = (AffineTransform(translation=rng.uniform(-2, 2, 2) - (88.5, 117))
                 + AffineTransform(rotation=np.deg2rad(rng.uniform(-2, 2)), scale=1 / zoom)
                 + AffineTransform(translation=(12, 12)))
        photo = warp(face, place, output_shape=(218, 178), order=3, mode="edge")
        photo = photo ** rng.uniform(0.8, 1.25) * rng.uniform(0.85, 1.1)
        photo = Image.fromarray((photo * 255).clip(0, 255).astype(np.uint8)).convert("RGB")
        with dataReader.replacing(path, sync=False) as file:
            photo.save(file, "JPEG", quality=95)

    paths = [folder / f"{number:04d}.jpg" for number in range(2000)]
    todo = [path for path in paths if not path.exists()]
    list(dataReader.in_threads(draw, todo, f"making {folder}", threads))


def main():
    options = dataReader.command_line(globals(), image_size=dataReader.SIZES, threads=[1])
    source, target = Path(options.input), Path(options.output)
    if options.demo:
        source, target = Path("demo/photos"), Path("demo", options.output)
        source.mkdir(parents=True, exist_ok=True)
        with dataReader.locked(source):
            make_demo_photos(source, options.threads)
    elif not source.exists() and Path(f"{source}.zip").exists():
        source = Path(f"{source}.zip")
    if source.resolve() in [target.resolve(), *target.resolve().parents]:
        raise Problem(f"{target} lies in {source}: pass an --output elsewhere, or the crops would"
                      " be cropped again the next time")
    cascade = None
    if options.find_faces:
        from skimage.data import lbp_frontal_face_cascade_filename  # 1 s to import
        from skimage.feature import Cascade

        cascade = Cascade(lbp_frontal_face_cascade_filename())
    photos = find_photos(source)
    target.mkdir(parents=True, exist_ok=True)
    with dataReader.locked(target):  # two writers of one file would spoil it
        crop_all(photos, target, options.image_size, options.threads, cascade)


if __name__ == "__main__":
    dataReader.run(main)
