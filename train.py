"""Train the DCGAN (tutorial §4 and §5).

    python train.py                                   # CelebA's crops in imgs/, on the GPU
    python train.py --batch_size 16 --learning_rate 0.0005 --epochs 6   # the demo, on a CPU
    python train.py --data_path photos --output_path Output/photos
    python train.py --restart                         # not go on with the run in Output/
    python -m paddle.distributed.launch --devices 0,1 train.py          # on two GPUs

Edit the settings below or pass them as flags. Everything is written to Output/:

    0003_0100.png           faces of the same latent vectors after epoch 3, batch 100
    losses.csv losses.png   both losses, D(x) and D(G(z)), iteration by iteration
    progress.gif            the first of those faces, from the first grid to the last
    real_vs_fake.png        training images beside generated ones, at the end
    generator.safetensors   what generator.py needs
    checkpoint.safetensors  what the same command needs to go on, exactly as if never stopped
"""

import contextlib
import ctypes
import fcntl
import hashlib
import os
import re
import signal
import threading
import time
from collections import deque
from pathlib import Path

from dataReader import (
    SIZES,
    FaceReader,
    Problem,
    command_line,
    grid,
    make_folder,
    read_image,
    replacing,
    run,
    save_gif,
    save_grids,
    save_png,
    say,
)
from network import (
    NOISES,
    Discriminator,
    Generator,
    average_weights,
    check_shapes,
    draw_faces,
    estimate_statistics,
    face_latents,
    latent,
    load_state,
    loss,
    margin,
    read_tensors,
    save_generator,
    use_device,
    write_tensors,
)

import numpy as np
import paddle
import paddle.distributed as dist
from paddle.nn import functional as F
from tqdm import tqdm

# -------------------------------------------------------------------------------------------------
# settings (each is also a flag, e.g. --batch_size 64)

# data
data_path = "imgs"       # folder of training images, searched recursively
image_size = 64          # height and width of an image: 32, 64 or 128 (run pretreat.py with it too)
# networks
z_dim = 100              # length of a latent vector
width = 64               # channels next to the image; 32 is twice as fast, but needs more epochs
noise = "normal"         # latent vectors: "normal" N(0, 1), or "uniform" U[0, 1)
# optimization
epochs = 8               # passes over the images
batch_size = 128         # images per iteration and process; fewer on a CPU, where 128 take 4 s
learning_rate = 0.0002   # Adam's, of both networks; halve it when the losses blow up
beta1 = 0.5              # Adam's decay of the mean gradient
beta2 = 0.999            # Adam's decay of the mean squared gradient
d_steps = 1              # discriminator steps per iteration
g_steps = 2              # generator steps per iteration; more when D wins (its loss goes to 0)
seed = 0                 # of weights, order and latent vectors
ema_decay = 0.999        # of the average of G's weights, which faces are drawn with; 0: no average
# the run
amp = False              # mixed precision, on a GPU: bfloat16, or float16 on one before Ampere
device = "auto"          # "gpu", "cpu", or "auto": the GPU if there is one that Paddle can use
output_path = "Output"   # where everything is written
log_every = 10           # iterations between updates of the bar and of losses.csv
sample_every = 100       # iterations between grids of faces; there is one after each epoch too
save_every = 200         # iterations between checkpoints, and after each epoch; less on a slow CPU
restart = False          # move an earlier run in output_path aside instead of going on with it

# -------------------------------------------------------------------------------------------------
# the algorithm


def descend(value, optimizer, scaler):
    """One optimizer step down the gradient of a loss, which is averaged over the processes.

    Args:
        value: the loss, a 0-D tensor.
        optimizer: of the parameters to change.
        scaler: paddle.amp.GradScaler; not enabled unless training in float16, where it waits for
            the device to see whether the gradient has overflowed.
    """
    scaler.scale(value).backward()
    # before the scaler looks for an overflow, so that all processes see it or none
    average(parameter.grad for parameter in optimizer._parameter_list
            if not parameter.stop_gradient)
    scaler.step(optimizer)
    scaler.update()
    optimizer.clear_grad()


def d_step(D, optimizer, scaler, real, fake):
    """Teach D to tell real images from generated ones: one Adam step on the sum of both losses.

    Args:
        D: the discriminator.
        optimizer, scaler: of D's parameters.
        real, fake: images `[N, 3, S, S]` in [-1, 1]; no gradient flows on into `fake`.

    Returns:
        (loss, D(x), D(G(z))), 0-D tensors: the sum of the two losses in nats, and the mean
        probabilities of being real that D gave.
    """
    logits_real, logits_fake = D(real), D(fake.detach())
    d_loss = loss(logits_real, 1) + loss(logits_fake, 0)
    descend(d_loss, optimizer, scaler)
    with paddle.no_grad():
        return (d_loss.detach(), F.sigmoid(margin(logits_real)).mean(),
                F.sigmoid(margin(logits_fake)).mean())


def g_step(D, optimizer, scaler, fake):
    """Teach G to make images that D calls real: one Adam step.

    Args:
        D: the discriminator; its parameters are frozen meanwhile.
        optimizer, scaler: of G's parameters.
        fake: images `[N, 3, S, S]` that G made, with the way back to its parameters.

    Returns:
        The loss in nats, a 0-D tensor.
    """
    frozen = [parameter for parameter in D.parameters() if not parameter.stop_gradient]
    for parameter in frozen:
        parameter.stop_gradient = True
    g_loss = loss(D(fake), 1)
    descend(g_loss, optimizer, scaler)
    for parameter in frozen:
        parameter.stop_gradient = False
    return g_loss.detach()


def iterate(nets, optimizers, scalers, images, z, d_steps, amp=None):
    """One iteration: `d_steps` discriminator steps, then generator steps (§4).

    The first generator step is on the images that the last discriminator step saw, which saves
    making them again; D has changed since, so its verdict on them is new.

    Args:
        nets, optimizers, scalers: dicts with the keys "D" and "G".
        images: uint8 tensor `[N, 3, S, S]`.
        z: latent vectors, a tensor `[draws, N, z_dim]`; there are draws - d_steps + 1 generator
            steps.
        d_steps: discriminator steps.
        amp: "bfloat16" or "float16" for mixed precision, None for float32.

    Returns:
        Tensor `[4]`: D's loss, G's loss, D(x), D(G(z)), of the last step of each network. It stays
        on the device, so that the device need not be waited for.
    """
    D, G = nets["D"], nets["G"]
    real = images.astype("float32") / 127.5 - 1
    # conv2d_transpose is not on Paddle's own list. BN keeps its statistics in float32.
    with paddle.amp.auto_cast(amp is not None, {"conv2d_transpose"}, dtype=amp or "float16"):
        for draw in range(d_steps):
            fake = G(z[draw])
            d_loss, d_real, d_fake = d_step(D, optimizers["D"], scalers["D"], real, fake)
        g_loss = g_step(D, optimizers["G"], scalers["G"], fake)
        for draw in range(d_steps, len(z)):
            g_loss = g_step(D, optimizers["G"], scalers["G"], G(z[draw]))
    return paddle.stack([d_loss, g_loss, d_real, d_fake])


class Batches(paddle.io.IterableDataset):
    """What the iterations of an epoch need, for paddle.io.DataLoader.

    Args:
        reader: the FaceReader.
        options: the settings.
        step: number of iterations done; the epoch goes on from there.
        offset: the step before epoch 1, see `epoch_offset`.

    Attributes:
        error: what ended the last pass before its end, or None. An exception in the loader's
            thread would leave the training waiting for ever.

    Yields:
        (images, z), numpy arrays that the loader makes the tensors of that `iterate` takes. (seed,
        number of the iteration, rank) determine the latent vectors.
    """

    def __init__(self, reader, options, step, offset=0):
        self.reader, self.options, self.step, self.error = reader, options, step, None
        self.offset = offset

    def __iter__(self):
        options, step = self.options, self.step
        epoch, start = divmod(step - self.offset, len(self.reader))
        try:
            for images in self.reader.epoch(epoch + 1, start):
                step += 1
                yield images, np.stack([
                    latent([options.seed, step, self.reader.rank, draw],
                           [len(images), options.z_dim], options.noise)
                    for draw in range(1, options.d_steps + options.g_steps)])
        except Exception as error:
            self.error = error


# -------------------------------------------------------------------------------------------------
# several processes, one a device, started by Paddle's launcher; a single one needs nobody


def average(tensors):
    """Set tensors to their mean over the processes, in one message; float32, the same on all."""
    if dist.get_world_size() > 1:
        tensors = list(tensors)
        with paddle.no_grad():
            flat = paddle.concat([tensor.reshape([-1]) for tensor in tensors])
            dist.all_reduce(flat)
            parts = paddle.split(
                flat / dist.get_world_size(), [int(np.prod(tensor.shape)) for tensor in tensors])
            for tensor, part in zip(tensors, parts, strict=True):
                paddle.assign(part.reshape(tensor.shape), tensor)


def from_first(value):
    """Return, on all processes, what the one of rank 0 has."""
    values = [value]
    if dist.get_world_size() > 1:
        dist.broadcast_object_list(values, 0)
    return values[0]


def check_same(value, what):
    """Check that all processes have the same value.

    Raises:
        Problem: they have not; `what` is named.
    """
    values = [value]
    if dist.get_world_size() > 1:
        values.clear()
        dist.all_gather_object(values, value)
    if any(other != value for other in values):
        raise Problem(f"{what} differ between the processes")


def begin(options):
    """Make the FaceReader of this process, have the device used, and join the other processes.

    The first process on a machine packs the images, the others wait for it.

    Raises:
        Problem: see FaceReader and `use_device`; or the processes have not the same settings and
            images.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    first = os.environ.get("PADDLE_RANK_IN_NODE", "0") == "0"
    if world > 1:  # the launcher ends all when one has ended, or it is told to
        for number in signal.SIGINT, signal.SIGTERM:
            signal.signal(number, signal.SIG_DFL)
    if "PADDLE_TRAINER_ID" in os.environ:  # if it is killed, they end too: PR_SET_PDEATHSIG
        ctypes.CDLL(None).prctl(1, signal.SIGKILL if world > 1 else signal.SIGTERM)

    def make():
        return FaceReader(options.data_path, options.image_size, options.batch_size, options.seed,
                          rank, world)

    if first:  # before the device is in use, since packing forks this process
        reader = make()
    else:
        say("waiting for the first process, which packs the images if need be")
    use_device(options.device)
    if world > 1:
        device = paddle.get_device()
        dist.init_parallel_env()
        if device.split(":")[0] != paddle.get_device().split(":")[0]:
            raise Problem(f"--device {options.device} is {device}, but the launcher is for"
                          f" {paddle.get_device()}: pass --device cpu with --backend gloo, or"
                          " leave both")
        dist.barrier()
    if not first:
        reader = make()
    check_same((vars(options), reader.digest), "the settings or the images")
    return reader


def epoch_offset(info, reader):
    """The step before epoch 1, had all epochs the length they have with this many processes.

    Args:
        info: of the checkpoint to go on from.
        reader: the FaceReader, which knows the length of an epoch.

    Raises:
        Problem: the number of processes is another, and the epoch is not at its end.
    """
    if info["processes"] == reader.world_size:
        return info["offset"]
    epochs, batch = divmod(info["step"] - info["offset"], info["batches"])
    if batch:
        raise Problem(
            f"the run had {info['processes']} processes, not {reader.world_size}, and is at batch"
            f" {batch} of {info['batches']}: start as many as it had, since the number can change"
            " only between two epochs")
    return info["step"] - epochs * len(reader)


# -------------------------------------------------------------------------------------------------
# the checkpoint

# What may differ when a run goes on: none of it changes an iteration.
FREE = {"data_path", "epochs", "device", "output_path", "log_every", "sample_every", "save_every",
        "restart"}


def _adam(net):
    """Yield (name, key, shape) of each tensor of the state of `net`'s Adam.

    The name begins with that of the parameter in `net`, Paddle's key with one that it makes up.
    """
    for name, value in net.state_dict().items():
        if not value.stop_gradient:
            for moment in "moment1", "moment2":
                yield f"{name}.{moment}", f"{value.name}_{moment}_0", value.shape
            for power in "beta1_pow_acc", "beta2_pow_acc":
                yield f"{name}.{power}", f"{value.name}_{power}_0", [1]


def save_checkpoint(path, nets, optimizers, info):
    """Save all that training changes: the networks and Adam's moments and powers.

    Args:
        path: of the file.
        nets: the networks by name: G, D and the average of G.
        optimizers: those of G and D.
        info: the step, the settings, the state of the scalers.

    Raises:
        Problem: a weight is not finite, or the file cannot be written.
    """
    tensors = {}
    for name, net in nets.items():
        tensors |= {f"{name}.{key}": value.numpy() for key, value in net.state_dict().items()}
        if name in optimizers:
            state = optimizers[name].state_dict()
            tensors |= {f"{name}.{own}": state[key].numpy() for own, key, _ in _adam(net)}
    for name, value in tensors.items():
        if not np.isfinite(value).all():
            raise Problem(f"{name} is no longer finite at iteration {info['step']}; {DIVERGED}")
    write_tensors(path, tensors, {"kind": "checkpoint", **info})


def load_checkpoint(path, nets, optimizers, tensors):
    """Set networks and optimizers from the tensors of a checkpoint.

    Raises:
        Problem: they are of other networks; `path` is named.
    """
    check_shapes(tensors, {
        f"{name}.{key}": shape for name, net in nets.items() for key, shape in [
            *((key, value.shape) for key, value in net.state_dict().items()),
            *((own, shape) for own, _, shape in _adam(net) if name in optimizers)]}, path)
    for name, net in nets.items():
        load_state(net, {key: tensors[f"{name}.{key}"] for key in net.state_dict()}, path)
    for name, optimizer in optimizers.items():
        optimizer.set_state_dict({key: paddle.to_tensor(tensors[f"{name}.{own}"])
                                  for own, key, _ in _adam(nets[name])})


def _lock(path):
    """Create a folder and lock it for this process: return its Path and the open lock file.

    Raises:
        Problem: another process has it.
    """
    folder = make_folder(path)
    if Path.cwd().is_relative_to(folder.resolve()):
        raise Problem(f"--output_path {path} must be a folder of its own")
    lock = open(folder / ".lock", "a+")  # noqa: SIM115, open until the process ends
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        moved = not os.path.samestat(os.fstat(lock.fileno()), os.stat(lock.name))
    except (BlockingIOError, FileNotFoundError):
        moved = True
    if moved:
        raise Problem(f"another train.py is writing to {folder}: wait for it, or pass another"
                      " --output_path")
    return folder, lock


def open_output(options, settings):
    """Take hold of the output folder, and read the checkpoint to go on from, if there is one.

    Args:
        options: the settings.
        settings: those that change the result, with what else must be the same to go on.

    Returns:
        (folder, lock, tensors, info), what the checkpoint holds; tensors and info are None for a
        new run. The folder is this process's own as long as the file `lock` is open.

    Raises:
        Problem: another process has it, or what is in it cannot be gone on from.
    """
    folder, lock = _lock(options.output_path)
    path = folder / "checkpoint.safetensors"
    if options.restart and any(folder.glob("*.safetensors")):
        number = 1
        while (aside := folder.with_name(f"{folder.name}.{number}")).exists():
            number += 1
        try:
            folder.rename(aside)
        except OSError as error:
            raise Problem(f"cannot move {folder} aside ({error.strerror}): pass another"
                          " --output_path") from error
        say(f"the run in {folder} is now in {aside}")
        lock.close()
        folder, lock = _lock(options.output_path)

    ways = "pass another --output_path, or --restart to move the old run aside"
    if not path.exists():
        if (folder / "generator.safetensors").exists():
            raise Problem(f"{folder} holds a generator, but no checkpoint to go on from: {ways}")
        return folder, lock, None, None
    try:
        tensors, info = read_tensors(path, "checkpoint")
        old = dict(info["settings"])
        for name in "step", "processes", "batches", "offset":
            info[name] = int(info[name])
        info["scalers"] = {name: dict(info["scalers"][name]) for name in ("G", "D")}
    except (KeyError, TypeError, ValueError) as error:
        raise Problem(f"{path} is not a checkpoint that train.py saved; {ways}") from error
    except Problem as problem:
        raise Problem(f"{problem}; {ways}") from problem
    different = [f"{name} {old.get(name)} (now {settings.get(name)})"
                 for name in sorted({*old, *settings}) if old.get(name) != settings.get(name)]
    if different:
        raise Problem(f"the run in {folder} has {', '.join(different)}: set it back, {ways}")
    return folder, lock, tensors, info


# -------------------------------------------------------------------------------------------------
# the run


DIVERGED = ("the last checkpoint, if there is one, is kept. What usually helps: half the"
            " --learning_rate, with another --output_path or --restart")


class Stops:
    """While entered: the first SIGINT or SIGTERM is noted in `signal`, another ends the process.

    One within a second is the same, since Paddle's launcher sends several.

    A thread watches for them, since Python's own handlers wait for Paddle's call to return, which
    takes seconds on a CPU.
    """

    signal = 0

    def __enter__(self):
        self.reader, self.writer = os.pipe()
        os.set_blocking(self.writer, False)
        signal.set_wakeup_fd(self.writer)
        self.before = {number: signal.signal(number, lambda *_: None)
                       for number in (signal.SIGINT, signal.SIGTERM)}
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self):
        noted = None
        while number := os.read(self.reader, 1):
            if self.signal:
                if time.monotonic() > noted + 1:
                    os._exit(128 + number[0])
            else:
                self.signal, noted = number[0], time.monotonic()
                say("stopping after this iteration; once more to stop at once")
        os.close(self.reader)

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(-1)
        os.close(self.writer)  # which ends the thread


def draw_losses(source, path):
    """Draw losses.csv (§5): the losses, and below them D(x) and D(G(z)).

    The faint lines are the values, the strong ones their means over a fiftieth of the run.

    Args:
        source: the csv.
        path: the PNG to write.
    """
    from matplotlib.figure import Figure  # 0.5 s to import, so only where it is used

    step, _, _, d_loss, g_loss, d_real, d_fake = np.genfromtxt(
        source, delimiter=",", ndmin=2)[1:].T
    if len(step) == 0:  # the csv was lost
        return
    span = max(1, len(step) // 50)
    figure = Figure(figsize=(9, 8), layout="constrained")
    losses, verdicts = figure.subplots(2, sharex=True)
    for axes, color, label, values in (
            (losses, "C0", "generator G", g_loss), (losses, "C1", "discriminator D", d_loss),
            (verdicts, "C2", "D(x), real images", d_real),
            (verdicts, "C3", "D(G(z)), generated images", d_fake)):
        axes.plot(step, values, color, alpha=0.25, linewidth=0.5)
        axes.plot(np.convolve(step, np.ones(span) / span, "valid"),
                  np.convolve(values, np.ones(span) / span, "valid"), color, label=label)
    losses.set_title("Losses of generator and discriminator")
    losses.set_ylabel("loss (nats)")
    losses.set_ylim(0, 1.1 * max(1, *np.quantile([d_loss, g_loss], 0.95, axis=1)))  # no spikes
    verdicts.set_title("What the discriminator takes for real")
    verdicts.set_ylabel("probability of being real")
    verdicts.set_ylim(0, 1)
    verdicts.set_xlabel("iteration")
    for axes in losses, verdicts:
        axes.legend(loc="upper right")
        axes.grid(alpha=0.3)
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=120)


def draw_progress(folder, size):
    """Make progress.gif of the grids in a folder: their first 6×6 faces, in 60 frames at most.

    Args:
        folder: the Path where the grids are, and where the GIF goes.
        size: height and width of a face, pixels.
    """
    grids = sorted((path for path in folder.glob("*.png") if re.fullmatch(r"\d+_\d+", path.stem)),
                   key=lambda path: [int(part) for part in path.stem.split("_")])
    if not grids:  # they were removed
        return
    chosen = np.unique(np.linspace(0, len(grids) - 1, 60).round().astype(int))
    edge = 6 * (size + 2) + 2
    save_gif(folder / "progress.gif", [
        read_image(grids[number]).crop((0, 0, edge, edge)) for number in chosen], 150, 2000)


LONG = 300  # iterations without a success of G's after which D has won


def d_has_won(recent):
    """Whether D has not been fooled for long, while G's loss has risen.

    Args:
        recent: (G's loss, D(G(z))) of the last `LONG` iterations, or of fewer, which is too early.
    """
    if len(recent) < LONG:
        return False
    g_loss, d_fake = np.transpose(recent)
    return d_fake.max() < 0.01 and g_loss[-LONG // 3:].mean() > g_loss[:LONG // 3].mean()


def amp_type(wanted):
    """The type for mixed precision: bfloat16 on a GPU that has it, else float16; None on a CPU."""
    if not wanted:
        return None
    if paddle.get_device() == "cpu":
        say("amp is off: it is for GPUs")
        return None
    return "bfloat16" if paddle.device.cuda.get_device_capability() >= (8, 0) else "float16"


def train(options):
    """Train, from scratch or from the checkpoint, and write what the docstring of this file lists.

    Raises:
        Problem: something in the settings, the data or the files that the user can put right, or
            a loss that is not finite.
        SystemExit: after SIGINT or SIGTERM, once the iteration is done and saved.
    """
    reader = begin(options)
    rank, world = reader.rank, reader.world_size
    if paddle.get_device() != "cpu":
        paddle.set_flags({"FLAGS_cudnn_exhaustive_search": True})
    amp = amp_type(options.amp)
    settings = {name: value for name, value in vars(options).items() if name not in FREE}
    settings["amp"] = amp or "float32"
    settings["images"] = f"{len(reader.images)} of digest {reader.digest[:8]}"
    output, lock, tensors, info = open_output(options, settings) if rank == 0 else [None] * 4
    output, tensors, info = from_first((output, tensors, info))
    step, offset = (info["step"], epoch_offset(info, reader)) if info else (0, 0)

    paddle.seed(options.seed)
    G = Generator(options.z_dim, options.image_size, options.width)
    D = Discriminator(options.image_size, options.width)
    averaged = Generator(options.z_dim, options.image_size, options.width)
    averaged.eval()
    average_weights(averaged, G, 0)
    nets = {"G": G, "D": D, "average": averaged}
    optimizers = {name: paddle.optimizer.Adam(
        options.learning_rate, options.beta1, options.beta2, parameters=nets[name].parameters())
        for name in ("G", "D")}
    scalers = {name: paddle.amp.GradScaler(amp == "float16") for name in optimizers}
    checkpoint, csv = output / "checkpoint.safetensors", output / "losses.csv"
    total = offset + options.epochs * len(reader)
    if tensors:
        load_checkpoint(checkpoint, nets, optimizers, tensors)
        for name, scaler in scalers.items():
            scaler.load_state_dict(info["scalers"][name])  # does nothing unless it is enabled
        say(f"{output}: " + (f"going on after iteration {step} of {total}" if step < total else
                             f"finished after {step} iterations; pass more --epochs to go on"))
    elif world > 1:
        for net in nets.values():
            for value in net.state_dict().values():
                dist.broadcast(value, 0)
    rows = []
    if tensors and csv.exists():  # what came after the checkpoint will come again
        rows = re.findall(r"^\d+,\d+,\d+(?:,-?\d+(?:\.\d+)?(?:e[-+]\d+)?){4}\n",
                          csv.read_text(errors="replace"), re.M)
        rows = [row for row in rows if int(row.split(",")[0]) <= step]
    if len(rows) < step and rank == 0:
        say(f"{csv} lacks {step - len(rows)} iterations before the checkpoint")
    if rank == 0:
        with replacing(csv) as file:
            file.write("".join(
                ["step,epoch,batch,d_loss,g_loss,d_real,d_fake\n", *rows]).encode())

    fixed_z = face_latents(options.seed, range(100), options.z_dim, options.noise)

    pending = []  # what the device has still to tell, one tensor an iteration
    # G's loss and D(G(z)); emptied once D has won, so that it is said now and then
    recent = deque(([float(row.split(",")[at]) for at in (4, 6)] for row in rows), maxlen=LONG)

    def log():
        values = paddle.stack(pending)
        average([values])
        values = values.numpy()
        first = step - len(pending)
        pending.clear()
        lines = ""
        for at, value in enumerate(values, first):
            if not np.isfinite(value).all():
                raise Problem(f"the loss of iteration {at + 1} is not finite; {DIVERGED}")
            epoch, batch = divmod(at - offset, len(reader))
            lines += ",".join([f"{at + 1},{epoch + 1},{batch + 1}",
                               *(f"{number:.6g}" for number in value)]) + "\n"
            recent.append(value[[1, 3]])
        try:
            table.write(lines.encode())
        except OSError as error:
            raise Problem(f"cannot write {csv}: {error.strerror}") from error
        bar.set_description(f"epoch {epoch + 1}/{options.epochs} it {step}/{total}", False)
        bar.set_postfix_str(
            "D {:.3f} G {:.3f} D(x) {:.2f} D(G(z)) {:.2f}".format(*values[-1]), False)
        bar.update(len(values) * options.batch_size * world)
        if d_has_won(recent) and rank == 0:
            recent.clear()
            say(f"iteration {step}: D has won, no face has fooled it for {LONG} iterations, and G"
                " learns little. What usually helps: --g_steps 3, or half the --learning_rate,"
                " with --restart or another --output_path; or more images")

    def save():
        average(value for net in (G, D) for value in net.parameters()
                if value.stop_gradient)  # BN's statistics
        if world > 1:
            digest = hashlib.sha256(b"".join(
                value.numpy().tobytes() for net in (G, D) for value in net.parameters()))
            check_same(digest.hexdigest(), f"the networks at iteration {step}")
        if rank:
            return
        os.fsync(table.fileno())
        # each is empty unless enabled; the scale is an array, which JSON cannot hold
        states = {name: {key: np.asarray(value).tolist() for key, value in
                         scaler.state_dict().items()} for name, scaler in scalers.items()}
        save_checkpoint(checkpoint, nets, optimizers, {
            "step": step, "settings": settings, "scalers": states, "processes": world,
            "batches": len(reader), "offset": offset})
        save_generator(output / "generator.safetensors", averaged, G, options.noise, step)

    def record():
        draw_losses(csv, output / "losses.png")
        draw_progress(output, options.image_size)

    drawn = time.monotonic()
    stops = Stops()
    each = options.batch_size * world
    with (open(os.devnull if rank else csv, "ab", buffering=0) as table,
          stops if world == 1 else contextlib.nullcontext(),
          tqdm(total=max(step, total) * each, initial=step * each, unit="img", unit_scale=True,
               disable=rank > 0) as bar):
        while step < total:
            epoch, start = divmod(step - offset, len(reader))
            # The loader copies the next batch to the device while the present one computes.
            batches = Batches(reader, options, step, offset)
            loader = paddle.io.DataLoader(batches, batch_size=None)
            for batch, (images, z) in enumerate(loader, start + 1):
                step += 1
                pending.append(iterate(nets, optimizers, scalers, images, z, options.d_steps, amp))
                # Warmed up: at first the average spans the last tenth of the iterations, so that a
                # short run does not draw with the weights that it began with.
                average_weights(averaged, G, min(options.ema_decay, (1 + step) / (10 + step)))
                last, stop = batch == len(reader), stops.signal
                sample = last or step % options.sample_every == 0
                store = last or step % options.save_every == 0 or stop
                if sample or store or step % options.log_every == 0:
                    log()
                if sample or store:  # on all processes: gloo waits for the first for 30 s only
                    estimate_statistics(averaged, options.noise)
                if sample and rank == 0:
                    save_png(output / f"{epoch + 1:04d}_{batch:04d}.png",
                             grid(draw_faces(averaged, fixed_z)))
                if store:
                    save()
                if last and rank == 0 and time.monotonic() > drawn + 60:
                    record()
                    drawn = time.monotonic()
                if stop:
                    say(f"stopped after iteration {step}, which is saved: the same command"
                        f"{' without --restart' if options.restart else ''} goes on")
                    raise SystemExit(128 + stop)
            if batches.error:
                raise batches.error

    if rank:
        return
    # Once more, for a run that was killed between its last checkpoint and here.
    save_generator(output / "generator.safetensors", averaged, G, options.noise, step)
    record()
    save_grids(output / "real_vs_fake.png",
               Real_faces=reader.sample(100), Generated_faces=draw_faces(averaged, fixed_z))
    print(f"{step} iterations done; to draw faces:"
          f" python generator.py --checkpoint {output / 'generator.safetensors'}")


def main():
    options = command_line(
        globals(), image_size=SIZES, z_dim=1, width=1, noise=NOISES, epochs=1,
        batch_size=1, learning_rate=[0.0, 1.0], beta1=[0.0, 1.0], beta2=[0.0, 1.0], d_steps=1,
        g_steps=1, seed=[0, 2**32], ema_decay=[0.0, 1.0], device=("auto", "gpu", "cpu"),
        log_every=1, sample_every=1, save_every=1)
    train(options)


if __name__ == "__main__":
    run(main)
