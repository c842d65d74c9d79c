"""How good drawn faces are, measured against crops that nothing was trained on.

`bench.py --quality` and `bench.py --measure` print these measures. They are for comparisons on one
set of crops: none is FID, and none can be compared with a number from elsewhere.

Of a folder's crops, sorted by name, the last fifth (at most 2,000) is held out: the reference. The
first of the others, at most 8,000, are taken to be those trained on.

    distance   Fréchet distance to the held-out crops, on their first 64 principal components
    spread     how much the faces differ from each other, over how much the held-out crops do
    contrast   how much a face's levels, of all pixels and colors, differ from each other, over how
               much a held-out crop's do; well below 1 faces are pale, and then distance and spread
               tell of little else
    found      in how many a detector finds a face, over how many of the held-out crops; three of
               them: OpenCV's two frontal Haar cascades and scikit-image's LBP cascade
    memory     median distance to the nearest of as many training crops as are held out, chosen at
               random, over that to the nearest held-out one: 1 is good; copies of training crops
               would have nearly 0 if all of these were looked at, and 0.92 with 2,000 of 8,000

Other training crops, measured as if they had been drawn, show what the best there is looks like.
"""

import dataReader
from dataReader import Problem

from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

HELD_OUT_AT_MOST = 2000
TRAINED_ON_AT_MOST = 8000  # ours trains for whole passes over them: over more, for too long
COMPONENTS = 64         # on which the Fréchet distance is measured
SEARCHED_AT_MOST = 1000  # faces that the detectors are shown, 20 ms each
ENLARGED = 3            # times, before the detectors see them: they look for faces of 20 pixels up


# -------------------------------------------------------------------------------------------------
# pixels


def held_out_count(crops):
    """How many of so many crops, the last by name, are held out; a Problem for too few."""
    count = min(HELD_OUT_AT_MOST, crops // 5)
    if count <= COMPONENTS:
        raise Problem(f"{crops} crops are too few to hold out a fifth and measure by it:"
                      f" {5 * (COMPONENTS + 1)} are needed")
    return count


def split(crops):
    """Of crops in the order of their names, those to train on and those held out."""
    count = held_out_count(len(crops))
    return crops[:-count][:TRAINED_ON_AT_MOST], crops[-count:]


def flat(images):
    """uint8 `[N, 3, S, S]` → float32 `[N, 3·S·S]` in [-1, 1]."""
    return images.reshape(len(images), -1) / np.float32(127.5) - 1


def squared_distances(some, others):
    """Squared pixel distances between all pairs of uint8 images, `[N, …]`, `[M, …]` → `[N, M]`."""
    middle = flat(others).mean(axis=0)  # without it, the differences of large numbers are coarse
    some = flat(some) - middle
    others = flat(others) - middle
    squares = (some**2).sum(axis=1)[:, None] + (others**2).sum(axis=1)
    return (squares - 2 * some @ others.T).clip(0)


def mean_distance(images):
    """Mean pixel distance between two different images of a set."""
    distances = np.sqrt(squared_distances(images, images))
    np.fill_diagonal(distances, 0)
    return distances.sum() / (len(images) * (len(images) - 1))


def contrast(images):
    """Standard deviation of the levels of an image, averaged over a set."""
    return flat(images).std(axis=1).mean()


def distance_to_nearest(images, crops):
    """Median over the images of the pixel distance to the nearest of the crops."""
    return np.median(np.sqrt(squared_distances(images, crops).min(axis=1)))


def yardstick(real):
    """Return a function that measures how far images are from `real`, uint8 `[N, 3, S, S]`.

    It is the Fréchet distance on the first 64 principal components of `real`, in units of [-1, 1],
    squared and summed over all pixels: as FID, but without Inception. It sees layout, light and
    contrast rather than what is in a picture, and is for comparisons on this data alone.
    """
    middle = flat(real).mean(axis=0)
    centred = flat(real) - middle
    values, vectors = np.linalg.eigh(centred @ centred.T)  # smaller than their covariance
    axes = centred.T @ vectors[:, -COMPONENTS:] / np.sqrt(values[-COMPONENTS:])

    def moments(images):
        at = ((flat(images) - middle) @ axes).astype(np.float64)
        return at.mean(axis=0), np.cov(at.T)

    real_mean, real_covariance = moments(real)
    values, vectors = np.linalg.eigh(real_covariance)
    root = vectors * np.sqrt(values) @ vectors.T

    def distance(images):
        mean, covariance = moments(images)
        shared = np.sqrt(np.linalg.eigvalsh(root @ covariance @ root).clip(0)).sum()
        apart = ((mean - real_mean) ** 2).sum()
        return apart + np.trace(covariance) + np.trace(real_covariance) - 2 * shared
    return distance


# -------------------------------------------------------------------------------------------------
# detectors


def opencv_detector(cascade):
    """A function that tells whether one of OpenCV's cascades finds a face in a uint8 `[H, W]`."""
    try:
        import cv2
        classifier = cv2.CascadeClassifier(f"{cv2.data.haarcascades}{cascade}.xml")
    except (ImportError, AttributeError) as error:  # OpenCV 5 has no cascades any more
        raise Problem("two of the detectors are OpenCV's of version 4:"
                      ' python -m pip install "opencv-python-headless<5"') from error
    return lambda gray: len(classifier.detectMultiScale(
        gray, scaleFactor=1.1, minNeighbors=3, minSize=(len(gray) // 3,) * 2)) > 0


def skimage_detector():
    """A function that tells whether scikit-image's cascade finds a face in a uint8 `[H, W]`."""
    from skimage.data import lbp_frontal_face_cascade_filename
    from skimage.feature import Cascade

    cascade = Cascade(lbp_frontal_face_cascade_filename())
    return lambda gray: len(cascade.detect_multi_scale(
        gray, scale_factor=1.1, step_ratio=1, min_size=(len(gray) // 3,) * 2,
        max_size=gray.shape, min_neighbor_number=2)) > 0


def detectors():
    """The three detectors by name.

    With these settings each finds a face in 0.94 to 0.96 of CelebA's crops, and in 0.01 to 0.05 of
    the same crops with their sixteen squares shuffled.
    """
    return {"Haar default": opencv_detector("haarcascade_frontalface_default"),
            "Haar alt2": opencv_detector("haarcascade_frontalface_alt2"),
            "LBP": skimage_detector()}


def shares_found(images):
    """Share of uint8 images `[N, 3, S, S]` in which a face is found, by detector."""
    size = images.shape[-1] * ENLARGED
    images = images[:SEARCHED_AT_MOST]
    by_name = detectors()
    counts = dict.fromkeys(by_name, 0)
    for image in tqdm(images, "looking for faces", unit="img", leave=False, disable=None):
        gray = Image.fromarray(image.transpose(1, 2, 0)).convert("L")
        gray = np.asarray(gray.resize((size, size), Image.Resampling.BICUBIC))
        for name, finds_face in by_name.items():
            counts[name] += finds_face(gray)
    return {name: count / len(images) for name, count in counts.items()}


# -------------------------------------------------------------------------------------------------
# all measures


@dataclass
class Reference:
    """Real crops, uint8 `[N, 3, S, S]`, as many in each set, and what was measured on them."""

    held_out: np.ndarray     # no row has been trained on them
    trained_on: np.ndarray   # chosen at random
    as_if_drawn: np.ndarray  # other training crops
    distance: Any            # a function of images: `yardstick`
    spread: float
    contrast: float
    found: dict              # shares by detector


def make_reference(train, held_out):
    """Choose among the training crops, and measure the held-out ones; uint8 `[N, 3, S, S]` both."""
    count = len(held_out)
    order = np.random.default_rng(0).permutation(len(train))
    return Reference(
        held_out=held_out, trained_on=train[order[:count]],
        as_if_drawn=train[order[count:2 * count]], distance=yardstick(held_out),
        spread=mean_distance(held_out), contrast=contrast(held_out),
        found=shares_found(held_out))


def measure(images, reference):
    """All measures of drawn faces, uint8 `[N, 3, S, S]`: floats by name, a list of them `found`."""
    found = shares_found(images)
    to_trained_on = distance_to_nearest(images, reference.trained_on)
    return {"distance": float(reference.distance(images)),
            "spread": float(mean_distance(images) / reference.spread),
            "contrast": float(contrast(images) / reference.contrast),
            "found": [found[name] / share for name, share in reference.found.items()],
            "memory": float(to_trained_on / distance_to_nearest(images, reference.held_out))}


def draw(path, which, count):
    """Faces of seed 1, uint8 `[count, 3, S, S]`, drawn by a generator's file; and its iterations.

    `which` is "averaged" or "raw" for what generator.py draws without and with `--raw`, or
    "running" for the raw weights with the BN statistics that ran along in training.
    """
    import network
    import weightInit
    from weightInit import paddle

    weightInit.use_device("cpu")
    generator, info = network.load_generator(path, raw=which != "averaged")
    if which == "running":
        tensors, _ = weightInit.read_tensors(path, "generator")
        generator.set_state_dict({
            name.removeprefix("raw."): paddle.to_tensor(value)
            for name, value in tensors.items() if name.startswith("raw.")})
    z = network.face_latents(1, range(count), info["z_dim"], info["noise"])
    parts = [network.draw_faces(generator, z[start:start + 100]) for start in range(0, count, 100)]
    return np.concatenate(parts), info["step"]


HEADER = ("| drawn by | distance | spread | contrast | found | memory |\n"
          "| --- | --- | --- | --- | --- | --- |")


def cells(measures):
    """A row's cells of distance, spread, contrast, the three shares found and memory."""
    found = ", ".join(f"{share:.2f}" for share in measures["found"])
    return (f"{measures['distance']:.1f} | {measures['spread']:.2f} |"
            f" {measures['contrast']:.2f} | {found} | {measures['memory']:.3f}")


def measure_generators(paths, data):
    """Print the measures of generators' files against the held-out crops of a folder."""
    crops = dataReader.FaceReader(data, 64, 1, 0).images  # in the order of their names
    reference = make_reference(*split(crops))
    found = ", ".join(f"{share:.2f}" for share in reference.found.values())
    print(f"{len(reference.held_out)} crops held out; faces found in {found} of them by"
          f" {', '.join(reference.found)}\n\n{HEADER}")
    floor = measure(reference.as_if_drawn, reference)
    print(f"| training crops, as if drawn | {cells(floor)} |", flush=True)
    for path in paths:
        faces, _ = draw(path, "averaged", len(reference.held_out))
        print(f"| {path} | {cells(measure(faces, reference))} |", flush=True)
