"""Initial weights (tutorial §3.3; Radford et al. 2015, §4).

Imported by network.py; import that one, since it prepares the loading of Paddle first.

All weights start from a normal distribution with standard deviation 0.02: around 0 in
convolutional, transposed convolutional and fully connected layers, around 1 for the scale of
batch normalization. Shifts and biases start at 0.
"""

import paddle

conv_initializer = paddle.nn.initializer.Normal(mean=0.0, std=0.02)
bn_initializer = paddle.nn.initializer.Normal(mean=1.0, std=0.02)
