"""The DCGAN of Paddle's own documentation, in its own recipe, for `bench.py --quality`.

    python tests/dcgan_docs.py images.npy folder --iterations 310 --batch 128 --seed 0
    python tests/dcgan_docs.py images.npy folder --onednn

What makes the recipe, which is what the page's code does and not what its text says: images in
[0, 1] under a tanh, BN momentum 0.8, a convolution and a sigmoid as D's last layers, BCE, an Adam
step of D on real images and another on generated ones, one of G on new latent vectors, faces drawn
in train mode, with their own batch's statistics. The page's code stops at its first loss with
today's Paddle; this is its algorithm. What is written: see recipe.py.

`--onednn` runs its convolutions as ours are run on a CPU, which the page does not: so that it
is not beaten by slowness alone.
Source: docs/practices/gan/dcgan_face in github.com/PaddlePaddle/docs, written anew.
"""

import sys
from pathlib import Path

import recipe

sys.path.insert(0, str(Path(__file__).parents[1]))

import network
import weightInit
from weightInit import bn_initializer, paddle, weight_initializer

nn = paddle.nn


class Layers:
    """The layers of the page, whose convolutions are Paddle's or, with `onednn`, network.py's."""

    def __init__(self, onednn):
        self.source = network if onednn else nn

    def conv(self, channels_in, channels_out, stride=2, padding=1):
        return self.source.Conv2D(channels_in, channels_out, 4, stride, padding,
                                  weight_attr=weight_initializer(), bias_attr=False)

    def deconv(self, channels_in, channels_out, stride=2, padding=1):
        return self.source.Conv2DTranspose(channels_in, channels_out, 4, stride, padding,
                                           weight_attr=weight_initializer(), bias_attr=False)

    def bn(self, channels):
        return nn.BatchNorm2D(channels, momentum=0.8, weight_attr=bn_initializer())


def make_generator(width, onednn):
    """`[N, 100, 1, 1]` → `[N, 3, 64, 64]`; `width` channels before the last layer."""
    of = Layers(onednn)
    layers = [of.deconv(100, 8 * width, 1, 0), of.bn(8 * width), nn.ReLU()]  # [N, 512, 4, 4]
    for channels in 4 * width, 2 * width, width:         # [N, 256, 8, 8] to [N, 64, 32, 32]
        layers += [of.deconv(2 * channels, channels), of.bn(channels), nn.ReLU()]
    return nn.Sequential(*layers, of.deconv(width, 3), nn.Tanh())


def make_discriminator(width, onednn):
    """`[N, 3, 64, 64]` → the probability of being real, `[N, 1, 1, 1]`."""
    of = Layers(onednn)
    layers = [of.conv(3, width), nn.LeakyReLU(0.2)]
    for channels in 2 * width, 4 * width, 8 * width:     # [N, 128, 16, 16] to [N, 512, 4, 4]
        layers += [of.conv(channels // 2, channels), of.bn(channels), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers, of.conv(8 * width, 1, 1, 0), nn.Sigmoid())


class Page:
    """The recipe, with what `recipe.run` wants of one."""

    def __init__(self, seed, width, onednn):
        paddle.seed(seed)
        self.G = make_generator(width, onednn)
        self.D = make_discriminator(width, onednn)
        self.g_adam = paddle.optimizer.Adam(2e-4, 0.5, 0.999, parameters=self.G.parameters())
        self.d_adam = paddle.optimizer.Adam(2e-4, 0.5, 0.999, parameters=self.D.parameters())

    def generate(self, z):
        return self.G(paddle.to_tensor(z).reshape([len(z), 100, 1, 1]))

    def step(self, adam, images, label):
        verdict = self.D(images)
        nn.functional.binary_cross_entropy(
            verdict, paddle.full(verdict.shape, label)).backward()
        adam.step()
        self.d_adam.clear_grad()
        self.g_adam.clear_grad()

    def iterate(self, images, latents):
        self.step(self.d_adam, paddle.to_tensor(images).astype("float32") / 255, 1.0)
        self.step(self.d_adam, self.generate(latents()).detach(), 0.0)
        self.step(self.g_adam, self.generate(latents()), 1.0)

    @paddle.no_grad()
    def draw(self, z):
        return (self.generate(z) * 255).round().clip(0, 255).astype("uint8").numpy()

    def parts(self):
        return {"G": self.G, "D": self.D, "g_adam": self.g_adam, "d_adam": self.d_adam}

    def save(self, path, step):
        states = {name: part.state_dict() for name, part in self.parts().items()}
        paddle.save({"step": step, **states}, str(path))

    def load(self, path):
        states = paddle.load(str(path))
        for name, part in self.parts().items():
            part.set_state_dict(states[name])
        return states["step"]


def main():
    parser = recipe.flags(__doc__, batch=128)
    parser.add_argument("--onednn", action="store_true")
    options = parser.parse_args()
    weightInit.use_device("cpu")
    recipe.run(Page(options.seed, options.width, options.onednn), options)


if __name__ == "__main__":
    main()
