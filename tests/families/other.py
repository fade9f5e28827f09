"""Relatives with other module trees (recognised), and look-alikes that compute something else (left alone)."""

import torch
import torch.nn.functional as F
from torch import nn


class Residual(nn.Module):
    """The main path in one Sequential, dropout always there, raw shortcut (as in pytorch-cifar100)."""

    def __init__(self, fan_in, fan_out, stride=1, rate=0.5):
        super().__init__()
        self.residual = nn.Sequential(
            nn.BatchNorm2d(fan_in), nn.ReLU(inplace=True), nn.Conv2d(fan_in, fan_out, 3, stride, 1, bias=False),
            nn.BatchNorm2d(fan_out), nn.ReLU(inplace=True), nn.Dropout(rate),
            nn.Conv2d(fan_out, fan_out, 3, 1, 1, bias=False),
        )  # fmt: skip
        self.shortcut = nn.Sequential()
        if fan_in != fan_out or stride != 1:
            self.shortcut = nn.Sequential(nn.Conv2d(fan_in, fan_out, 1, stride, bias=False))

    def forward(self, x):
        return self.residual(x) + self.shortcut(x)


class PreConv(nn.Module):
    def __init__(self, fan_in, fan_out, stride, keep):
        super().__init__()
        self.keep, self.bn, self.activ = keep, nn.BatchNorm2d(fan_in), nn.ReLU(inplace=True)
        self.conv = nn.Conv2d(fan_in, fan_out, 3, stride, 1, bias=False)

    def forward(self, x):
        a = self.activ(self.bn(x))
        return (self.conv(a), a) if self.keep else self.conv(a)


class Body(nn.Module):
    def __init__(self, fan_in, fan_out, stride):
        super().__init__()
        self.conv1, self.conv2 = PreConv(fan_in, fan_out, stride, True), PreConv(fan_out, fan_out, 1, False)

    def forward(self, x):
        out, a = self.conv1(x)
        return self.conv2(out), a


class ZooUnit(nn.Module):
    """bn and convolution in modules of their own, three levels deep, the body returns a pair (a model zoo)."""

    def __init__(self, fan_in, fan_out, stride=1):
        super().__init__()
        self.resize, self.body = fan_in != fan_out or stride != 1, Body(fan_in, fan_out, stride)
        if self.resize:
            self.identity_conv = nn.Conv2d(fan_in, fan_out, 1, stride, bias=False)

    def forward(self, x):
        identity = x
        x, a = self.body(x)
        return x + (self.identity_conv(a) if self.resize else identity)


class Plain(nn.Module):
    """The submodules of a block, for those that do other things with them."""

    def __init__(self, c=16):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(c), nn.Conv2d(c, c, 3, padding=1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(c), nn.Conv2d(c, c, 3, padding=1, bias=False)


class PostActivation(Plain):
    def forward(self, x):
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + x)


class SqueezeExcite(Plain):
    def __init__(self, c=16):
        super().__init__(c)
        self.squeeze, self.excite = nn.Linear(c, 4), nn.Linear(4, c)

    def forward(self, x):
        out = self.conv2(F.relu(self.bn2(self.conv1(F.relu(self.bn1(x))))))
        gate = torch.sigmoid(self.excite(F.relu(self.squeeze(out.mean((2, 3))))))
        return x + out * gate[:, :, None, None]


class OpBetween(Plain):
    def forward(self, x):
        return x + self.conv2(F.relu(self.bn2(self.conv1(F.relu(self.bn1(x) * 2)))))


class DataDependent(Plain):
    def forward(self, x):
        return x + self.conv2(F.relu(self.bn2(self.conv1(F.relu(self.bn1(x)))))) if x.mean() > 0 else x


class Detached(Plain):
    """The forward of a block, but no gradient passes the shortcut."""

    def forward(self, x):
        return x.detach() + self.conv2(F.relu(self.bn2(self.conv1(F.relu(self.bn1(x))))))


class EditsItsInput(Plain):
    def forward(self, x):
        x += self.conv2(F.relu(self.bn2(self.conv1(F.relu(self.bn1(x))))))
        return x


class Grouped(Plain):
    def __init__(self, c=16):
        super().__init__(c)
        self.conv2 = nn.Conv2d(c, c, 3, padding=1, groups=4, bias=False)

    def forward(self, x):
        return x + self.conv2(F.relu(self.bn2(self.conv1(F.relu(self.bn1(x))))))


class NormInShortcut(Plain):
    def __init__(self, c=16):
        super().__init__(c)
        self.shortcut = nn.Sequential(nn.Conv2d(c, c, 1, bias=False), nn.BatchNorm2d(c))

    def forward(self, x):
        return self.shortcut(x) + self.conv2(F.relu(self.bn2(self.conv1(F.relu(self.bn1(x))))))


class LearnedActivation(Plain):
    def __init__(self, c=16):
        super().__init__(c)
        self.act = nn.PReLU()

    def forward(self, x):
        return x + self.conv2(self.act(self.bn2(self.conv1(self.act(self.bn1(x))))))


class _WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, v):
        return torch.relu(v)

    @staticmethod
    def backward(ctx, grad):
        return grad


class StraightThrough(Plain):
    """ReLU forward, identity backward."""

    def forward(self, x):
        a = _WrongGradient.apply(self.bn1(x))
        return x + self.conv2(_WrongGradient.apply(self.bn2(self.conv1(a))))


class GradModeDependent(Plain):
    def forward(self, x):
        out = self.conv2(F.relu(self.bn2(self.conv1(F.relu(self.bn1(x))))))
        return x + out if torch.is_grad_enabled() else x + 2 * out


class StoresItsFeature(Plain):
    """Someone reads `block.feature` after the call."""

    def forward(self, x):
        self.feature = F.relu(self.bn2(self.conv1(F.relu(self.bn1(x)))))
        return x + self.conv2(self.feature)


class SizeDependent(Plain):
    def forward(self, x):
        out = self.conv2(F.relu(self.bn2(self.conv1(F.relu(self.bn1(x))))))
        return x + out if x.shape[-1] < 20 else x + 2 * out


REASONS = {
    SizeDependent: "no known family",
    StoresItsFeature: "stores feature on the module",
    PostActivation: "conv bn relu conv bn add relu",
    SqueezeExcite: "mean",
    OpBetween: "bn mul relu",
    DataDependent: "cannot be recorded",
    Detached: "no known family",
    EditsItsInput: "modified by an inplace operation",
    Grouped: "not plain",
    NormInShortcut: "found 3, 2 and 1",
    LearnedActivation: "prelu",
    StraightThrough: "custom gradient of _WrongGradient",
    GradModeDependent: "no known family",
}
