"""Face crops in, batches out (tutorial §3.1 and §3.2); here too is what all scripts share.

    python dataReader.py                     # Output/training_images.png, a 10×10 grid of imgs/
    python dataReader.py --data_path photos  # any folder of images, of any size
"""

import os
import signal
import sys

if sys.platform != "linux":
    sys.exit("these scripts are for Linux; on Windows it is in WSL2, on a Mac in a virtual machine")
if sys.version_info < (3, 10):  # noqa: UP036
    sys.exit(f"Python 3.10 or newer is needed; this is {sys.version.split()[0]}")
# While the rest loads, Ctrl-C ends a script at once, without a traceback. Not what imports this.
if (signal.getsignal(signal.SIGINT) is signal.default_int_handler
        and os.path.dirname(os.path.realpath(sys.argv[0]))
        == os.path.dirname(os.path.realpath(__file__))):
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import ast
import contextlib
import fcntl
import functools
import hashlib
import io
import itertools
import math
import re
import resource
import stat
import threading
import tokenize
import warnings
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL
from PIL import ExifTags, Image, ImageCms, ImageDraw, ImageFont, ImageOps, PngImagePlugin
from tqdm import tqdm

# --- settings (each is also a flag, e.g. --image_size 128) ---------------------------------------
data_path = "imgs"      # folder of training images, searched recursively
image_size = 64         # height and width of a training image, pixels
seed = 0                # another seed draws other images
flip = False            # mirror half of them
output_path = "Output"  # where training_images.png is written

# --- what every script shares --------------------------------------------------------------------
SIZES = (32, 64, 128)  # the image sizes that the networks can be built for
# of an image: red, green, blue. For another number also look at `to_rgb`, which makes these of a
# photo, `warn_if_black`, `save_png`, `save_grids`, pretreat.py's detectors, generator.py's
# `enlarge` and network.py's `vary_color`; and crop into an empty folder.
CHANNELS = 3
NO_MEMORY = re.compile(  # texts of Paddle, C++, oneDNN, CUDA, Python, the kernel and its loader
    "ResourceExhausted|bad_alloc|create a memory object|[Oo]ut of memory|start new thread|"
    "Cannot allocate memory|failed to map segment|MemoryError")


class Problem(Exception):
    """Something the user can put right; `run_script` prints it as one line, without a traceback."""


class Kind(NamedTuple):
    """What a setting may be."""

    words: str         # for who has set it to something else
    convert: Callable  # from a value in the file or a flag's text; or raises ValueError, TypeError
    flag: dict         # what argparse is told about the flag


def numeric(kind, least=-math.inf, below=math.inf):
    """The Kind of numbers, `kind` being int or float, `least` ≤ number < `below`; 4.0 is an int."""
    def convert(value):
        exact = float(str(value))  # through its text, since True is no number
        if not (math.isfinite(exact) and least <= exact < below and kind(exact) == exact):
            raise ValueError
        return kind(exact)

    words = "a whole number" if kind is int else "a number"
    if least > -math.inf:
        words += f", at least {least}"
    if below < math.inf:
        words += f" and less than {below}"
    return Kind(words, convert, {"metavar": kind.__name__})


whole_number = functools.partial(numeric, int)
real_number = functools.partial(numeric, float)


def one_of(*choices):
    """The Kind of a few values of one type."""
    def convert(value):
        for choice in choices:
            if value in (choice, str(choice)):
                return choice
        raise ValueError

    names = ", ".join(map(str, choices))
    return Kind(f"one of {names}", convert, {"metavar": type(choices[0]).__name__})


def as_path(value):
    path = os.fspath(value)
    if not path or "\0" in path:
        raise ValueError
    return os.path.expanduser(path)  # ~ is the home folder


YES_NO = Kind("True or False", one_of(True, False).convert,
              {"action": argparse.BooleanOptionalAction})
TEXT = Kind("a text", str, {"metavar": "str"})
PATH = Kind("a path", as_path, {"metavar": "path"})
# of settings that ALLOWED does not name
KINDS = {bool: YES_NO, int: whole_number(), float: real_number(), str: TEXT}

# --- what the settings above may be, and what --demo stands for ----------------------------------
ALLOWED = {"data_path": PATH, "image_size": one_of(*SIZES), "seed": whole_number(0, 2**32),
           "flip": YES_NO, "output_path": PATH}
DEMO = {"data_path": "demo/imgs", "output_path": "demo/Output"}


def read_settings(path):
    """What a script assigns in its section "settings": a dict from name to (line, comment)."""
    with tokenize.open(path) as file:  # which heeds a line like `# coding: gbk`
        above, _, below = file.read().partition("\n# --- settings")
    section = "#" + below.partition("\n# ---")[0]
    lines_above = above.count("\n") + 1
    settings = {}
    for statement in ast.parse(section).body:
        last_line = section.splitlines()[statement.end_lineno - 1]
        comment = last_line.partition("#")[2].strip()
        for node in ast.walk(statement):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                settings[node.id] = (lines_above + node.lineno, comment)
    return settings


def flag_parser(script, settings, kinds):
    """The argparse parser with a flag for each of `kinds`, a dict from name to Kind."""
    parser = argparse.ArgumentParser(
        description=script["__doc__"], formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s [--flag value ...]", allow_abbrev=False,
        argument_default=argparse.SUPPRESS)  # a flag that is not given is not in the result
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message} (see --help)\n")
    for name, kind in kinds.items():
        _, comment = settings.get(name, (0, "not set in the file"))
        text = f"{comment} (default: {script.get(name)})".replace("%", "%%")
        parser.add_argument(f"--{name}", help=text, **kind.flag)
    stands_for = " ".join(f"--{name} {value}" for name, value in script["DEMO"].items())
    parser.add_argument("--demo", action="store_true", default=False,
                        help=f"{stands_for}; flags beside it count more")
    return parser


def command_line(script):
    """Turn the settings in a script's `globals()` into flags; return them and `demo`, a Namespace.

    Every name that is assigned in its section "settings" becomes a flag, and the comment behind it
    the help. `ALLOWED` in the script is a dict from name to Kind, for other names the value tells;
    `DEMO` has the settings that --demo stands for. A value that cannot be meant, in the file or of
    a flag, ends the process with one line and status 2.
    """
    settings = read_settings(script["__file__"])
    kinds = {name: KINDS.get(type(script.get(name))) for name in settings} | script["ALLOWED"]
    for name, (line, _) in settings.items():
        if kinds[name] is None or name in ("demo", "help"):
            say(f"{Path(sys.argv[0]).name}: line {line}: {name} cannot be a flag, it can only be"
                " edited")
            del kinds[name]
    parser = flag_parser(script, settings, kinds)
    given = vars(parser.parse_args())
    options = argparse.Namespace(demo=given.pop("demo"))
    for name, kind in kinds.items():
        place, value = name, script.get(name)
        if name in given:
            place, value = f"--{name}", given[name]
        elif options.demo and name in script["DEMO"]:
            place, value = f"{name} in DEMO", script["DEMO"][name]
        elif name in settings:  # or else it has been commented out
            place = f"line {settings[name][0]}: {name}"
        try:
            setattr(options, name, kind.convert(value))
        except (TypeError, ValueError):
            parser.error(f"{place} is {value!r}, but must be {kind.words}")
    return options


class Messages:
    """In place of sys.stdout or sys.stderr: a message that cannot be delivered is no error.

    The terminal may be closed, the disk full, or a character not be in the terminal's encoding.
    """

    def __init__(self, stream):
        # None if it was closed; its number must not be given to a file with data
        self.stream = stream or open(os.devnull, "w")  # noqa: SIM115

    def write(self, text):
        encoding = self.stream.encoding or "utf-8"
        with contextlib.suppress(OSError, ValueError):
            self.stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def flush(self):
        with contextlib.suppress(OSError, ValueError):
            self.stream.flush()

    def __getattr__(self, name):
        return getattr(self.stream, name)


def report(kind, error, trace):
    """What Python calls at an error that ends it: one line, unless it is a mistake of the code."""
    line = "interrupted" if kind is KeyboardInterrupt else error_line(error)
    if line is None:
        sys.__excepthook__(kind, error, trace)
    else:
        print(f"{Path(sys.argv[0]).name}: {printable(line)}", file=sys.stderr)


if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # a script loads: see the top of this file
    sys.excepthook = report


def run_script(main):
    """Call a script's `main`; what is no mistake of the code ends in one line and status 1."""
    sys.stdout = Messages(sys.stdout)
    sys.stderr = Messages(sys.stderr)
    sys.excepthook = report
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # all has been loaded
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        main()
    except Exception as error:
        line = error_line(error)
        if line is None:
            raise
        # not left to `report`, since a notebook's %run has a hook of its own
        sys.exit(f"{Path(sys.argv[0]).name}: {printable(line)}")


def error_line(error):
    """What to tell the user about an error; None if it is a mistake of the code."""
    text = paddle_error_text(error)
    if isinstance(error, Problem):
        return str(error)
    if isinstance(error, MemoryError) or NO_MEMORY.search(str(error)):
        advice = ""
        if "paddle" in sys.modules:  # it was not an image that took too much
            advice = ": a smaller batch_size, width or image_size needs less"
        return f"out of memory{advice}; {text or type(error).__name__}"
    if re.search("(CU|NC)[A-Z]+ error", text):  # of CUDA, cuDNN, cuBLAS or NCCL
        return f"the GPU failed: {text}"
    if isinstance(error, OSError) and "(External)" not in str(error):  # Paddle's, of anything
        return f"{error.filename or 'input/output'}: {error.strerror or error}"
    return None


def paddle_error_text(error):
    """What an error of Paddle's says, on one line, without its hints and its place in C++."""
    text = re.split("Error Message Summary:|Error message in backward of [^=]*=+", str(error))[-1]
    sentence = re.split(r"\[Hint|\(at |Please check|\bAt:\n", text)[0]
    return " ".join(sentence.strip("- \n").split())


def printable(text):
    """A text with what could confuse a terminal, as an escape sequence in a name, written out."""
    return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in str(text))


def say(line):
    """One line on stderr, above a progress bar if there is one."""
    tqdm.write(printable(line), file=sys.stderr)


def cores(groups=Path("/sys/fs/cgroup")):
    """Cores that this process may use: by its affinity, and by a container's quota for its time.

    In a container, `groups` has the files of its own cgroup, version 2 or 1, as a rule. Quotas of a
    group outside any container, as Slurm or systemd may set, are not seen.
    """
    number = len(os.sched_getaffinity(0))
    with contextlib.suppress(OSError, ValueError):  # there is no quota, or it is "max"
        if (groups / "cpu.max").exists():
            quota, period = (groups / "cpu.max").read_text().split()
        else:
            quota = (groups / "cpu/cpu.cfs_quota_us").read_text()
            period = (groups / "cpu/cpu.cfs_period_us").read_text()
        if int(quota) > 0:
            number = min(number, math.ceil(int(quota) / int(period)))
    return number


THREADS = min(8, cores())  # more would wait for Python's lock


@contextlib.contextmanager
def locked(folder, refusal=None):
    """Keep other processes out of a folder meanwhile, by the kernel's lock on the folder itself.

    If another one has it: a Problem with the text `refusal`, or else its end is waited for.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if refusal:
                raise Problem(refusal) from error
            say(f"waiting for another process, which works in {folder}")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError as error:  # some network file systems have no locks
            say(f"{folder} cannot be locked ({error.strerror}): start no second process that"
                " writes there")
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def replacing(path, sync=True):
    """Open a binary file that takes the name `path` only when it has been written whole.

    Whatever happens on the way, be it a kill or a full disk, which raises a Problem, `path` is what
    it was before; `.NAME.tmp`, which a kill leaves, is overwritten the next time.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
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


def in_threads(function, items, title, threads, reasons):
    """Yield `function(item)` for each item of a list, in order, from a thread pool, under a bar.

    An item that raises an error, as PIL may any, is left out: see `leave_out`. Why is counted in
    `reasons`, a Counter.
    """
    def attempt(item):
        threading.current_thread().item = item
        try:
            return function(item), None
        except Exception as error:  # which is not handed on, since it holds what was decoded
            return None, leave_out(item, error)

    bar = tqdm(total=len(items), desc=title, unit="img")
    with warnings_of_items(), ThreadPoolExecutor(threads) as pool, bar:
        try:
            # a thousand at a time, so that few results wait for their turn
            for start in range(0, len(items), 1000):
                some = items[start:start + 1000]
                for result, reason in pool.map(attempt, some):
                    if reason is None:
                        yield result
                    else:
                        reasons[reason] += 1
                    bar.update()
        finally:
            pool.shutdown(cancel_futures=True)  # so an error or Ctrl-C waits for few of them


@contextlib.contextmanager
def warnings_of_items():
    """Print warnings meanwhile, each with the item that its thread of `in_threads` works on."""
    def show_warning(message, *_):
        item = getattr(threading.current_thread(), "item", "warning")
        say(f"{item}: {message}")

    with warnings.catch_warnings():
        warnings.showwarning = show_warning
        warnings.simplefilter("always", UserWarning)  # not of equal ones the first file's only
        yield


def leave_out(item, error):
    """Name an item that raised an error; return the reason without what differs between items.

    A Problem is raised if that is no fault of the item.
    """
    if isinstance(error, Problem):
        raise error
    if isinstance(error, MemoryError):
        raise Problem(f"memory ran out at {item}: end other programs, or move that file"
                      " elsewhere") from error
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    say(f"skipped {item}: {reason}")
    return re.split(r" \(| '| for file|: ", reason)[0]


def none_could_be_used(reasons):
    """What to say of files that were all left out, by the Counter of `in_threads`."""
    counted = ", ".join(f"{reason} ({count})" for reason, count in reasons.most_common(5))
    return f"no file could be used, of {sum(reasons.values())}: {counted}"


# --- images --------------------------------------------------------------------------------------
def list_files(folder):
    """Paths of all files below a folder but hidden ones, relative to it, sorted.

    Linked folders are not looked into; those that cannot be read are named.
    """
    paths = []
    inner_folders = [""]
    while inner_folders:  # os.walk calls itself, and gives up a thousand folders deep
        inner = inner_folders.pop()
        try:
            for entry in os.scandir(os.path.join(folder, inner)):
                path = os.path.join(inner, entry.name)
                if entry.name.startswith("."):
                    continue
                if entry.is_dir(follow_symlinks=False):
                    inner_folders.append(path)
                elif not (entry.is_symlink() and os.path.isdir(entry)):
                    paths.append(path)
        except OSError as error:
            if not inner:
                raise
            say(f"skipped the folder {inner}: {error.strerror}")
    return sorted(paths)


# What cameras, phones, scanners, the web and games make. Pillow knows more: PostScript, for which
# it starts Ghostscript, which runs it; ICO, whose images it decodes before their size can be asked.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "MPO", "HEIF", "AVIF", "JPEG2000", "PPM",
           "PSD", "DDS", "QOI", "PCX", "TGA")
LARGE = 2**25  # pixels of an image that is decoded while no other large one is, at most
BYTES_PER_PIXEL = 16  # at most, while an image is decoded and converted
one_large_image = threading.Lock()
# by EXIF's orientation; ImageOps.exif_transpose fails where it cannot write other metadata again
TURNS = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
         4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
         6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
         8: Image.Transpose.ROTATE_90}
Image.MAX_IMAGE_PIXELS = None  # `most_pixels` is the limit
# Bytes of a PNG's texts, or of its colour profile: image generators keep much there.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 2**28


@functools.cache
def formats():
    """Those of FORMATS that this Pillow can open, HEIF if pillow-heif is installed."""
    with contextlib.suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


@functools.cache
def most_pixels():
    """Of the largest image that is decoded; they fill half of the memory."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limits = [resource.getrlimit(resource.RLIMIT_AS)[0]]  # -1: none
    for name in "memory.max", "memory/memory.limit_in_bytes":  # a container's
        with contextlib.suppress(OSError, ValueError):
            limits.append(int(Path("/sys/fs/cgroup", name).read_text()))
    memory = min([memory, *(limit for limit in limits if limit > 0)])
    return min(memory // 2 // BYTES_PER_PIXEL, 2**29)  # Pillow's rows cannot be longer


def read_image(source):
    """Decode any image of FORMATS, a path or binary file, as an upright RGB `PIL.Image.Image`.

    EXIF rotation is undone, colours are converted to sRGB, transparency shows white, other levels
    are scaled to 8 bits (`to_8_bits`). An image of more than `most_pixels`, and what is none,
    truncated or damaged, raise almost any exception, with the reason as text.
    """
    if isinstance(source, str | os.PathLike) and not stat.S_ISREG(os.stat(source).st_mode):
        raise ValueError("not a regular file")
    try:
        image = Image.open(source, formats=formats())
    except PIL.UnidentifiedImageError as error:
        reason = "cannot identify image file"
        name = str(getattr(source, "name", source))  # of a file in a zip, or of a path
        if name.lower().endswith((".heic", ".heif")):
            reason = "HEIC, for which you need `python -m pip install pillow-heif`"
        raise ValueError(reason) from error
    with image:
        pixels = image.width * image.height
        if pixels > most_pixels():
            raise ValueError(f"its {image.width}×{image.height} pixels are too many for this"
                             f" computer's memory ({most_pixels() // 10**6} megapixels at most)")
        hidden = image.info.get("transparency")
        if isinstance(hidden, tuple) and "RGB;16B" in str(image.tile):
            # a colour of 16 bits, but Pillow keeps 8 of the image's
            image.info["transparency"] = tuple(level >> 8 for level in hidden)
        is_large = pixels > min(LARGE, most_pixels() // 8)
        with one_large_image if is_large else contextlib.nullcontext():
            image.load()
            return to_rgb(image)


def to_rgb(image):
    """A loaded image of any mode, with its metadata → an upright one of mode RGB, in sRGB."""
    turn = None
    with contextlib.suppress(Exception):  # metadata may be senseless
        turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    if turn is not None:
        image = image.transpose(turn)
    profile = image.info.get("icc_profile")
    if image.mode[0] in "IF":
        image = to_8_bits(image)
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    if image.mode not in ("L", "RGB", "CMYK"):
        image = image.convert("RGB")
    if profile:
        with contextlib.suppress(OSError, ImageCms.PyCMSError):  # one of other colours, or damaged
            transform = to_srgb(profile, image.mode)
            if transform is not None:
                image = transform.apply(image)
    return image if image.mode == "RGB" else image.convert("RGB")


@functools.lru_cache(16)  # to build one takes 5 ms, and a camera's photos have all the same
def to_srgb(profile, mode):
    """The transform from an ICC profile, its bytes, to sRGB; None if that is what it says it is."""
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    if ImageCms.getProfileDescription(source).startswith("sRGB"):
        return None
    return ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")


def to_8_bits(image):
    """Scale 16-bit, 32-bit or float levels by the range they are in: image → image of mode L.

    That is 8, 10, 12 or 16 bits, for floats 0 to 1, 255 or 65535, or else what they reach.
    """
    levels = np.asarray(image)
    finite = levels[np.isfinite(levels)]
    low = float(finite.min(initial=0))
    high = finite.max(initial=0)
    is_float = levels.dtype.kind == "f"
    ranges = (1, 255, 65535) if is_float else (255, 1023, 4095, 65535)
    top = next((each for each in ranges if high <= each), high)
    if is_float and 0 < high < top / 16:
        top = high
    scaled = (levels.astype(np.float32) - low) * (255 / (float(top) - low)) + 0.5
    pixels = np.nan_to_num(scaled).clip(0, 255).astype(np.uint8)
    pixels[levels == image.info.get("transparency", np.nan)] = 255
    return Image.fromarray(pixels)


def warn_if_black(image):
    """Warn of an RGB image without a level of 16 or more: its levels may have been misread."""
    if max(high for _, high in image.getextrema()) < 16:
        warnings.warn("it is nearly black", stacklevel=2)


def grid(images, columns=None):
    """Lay images out row by row, 2 white pixels apart: uint8 `[N, 3, H, W]` → `[height, width, 3]`.

    There are `columns` in a row, N if that is less; None: ceil(sqrt(N)). Missing cells are white.
    """
    from skimage.util import montage  # 0.15 s to import, so only where it is used

    columns = min(columns or int(np.ceil(np.sqrt(len(images)))), len(images))
    rows = -(-len(images) // columns)
    return montage(images.transpose(0, 2, 3, 1), fill=[255] * CHANNELS, padding_width=2,
                   channel_axis=-1, grid_shape=(rows, columns))


def save_png(path, picture, quick=False, origin=""):
    """Write a uint8 `[H, W, 3]` array, or a PIL image, as a PNG, with a text `origin` if given.

    One of thousands is `quick`: not synced, nor compressed, which makes pretreat.py a third faster.
    """
    texts = PngImagePlugin.PngInfo()
    if origin:
        texts.add_text("origin", origin)
    encoded = io.BytesIO()  # in a file PIL would write it bit by bit, which takes a third longer
    # as an array it has left behind the metadata of the photo
    Image.fromarray(np.asarray(picture)).save(
        encoded, "PNG", compress_level=0 if quick else 1, pnginfo=texts)
    with replacing(path, sync=not quick) as file:
        file.write(encoded.getbuffer())


def save_gif(path, frames, wait, rest):
    """Write an endless animation of PIL images; each is shown `wait` ms, the last one `rest` ms."""
    with replacing(path) as file:
        frames[0].save(file, "GIF", save_all=True, append_images=frames[1:], loop=0,
                       duration=[wait] * (len(frames) - 1) + [rest])


@contextlib.contextmanager
def figure_file(path, size, dpi):
    """Yield a figure of matplotlib's, `size` inches, which is then written to a PNG.

    By Agg and with matplotlib's own defaults, whatever the environment or a matplotlibrc says.
    """
    os.environ["MPLBACKEND"] = "Agg"  # a notebook's makes the import an error
    import matplotlib  # 0.5 s, so only where it is used
    from matplotlib.figure import Figure

    with matplotlib.rc_context(), replacing(path) as file:
        matplotlib.rcdefaults()
        figure = Figure(figsize=size, layout="constrained")
        yield figure
        figure.savefig(file, format="png", dpi=dpi)


def save_grids(path, grids):
    """Draw grids side by side (§5); `grids` is a dict from title to uint8 `[N, 3, H, W]`."""
    pictures = {title: grid(images) for title, images in grids.items()}
    height = max(picture.shape[0] for picture in pictures.values())
    width = max(picture.shape[1] for picture in pictures.values())
    margin = 40  # above each grid, for its title, and beside it
    canvas = Image.new("RGB", ((width + margin) * len(pictures), margin + height), "white")
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(24)
    for number, (title, picture) in enumerate(pictures.items()):
        left = number * (width + margin) + margin // 2
        draw.text((left + width // 2, margin // 2), title, "black", font, anchor="mm")
        canvas.paste(Image.fromarray(picture), (left, margin))
    save_png(path, canvas)


# --- the reader ----------------------------------------------------------------------------------
class FaceReader:
    """Shuffled uint8 batches from a folder of images (tutorial §3.1).

    `data_path` is searched recursively; images of another size than `image_size`, S, are cropped to
    a central square and resized with anti-aliasing. Each of `world_size` processes, `rank`, reads
    its own share of each epoch; with `flip` half of the images are mirrored, others in each epoch.
    Raises a Problem for no folder, or fewer images than one batch.

    Attributes:
        images: uint8 `[N, 3, S, S]`, read-only, mapped from the file that `packed` makes, so that
            processes share it and it may be larger than memory.
        digest: hexadecimal SHA-1 of `images`.
    """

    def __init__(self, data_path, image_size, batch_size, seed, rank=0, world_size=1, flip=False):
        self.batch_size = batch_size
        self.seed = seed
        self.flip = flip
        self.rank = rank
        self.world_size = world_size
        self.epoch_at_hand = None  # whose order is kept, since to draw it takes a while
        self.images, self.digest = packed(Path(data_path), image_size)
        if len(self) == 0:
            most = max(1, len(self.images) // world_size)
            raise Problem(f"{data_path} has {len(self.images)} images, too few for a batch of"
                          f" {batch_size} a process: pass --batch_size {most} or less, or add"
                          " images")

    def __len__(self):
        """Batches per epoch; the last partial batch is dropped."""
        return len(self.images) // self.world_size // self.batch_size

    def batch(self, epoch, number):
        """A batch of an epoch by its number, from 0: uint8 `[batch_size, 3, S, S]`.

        All depends on (seed, epoch) alone, so that any batch can be reached at once.
        """
        if self.epoch_at_hand != epoch:
            rng = np.random.default_rng([self.seed, epoch])
            self.order = rng.permutation(len(self.images))[self.rank::self.world_size]
            self.mirrored = self.flip & (rng.random(len(self.images)) < 0.5)
            self.epoch_at_hand = epoch
        chosen = self.order[number * self.batch_size:(number + 1) * self.batch_size]
        images = self.images[chosen]
        mirrored = self.mirrored[chosen]
        images[mirrored] = images[mirrored, ..., ::-1]
        return images

    def epoch(self, epoch, start=0):
        """Yield the batches of an epoch, from number `start` on."""
        for number in range(start, len(self)):
            yield self.batch(epoch, number)

    def sample(self, count):
        """Choose images to look at, by the seed alone: uint8 `[N, 3, S, S]`, N ≤ count."""
        order = np.random.default_rng(self.seed).permutation(len(self.images))
        return self.images[order[:count]]


def packed(folder, size):
    """Decode all images of a folder into one `.npy` in it, unless it is there: → it and its digest.

    The name is `.faces-SIZE-STATE-DIGEST.npy`: STATE is a digest of the files' names, sizes and
    times, so that a change is noticed and all are packed anew, DIGEST is that of the pixels. Raises
    a Problem if there is no folder or no image in it, or the file is damaged or cannot be written.
    """
    without_images = (f"{folder} is no folder of images: run `python pretreat.py` on CelebA's"
                      " photos, or `python pretreat.py --demo`, which needs no download")
    if not folder.is_dir():
        raise Problem(without_images)
    with locked(folder):  # before the files are listed: pretreat.py may be writing more
        files = list_files(folder)
        if not files:
            raise Problem(without_images)
        facts = hashlib.sha1(str(CHANNELS).encode(), usedforsecurity=False)
        for name in files:
            with contextlib.suppress(OSError):  # it will be named when it is read
                info = os.stat(f"{folder}/{name}")
                facts.update(os.fsencode(f"{name}\0{info.st_size}\0{info.st_mtime_ns}\0"))
        state = facts.hexdigest()[:16]
        if not list(folder.glob(f".faces-{size}-{state}-*.npy")):
            for old in folder.glob(f".faces-{size}-{'[0-9a-f]' * 16}-{'?' * 40}.npy"):
                old.unlink()
            pack(folder, files, size, state)
        path = next(folder.glob(f".faces-{size}-{state}-*.npy"))
        try:  # here, as another process that gets the lock may remove it
            return np.load(path, mmap_mode="r"), path.stem.split("-")[-1]
        except (ValueError, EOFError) as error:
            raise Problem(f"{path} is damaged: remove it, it will be made again") from error


def pack(folder, files, size, state):
    """Decode files, in their order, into the folder's `.faces-SIZE-STATE-DIGEST.npy`.

    Those that are no images are named and left out, so image k of it may not be file k. Raises a
    Problem if none is.
    """
    def decode(path):
        image = ImageOps.fit(read_image(path), (size, size), Image.Resampling.BILINEAR)
        warn_if_black(image)
        pixels = np.asarray(image).reshape(size, size, CHANNELS)
        return np.ascontiguousarray(pixels.transpose(2, 0, 1))

    def write_header(count):  # NumPy leaves room in it for any number
        np.lib.format.write_array_header_1_0(file, {
            "descr": "|u1", "fortran_order": False, "shape": (count, CHANNELS, size, size)})

    count = 0
    reasons = Counter()
    digest = hashlib.sha1(usedforsecurity=False)
    unnamed = folder / f".faces-{size}.npy"  # gets its final name when the digest is known
    with replacing(unnamed) as file:
        write_header(0)
        paths = [f"{folder}/{name}" for name in files]
        for image in in_threads(decode, paths, f"packing {folder}", THREADS, reasons):
            file.write(image)
            digest.update(image)
            count += 1
        if count == 0:
            raise Problem(f"{folder}: {none_could_be_used(reasons)}")
        file.seek(0)
        write_header(count)
    unnamed.rename(folder / f".faces-{size}-{state}-{digest.hexdigest()}.npy")


def check_outside(folder, data):
    """Raise a Problem if a folder to write to lies in one whose images are read, or is it."""
    if Path(folder).resolve().is_relative_to(Path(data).resolve()):
        raise Problem(f"{folder} lies in {data}: write elsewhere, or what is written would be read"
                      " as an image the next time")


def main():
    options = command_line(globals())
    check_outside(options.output_path, options.data_path)
    reader = FaceReader(options.data_path, options.image_size, 1, options.seed, flip=options.flip)
    images = np.concatenate(list(itertools.islice(reader.epoch(0), 100)))  # maybe mirrored
    path = Path(options.output_path) / "training_images.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_png(path, grid(images, columns=10))
    print(f"{len(images)} of {len(reader.images)} images in {path}")


if __name__ == "__main__":
    run_script(main)
