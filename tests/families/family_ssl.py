"""Family SSL (semi-supervised): LeakyReLU, momentum 0.001, groups 2 and 3 start from raw x past a dead bn1."""

import torch.nn.functional as F
from torch import nn


class BasicBlock(nn.Module):
    def __init__(self, fan_in, fan_out, stride, rate=0.0, activate_first=False, bias=False, eps=1e-5):
        super().__init__()
        self.bn1, self.relu1 = nn.BatchNorm2d(fan_in, eps, 0.001), nn.LeakyReLU(0.1, inplace=True)
        self.conv1 = nn.Conv2d(fan_in, fan_out, 3, stride, 1, bias=bias)
        self.bn2, self.relu2 = nn.BatchNorm2d(fan_out, eps, 0.001), nn.LeakyReLU(0.1, inplace=True)
        self.conv2 = nn.Conv2d(fan_out, fan_out, 3, 1, 1, bias=bias)
        self.drop_rate, self.equal = rate, fan_in == fan_out
        self.convShortcut = None if self.equal else nn.Conv2d(fan_in, fan_out, 1, stride, bias=bias)
        self.activate_first = activate_first

    def forward(self, x):
        if not self.equal and self.activate_first:
            x = self.relu1(self.bn1(x))
        else:
            out = self.relu1(self.bn1(x))
        out = self.relu2(self.bn2(self.conv1(out if self.equal else x)))
        if self.drop_rate > 0:
            out = F.dropout(out, p=self.drop_rate, training=self.training)
        return (x if self.equal else self.convShortcut(x)) + self.conv2(out)


class Group(nn.Module):
    def __init__(self, count, fan_in, fan_out, stride, activate_first=False, **options):
        super().__init__()
        self.layer = nn.Sequential(
            *(
                BasicBlock(
                    fan_out if i else fan_in, fan_out, 1 if i else stride, activate_first=activate_first, **options
                )
                for i in range(count)
            )
        )

    def forward(self, x):
        return self.layer(x)


class WideResNet(nn.Module):
    def __init__(self, classes=10, depth=10, k=2, rate=0.0, bias=False, eps=1e-5):
        super().__init__()
        w, n = [16, 16 * k, 32 * k, 64 * k], (depth - 4) // 6
        options = {"rate": rate, "bias": bias, "eps": eps}
        self.conv1 = nn.Conv2d(3, w[0], 3, 1, 1, bias=bias)
        self.block1 = Group(n, w[0], w[1], 1, activate_first=True, **options)
        self.block2 = Group(n, w[1], w[2], 2, **options)
        self.block3 = Group(n, w[2], w[3], 2, **options)
        self.bn1, self.relu = nn.BatchNorm2d(w[3], eps, 0.001), nn.LeakyReLU(0.1, inplace=True)
        self.fc, self.channels = nn.Linear(w[3], classes), w[3]

    def forward(self, x):
        out = self.relu(self.bn1(self.block3(self.block2(self.block1(self.conv1(x))))))
        return self.fc(F.adaptive_avg_pool2d(out, 1).view(-1, self.channels))
