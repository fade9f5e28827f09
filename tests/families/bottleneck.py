"""Wide ResNet-50-2 and 101-2: post-activation bottlenecks, in the module trees of the two best known libraries."""

import torch
import torch.nn.functional as F
from torch import nn


class Bottleneck(nn.Module):
    """1x1, 3x3 at twice the usual width, 1x1; one ReLU module for all three."""

    expansion = 4

    def __init__(self, inplanes, planes, stride=1, downsample=None, base_width=128):
        super().__init__()
        width = planes * base_width // 64
        self.conv1, self.bn1 = nn.Conv2d(inplanes, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, planes * self.expansion, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(planes * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample, self.stride = downsample, stride

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


class OtherNames(nn.Module):
    """An activation module for each place, hooks for extensions left as Identity or None, the shortcut first."""

    expansion = 4

    def __init__(self, inplanes, planes, stride=1, downsample=None, base_width=128):
        super().__init__()
        width = planes * base_width // 64
        self.downsample = downsample
        self.conv1, self.bn1 = nn.Conv2d(inplanes, width, 1, bias=False), nn.BatchNorm2d(width)
        self.act1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2, self.drop_block, self.act2 = nn.BatchNorm2d(width), nn.Identity(), nn.ReLU(inplace=True)
        self.aa, self.se, self.drop_path = nn.Identity(), None, None
        self.conv3 = nn.Conv2d(width, planes * self.expansion, 1, bias=False)
        self.bn3, self.act3 = nn.BatchNorm2d(planes * self.expansion), nn.ReLU(inplace=True)

    def forward(self, x):
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.aa(self.act2(self.drop_block(self.bn2(self.conv2(self.act1(self.bn1(self.conv1(x))))))))
        x = self.bn3(self.conv3(x))
        x = x if self.se is None else self.se(x)
        x = shortcut + (x if self.drop_path is None else self.drop_path(x))
        return self.act3(x)


class ResNet(nn.Module):
    def __init__(self, block=Bottleneck, counts=(2, 1, 2, 1), planes=8, classes=10):
        super().__init__()
        self.conv1 = nn.Conv2d(3, planes, 7, 2, 3, bias=False)
        self.bn1, self.relu, self.maxpool = nn.BatchNorm2d(planes), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
        fan_in = planes
        for g, count in enumerate(counts):
            width, stride, blocks = planes * 2**g, 2 if g else 1, []
            for i in range(count):
                step, down = (stride, fan_in != width * 4 or stride > 1) if i == 0 else (1, False)
                conv = nn.Conv2d(fan_in, width * 4, 1, step, bias=False) if down else None
                downsample = nn.Sequential(conv, nn.BatchNorm2d(width * 4)) if down else None
                blocks.append(block(fan_in, width, step, downsample))
                fan_in = width * 4
            setattr(self, f"layer{g + 1}", nn.Sequential(*blocks))
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(fan_in, classes)

    def forward(self, x):
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


def wide_resnet50_2():
    return ResNet(counts=(3, 4, 6, 3), planes=64, classes=1000)


class LeakyBottleneck(Bottleneck):
    def forward(self, x):
        out = F.leaky_relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))))
        return self.relu(self.bn3(self.conv3(out)) + x)


class ScaledBottleneck(Bottleneck):
    def forward(self, x):
        out = self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))))
        return self.relu(0.5 * self.bn3(self.conv3(out)) + x)


class NoLastActivation(Bottleneck):
    def forward(self, x):
        out = self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))))
        return self.bn3(self.conv3(out)) + x


class OtherInEval(Bottleneck):
    def forward(self, x):
        return super().forward(x) if self.training else super().forward(2 * x)
