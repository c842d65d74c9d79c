"""Face crops in, batches out (tutorial §3.1 and §3.2).

    python dataReader.py                     # Output/training_images.png, a 10×10 grid of imgs/
    python dataReader.py --data_path photos  # any folder of images, of any size

Here too is what the scripts share and none of them should write again: settings that are also
flags, errors that are one line, files that appear whole or not at all, grids of images.
"""

import argparse
import collections
import contextlib
import ctypes
import hashlib
import io
import multiprocessing
import os
import re
import signal
import sys
import threading
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

# -------------------------------------------------------------------------------------------------
# settings (each is also a flag, e.g. --image_size 128)

data_path = "imgs"      # folder of training images, searched recursively
image_size = 64         # height and width of a training image, pixels
seed = 0                # another seed draws other images
output_path = "Output"  # where training_images.png is written

# -------------------------------------------------------------------------------------------------
# what every script shares

SIZES = (32, 64, 128)  # the image sizes that the networks can be built for


class Problem(Exception):
    """Something the user can put right; `run` prints it as one line, without a traceback."""


def command_line(script, **limits):
    """Turn the settings at the top of a script into flags and parse them.

    Every line `name = value  # help` there becomes the flag `--name`, so editing the script and
    passing a flag do the same. A bad value ends the process with status 2.

    Args:
        script: the script's `globals()`.
        **limits: for a setting, the least value, or a list [least, below], or the tuple of all
            values it may take; and with that its type, else it is that of the value.

    Returns:
        argparse.Namespace with one attribute per setting.
    """
    parser = argparse.ArgumentParser(
        description=script["__doc__"], formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s [--flag value ...]", allow_abbrev=False)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message} (see --help)\n")
    source = Path(script["__file__"]).read_text(encoding="utf-8")
    section = source.split("# settings")[1].split("\n# ---")[0]
    for name, text in re.findall(r"^([a-z]\w*) = .*?(?:\s#\s*(.*))?$", section, re.MULTILINE):
        value, limit = script[name], limits.get(name, script[name])
        kind = type(limit[0] if name in limits and isinstance(limit, (list, tuple)) else limit)
        if kind is bool:
            flag = {"action": argparse.BooleanOptionalAction}
        elif kind is list:  # of integers
            flag = {"type": int, "nargs": "+", "metavar": "int"}
        else:
            flag = {"type": kind, "metavar": kind.__name__}
        parser.add_argument(f"--{name}", default=value, **flag,
                            help=text.replace("%", "%%") + f" (default: {value})")
    options = parser.parse_args()
    for name, limit in limits.items():
        value = getattr(options, name)
        if isinstance(limit, tuple):
            if value not in limit:
                parser.error(f"--{name} is {value}, but can be {', '.join(map(str, limit))}")
        elif isinstance(limit, list):
            if not limit[0] <= value < limit[1]:  # so that nan fails too
                parser.error(f"--{name} is {value}, but must be at least {limit[0]} and less than"
                             f" {limit[1]}")
        elif value < limit:
            parser.error(f"--{name} is {value}, but must be at least {limit}")
    return options


def run(main):
    """Call a script's `main`; a Problem or an OSError becomes one line on stderr and status 1."""
    name = Path(sys.argv[0]).name
    try:
        main()
    except Problem as problem:
        sys.exit(f"{name}: {problem}")
    except OSError as error:
        sys.exit(f"{name}: {error.filename or 'input/output'}: {error.strerror or error}")
    except MemoryError:
        sys.exit(f"{name}: out of memory: a smaller batch_size, width or image_size needs less")
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        sys.exit(130)


def say(line):
    """One line on stderr, above a progress bar if there is one."""
    tqdm.write(line, file=sys.stderr)


def make_folder(path):
    """Create a folder and its parents, remove what killed runs left in it; return its Path.

    Raises:
        Problem: `path` cannot be created or is a file.
    """
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Problem(f"cannot make the folder {path}: {error.strerror}") from error
    for left in path.glob(".*.tmp"):
        process = left.name[1:].split("-")[0]
        try:
            alive = not process.isdigit() or Path("/proc", process, "cmdline").read_bytes()
        except OSError:
            alive = False
        if not alive:  # gone, or a zombie, which has no command line
            left.unlink(missing_ok=True)
    return path


@contextlib.contextmanager
def replacing(path, sync=True):
    """Open a binary file that takes the name `path` only when it has been written whole.

    Whatever happens on the way, be it a kill or a full disk, `path` is what it was before. The
    file is synced to disk first unless `sync` is False.

    Raises:
        Problem: the file cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            if sync:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise Problem(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def in_processes(function, items, title, processes):
    """Yield `function(item)` for every item, in order, from worker processes, under a bar.

    Threads would do little: PIL decodes and encodes small images with Python's lock held. The
    workers are forks, so `function` may be a closure, but only its result is sent back. No more
    than a few hundred results wait to be taken. When the loop over it is left, each worker ends
    its item and begins no other.

    Raises:
        Problem: a worker was killed.
    """
    Image.preinit()  # here, once, and not in every worker
    processes = max(1, min(processes, len(items)))
    share = max(1, min(64, len(items) // (4 * processes)))
    context = multiprocessing.get_context("fork")
    leaving, waiting = context.Event(), collections.deque()
    pool = ProcessPoolExecutor(processes, context, _begin, (function, items, leaving))

    def results():
        for start in range(0, len(items), share):
            waiting.append(pool.submit(_work, range(start, min(start + share, len(items)))))
            if len(waiting) > 3 * processes:
                yield from waiting.popleft().result()
        for future in waiting:
            yield from future.result()

    try:
        yield from tqdm(results(), title, len(items), unit="img")
    except BrokenExecutor as error:
        raise Problem(f"{title}: a worker process was killed; out of memory?") from error
    finally:
        leaving.set()
        pool.shutdown(cancel_futures=True)


def _begin(*task):
    global _task
    _task = task
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets Ctrl-C too, and ends the pool
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: do not outlive the parent


def _work(numbers):
    function, items, leaving = _task
    return [function(items[number]) for number in numbers if not leaving.is_set()]


# -------------------------------------------------------------------------------------------------
# images


def list_files(folder):
    """Paths of all files below a folder but hidden ones, relative to it, sorted.

    Links are followed; what is neither a file nor a folder is named on stderr and left out.
    """
    seen = set()  # a link may lead back up

    def walk(path, prefix):
        if (real := os.path.realpath(path)) in seen:
            return
        seen.add(real)
        with os.scandir(path) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_file():
                    yield prefix + entry.name
                elif entry.is_dir():
                    yield from walk(entry.path, f"{prefix}{entry.name}/")
                else:
                    say(f"skipped {entry.path}: a broken link, or no file")
    return sorted(walk(folder, ""))


def read_image(source):
    """Decode any image as an upright 8-bit RGB one.

    EXIF rotation is undone, transparency shows white, 16-bit levels are scaled to 8 bits.

    Args:
        source: path or binary file.

    Returns:
        PIL.Image.Image of mode RGB.

    Raises:
        Exception: whatever PIL raises for a file that is no image, truncated or damaged.
    """
    with Image.open(source) as image:
        image.load()
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) / 257 + 0.5).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def why_unreadable(error):
    """The reason, in a few words, for which `read_image` failed."""
    if isinstance(error, Image.UnidentifiedImageError):
        return "empty or not an image"
    return f"damaged ({error})" if str(error) else f"damaged ({type(error).__name__})"


def grid(images, columns=None):
    """Lay images out row by row, as near a square as their number allows, 2 pixels apart.

    Args:
        images: uint8 `[N, 3, H, W]`.
        columns: images per row; ceil(sqrt(N)) if None.

    Returns:
        uint8 `[height, width, 3]`; the gaps and missing cells are white.
    """
    count, channels, height, width = images.shape
    columns = columns or int(np.ceil(np.sqrt(count)))
    rows = -(-count // columns)
    cells = np.full((rows * columns, channels, height + 2, width + 2), 255, np.uint8)
    cells[:count, :, 2:, 2:] = images
    cells = cells.reshape(rows, columns, channels, height + 2, width + 2)
    picture = cells.transpose(0, 3, 1, 4, 2).reshape(rows * (height + 2), columns * (width + 2), -1)
    return np.pad(picture, ((0, 2), (0, 2), (0, 0)), constant_values=255)


def save_png(path, picture, quick=False):
    """Write a uint8 `[H, W, 3]` array, or a PIL image, as a PNG.

    `quick` is for one of thousands of small ones: not synced to disk, and not compressed, which
    makes pretreat.py a third faster than zlib's level 1, and reading faster too, for 12 KB a crop
    in place of 4 to 9.
    """
    encoded = io.BytesIO()  # in a file PIL would write it bit by bit, which takes a third longer
    # as an array it has left behind the metadata of the photo
    Image.fromarray(np.asarray(picture)).save(encoded, "PNG", compress_level=0 if quick else 1)
    with replacing(path, sync=not quick) as file:
        file.write(encoded.getbuffer())


def save_gif(path, frames, wait, rest):
    """Write an endless animation.

    Args:
        path: the GIF to write.
        frames: PIL images of one size, mode RGB; each gets 256 colours of its own.
        wait, rest: milliseconds that a frame, and the last one, is shown.
    """
    with replacing(path) as file:
        frames[0].save(file, "GIF", save_all=True, append_images=frames[1:], loop=0,
                       duration=[wait] * (len(frames) - 1) + [rest])


def save_grids(path, **grids):
    """Draw grids of images side by side, each under its title (tutorial §5).

    Args:
        path: the PNG to write.
        **grids: uint8 `[N, 3, H, W]` by title; an underscore in a title is shown as a space.
    """
    from matplotlib.figure import Figure  # 0.5 s to import, so only where it is used

    figure = Figure(figsize=(7 * len(grids), 7.4), layout="constrained")
    for axes, (title, images) in zip(
            figure.subplots(1, len(grids), squeeze=False)[0], grids.items(), strict=True):
        axes.imshow(grid(images))
        axes.set_title(title.replace("_", " "), fontsize=16)
        axes.axis("off")
    with replacing(path) as file:
        figure.savefig(file, format="png")


# -------------------------------------------------------------------------------------------------
# the reader


class FaceReader:
    """Shuffled uint8 batches from a folder of images (tutorial §3.1).

    Every image is decoded once, into one packed file in the folder itself (`.faces-64-….uint8`)
    that is mapped into memory, so that any number of processes share it and a dataset larger than
    memory is no trouble. In the file's name is a digest of the images' names, sizes and times;
    when an image is added, changed or removed, it is packed anew.

    Args:
        data_path: folder, searched recursively; images of another size than `image_size` are
            cropped to a central square and resized with anti-aliasing.
        image_size: height and width S of a training image, pixels.
        batch_size: images per batch and process.
        seed: of the shuffles.
        rank, world_size: this process and the number of processes; each reads its own share.

    Attributes:
        images: uint8 `[N, 3, S, S]`, read-only, mapped from the packed file.
        digest: hexadecimal digest of `images`.

    Raises:
        Problem: no folder, no image in it, or fewer images than one batch.
    """

    def __init__(self, data_path, image_size, batch_size, seed, rank=0, world_size=1):
        self.batch_size, self.seed, self.rank, self.world_size = batch_size, seed, rank, world_size
        self.images, self.digest = _packed(Path(data_path), image_size)
        if len(self) == 0:
            number, each = len(self.images), f" on each of {world_size} processes"
            raise Problem(f"{data_path} has {number} images, too few for a batch of {batch_size}"
                          f"{each if world_size > 1 else ''}: pass --batch_size"
                          f" {max(1, number // world_size)} or less, or add images")

    def __len__(self):
        """Batches per epoch; the last partial batch is dropped."""
        return len(self.images) // self.world_size // self.batch_size

    def epoch(self, epoch, start=0):
        """Yield the batches of one epoch, from batch number `start` (0 is the first) on.

        The order depends on (seed, epoch) alone, so any batch can be reached at once.

        Yields:
            uint8 `[batch_size, 3, S, S]`.
        """
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.images))
        order = order[self.rank::self.world_size]
        for batch in range(start, len(self)):
            yield self.images[order[batch * self.batch_size:(batch + 1) * self.batch_size]]

    def sample(self, count):
        """Choose images to look at, by the seed alone: uint8 `[N, 3, S, S]`, N ≤ count."""
        order = np.random.default_rng(self.seed).permutation(len(self.images))
        return self.images[order[:count]]


DIGEST = hashlib.sha1().digest_size  # bytes at the end of a packed file


def _packed(folder, size):
    """Map the packed images of a folder and read their digest; pack them first if need be."""
    if not folder.is_dir():
        raise Problem(f"{folder} is not a folder of images: run `python pretreat.py` on CelebA's"
                      " photos, or `python pretreat.py --demo`, which needs no download")
    files = list_files(folder)
    state = hashlib.sha1(usedforsecurity=False)
    place = os.open(folder, os.O_RDONLY)  # a tenth faster than whole paths
    try:
        for name in files:
            info = os.stat(name, dir_fd=place)
            state.update(f"{name}\0{info.st_size}\0{info.st_mtime_ns}\0".encode(errors="replace"))
    finally:
        os.close(place)
    path = folder / f".faces-{size}-{state.hexdigest()[:16]}.uint8"
    each = 3 * size * size
    if not path.exists() or path.stat().st_size % each != DIGEST:
        _pack(files, size, path)
        for old in set(folder.glob(f".faces-{size}-*.uint8")) - {path}:
            old.unlink(missing_ok=True)
    packed = np.memmap(path, np.uint8, "r")
    return packed[:-DIGEST].reshape(-1, 3, size, size), packed[-DIGEST:].tobytes().hex()


def _pack(files, size, path):
    """Decode files, in their order, into the packed file `path`; report those that are no images.

    Raises:
        Problem: none of them is an image, or the packed file cannot be written.
    """
    def decode(name):
        """Return the pixels as bytes, or why there are none as a string."""
        try:
            image = read_image(path.parent / name)
        except Exception as error:  # PIL raises almost anything for a damaged file
            return f"skipped {path.parent / name}: {why_unreadable(error)}"
        if image.size != (size, size):
            from skimage.transform import resize  # 1 s to import, and crops need no resizing

            image = ImageOps.fit(image, (min(image.size),) * 2)
            image = resize(np.asarray(image), (size, size), anti_aliasing=True, preserve_range=True)
            image = image.round().clip(0, 255).astype(np.uint8)
        return np.asarray(image).transpose(2, 0, 1).tobytes()

    make_folder(path.parent)
    count, digest = 0, hashlib.sha1(usedforsecurity=False)
    with replacing(path) as packed:
        for pixels in in_processes(
                decode, files, f"packing {path.parent}", len(os.sched_getaffinity(0))):
            if isinstance(pixels, str):
                say(pixels)
                continue
            packed.write(pixels)
            digest.update(pixels)
            count += 1
        if count == 0:
            raise Problem(f"{path.parent} holds no images: run `python pretreat.py` on CelebA's"
                          " photos, or `python pretreat.py --demo`, which needs no download")
        packed.write(digest.digest())


def main():
    options = command_line(globals(), image_size=SIZES, seed=0)
    reader = FaceReader(options.data_path, options.image_size, 1, options.seed)
    chosen = reader.sample(100)
    path = make_folder(options.output_path) / "training_images.png"
    save_png(path, grid(chosen, columns=10))
    print(f"{len(chosen)} of {len(reader.images)} images in {path}")


if __name__ == "__main__":
    run(main)
