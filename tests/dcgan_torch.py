"""PyTorch's DCGAN example in its own recipe, for `bench.py --quality`; needs torch and numpy.

    python tests/dcgan_torch.py images.npy faces.npy --iterations 310 --batch 64 --seed 0

images.npy is uint8 [N, 3, 64, 64]. faces.npy gets 2,000 generated images, uint8, each batch drawn
with its own BN statistics, in train mode, as the example draws them. What makes the recipe: a
convolution as D's last layer, BCE, one step of D (a backward for the real images and one for the
generated) and one of G on the same latent vectors, BN momentum 0.1. Other than the example it
drops the partial batch at the end of an epoch, so that iterations compare.
Source: github.com/pytorch/examples, dcgan/main.py, written anew.
"""

import argparse

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

COUNT = 2000


def generator():
    layers, channels = [], 100
    for index, wider in enumerate((512, 256, 128, 64)):
        layers += [nn.ConvTranspose2d(channels, wider, 4, 2 if index else 1, 1 if index else 0,
                                      bias=False), nn.BatchNorm2d(wider), nn.ReLU(True)]
        channels = wider
    return nn.Sequential(*layers, nn.ConvTranspose2d(channels, 3, 4, 2, 1, bias=False), nn.Tanh())


def discriminator():
    layers = [nn.Conv2d(3, 64, 4, 2, 1, bias=False), nn.LeakyReLU(0.2, True)]
    for channels in 64, 128, 256:
        layers += [nn.Conv2d(channels, 2 * channels, 4, 2, 1, bias=False),
                   nn.BatchNorm2d(2 * channels), nn.LeakyReLU(0.2, True)]
    return nn.Sequential(*layers, nn.Conv2d(512, 1, 4, 1, 0, bias=False), nn.Flatten(0))


def initialize(layer):
    if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.normal_(layer.weight, 0, 0.02)
    elif isinstance(layer, nn.BatchNorm2d):
        nn.init.normal_(layer.weight, 1, 0.02)
        nn.init.zeros_(layer.bias)


def train(images, iterations, batch, seed):
    """Return the trained generator; `images` is a uint8 array `[N, 3, 64, 64]`."""
    torch.manual_seed(seed)
    G, D = generator().apply(initialize), discriminator().apply(initialize)
    adams = [torch.optim.Adam(net.parameters(), 2e-4, (0.5, 0.999)) for net in (D, G)]
    real_label, fake_label = torch.ones(batch), torch.zeros(batch)
    order = iter(())
    for _ in range(iterations):
        chosen = next(order, None)
        if chosen is None:
            order = iter(torch.randperm(len(images))[:len(images) // batch * batch].split(batch))
            chosen = next(order)
        real = torch.from_numpy(images[chosen.numpy()]).float() / 127.5 - 1

        D.zero_grad()
        F.binary_cross_entropy_with_logits(D(real), real_label).backward()
        fake = G(torch.randn(batch, 100, 1, 1))
        F.binary_cross_entropy_with_logits(D(fake.detach()), fake_label).backward()
        adams[0].step()

        G.zero_grad()
        F.binary_cross_entropy_with_logits(D(fake), real_label).backward()
        adams[1].step()
    return G


@torch.no_grad()
def draw(G, batch):
    torch.manual_seed(1)
    faces = [G(torch.randn(batch, 100, 1, 1)) for _ in range(-(-COUNT // batch))]
    return ((torch.cat(faces)[:COUNT] * 127.5 + 128).clip(0, 255)).byte().numpy()


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images")
    parser.add_argument("faces")
    parser.add_argument("--iterations", type=int, default=310)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    G = train(np.load(options.images), options.iterations, options.batch, options.seed)
    np.save(options.faces, draw(G, options.batch))


if __name__ == "__main__":
    main()
