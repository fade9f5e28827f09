"""Family DM (adversarial training): right-and-bottom padding at stride 2, SiLU as a module or a custom function."""

import torch
import torch.nn.functional as F
from torch import nn


class _SwishFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, v):
        ctx.save_for_backward(v)
        return v * torch.sigmoid(v)

    @staticmethod
    def backward(ctx, grad):
        (v,) = ctx.saved_tensors
        s = torch.sigmoid(v)
        return grad * (s * (1 + v * (1 - s)))


class Swish(nn.Module):
    def forward(self, v):
        return _SwishFunction.apply(v)


class Block(nn.Module):
    def __init__(self, fan_in, fan_out, stride, act, momentum):
        super().__init__()
        self.has_shortcut, self.stride = fan_in != fan_out, stride
        self.batchnorm_0, self.relu_0 = nn.BatchNorm2d(fan_in, momentum=momentum), act()
        self.conv_0 = nn.Conv2d(fan_in, fan_out, 3, stride, 0 if stride == 2 else 1, bias=False)
        self.batchnorm_1, self.relu_1 = nn.BatchNorm2d(fan_out, momentum=momentum), act()
        self.conv_1 = nn.Conv2d(fan_out, fan_out, 3, 1, 1, bias=False)
        if self.has_shortcut:
            self.shortcut = nn.Conv2d(fan_in, fan_out, 1, stride, 0, bias=False)

    def forward(self, x):
        if self.has_shortcut:
            x = self.relu_0(self.batchnorm_0(x))
            v = x
        else:
            v = self.relu_0(self.batchnorm_0(x))
        if self.stride == 2:
            v = F.pad(v, (0, 1, 0, 1))
        v = self.conv_1(self.relu_1(self.batchnorm_1(self.conv_0(v))))
        return v + (self.shortcut(x) if self.has_shortcut else x)


class BlockGroup(nn.Module):
    def __init__(self, count, fan_in, fan_out, stride, act, momentum):
        super().__init__()
        self.block = nn.Sequential(
            *(Block(fan_out if i else fan_in, fan_out, 1 if i else stride, act, momentum) for i in range(count))
        )

    def forward(self, x):
        return self.block(x)


class WideResNet(nn.Module):
    def __init__(self, classes=10, depth=10, width=1, act=nn.SiLU, momentum=0.01):
        super().__init__()
        # plain attributes, as they are published: not in the state_dict, and they do not move with the model
        self.mean, self.std = [torch.full((1, 3, 1, 1), v) for v in (0.47, 0.25)]
        w, n = [16, 16 * width, 32 * width, 64 * width], (depth - 4) // 6
        self.init_conv = nn.Conv2d(3, w[0], 3, 1, 1, bias=False)
        self.layer = nn.Sequential(
            *(BlockGroup(n, w[g], w[g + 1], stride, act, momentum) for g, stride in enumerate((1, 2, 2)))
        )
        self.batchnorm, self.relu = nn.BatchNorm2d(w[3], momentum=momentum), act()
        self.logits, self.channels = nn.Linear(w[3], classes), w[3]

    def forward(self, x):
        out = self.layer(self.init_conv((x - self.mean) / self.std))
        return self.logits(F.avg_pool2d(self.relu(self.batchnorm(out)), 8).view(-1, self.channels))
