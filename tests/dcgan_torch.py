"""PyTorch's DCGAN example in its own recipe, for `bench.py --quality`; needs torch and numpy.

    python tests/dcgan_torch.py images.npy folder --iterations 310 --batch 64 --seed 0

What makes the recipe: a convolution as D's last layer, BCE, one step of D (a backward for the real
images and one for the generated) and one of G on the same latent vectors, BN momentum 0.1, faces
drawn in train mode, with their own batch's statistics. Other than the example it drops the partial
batch at the end of an epoch, so that iterations compare. What is written: see recipe.py.
Source: github.com/pytorch/examples, dcgan/main.py, written anew.
"""

import numpy as np
import recipe
import torch
from torch import nn
from torch.nn import functional as F


def make_generator(width):
    """`[N, 100, 1, 1]` → `[N, 3, 64, 64]` in [-1, 1]; `width` channels before the last layer."""
    layers = [nn.ConvTranspose2d(100, 8 * width, 4, 1, 0, bias=False),        # [N, 512, 4, 4]
              nn.BatchNorm2d(8 * width), nn.ReLU(True)]
    for channels in 4 * width, 2 * width, width:         # [N, 256, 8, 8] to [N, 64, 32, 32]
        layers += [nn.ConvTranspose2d(2 * channels, channels, 4, 2, 1, bias=False),
                   nn.BatchNorm2d(channels), nn.ReLU(True)]
    return nn.Sequential(*layers, nn.ConvTranspose2d(width, 3, 4, 2, 1, bias=False), nn.Tanh())


def make_discriminator(width):
    """`[N, 3, 64, 64]` → logits `[N]`."""
    layers = [nn.Conv2d(3, width, 4, 2, 1, bias=False), nn.LeakyReLU(0.2, True)]
    for channels in 2 * width, 4 * width, 8 * width:     # [N, 128, 16, 16] to [N, 512, 4, 4]
        layers += [nn.Conv2d(channels // 2, channels, 4, 2, 1, bias=False),
                   nn.BatchNorm2d(channels), nn.LeakyReLU(0.2, True)]
    return nn.Sequential(*layers, nn.Conv2d(8 * width, 1, 4, 1, 0, bias=False), nn.Flatten(0))


def initialize(layer):
    if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.normal_(layer.weight, 0, 0.02)
    elif isinstance(layer, nn.BatchNorm2d):
        nn.init.normal_(layer.weight, 1, 0.02)
        nn.init.zeros_(layer.bias)


class Example:
    """The recipe, with what `recipe.run` wants of one."""

    def __init__(self, seed, width):
        torch.manual_seed(seed)
        self.G = make_generator(width).apply(initialize)
        self.D = make_discriminator(width).apply(initialize)
        self.g_adam = torch.optim.Adam(self.G.parameters(), 2e-4, (0.5, 0.999))
        self.d_adam = torch.optim.Adam(self.D.parameters(), 2e-4, (0.5, 0.999))

    def generate(self, z):
        return self.G(torch.from_numpy(z)[:, :, None, None])

    def iterate(self, images, latents):
        real = torch.from_numpy(images).float() / 127.5 - 1
        is_real, is_fake = torch.ones(len(images)), torch.zeros(len(images))

        self.D.zero_grad()
        F.binary_cross_entropy_with_logits(self.D(real), is_real).backward()
        fake = self.generate(latents())
        F.binary_cross_entropy_with_logits(self.D(fake.detach()), is_fake).backward()
        self.d_adam.step()

        self.G.zero_grad()
        F.binary_cross_entropy_with_logits(self.D(fake), is_real).backward()
        self.g_adam.step()

    @torch.no_grad()
    def draw(self, z):
        return (self.generate(z) * 127.5 + 128).clip(0, 255).byte().numpy().astype(np.uint8)

    def parts(self):
        return {"G": self.G, "D": self.D, "g_adam": self.g_adam, "d_adam": self.d_adam}

    def save(self, path, step):
        states = {name: part.state_dict() for name, part in self.parts().items()}
        torch.save({"step": step, **states}, path)

    def load(self, path):
        states = torch.load(path)
        for name, part in self.parts().items():
            part.load_state_dict(states[name])
        return states["step"]


def main():
    options = recipe.flags(__doc__, batch=64).parse_args()
    recipe.run(Example(options.seed, options.width), options)


if __name__ == "__main__":
    main()
