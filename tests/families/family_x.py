"""Family X: activated shortcut, bias-free convolutions, `block{1,2,3}.layer` keys. The most common code there is.

Variants of the outer network: a copy of block1 that never runs (`spare`), a second argument of forward, a dict as the
result, `conv_shortcut` as a name, other widths and depths for each group, a normalisation before the first convolution.
"""

import torch
import torch.nn.functional as F
from torch import nn


class BasicBlock(nn.Module):
    def __init__(self, fan_in, fan_out, stride, rate=0.0, name="convShortcut"):
        super().__init__()
        self.bn1, self.relu1 = nn.BatchNorm2d(fan_in), nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(fan_in, fan_out, 3, stride, 1, bias=False)
        self.bn2, self.relu2 = nn.BatchNorm2d(fan_out), nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(fan_out, fan_out, 3, 1, 1, bias=False)
        self.rate, self.same, self.name = rate, fan_in == fan_out, name
        setattr(self, name, None if self.same else nn.Conv2d(fan_in, fan_out, 1, stride, bias=False))

    def forward(self, x):
        if self.same:
            out = self.relu1(self.bn1(x))
        else:
            x = self.relu1(self.bn1(x))
        out = self.relu2(self.bn2(self.conv1(out if self.same else x)))
        if self.rate > 0:
            out = F.dropout(out, p=self.rate, training=self.training)
        return torch.add(x if self.same else getattr(self, self.name)(x), self.conv2(out))


class Group(nn.Module):
    def __init__(self, count, fan_in, fan_out, stride, **options):
        super().__init__()
        blocks = [BasicBlock(fan_out if i else fan_in, fan_out, 1 if i else stride, **options) for i in range(count)]
        self.layer = nn.Sequential(*blocks)

    def forward(self, x):
        return self.layer(x)


class WideResNet(nn.Module):
    def __init__(
        self, depth=10, classes=10, k=1, rate=0.0, *, counts=None, widths=None, spare=False, name="convShortcut"
    ):
        super().__init__()
        counts = counts or [(depth - 4) // 6] * 3
        w = widths or [16, 16 * k, 32 * k, 64 * k]
        self.conv1 = nn.Conv2d(3, w[0], 3, 1, 1, bias=False)
        self.block1 = Group(counts[0], w[0], w[1], 1, rate=rate, name=name)
        if spare:
            self.sub_block1 = Group(counts[0], w[0], w[1], 1, rate=rate, name=name)
        self.block2 = Group(counts[1], w[1], w[2], 2, rate=rate, name=name)
        self.block3 = Group(counts[2], w[2], w[3], 2, rate=rate, name=name)
        self.bn1, self.relu = nn.BatchNorm2d(w[3]), nn.ReLU(inplace=True)
        self.fc, self.channels = nn.Linear(w[3], classes), w[3]

    def features(self, x):
        return self.relu(self.bn1(self.block3(self.block2(self.block1(self.conv1(x))))))

    def forward(self, x):
        return self.fc(F.avg_pool2d(self.features(x), 8).view(-1, self.channels))


class TwoArguments(WideResNet):
    def forward(self, x, return_feature=False):
        feature = F.avg_pool2d(self.features(x), 8).view(-1, self.channels)
        return (self.fc(feature), feature) if return_feature else self.fc(feature)


class ReturnsDict(WideResNet):
    def forward(self, x):
        feature = F.adaptive_avg_pool2d(self.features(x), 1).flatten(1)
        return {"logits": self.fc(feature), "feat": feature}


class Normalised(nn.Module):
    """The wrapper of adversarial training: (x - mean) / std from buffers, then the net."""

    def __init__(self, net):
        super().__init__()
        self.register_buffer("mean", torch.full((1, 3, 1, 1), 0.47))
        self.register_buffer("std", torch.full((1, 3, 1, 1), 0.25))
        self.net = net

    def forward(self, x):
        return self.net((x - self.mean) / self.std)
