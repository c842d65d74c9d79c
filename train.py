"""Train the DCGAN (tutorial §4 and §5).

    python train.py                                   # CelebA's crops in imgs/, on the GPU
    python train.py --data_path demo/imgs --output_path demo/Output --width 16 --batch_size 16
    python train.py --data_path photos --output_path Output/photos --save_minutes 1
    python train.py --restart                         # not go on with the run in Output/
    python -m paddle.distributed.launch --devices 0,1 train.py          # on two GPUs

Edit the settings below or pass them as flags. Everything is written to Output/:

    0003_0100.png           faces of the same latent vectors after epoch 3, batch 100
    progress.gif            the first of those faces, from the first grid to the last
    losses.csv losses.png   both losses, D(x) and D(G(z)), iteration by iteration
    real_vs_fake.png        training images beside generated ones, at the end
    generator.safetensors   what generator.py needs
    checkpoint.safetensors  what the same command needs to go on, exactly as if never stopped
"""

import contextlib
import ctypes
import itertools
import os
import re
import signal
import time
from pathlib import Path

import numpy as np
from tqdm import tqdm

import dataReader
import network
import weightInit
from dataReader import PATH, YES_NO, Problem, one_of, real, say, whole
from weightInit import paddle

dist, F = paddle.distributed, paddle.nn.functional

# --- settings (each is also a flag, e.g. --batch_size 64) ----------------------------------------
# data
data_path = "imgs"       # folder of training images, searched recursively
image_size = 64          # height and width of an image: 32, 64 or 128 (run pretreat.py with it too)
# networks
z_dim = 100              # length of a latent vector
width = 64               # channels next to the image; 32 is twice as fast, but needs more epochs
noise = "normal"         # latent vectors: "normal" N(0, 1), or "uniform" U[0, 1)
# optimization
epochs = 8               # passes over the images
batch_size = 128         # images per iteration and process; fewer on a CPU, where 128 take seconds
learning_rate = 0.0002   # Adam's, of both networks; halve it when the losses blow up
beta1 = 0.5              # Adam's decay of the mean gradient
beta2 = 0.999            # Adam's decay of the mean squared gradient
d_steps = 1              # discriminator steps per iteration
g_steps = 2              # generator steps per iteration; more when D wins (its loss goes to 0)
augment = False          # vary what D sees, so that it cannot learn few images by heart
flip = False             # mirror half of the images, others in each epoch
seed = 0                 # of weights, order and latent vectors
ema_decay = 0.999        # of the average of G's weights, which faces are drawn with; 0: no average
# the run
amp = False              # mixed precision, on a GPU: bfloat16, or float16 on one before Ampere
device = "auto"          # "gpu", "cpu", or "auto": the GPU if there is one that Paddle can use
deterministic = False    # on a GPU: cuDNN's repeatable algorithms, not the fastest ones
output_path = "Output"   # where everything is written
log_every = 10           # iterations between updates of the bar and of losses.csv
sample_every = 500       # iterations between grids of faces; there is one at the end too
save_minutes = 5.0       # between checkpoints; what came after the last one is lost in a kill
restart = False          # move an earlier run in output_path aside instead of going on with it

# --- what they may be, and what --demo stands for ------------------------------------------------
ALLOWED = {
    "data_path": PATH, "image_size": one_of(*dataReader.SIZES),
    "z_dim": whole(1), "width": whole(1), "noise": one_of(*network.NOISES),
    "epochs": whole(1), "batch_size": whole(1),
    "learning_rate": real(1e-8, 1),  # float32 weights do not feel less
    "beta1": real(0, 1), "beta2": real(0, 1),
    "d_steps": whole(1), "g_steps": whole(1),
    "augment": YES_NO, "flip": YES_NO, "seed": whole(0, 2**32),
    "ema_decay": real(0, 1), "amp": YES_NO, "device": one_of("auto", "gpu", "cpu"),
    "deterministic": YES_NO, "output_path": PATH, "log_every": whole(1),
    "sample_every": whole(1), "save_minutes": real(0), "restart": YES_NO}
DEMO = {"data_path": "demo/imgs", "output_path": "demo/Output", "width": 16, "batch_size": 16,
        "learning_rate": 0.0005, "epochs": 17, "sample_every": 100}

# --- the algorithm -------------------------------------------------------------------------------
def descend(loss, net, optimizer, scaler):
    """One optimizer step of a network down the gradient of a loss, a 0-D tensor.

    `scaler`, a paddle.amp.GradScaler, does nothing unless training in float16.
    """
    scaler.scale(loss).backward()
    if dist.get_world_size() > 1:  # their mean, before the scaler looks for an overflow
        dist.fleet.utils.hybrid_parallel_util.fused_allreduce_gradients(net.parameters(), None)
    scaler.step(optimizer)
    scaler.update()
    optimizer.clear_grad(False)  # frees them; True would fill them with zeros


def d_step(D, optimizer, scaler, real, fake):
    """Teach D to tell real images from generated ones: one Adam step on the sum of both losses.

    `real` and `fake` are `[N, 3, S, S]` in [-1, 1]; no gradient flows on into `fake`. Returns 0-D
    tensors: that sum in nats, D(x) and D(G(z)), the mean probabilities of being real.
    """
    logits_real, logits_fake = D(real), D(fake.detach())
    d_loss = network.loss(logits_real, 1) + network.loss(logits_fake, 0)
    descend(d_loss, D, optimizer, scaler)
    return d_loss.detach(), *(F.sigmoid(network.margin(logits.detach())).mean()
                              for logits in (logits_real, logits_fake))


def g_step(G, D, optimizer, scaler, fake):
    """Teach G to make images that D calls real: one Adam step; returns the loss in nats, 0-D.

    `fake` are images `[N, 3, S, S]` with the way back to G's parameters; D's are frozen meanwhile.
    """
    frozen = [parameter for parameter in D.parameters() if not parameter.stop_gradient]
    for parameter in frozen:
        parameter.stop_gradient = True
    g_loss = network.loss(D(fake), 1)
    descend(g_loss, G, optimizer, scaler)
    for parameter in frozen:
        parameter.stop_gradient = False
    return g_loss.detach()


def iterate(nets, optimizers, scaler, images, z, d_steps, amp=None, draws=None):
    """One iteration: `d_steps` discriminator steps, then generator steps (§4).

    The first generator step is on the images that the last discriminator step saw, which saves
    making them again; D has changed since, so its verdict on them is new.

    Args:
        nets, optimizers: dicts with the keys "D" and "G".
        images: uint8 tensor `[N, 3, S, S]`.
        z: latent vectors, a tensor `[d_steps + generator steps - 1, N, z_dim]`.
        amp: "bfloat16" or "float16" for mixed precision, None for float32.
        draws: of `network.augment`, `[2·d_steps + generator steps, N, 7]`, or None.

    Returns:
        Tensor `[4]`, on the device: D's loss, G's loss, D(x), D(G(z)) of each network's last step.
    """
    G, D = nets["G"], nets["D"]
    real = images.astype("float32") / 127.5 - 1
    draws = itertools.repeat(None) if draws is None else iter(draws)
    # conv2d_transpose is not on Paddle's own list. BN keeps its statistics in float32.
    with paddle.amp.auto_cast(amp is not None, {"conv2d_transpose"}, dtype=amp or "float16"):
        for draw in range(d_steps):
            fake = G(z[draw])
            seen = [network.augment(half, next(draws)) for half in (real, fake)]
            d_loss, d_real, d_fake = d_step(D, optimizers["D"], scaler, *seen)
        g_loss = g_step(G, D, optimizers["G"], scaler, network.augment(fake, next(draws)))
        for draw in range(d_steps, len(z)):
            g_loss = g_step(G, D, optimizers["G"], scaler, network.augment(G(z[draw]), next(draws)))
    return paddle.stack([d_loss, g_loss, d_real, d_fake])


def batches(reader, options, step):
    """Yield (step, epoch, batch, images, z) of each iteration after `step`, all counted from 1.

    Here alone step, epoch and batch are turned into each other. images, z and, with `augment`, also
    draws are for `iterate`, on a GPU once they have been copied there from page-locked memory,
    which need not be waited for.
    """
    place = None if paddle.get_device() == "cpu" else paddle.CUDAPinnedPlace()
    while step < options.epochs * len(reader):
        epoch, batch = divmod(step, len(reader))  # that are done
        for images in reader.epoch(epoch + 1, batch):
            step, batch = step + 1, batch + 1
            # a key's last number is not 0, or these would be faces of generator.py: see `latent`
            key, count = [options.seed, step, reader.rank], 2 * options.d_steps + options.g_steps
            z = [network.latent([*key, draw + 1], [len(images), options.z_dim], options.noise)
                 for draw in range(options.d_steps + options.g_steps - 1)]
            draws = [network.latent([*key, 0, 1], [count, len(images), 7], "uniform")
                     ] if options.augment else []
            yield (step, epoch + 1, batch, *(paddle.to_tensor(value, place=place)
                                             for value in (images, np.stack(z), *draws)))


# --- several processes, one a device, started by Paddle's launcher -------------------------------
# The rule: all make all calls, since each may wait for the others; where a file is written, and
# only there, `first()` is asked.

def first():
    """Whether this process is the one that writes."""
    return dist.get_rank() == 0


def check_same(value, what):
    """Raise a Problem that names `what`, unless all processes have the same value."""
    values = []
    if dist.get_world_size() > 1:
        dist.all_gather_object(values, value)
    if any(other != value for other in values):
        raise Problem(f"{what} differ between the processes")


def begin(options):
    """Return (this process's FaceReader, type of mixed precision); all processes have joined then.

    The images are packed first, since who waits for the others gives up after 15 minutes.
    """
    if "PADDLE_TRAINER_ID" in os.environ:  # end with the launcher, however it ends
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # 1 is PR_SET_PDEATHSIG
    reader = dataReader.FaceReader(
        options.data_path, options.image_size, options.batch_size, options.seed, dist.get_rank(),
        dist.get_world_size(), options.flip)  # one process packs, the others wait
    if len(reader.images) < 1000 and not options.augment and first():
        say(f"{len(reader.images)} images are few: D will learn them by heart, unless you pass"
            " --augment")
    weightInit.use_device(options.device)
    if dist.get_world_size() > 1:
        dist.init_parallel_env()  # which with --backend gloo takes the CPU
    amp = weightInit.amp_type(options.amp)
    check_same((vars(options), reader.digest, amp), "the settings, the images or the cards' types")
    if paddle.get_device() != "cpu":  # cuDNN's fastest algorithms, or those that repeat to the bit
        name = "FLAGS_cudnn_deterministic"
        exact = options.deterministic or paddle.get_flags(name)[name]  # both at once is an error
        paddle.set_flags({name: exact, "FLAGS_cudnn_exhaustive_search": not exact})
    return reader, amp


# --- the files of a run --------------------------------------------------------------------------
ALGORITHM = 1  # raise it when you change what an iteration computes, and older runs are refused
BEFORE = {"algorithm": 1, "processes": 1, "augment": False, "flip": False}  # unnamed in old runs
# What may differ when a run goes on: none of it changes an iteration.
FREE = {"data_path", "demo", "epochs", "device", "deterministic", "output_path", "log_every",
        "sample_every", "save_minutes", "restart"}
WAYS = "pass another --output_path, or --restart to move the old run aside"
DIVERGED = f"the last checkpoint is kept. What usually helps: half the --learning_rate; {WAYS}"


def open_output(options, stack):
    """Make the output folder, keep other runs out until `stack` (an ExitStack) ends; its Path."""
    folder = Path(options.output_path)
    folder.mkdir(parents=True, exist_ok=True)
    busy = f"another train.py is writing to {folder}: wait for it, or pass another --output_path"
    stack.enter_context(dataReader.locked(folder, busy))
    if options.restart and any(folder.glob("*.safetensors")):
        aside = (Path(f"{folder}.{number}") for number in itertools.count(1))
        aside = folder.rename(next(path for path in aside if not path.exists()))
        say(f"the run in {folder} is now in {aside}")
        folder.mkdir()
        stack.enter_context(dataReader.locked(folder, busy))
    return folder


def weights(nets):
    """All weights and BN statistics by name, e.g. `G.layers.3.weight`."""
    return {f"{name}.{key}": value for name, net in nets.items()
            for key, value in net.state_dict().items()}


def adam_state(nets):
    """Of the state of both Adams (key, shape) by name; Paddle makes its keys up in each run."""
    return {f"{name}.{kind}": (f"{value.name}_{kind}_0", value.shape if "moment" in kind else [1])
            for name, value in weights(nets).items()
            if not name.startswith("average") and not value.stop_gradient
            for kind in ("moment1", "moment2", "beta1_pow_acc", "beta2_pow_acc")}


def save(folder, nets, optimizers, scaler, settings, step):
    """Save all that training changes as the checkpoint, what generator.py needs, and the curves.

    Raises a Problem if a weight is not finite, or not the same on all processes.
    """
    adam = {**optimizers["G"].state_dict(), **optimizers["D"].state_dict()}
    tensors = weights(nets) | {name: adam[key] for name, (key, _) in adam_state(nets).items()}
    tensors = {name: value.numpy() for name, value in tensors.items()}
    for name, value in tensors.items():
        if not np.isfinite(value).all():
            raise Problem(f"{name} is no longer finite at iteration {step}; {DIVERGED}")
    check_same(weightInit.checksum({  # each process has its own statistics of batch normalization
        name: value for name, value in tensors.items()
        if not name.endswith(("_mean", "_variance"))}, ""), f"the networks at iteration {step}")
    if first():
        # empty unless enabled; the scale is an array, which JSON cannot hold
        scale = {key: np.asarray(value).tolist() for key, value in scaler.state_dict().items()}
        draw_run(folder, settings["image_size"])
        network.save_generator(folder / "generator.safetensors", nets["average"], nets["G"],
                               settings["noise"], step)
        # last, so that a killed run's generator is never older than its checkpoint
        weightInit.write_tensors(folder / "checkpoint.safetensors", tensors, {
            "kind": "checkpoint", "step": step, "settings": settings, "scaler": scale})


def read_checkpoint(path, settings):
    """Read (tensors, step, scaler's state); a Problem if it is damaged or of other settings."""
    try:
        tensors, info = weightInit.read_tensors(path, "checkpoint")
        old, step, scale = {**BEFORE, **info["settings"]}, int(info["step"]), info.get("scaler", {})
    except (Problem, KeyError, TypeError, ValueError) as error:
        raise Problem(f"cannot go on from {path}: {error}; {WAYS}") from error
    different = [f"{name} {old.get(name)} (now {settings.get(name)})"
                 for name in sorted({*old, *settings}) if old.get(name) != settings.get(name)]
    if different:
        raise Problem(f"the run in {path.parent} has {', '.join(different)}: set it back, {WAYS}")
    return tensors, step, scale


def load(folder, nets, optimizers, scaler, settings):
    """Set what training changes from the first process's checkpoint; return its step, or 0."""
    path, saved = folder / "checkpoint.safetensors", [None]
    if first() and path.exists():
        saved = [read_checkpoint(path, settings)]
    elif first() and (folder / "generator.safetensors").exists():
        raise Problem(f"{folder} holds a generator, but no checkpoint to go on from: {WAYS}")
    now, adam = weights(nets), adam_state(nets)
    if dist.get_world_size() > 1:
        dist.broadcast_object_list(saved, 0)
        for value in now.values():  # one seed is not one stream on different cards
            dist.broadcast(value, 0)
    if not saved[0]:
        return 0
    tensors, step, scale = saved[0]
    weightInit.check_shapes(tensors, {name: value.shape for name, value in now.items()}
                            | {name: shape for name, (_, shape) in adam.items()}, path)
    for name, value in now.items():
        value.set_value(tensors[name])
    for optimizer in optimizers.values():
        optimizer.set_state_dict(
            {key: paddle.to_tensor(tensors[name]) for name, (key, _) in adam.items()})
    scaler.load_state_dict(scale)  # does nothing unless it is enabled
    return step


# --- what a run shows ----------------------------------------------------------------------------
LONG = 300  # iterations without a face that D takes for real, after which D has won


class Losses:
    """losses.csv, cut after iteration `step`, since what came then will come again."""

    def __init__(self, path, step):
        # pending: (step, epoch, batch, tensor of `iterate`, what it was made of). `flush` alone
        # waits for the device; until then, copies from page-locked memory may be under way.
        self.path, self.pending, self.won = path, [], 0
        if first():
            old = path.read_bytes() if path.exists() else b""
            rows = [row for row in re.findall(rb"^\d+,.*\n", old, re.MULTILINE)  # whole ones
                    if int(row.split(b",")[0]) <= step]
            with dataReader.replacing(path) as file:
                file.writelines([b"step,epoch,batch,d_loss,g_loss,d_real,d_fake\n", *rows])

    def flush(self, due):
        """Write what is pending.

        Returns D's loss, G's loss, D(x), D(G(z)) of the last iteration, and `due`, a bool, as it is
        for the first process.
        """
        flags = paddle.full([4], float(bool(due) and first()))
        values, lines = paddle.stack([*(value for *_, value, _ in self.pending), flags]), ""
        if dist.get_world_size() > 1:
            dist.all_reduce(values)
        *values, flags = values.numpy() / dist.get_world_size()
        for (step, epoch, batch, *_), row in zip(self.pending, values, strict=True):
            if not np.isfinite(row).all():
                raise Problem(f"the loss of iteration {step} is not finite; {DIVERGED}")
            lines += f"{step},{epoch},{batch}," + ",".join(f"{value:.6g}" for value in row) + "\n"
            self.won = self.won % LONG + 1 if row[3] < 0.01 else 0
            if self.won == LONG and first():
                say(f"iteration {step}: D has won, no face has fooled it for {LONG} iterations."
                    f" What usually helps: --g_steps 3, or half the --learning_rate; {WAYS}")
        self.pending.clear()
        if first():
            try:
                with open(self.path, "a") as file:
                    file.write(lines)
            except OSError as error:
                raise Problem(f"cannot write {self.path}: {error.strerror}") from error
        return row, flags[0] > 0


def draw_run(folder, size):
    """Draw what train.py's folder tells (§5): losses.png, and progress.gif of faces of `size`."""
    from matplotlib.figure import Figure  # 0.5 s to import, so only where it is used

    table = np.atleast_1d(np.genfromtxt(
        folder / "losses.csv", delimiter=",", names=True, invalid_raise=False))
    grids = sorted((path for path in folder.glob("*.png") if re.fullmatch(r"\d+_\d+", path.stem)),
                   key=lambda path: [int(part) for part in path.stem.split("_")])
    figure = Figure(figsize=(9, 8), layout="constrained")
    above, below = figure.subplots(2, sharex=True)
    mean = np.ones(1 + len(table) // 50) / (1 + len(table) // 50)
    for axes, column, color, label in (
            (above, "g_loss", "C0", "generator G"), (above, "d_loss", "C1", "discriminator D"),
            (below, "d_real", "C2", "D(x), real images"),
            (below, "d_fake", "C3", "D(G(z)), generated images")):
        # faint the values, strong their means over a fiftieth of the run
        axes.plot(table["step"], table[column], color, alpha=0.25, linewidth=0.5)
        axes.plot(*(np.convolve(table[name], mean, "valid") for name in ("step", column)), color,
                  label=label)
        axes.legend(loc="lower left")
    top = np.quantile([table["d_loss"], table["g_loss"]], 0.95)  # no spikes
    above.set(title="Losses of generator and discriminator", ylabel="loss (nats)",
              ylim=(0, 1.3 * max(1, top)))
    below.set(title="What the discriminator takes for real", ylabel="probability of being real",
              ylim=(0, 1), xlabel="iteration")
    with dataReader.replacing(folder / "losses.png") as file:
        figure.savefig(file, format="png", dpi=120)

    grids = grids[::-(1 + len(grids) // 60)][::-1]  # 60 frames at most, their first 6×6 faces
    frames = [dataReader.read_image(path).crop((0, 0) + (6 * size + 14,) * 2) for path in grids]
    if frames:
        dataReader.save_gif(folder / "progress.gif", frames, 150, 2000)


# --- the run -------------------------------------------------------------------------------------
def build(options, amp):
    """Make (nets, optimizers, scaler) from the seed; the dicts' keys are "G", "D" and "average"."""
    paddle.seed(options.seed)
    shape = options.image_size, options.width
    nets = {"G": network.Generator(options.z_dim, *shape), "D": network.Discriminator(*shape),
            "average": network.Generator(options.z_dim, *shape)}
    nets["average"].eval()
    network.average_weights(nets["average"], nets["G"], 0)
    optimizers = {name: paddle.optimizer.Adam(
        options.learning_rate, options.beta1, options.beta2, parameters=nets[name].parameters())
        for name in ("G", "D")}
    return nets, optimizers, paddle.amp.GradScaler(amp == "float16")


def note_signals():
    """Return a list in which SIGINT and SIGTERM are noted; a second Ctrl-C ends at once."""
    def note(number, _):  # when Paddle's present call returns, in seconds on a CPU
        noted.append(number)
        if "PADDLE_TRAINER_ID" not in os.environ:  # Paddle's launcher sends several
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.write(2, b"\nstopping after this iteration; Ctrl-C once more to stop at once\n")

    noted = []
    for number in signal.SIGINT, signal.SIGTERM:
        signal.signal(number, note)
    return noted


def train(options):
    """Train, from scratch or from the checkpoint, and write what the docstring of this file lists.

    A SIGINT or SIGTERM becomes SystemExit, once the iteration is done and saved.
    """
    reader, amp = begin(options)
    settings = {name: value for name, value in vars(options).items() if name not in FREE}
    settings |= {"amp": amp or "float32", "processes": reader.world_size, "algorithm": ALGORITHM,
                 "images": f"{len(reader.images)} of digest {reader.digest[:8]}"}
    z_shown = network.face_latents(options.seed, range(100), options.z_dim, options.noise)
    with contextlib.ExitStack() as stack:
        folder = open_output(options, stack) if first() else Path(options.output_path)
        nets, optimizers, scaler = state = build(options, amp)
        done = step = load(folder, *state, settings)
        losses, saved = Losses(folder / "losses.csv", done), float("-inf")  # the first log saves
        each, total = options.batch_size * reader.world_size, options.epochs * len(reader)
        if done:
            say(f"{folder}: going on after iteration {done} of {total}")
        stops = note_signals() if reader.world_size == 1 else []
        bar = stack.enter_context(tqdm(total=max(done, total) * each, initial=done * each,
                                       unit="img", unit_scale=True, disable=not first()))
        for step, epoch, batch, *sources in batches(reader, options, done):
            images, z, *draws = (
                source.cuda(blocking=False) if source.place.is_cuda_pinned_place() else source
                for source in sources)
            values = iterate(nets, optimizers, scaler, images, z, options.d_steps, amp, *draws)
            # Warmed up: at first the average spans the last tenth of the iterations, so that a
            # short run does not draw with the weights that it began with.
            network.average_weights(nets["average"], nets["G"],
                                    min(options.ema_decay, (1 + step) / (10 + step)))
            losses.pending.append((step, epoch, batch, values, sources))
            last, stop = step == total, stops[:1]
            sample = last or step % options.sample_every == 0
            if not (sample or stop or step % options.log_every == 0):
                continue
            bar.update(len(losses.pending) * each)
            bar.set_description(f"epoch {epoch}/{options.epochs} it {step}/{total}", False)
            row, store = losses.flush(
                last or stop or time.monotonic() >= saved + 60 * options.save_minutes)
            bar.set_postfix_str("D {:.3f} G {:.3f} D(x) {:.2f} D(G(z)) {:.2f}".format(*row))
            if sample:  # roughly, even if a save is due: grids must not depend on the clock
                network.estimate_statistics(nets["average"], options.noise, 5 if last else 1)
                faces = dataReader.grid(network.draw_faces(nets["average"], z_shown))
                if first():
                    dataReader.save_png(folder / f"{epoch:04d}_{batch:04d}.png", faces)
            if store:
                network.estimate_statistics(nets["average"], options.noise)
                save(folder, *state, settings, step)
                saved = time.monotonic()
            if stop:
                say(f"stopped after iteration {step}, which is saved: the same command (without"
                    " --restart) goes on")
                raise SystemExit(128 + stop[0])
        if first():
            faces = network.draw_faces(nets["average"], z_shown)
            dataReader.save_grids(folder / "real_vs_fake.png",
                                  Real_faces=reader.sample(100), Generated_faces=faces)
            print(f"{step} iterations done; to draw faces:"
                  f" python generator.py --checkpoint {folder / 'generator.safetensors'}")


def main():
    train(dataReader.command_line(globals()))


if __name__ == "__main__":
    dataReader.run_script(main)
