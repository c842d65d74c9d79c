"""Train the DCGAN (tutorial §4 and §5).

    python train.py                                   # CelebA's crops in imgs/, on the GPU
    python train.py --demo                            # a small network, on the demo's crops
    python train.py --data_path photos --output_path Output/photos --save_minutes 1
    python train.py --restart                         # not go on with the run in Output/
    python train.py --change --learning_rate 0.0001   # go on with it, but with another rate
    python -m paddle.distributed.launch --devices 0,1 train.py          # on two GPUs

Edit the settings below or pass them as flags. Everything is written to Output/:

    training_images.png     images as D sees them
    0003_0336.png           faces of the same latent vectors in epoch 3, after batch 336
    0003_0336.safetensors   the generator that drew them, for generator.py
    progress.gif            the first of those faces, from the first grid to the last
    losses.csv losses.png   both losses, D(x) and D(G(z)), iteration by iteration
    real_vs_fake.png        training images beside generated ones, at the end
    generator.safetensors   what generator.py needs
    checkpoint.safetensors  what the same command needs to go on, as if never stopped: to the bit
                            on a CPU, or with --deterministic
"""

import dataReader
import network
import weightInit
from dataReader import PATH, YES_NO, Problem, one_of, real_number, say, whole_number
from weightInit import paddle  # made ready there

import ast
import contextlib
import ctypes
import dataclasses
import functools
import hashlib
import math
import os
import re
import shlex
import signal
import time
from pathlib import Path

import numpy as np
from tqdm import tqdm

dist, F = paddle.distributed, paddle.nn.functional

# --- settings (each is also a flag, e.g. --batch_size 64) ----------------------------------------
# A new one becomes a flag by itself; ALLOWED says what it may be. If it changes no iteration, name
# it in MAY_CHANGE too.
# data
data_path = "imgs"       # folder of training images, searched recursively
image_size = 64          # height and width of an image: 32, 64 or 128 (run pretreat.py with it too)
# networks
z_dim = 100              # length of a latent vector
width = 64               # channels next to the image; on a CPU take 16 to 48
noise = "normal"         # latent vectors: "normal" N(0, 1), or "uniform" U[0, 1)
# optimization
epochs = 8               # passes over the images
batch_size = 128         # images per iteration and process; fewer on a CPU, where 128 take seconds
learning_rate = 0.0002   # Adam's, of both networks; halve it when the losses blow up
beta1 = 0.5              # Adam's decay of the mean gradient
beta2 = 0.999            # Adam's decay of the mean squared gradient
d_steps = 1              # discriminator steps per iteration
g_steps = 2              # generator steps per iteration; more when D wins (its loss goes to 0)
augment = False          # vary at random what D sees; learning takes far longer
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
keep = 20                # generators to keep, of those that drew grids; spread over the run
restart = False          # move an earlier run in output_path aside instead of going on with it
change = False           # go on though rates, betas, steps, batch_size, ... or images have changed

# --- what they may be, and what --demo stands for ------------------------------------------------
ALLOWED = {
    "data_path": PATH, "image_size": one_of(*dataReader.SIZES),
    "z_dim": whole_number(1), "width": whole_number(1), "noise": one_of(*network.NOISES),
    "epochs": whole_number(1), "batch_size": whole_number(1),
    "learning_rate": real_number(1e-8, 1),  # float32 weights do not feel less
    "beta1": real_number(0, 1), "beta2": real_number(0, 1),
    "d_steps": whole_number(1), "g_steps": whole_number(1),
    "augment": YES_NO, "flip": YES_NO, "seed": whole_number(0, 2**32),
    "ema_decay": real_number(0, 1), "amp": YES_NO, "device": one_of("auto", "gpu", "cpu"),
    "deterministic": YES_NO, "output_path": PATH, "log_every": whole_number(1),
    "sample_every": whole_number(1), "save_minutes": real_number(0), "keep": whole_number(1),
    "restart": YES_NO, "change": YES_NO}
DEMO = {"data_path": "demo/imgs", "output_path": "demo/Output", "width": 16, "batch_size": 16,
        "learning_rate": 0.0005, "epochs": 17, "sample_every": 100}

# --- the algorithm -------------------------------------------------------------------------------
@dataclasses.dataclass
class State:
    """What training changes: all that the checkpoint holds."""

    generator: network.Generator
    discriminator: network.Discriminator
    average: network.Generator  # its weights are means of the generator's; it draws the faces
    generator_optimizer: paddle.optimizer.Optimizer
    discriminator_optimizer: paddle.optimizer.Optimizer
    scaler: paddle.amp.GradScaler  # does nothing unless training in float16
    precision: str          # "bfloat16" or "float16" for mixed precision, or "float32"
    settings: dict = dataclasses.field(default_factory=dict)  # that must not change unnoticed
    batches: int = 1        # per epoch
    step: int = 0           # iterations done
    # The step and the epoch from which epochs of `batches` are counted. They are not 0 once a run
    # has gone on with another number of batches.
    origin_step: int = 0
    origin_epoch: int = 0
    hopeless: int = 0       # iterations in a row, up to this one, with D(G(z)) below 0.01
    grids: list = dataclasses.field(default_factory=list)     # names of those drawn: "0003_0336"
    changes: list = dataclasses.field(default_factory=list)   # of settings, in words

    def next_batch(self):
        """(epoch, batch) of the next iteration, both from 0."""
        epoch, batch = divmod(self.step - self.origin_step, self.batches)
        return self.origin_epoch + epoch, batch


def build(options, precision):
    """Make networks and optimizers, from the seed, in a State whose other fields are not set yet.

    `precision` is as in a State.
    """
    # Another optimizer can stand here if it treats all weights alike, one by one (not LARS or LAMB,
    # which ask for the layer), and its rate is a number: the checkpoint has all tensors that it
    # keeps, but no scheduler. Its own settings then replace beta1 and beta2, in ALLOWED and
    # CHANGE_IF_TOLD too.
    def optimizer_of(net):
        return paddle.optimizer.Adam(options.learning_rate, beta1=options.beta1,
                                     beta2=options.beta2, parameters=[net.vector])

    paddle.seed(options.seed)
    generator = network.Generator(options.z_dim, options.image_size, options.width)
    discriminator = network.Discriminator(options.image_size, options.width)
    average = network.Generator(options.z_dim, options.image_size, options.width)
    average.eval()
    average.set_state_dict(generator.state_dict())
    # To freeze a layer of D set its weights' stop_gradient here; of G, in the average too.
    for net in (generator, discriminator, average):
        network.join_weights(net)
    scaler = paddle.amp.GradScaler(precision == "float16")
    return State(generator, discriminator, average, optimizer_of(generator),
                 optimizer_of(discriminator), scaler, precision)


def descend(loss, net, optimizer, scaler):
    """One optimizer step of a network down the gradient of a loss, a 0-D tensor.

    It waits for the other processes, so all must take it equally often.
    """
    scaler.scale(loss).backward()
    with paddle.no_grad():
        gradient = paddle.concat([weight.grad.flatten() for weight in net.weights])
    for weight in net.weights:
        weight.clear_gradient(False)  # frees it; True would fill it with zeros
    if dist.get_world_size() > 1:  # the processes' mean, before the scaler looks for an overflow
        dist.all_reduce(gradient)
        gradient.scale_(1 / dist.get_world_size())
    net.vector.grad = gradient
    scaler.step(optimizer)
    scaler.update()
    optimizer.clear_grad(False)


def d_step(D, optimizer, scaler, real, fake):
    """Teach D to tell real images from generated ones: one Adam step on the sum of both losses.

    `real` and `fake` are `[N, 3, S, S]` in [-1, 1]; no gradient flows on into `fake`. Returns 0-D
    tensors: that sum in nats, D(x) and D(G(z)), the mean probabilities of being real.
    """
    logits_real = D(real)
    logits_fake = D(fake.detach())
    d_loss = network.loss(logits_real, 1) + network.loss(logits_fake, 0)
    descend(d_loss, D, optimizer, scaler)
    d_real = F.sigmoid(network.margin(logits_real.detach())).mean()
    d_fake = F.sigmoid(network.margin(logits_fake.detach())).mean()
    return d_loss.detach(), d_real, d_fake


def g_step(G, D, optimizer, scaler, fake):
    """Teach G to make images that D calls real: one Adam step; returns the loss in nats, 0-D.

    `fake` are images `[N, 3, S, S]` with the way back to G's parameters; D's are frozen meanwhile.
    """
    for weight in D.weights:
        weight.stop_gradient = True
    g_loss = network.loss(D(fake), 1)
    descend(g_loss, G, optimizer, scaler)
    for weight in D.weights:
        weight.stop_gradient = False
    return g_loss.detach()


def iterate(state, images, z, draws, d_steps, g_steps):
    """One iteration: `d_steps` discriminator steps, then `g_steps` generator steps (§4).

    The first generator step is on the images that the last discriminator step saw, which saves
    making them again; D has changed since, so its verdict on them is new.

    Nothing here reads a number, since the host would wait for the GPU. If a step is to depend on a
    number, that must be the same in all processes: see `descend`.

    Args:
        state: a State, whose networks and optimizers are changed.
        images: uint8 tensor `[N, 3, S, S]`, the real ones of every discriminator step.
        z: latent vectors, a tensor `[d_steps + g_steps - 1, N, z_dim]`.
        draws: `network.augment`'s, a tensor `[2·d_steps + g_steps, N, 7]`, or None to leave it out.

    Returns:
        Tensor `[4]`, on the device: D's loss, G's loss, D(x), D(G(z)) of each network's last step.
    """
    G, D, scaler = state.generator, state.discriminator, state.scaler
    draws_left = None if draws is None else iter(draws)

    def varied(seen):  # by the next draws, so the order of the calls counts
        return seen if draws_left is None else network.augment(seen, next(draws_left))

    real = images.astype("float32") / 127.5 - 1
    with mixed_precision(state.precision):
        for turn in range(d_steps):
            fake = G(z[turn])
            d_loss, d_real, d_fake = d_step(
                D, state.discriminator_optimizer, scaler, varied(real), varied(fake))
        g_loss = g_step(G, D, state.generator_optimizer, scaler, varied(fake))
        for turn in range(d_steps, d_steps + g_steps - 1):
            fake = G(z[turn])
            g_loss = g_step(G, D, state.generator_optimizer, scaler, varied(fake))
    return paddle.stack([d_loss, g_loss, d_real, d_fake])


def mixed_precision(precision):
    """The context to train in; `precision` is as in a State."""
    if precision == "float32":
        return contextlib.nullcontext()
    # Paddle's own list lacks conv2d_transpose. BN keeps its statistics in float32.
    return paddle.amp.auto_cast(custom_white_list={"conv2d_transpose"}, dtype=precision)


def random_numbers(options, step, rank):
    """The random numbers of iteration `step`, from 1: (latent vectors, draws or None).

    float32 arrays as `iterate` takes them, for process `rank`. The keys that they are made from are
    in the table of `network.random_array`.
    """
    key = [options.seed, step, rank]
    z = [network.random_array([*key, turn + 1], [options.batch_size, options.z_dim], options.noise)
         for turn in range(options.d_steps + options.g_steps - 1)]
    draws = None
    if options.augment:
        shape = [2 * options.d_steps + options.g_steps, options.batch_size, 7]
        draws = network.random_array([*key, 0, 1], shape, "uniform")
    return np.stack(z), draws


def to_device(values):
    """An array as a tensor; None stays None. A copy to a GPU is begun and not waited for."""
    if values is None:
        return None
    if paddle.get_device() == "cpu":
        return paddle.to_tensor(values)
    # Paddle keeps the page-locked memory until the copy has been done.
    return paddle.to_tensor(values, place=paddle.CUDAPinnedPlace()).cuda(blocking=False)


# --- several processes, one a device, started by Paddle's launcher -------------------------------
# The rule: all make all calls, since each may wait for the others; where a file or a line is
# written, and only there, `is_main()` is asked.

def is_main():
    """Whether this process is the one that writes."""
    return dist.get_rank() == 0


def from_main(value):
    """The first process's value, on all of them."""
    values = [value]
    if dist.get_world_size() > 1:
        dist.broadcast_object_list(values, 0)
    return values[0]


def check_same(value, what):
    """Raise a Problem that names `what`, unless all processes have the same value."""
    values = []
    if dist.get_world_size() > 1:
        dist.all_gather_object(values, value)
    if any(other != value for other in values):
        raise Problem(f"{what} differ between the processes")


def set_up(options):
    """Choose the device, read the images and join the other processes.

    Returns this process's FaceReader and the precision, as in a State. The images are packed before
    joining: a process that waits in a call of Paddle's gives up after 15 minutes.
    """
    if "PADDLE_TRAINER_ID" in os.environ:  # end with the launcher, however it ends
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # 1 is PR_SET_PDEATHSIG
    weightInit.use_device(options.device)
    reader = dataReader.FaceReader(  # one process packs; the others wait for the folder's lock
        options.data_path, options.image_size, options.batch_size, options.seed, dist.get_rank(),
        dist.get_world_size(), options.flip)
    if dist.get_world_size() > 1:
        dist.init_parallel_env()  # this goes to the CPU if the launcher has --backend gloo
    precision = weightInit.amp_type(options.amp)
    check_same((vars(options), code_digest(), reader.digest, precision),
               "the settings, the code, the images or the cards' types")
    if paddle.get_device() != "cpu":  # cuDNN's fastest algorithms, or those that repeat to the bit
        name = "FLAGS_cudnn_deterministic"
        repeatable = options.deterministic or paddle.get_flags(name)[name]
        # Paddle takes it for an error if both are set
        paddle.set_flags({name: repeatable, "FLAGS_cudnn_exhaustive_search": not repeatable})
    return reader, precision


# --- the files of a run --------------------------------------------------------------------------
# When a run goes on, these settings may be others: they change no iteration. (A schedule over the
# whole run would depend on epochs: then move it to those below.)
MAY_CHANGE = {"data_path", "epochs", "device", "deterministic", "output_path", "log_every",
              "sample_every", "save_minutes", "keep", "restart", "change", "demo"}
# and these with --change: the networks can be trained with others.
CHANGE_IF_TOLD = {"learning_rate", "beta1", "beta2", "d_steps", "g_steps", "ema_decay", "augment",
                  "flip", "amp", "batch_size", "images"}
# fields of State that the checkpoint has as JSON, beside settings and batches
PROGRESS = "step", "origin_step", "origin_epoch", "hopeless", "grids", "changes"
START_OVER = "pass another --output_path, or --restart to move the old run aside"
# The files in the docstring at the top, which --restart moves: name a new one here too.
WRITTEN = re.compile(r"losses\.(csv|png)|progress\.gif|(real_vs_fake|training_images)\.png"
                     r"|\d{4,}_\d{4,}\.(png|safetensors)|(generator|checkpoint)\.safetensors")


@functools.cache  # first called at the start, so that it tells of the code that runs
def code_digest():
    """SHA-1 of what network.py and this file do: comments, docstrings, settings do not count."""
    digest = hashlib.sha1(usedforsecurity=False)
    for file in network.__file__, __file__:
        source = Path(file).read_text(encoding="utf-8")
        # without what stands between these two headings: the settings, ALLOWED and DEMO
        code = re.sub("# --- settings .*?# --- the algorithm ", "#", source, count=1,
                      flags=re.DOTALL)
        tree = ast.parse(code)
        for node in ast.walk(tree):
            may_have_docstring = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
            if may_have_docstring and ast.get_docstring(node) is not None:
                del node.body[0]
        digest.update(ast.unparse(tree).encode())
    return digest.hexdigest()


@contextlib.contextmanager
def output_folder(options):
    """Make the output folder and keep other runs out of it meanwhile; yields its Path.

    If an earlier run has saved anything, its files, and none but those, are moved aside with
    --restart, or if there is no checkpoint among them to go on from.
    """
    folder = Path(options.output_path)
    if not is_main():
        yield folder
        return
    folder.mkdir(parents=True, exist_ok=True)
    busy = f"another train.py is writing to {folder}: wait for it, or pass another --output_path"
    with dataReader.locked(folder, busy):
        written = [path for path in folder.iterdir() if WRITTEN.fullmatch(path.name)]
        saved = [path for path in written if path.suffix == ".safetensors"]
        if saved and (options.restart or folder / "checkpoint.safetensors" not in saved):
            number = 1
            while (folder / f"earlier-{number}").exists():
                number += 1
            aside = folder / f"earlier-{number}"
            aside.mkdir()
            for path in written:
                path.rename(aside / path.name)
            say(f"the run in {folder} {'' if options.restart else 'has no checkpoint and '}"
                f"is now in {aside}")
        yield folder


def tensors_by_name(state):
    """All tensors of a State: `G.layers.3.weight`, `D_optimizer.moment1_0`, and so on.

    The optimizers' are there from their first step on. Paddle's names for those begin with the name
    of the vector, which has a counter in it and differs between runs, so it is cut off.
    """
    tensors = {}
    for prefix, net in (("G", state.generator), ("D", state.discriminator),
                        ("average", state.average)):
        for name, tensor in net.state_dict().items():
            tensors[f"{prefix}.{name}"] = tensor
    for prefix, net, optimizer in (
            ("G_optimizer", state.generator, state.generator_optimizer),
            ("D_optimizer", state.discriminator, state.discriminator_optimizer)):
        for name, tensor in optimizer.state_dict().items():
            own_name = name.removeprefix(f"{net.vector.name}_")
            tensors[f"{prefix}.{own_name}"] = tensor
    return tensors


def save(path, state):
    """Save all that training changes as the checkpoint.

    Raises a Problem if any number is not finite, or a weight not the same on all processes.
    """
    arrays = {name: tensor.numpy() for name, tensor in tensors_by_name(state).items()}
    for name, values in arrays.items():
        if not np.isfinite(values).all():
            raise Problem(f"{name} is no longer finite at iteration {state.step};"
                          f" {advice(state)}")
    # all but BN's statistics, of which each process has its own
    same = {name: values for name, values in arrays.items()
            if not name.endswith(("_mean", "_variance"))}
    check_same(weightInit.checksum(same), f"the networks at iteration {state.step}")
    if is_main():
        # empty unless enabled; the scale is an array, which JSON cannot hold
        scaler = {key: np.asarray(value).tolist()
                  for key, value in state.scaler.state_dict().items()}
        weightInit.write_tensors(path, arrays, {
            "kind": "checkpoint", "code": code_digest(), "scaler": scaler,
            "settings": state.settings, "batches": state.batches,
            **{name: getattr(state, name) for name in PROGRESS}})


def read_checkpoint(path, settings, change):
    """Read (arrays, info); a Problem if it is damaged, or settings differ that may not."""
    try:
        arrays, found = weightInit.read_tensors(path, "checkpoint")
        info = {name: found[name]
                for name in ("code", "scaler", "settings", "batches", *PROGRESS)}
        old = dict(info["settings"])
        step = int(info["step"])
    except KeyError as error:
        raise Problem(f"cannot go on from {path}: it lacks {error}, so another version of train.py"
                      f" has saved it; {START_OVER}") from error
    except (Problem, TypeError, ValueError) as error:
        raise Problem(f"cannot go on from {path}: {error}; {START_OVER}") from error
    different = [name for name in sorted({*old, *settings}) if old.get(name) != settings.get(name)]
    difference = ", ".join(
        f"{name} {old.get(name)} (now {settings.get(name)})" for name in different)
    is_allowed = CHANGE_IF_TOLD.issuperset(different)
    if different and not (change and is_allowed):
        hint = "pass --change to go on with them, " if is_allowed else ""
        raise Problem(f"the run in {path.parent} has {difference}: set it back, {hint}{START_OVER}")
    if different:
        info["changes"].append(f"iteration {step}: {difference}")
        say(f"changed after iteration {step}: {difference}")
    if info["code"] != code_digest():
        say(f"the code of network.py or train.py has changed since iteration {step}")
    return arrays, info


def load(path, state, change):
    """Set a new State to the first process's checkpoint, if there is one.

    With `change` the checkpoint may be of other settings; those of the State are kept then.
    """
    saved = None
    if is_main() and path.exists():
        saved = read_checkpoint(path, state.settings, change)
    saved = from_main(saved)
    if saved is None:
        if dist.get_world_size() > 1:  # one seed is not one stream on different cards
            for tensor in tensors_by_name(state).values():
                dist.broadcast(tensor, 0)
        return
    arrays, info = saved
    make_optimizer_state(state.generator, state.generator_optimizer)
    make_optimizer_state(state.discriminator, state.discriminator_optimizer)
    tensors = tensors_by_name(state)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    try:
        weightInit.check_shapes(arrays, shapes, path)
    except Problem as problem:  # the code has been changed
        raise Problem(f"cannot go on: {problem}; {START_OVER}") from problem
    for name, tensor in tensors.items():  # in place: weights must stay parts of their vector
        tensor.copy_(paddle.to_tensor(arrays[name], place=paddle.CPUPlace()), True)
    if info["scaler"]:
        state.scaler.load_state_dict(info["scaler"])  # does nothing unless it is enabled
    for name in PROGRESS:
        setattr(state, name, info[name])
    if info["batches"] != state.batches:
        # an epoch that was begun counts as done: go on with the first batch of the next
        epochs_since_origin = math.ceil((state.step - state.origin_step) / info["batches"])
        state.origin_epoch += epochs_since_origin
        state.origin_step = state.step


def make_optimizer_state(net, optimizer):
    """One step with a gradient of zeros: the optimizer makes what it keeps, in the right places.

    On a GPU Adam keeps the powers of beta on the CPU. `set_state_dict` would put them on the card,
    for which Adam has another kernel; that it rounds alike is promised nowhere.
    """
    net.vector.grad = paddle.zeros_like(net.vector)
    optimizer.step()
    optimizer.clear_grad(False)


# --- losses.csv ----------------------------------------------------------------------------------
D_WON_AFTER = 300  # hopeless iterations in a row: then there is a warning, as after every 300 more


def continue_table(path, step):
    """Cut losses.csv after iteration `step`: the iterations that follow will be done again.

    Torn rows are left out too, and columns after the seventh. (If you keep another log of the
    iterations, cut it here too.)
    """
    with open(path if path.exists() else os.devnull, errors="replace") as old, \
            dataReader.replacing(path) as new:
        new.write(b"step,epoch,batch,d_loss,g_loss,d_real,d_fake\n")
        for row in old:
            cells = row.strip().split(",")[:7]
            try:
                numbers = [float(cell) for cell in cells]
            except ValueError:  # the heading, or torn
                continue
            if len(numbers) == 7 and row.endswith("\n") and numbers[0] <= step:
                new.write(",".join(cells).encode() + b"\n")


def log(folder, pending, state):
    """Write what is pending to losses.csv, and warn if D has won.

    `pending` is a dict from (step, epoch, batch) to what `iterate` returned. Returns the last
    iteration's as an array. Raises a Problem if a value is not finite; the rows before it have been
    written then, and drawn.
    """
    values = paddle.stack(list(pending.values()))
    if dist.get_world_size() > 1:
        dist.all_reduce(values)
    values = values.numpy() / dist.get_world_size()  # waits for the device
    rows = []
    bad_step = None
    for (step, epoch, batch), losses in zip(pending, values, strict=True):
        if not np.isfinite(losses).all():
            bad_step = step
            break
        cells = ",".join(f"{value:.6g}" for value in losses)
        rows.append(f"{step},{epoch},{batch},{cells}\n")
        _, _, _, d_fake = losses
        state.hopeless = state.hopeless + 1 if d_fake < 0.01 else 0
        if state.hopeless and state.hopeless % D_WON_AFTER == 0 and is_main():
            say(f"iteration {step}: D has won, its mean verdict on faces, D(G(z)), stayed below"
                f" 0.01 for {state.hopeless} iterations: stop (Ctrl-C), and {advice(state)}")
    if is_main():
        try:
            with open(folder / "losses.csv", "a") as file:
                file.writelines(rows)
        except OSError as error:
            raise Problem(f"cannot write {folder / 'losses.csv'}: {error.strerror}") from error
    if bad_step:
        try_to_write(draw_curves, folder / "losses.png")
        raise Problem(f"the loss of iteration {bad_step} is not finite; {advice(state)}")
    return values[-1]


def advice(state):
    """What helps when a run goes wrong, in flags that it can go on with."""
    rate = state.settings["learning_rate"] / 2
    g_steps = state.settings["g_steps"] + 1
    return ("from the last checkpoint go on with the same command (without --restart) and --change"
            f" --learning_rate {rate:g}, or --change --g_steps {g_steps}, which usually helps")


# --- pictures ------------------------------------------------------------------------------------
def try_to_write(write, path, *args):
    """Call `write(path, *args)` on the first process; a failure is told, and the run goes on."""
    if is_main():
        try:
            write(path, *args)
        except Exception as error:  # a full disk, matplotlib's, a file that is not ours
            say(f"{path} could not be written: {error}")


GRID = 100    # faces of a grid
COLUMNS = 10  # of them, in a row; 6 to 18, and one number for a run: progress.gif cuts out 6×6


def draw_training_images(path, reader, is_augmented):
    """Draw the first images of the first epoch as D sees them, mirrored or augmented."""
    count = min(len(reader), math.ceil(GRID / reader.batch_size))
    images = np.concatenate([reader.batch(1, number) for number in range(count)])[:GRID]
    if is_augmented:
        draws = network.random_array([reader.seed, 0, 0, 0, 1], [len(images), 7], "uniform")
        scaled = paddle.to_tensor(images / np.float32(127.5) - 1)
        images = network.to_levels(network.augment(scaled, paddle.to_tensor(draws)))
    dataReader.save_png(path, dataReader.grid(images, COLUMNS))


def draw_curves(path):
    """Draw losses.png, from the losses.csv beside it: both losses, D(x) and D(G(z)) (§5).

    Thin: each iteration; bold: the running mean over a fiftieth of the run; shaded: lowest to
    highest. Of a long run a thousand stretches are drawn in place of iterations.
    """
    rows = path.with_suffix(".csv").read_text().splitlines()[1:]
    if not rows:
        return
    STEP, D_LOSS, G_LOSS, D_REAL, D_FAKE = 0, 3, 4, 5, 6  # columns
    table = np.loadtxt(rows, delimiter=",", usecols=range(7), ndmin=2)
    starts = np.arange(0, len(table), 1 + len(table) // 1000)
    lengths = np.diff([*starts, len(table)])[:, None]
    means = np.add.reduceat(table, starts) / lengths
    lows = np.minimum.reduceat(table, starts)
    highs = np.maximum.reduceat(table, starts)
    window = np.ones(1 + len(means) // 50) / (1 + len(means) // 50)
    smooth = np.stack([np.convolve(column, window, "valid") for column in means.T], 1)
    with dataReader.figure_file(path, (9, 8), 120) as figure:
        above, below = figure.subplots(2, sharex=True)
        for axes, curve, color, label in (
                (above, G_LOSS, "C0", "generator G"), (above, D_LOSS, "C1", "discriminator D"),
                (below, D_REAL, "C2", "D(x), real images"),
                (below, D_FAKE, "C3", "D(G(z)), generated images")):
            axes.fill_between(means[:, STEP], lows[:, curve], highs[:, curve], color=color,
                              alpha=0.2, linewidth=0)
            axes.plot(means[:, STEP], means[:, curve], color, alpha=0.25, linewidth=0.5)
            axes.plot(smooth[:, STEP], smooth[:, curve], color, label=label)
            axes.legend(loc="lower left")
        top = np.quantile(table[:, [D_LOSS, G_LOSS]], 0.95)  # no spikes
        above.set(title="Losses of generator and discriminator", ylabel="loss (nats)",
                  ylim=(0, 1.3 * max(1, top)))
        below.set(title="What the discriminator takes for real", ylim=(0, 1), xlabel="iteration",
                  ylabel="probability of being real")


def draw_progress(path, state):
    """Draw progress.gif: the first 6×6 faces of 60 grids at most."""
    paths = [path.with_name(f"{name}.png") for name in state.grids]
    paths = [grid for grid in paths if grid.exists()]
    every = 1 + len(paths) // 60
    shown = paths[(len(paths) - 1) % every::every]  # the last one always
    side = 6 * (state.settings["image_size"] + 2) + 2  # with the white lines of `dataReader.grid`
    frames = [dataReader.read_image(grid).crop((0, 0, side, side)) for grid in shown]
    if frames:
        dataReader.save_gif(path, frames, wait=150, rest=2000)


def sample(folder, state, keep, batches):
    """Draw a grid of faces, of the same latent vectors each time, and keep the generator beside it.

    Kept are those of every grid, or of every 2nd, 4th, 8th, ... one, so that they are at most
    `keep`, spread over the run. `batches` is as in `network.estimate_statistics`. What is drawn
    does not depend on when checkpoints are saved.
    """
    noise = state.settings["noise"]
    network.estimate_statistics(state.average, noise, batches)
    name = state.grids[-1]
    faces = dataReader.grid(draw_first_faces(state), COLUMNS)
    try_to_write(dataReader.save_png, folder / f"{name}.png", faces)
    try_to_write(network.save_generator, folder / f"{name}.safetensors",
                 state.average, None, noise, state.step)
    every = 1
    while math.ceil(len(state.grids) / every) > keep:
        every *= 2
    for number, earlier in enumerate(state.grids[:-1], 1):
        if number % every and is_main():
            (folder / f"{earlier}.safetensors").unlink(missing_ok=True)


def draw_first_faces(state):
    """Draw the first faces of the run's seed by the averaged generator, uint8 `[100, 3, S, S]`."""
    settings = state.settings
    z = network.face_latents(settings["seed"], range(GRID), settings["z_dim"], settings["noise"])
    return network.draw_faces(state.average, z)


def draw_comparison(path, reader, state):
    """Draw real_vs_fake.png: training images beside generated ones (§5)."""
    dataReader.save_grids(path, {
        "Real faces": reader.sample(GRID), "Generated faces": draw_first_faces(state)})


def write_results(folder, state):
    """Write generator.safetensors, and draw the curves: what goes with a checkpoint."""
    if is_main():
        network.save_generator(folder / "generator.safetensors", state.average, state.generator,
                               state.settings["noise"], state.step)
    try_to_write(draw_curves, folder / "losses.png")


# --- the run -------------------------------------------------------------------------------------
@contextlib.contextmanager
def noted_signals():
    """Yield a list in which signals that ask for an end are noted; the second Ctrl-C ends at once.

    SIGHUP comes when a terminal closes (under nohup it stays ignored), SIGUSR1 from Slurm. Several
    processes note nothing: their launcher ends them.
    """
    noted = []
    before = {}

    def note(number, _):  # runs when Paddle's current call returns, perhaps seconds later
        noted.append(number)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        with contextlib.suppress(OSError):  # the terminal may be gone
            os.write(2, b"\nstopping after this iteration; Ctrl-C once more to stop at once\n")

    if dist.get_world_size() == 1:
        for number in signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                before[number] = signal.signal(number, note)
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def announce(folder, state, reader, total):
    """Say what is about to be trained, how long and on what."""
    if state.step >= total:
        say(f"{folder}: {state.step} iterations are done, and no more are asked for: pass more"
            " --epochs to go on")
        return
    say(f"{weightInit.device_name()}, {state.precision}: {len(reader.images)} images,"
        f" {state.generator.vector.size:,} weights in G, {state.discriminator.vector.size:,} in D,"
        f" {total:,} iterations in all")
    if len(reader.images) < 1000 and not state.settings["augment"]:
        say(f"{len(reader.images)} images are few: D will learn them by heart. When faces get"
            " worse, draw with the generator of an earlier grid")
    if state.step:
        say(f"{folder}: going on after iteration {state.step} of {total}")


def train(options):
    """Train, from scratch or from the checkpoint, and write what the docstring of this file lists.

    A signal that asks for an end becomes SystemExit, once the iteration is done and saved.
    """
    code_digest()  # now, since somebody may edit the file while images are packed
    dataReader.check_outside(options.output_path, options.data_path)
    reader, precision = set_up(options)
    with output_folder(options) as folder, noted_signals() as signals:
        state = build(options, precision)
        state.batches = len(reader)
        state.settings = {
            **{name: value for name, value in vars(options).items() if name not in MAY_CHANGE},
            "amp": precision, "processes": reader.world_size,
            "images": f"{len(reader.images)} of digest {reader.digest[:8]}"}
        load(folder / "checkpoint.safetensors", state, options.change)
        epochs_left = max(0, options.epochs - state.origin_epoch)
        total = state.origin_step + epochs_left * len(reader)
        if is_main():
            continue_table(folder / "losses.csv", state.step)
            announce(folder, state, reader, total)
        try_to_write(draw_training_images, folder / "training_images.png", reader, options.augment)
        if state.step >= total:  # the run may have been killed before these were written
            write_results(folder, state)
            try_to_write(draw_progress, folder / "progress.gif", state)
        # does nothing if no more are asked for
        train_until(total, folder, state, reader, options, signals)
        try_to_write(draw_comparison, folder / "real_vs_fake.png", reader, state)
        if is_main():
            path = shlex.quote(str(folder / "generator.safetensors"))
            print(f"{state.step} iterations done; to draw faces:"
                  f" python generator.py --checkpoint {path}")


def train_until(total, folder, state, reader, options, signals):
    """The loop: iterations until `total` are done, or one of `signals` came, as SystemExit."""
    images_per_step = options.batch_size * reader.world_size
    pending = {}  # what `iterate` returned, by (step, epoch, batch), until the next log
    next_save = 0.0  # by time.monotonic: at the first log, so that a full disk shows at once
    with tqdm(total=max(state.step, total) * images_per_step, unit="img", unit_scale=True,
              initial=state.step * images_per_step, disable=not is_main()) as bar:
        while state.step < total:
            epoch, batch = state.next_batch()
            state.step += 1
            # For a schedule, call both optimizers' set_lr here: by state.step, so that it resumes
            # too. If it is also by `total`, see MAY_CHANGE.
            images = to_device(reader.batch(epoch + 1, batch))
            z, draws = random_numbers(options, state.step, reader.rank)
            pending[state.step, epoch + 1, batch + 1] = iterate(
                state, images, to_device(z), to_device(draws), options.d_steps, options.g_steps)
            # Warmed up: at first the average spans the last tenth of the iterations, so that a
            # short run does not draw with the weights that it began with.
            decay = min(options.ema_decay, (1 + state.step) / (10 + state.step))
            network.average_weights(state.average, state.generator, decay)

            is_last = state.step == total
            is_stopped = bool(signals)
            sample_now = is_last or state.step % options.sample_every == 0
            # what else is due every so often: condition here and in `log_now`, the rest after that
            log_now = sample_now or is_stopped or state.step % options.log_every == 0
            if not log_now:
                continue
            losses = log(folder, pending, state)
            images_seen = len(pending) * images_per_step
            pending.clear()
            save_now = from_main(is_last or is_stopped or time.monotonic() >= next_save)
            if sample_now:
                state.grids.append(f"{epoch + 1:04d}_{batch + 1:04d}")
                sample(folder, state, options.keep, batches=5 if is_last else 1)
            if save_now:
                network.estimate_statistics(state.average, options.noise)
                save(folder / "checkpoint.safetensors", state)
                write_results(folder, state)
                next_save = time.monotonic() + 60 * options.save_minutes
            if sample_now:
                try_to_write(draw_progress, folder / "progress.gif", state)
            bar.update(images_seen)  # after saving, since the terminal may be gone
            where = f"epoch {epoch + 1}/{options.epochs} it {state.step}/{total}"
            bar.set_description(where, refresh=False)
            bar.set_postfix_str("D {:.3f} G {:.3f} D(x) {:.2f} D(G(z)) {:.2f}".format(*losses))
            if is_stopped and not is_last:
                say(f"stopped after iteration {state.step}, which is saved: the same command"
                    " (without --restart) goes on")
                raise SystemExit(128 + signals[0])


def main():  # the settings above are the flags; ALLOWED and DEMO say more about them
    train(dataReader.command_line(globals()))


if __name__ == "__main__":
    dataReader.run_script(main)
