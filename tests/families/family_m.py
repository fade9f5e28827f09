"""Family M: every convolution has a bias, the stride is on conv2, a dropout module before bn2, a raw shortcut."""

import torch.nn.functional as F
from torch import nn


class WideBasic(nn.Module):
    def __init__(self, fan_in, fan_out, rate, stride):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(fan_in), nn.Conv2d(fan_in, fan_out, 3, padding=1)
        self.dropout = nn.Dropout(rate)
        self.bn2, self.conv2 = nn.BatchNorm2d(fan_out), nn.Conv2d(fan_out, fan_out, 3, stride, 1)
        self.shortcut = nn.Sequential()
        if stride != 1 or fan_in != fan_out:
            self.shortcut = nn.Sequential(nn.Conv2d(fan_in, fan_out, 1, stride))

    def forward(self, x):
        out = self.dropout(self.conv1(F.relu(self.bn1(x))))
        out = self.conv2(F.relu(self.bn2(out)))
        out += self.shortcut(x)
        return out


class WideResNet(nn.Module):
    def __init__(self, depth=10, k=1, rate=0.0, classes=10):
        super().__init__()
        w, n = [16, 16 * k, 32 * k, 64 * k], (depth - 4) // 6
        self.conv1 = nn.Conv2d(3, w[0], 3, padding=1)
        for g, stride in enumerate((1, 2, 2), 1):
            blocks = [WideBasic(w[g] if i else w[g - 1], w[g], rate, 1 if i else stride) for i in range(n)]
            setattr(self, f"layer{g}", nn.Sequential(*blocks))
        self.bn1, self.linear = nn.BatchNorm2d(w[3], momentum=0.9), nn.Linear(w[3], classes)

    def forward(self, x):
        out = F.relu(self.bn1(self.layer3(self.layer2(self.layer1(self.conv1(x))))))
        out = F.avg_pool2d(out, 8)
        return self.linear(out.view(out.size(0), -1))
