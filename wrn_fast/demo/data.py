"""Real labelled images as normalised tensors: the user's CIFAR or SVHN, else scikit-learn's digits."""

from __future__ import annotations

import importlib.util
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from wrn_fast.demo import files
from wrn_fast.errors import WrnFastError


class Split(NamedTuple):
    """Images ready for a model: x fp32 [N, 3, 32, 32] channels_last, y int64 [N]."""

    name: str
    classes: int
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor

    def to(self, device: torch.device) -> Split:
        """The same images on another device."""
        tensors = (getattr(self, name).to(device) for name in self._fields[2:])
        return Split(self.name, self.classes, *tensors)


def load(path: str | None, *, limit: int, seed: int) -> Split:
    """The images of the folder `path`, or the digits if it is None, normalised by the training images' statistics.

    Args:
        path: a folder with CIFAR-10, CIFAR-100 or SVHN files; None: `sklearn.datasets.load_digits`.
        limit: at most so many training images, and a quarter of it test images, drawn by `seed`; 0: all.
        seed: of the draw, and of the digits' split into four fifths for training and one for testing.

    Raises:
        WrnFastError: the files are not there or not what their names say; scikit-learn is missing.
    """
    generator = np.random.default_rng(seed)
    images = digits(generator) if path is None else files.read(path)
    parts = []
    for x, y, most in (
        (images.train_x, images.train_y, limit),
        (images.test_x, images.test_y, max(1, limit // 4) if limit else 0),
    ):
        rows = generator.permutation(len(x))[: most or None]
        parts += [torch.from_numpy(x[rows]).float() / 255, torch.from_numpy(y[rows])]
    train_x, train_y, test_x, test_y = parts
    std, mean = torch.std_mean(train_x, dim=(0, 2, 3), keepdim=True)
    std = std.clamp_min(1e-3)  # a channel of one colour stays finite
    train_x, test_x = (((x - mean) / std).to(memory_format=torch.channels_last) for x in (train_x, test_x))
    return Split(images.name, images.classes, train_x, train_y, test_x, test_y)


def digits(generator: np.random.Generator) -> files.Images:
    """scikit-learn's 1,797 handwritten digits, 8x8 in 17 grey levels, enlarged to 32x32 on three equal channels."""
    if importlib.util.find_spec("sklearn") is None:
        raise WrnFastError("--data: without it the demo needs scikit-learn (pip install 'wrn_fast[demo]')")
    from sklearn.datasets import load_digits

    small = load_digits()
    x = torch.from_numpy(small.images).float()[:, None] * (255 / 16)
    x = F.interpolate(x, size=(32, 32), mode="bilinear", align_corners=False)
    large = x.round().to(torch.uint8).expand(-1, 3, -1, -1).numpy()
    labels = small.target.astype(np.int64)
    order = generator.permutation(len(large))
    test, train = order[: len(order) // 5], order[len(order) // 5 :]
    name = "scikit-learn digits (8x8, enlarged)"
    return files.Images(name, 10, large[train], labels[train], large[test], labels[test])
