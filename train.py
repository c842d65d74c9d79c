"""Train the DCGAN (tutorial §4 and §5).

    python train.py                                   # CelebA's crops in imgs/, on the GPU
    python train.py --batch_size 32 --epochs 6        # the demo faces, on a CPU
    python train.py --data_path photos --output_path Output/photos

Edit the settings below or pass them as flags. Everything is written to Output/:

    0003_0100.png          faces of the same latent vectors after epoch 3, batch 100
    losses.csv losses.png  both losses, iteration by iteration
    real_vs_fake.png       training images beside generated ones, at the end
    generator.safetensors  what generator.py needs
"""

from dataReader import (
    SIZES,
    FaceReader,
    Problem,
    command_line,
    grid,
    make_folder,
    replacing,
    run,
    save_grids,
    save_png,
)
from network import (
    Discriminator,
    Generator,
    draw_faces,
    face_latents,
    latent,
    loss,
    margin,
    save_generator,
    use_device,
)

import numpy as np
import paddle
from paddle.nn import functional as F
from tqdm import tqdm

# -------------------------------------------------------------------------------------------------
# settings (each is also a flag, e.g. --batch_size 64)

# data
data_path = "imgs"       # folder of training images, searched recursively
image_size = 64          # height and width of an image: 32, 64 or 128 (run pretreat.py with it too)
# networks
z_dim = 100              # length of a latent vector
width = 64               # channels next to the image; 32 is three times as fast, and blurrier
noise = "normal"         # latent vectors: "normal" N(0, 1), or "uniform" U[0, 1): less diverse here
# optimization
epochs = 8               # passes over the images
batch_size = 128         # images per iteration; 32 or 64 learns more a minute on a CPU
learning_rate = 0.0002   # Adam's, of both networks; halve it when the losses blow up
beta1 = 0.5              # Adam's decay of the mean gradient
beta2 = 0.999            # Adam's decay of the mean squared gradient
d_steps = 1              # discriminator steps per iteration
g_steps = 2              # generator steps per iteration; more when D wins (its loss goes to 0)
seed = 0                 # of weights, order and latent vectors
# the run
device = "auto"          # "gpu", "cpu", or "auto": the GPU if there is one that Paddle can use
output_path = "Output"   # where everything is written
log_every = 10           # iterations between updates of the bar and of losses.csv
sample_every = 100       # iterations between grids of faces; there is one after each epoch too

# -------------------------------------------------------------------------------------------------
# the algorithm


def d_step(D, G, optimizer, real, z):
    """Teach D to tell real images from generated ones: one Adam step on the sum of both losses.

    Args:
        D, G: the networks; G is left as it is.
        optimizer: of D's parameters.
        real: images `[N, 3, S, S]` in [-1, 1].
        z: latent vectors `[N, z_dim]`.

    Returns:
        (loss, D(x), D(G(z))), 0-D tensors: the sum of the two losses in nats, and the mean
        probabilities of being real that D gave.
    """
    with paddle.no_grad():
        fake = G(z)
    logits_real, logits_fake = D(real), D(fake)
    d_loss = loss(logits_real, 1) + loss(logits_fake, 0)
    d_loss.backward()
    optimizer.step()
    optimizer.clear_grad()
    with paddle.no_grad():
        return (d_loss.detach(), F.sigmoid(margin(logits_real)).mean(),
                F.sigmoid(margin(logits_fake)).mean())


def g_step(D, G, optimizer, z):
    """Teach G to make images that D calls real: one Adam step.

    Args:
        D, G: the networks; D's parameters are frozen meanwhile.
        optimizer: of G's parameters.
        z: latent vectors `[N, z_dim]`.

    Returns:
        The loss in nats, a 0-D tensor.
    """
    frozen = [parameter for parameter in D.parameters() if not parameter.stop_gradient]
    for parameter in frozen:
        parameter.stop_gradient = True
    g_loss = loss(D(G(z)), 1)
    g_loss.backward()
    optimizer.step()
    optimizer.clear_grad()
    for parameter in frozen:
        parameter.stop_gradient = False
    return g_loss.detach()


def iterate(D, G, d_optimizer, g_optimizer, images, options, step):
    """One iteration: `d_steps` discriminator steps, then `g_steps` generator steps (§4).

    Args:
        images: uint8 array `[N, 3, S, S]`.
        options: the settings.
        step: number of the iteration; with the seed it determines the latent vectors.

    Returns:
        Tensor `[4]`: D's loss, G's loss, D(x), D(G(z)), of the last step of each network. It stays
        on the device, so that the device need not be waited for.
    """
    def z(draw):
        return paddle.to_tensor(latent(
            [options.seed, step, 0, draw], [len(images), options.z_dim], options.noise))

    real = paddle.to_tensor(images).astype("float32") / 127.5 - 1
    for draw in range(options.d_steps):
        d_loss, d_real, d_fake = d_step(D, G, d_optimizer, real, z(draw))
    for draw in range(options.d_steps, options.d_steps + options.g_steps):
        g_loss = g_step(D, G, g_optimizer, z(draw))
    return paddle.stack([d_loss, g_loss, d_real, d_fake])


# -------------------------------------------------------------------------------------------------
# the run


def draw_losses(source, path):
    """Draw the losses of losses.csv (§5).

    Args:
        source: the csv.
        path: the PNG to write.
    """
    from matplotlib.figure import Figure  # 0.5 s to import, so only where it is used

    step, _, _, d_loss, g_loss = np.loadtxt(source, delimiter=",", skiprows=1, ndmin=2).T
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    axes.plot(step, g_loss, label="generator G", linewidth=0.8)
    axes.plot(step, d_loss, label="discriminator D", linewidth=0.8)
    axes.set_title("Losses of generator and discriminator")
    axes.set_xlabel("iteration")
    axes.set_ylabel("loss (nats)")
    axes.legend()
    axes.grid(alpha=0.3)
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=120)


def train(options):
    """Train from scratch, and write what the docstring of this file lists.

    Raises:
        Problem: something in the settings or the data that the user can put right.
    """
    use_device(options.device)
    reader = FaceReader(options.data_path, options.image_size, options.batch_size, options.seed)
    output = make_folder(options.output_path)

    paddle.seed(options.seed)
    G = Generator(options.z_dim, options.image_size, options.width)
    D = Discriminator(options.image_size, options.width)
    d_optimizer, g_optimizer = (
        paddle.optimizer.Adam(options.learning_rate, options.beta1, options.beta2,
                              parameters=net.parameters()) for net in (D, G))

    fixed_z = face_latents(options.seed, range(100), options.z_dim, options.noise)

    def samples():
        G.eval()
        images = draw_faces(G, fixed_z)
        G.train()
        return images

    pending = []  # what the device has still to tell, one tensor an iteration
    total = options.epochs * len(reader)
    with open(output / "losses.csv", "w") as table, \
            tqdm(total=total * options.batch_size, unit="img", unit_scale=True) as bar:
        table.write("step,epoch,batch,d_loss,g_loss\n")

        def log():
            values = paddle.stack(pending).numpy()
            for (d_loss, g_loss, _, _), at in zip(
                    values, range(step - len(pending), step), strict=True):
                epoch, batch = divmod(at, len(reader))
                table.write(f"{at + 1},{epoch + 1},{batch + 1},{d_loss:.6g},{g_loss:.6g}\n")
            table.flush()
            bar.set_description(f"epoch {epoch + 1}/{options.epochs} it {step}/{total}", False)
            bar.set_postfix_str(
                "D {:.3f} G {:.3f} D(x) {:.2f} D(G(z)) {:.2f}".format(*values[-1]), False)
            bar.update(len(pending) * options.batch_size)
            pending.clear()

        step = 0
        for epoch in range(1, options.epochs + 1):
            for batch, images in enumerate(reader.epoch(epoch), 1):
                step += 1
                pending.append(iterate(D, G, d_optimizer, g_optimizer, images, options, step))
                ends = batch == len(reader)
                if ends or step % options.log_every == 0:
                    log()
                if ends or step % options.sample_every == 0:
                    save_png(output / f"{epoch:04d}_{batch:04d}.png", grid(samples()))
            save_generator(output / "generator.safetensors", G, options.noise, step)

    draw_losses(output / "losses.csv", output / "losses.png")
    chosen = np.random.default_rng(options.seed).permutation(len(reader.images))[:100]
    save_grids(output / "real_vs_fake.png",
               Real_faces=reader.images[chosen], Generated_faces=samples())
    print(f"{step} iterations done; faces from it: python generator.py"
          f" --checkpoint {output / 'generator.safetensors'}")


def main():
    options = command_line(
        globals(), image_size=SIZES, z_dim=1, width=1, noise=("normal", "uniform"), epochs=1,
        batch_size=1, learning_rate=0, beta1=0, beta2=0, d_steps=1, g_steps=1, seed=0,
        device=("auto", "gpu", "cpu"), log_every=1, sample_every=1)
    if max(options.beta1, options.beta2) >= 1:
        raise Problem("--beta1 and --beta2 must be less than 1")
    train(options)


if __name__ == "__main__":
    run(main)
