"""Names of weights in the known repositories, as patterns that lead to one naming.

Canonical names: `conv1`, `{g}.{i}.{bn1,conv1,bn2,conv2,convShortcut}` with g from 1 and i from 0, `bn1`, `fc`, each
followed by `.weight` and so on. Blocks of more convolutions go on with bn3 and conv3.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from wrn_fast.errors import WrnFastError

_HEADS = "fc|linear|classifier|logits|output"
# Buffers of a normalisation before the first convolution.
_MEAN, _STD = {"mean", "mu"}, {"std", "sigma"}


class Scheme(NamedTuple):
    """One repository family's names."""

    name: str
    family: str
    anchor: str  # a key that every such file has, after its prefix
    patterns: tuple[tuple[str, str], ...]  # (whole key, canonical name); {g+1}, {i-1} shift a number
    parts: dict[str, str]  # submodules of a block


SCHEMES = (
    Scheme(
        "X", "x", r"block1\.layer\.0\.conv1\.weight",
        (
            (r"conv1\.(?P<p>\w+)", "conv1.{p}"),
            (r"block(?P<g>\d+)\.layer\.(?P<i>\d+)\.(?P<m>\w+)\.(?P<p>\w+)", "{g}.{i}.{m}.{p}"),
            (r"bn1\.(?P<p>\w+)", "bn1.{p}"),
            (rf"(?:{_HEADS})\.(?P<p>\w+)", "fc.{p}"),
        ),
        {name: name for i in (1, 2, 3, 4) for name in (f"bn{i}", f"conv{i}")}
        | {"convShortcut": "convShortcut", "conv_shortcut": "convShortcut"},
    ),
    Scheme(
        "DM", "dm", r"layer\.0\.block\.0\.conv_0\.weight",
        (
            (r"init_conv\.(?P<p>\w+)", "conv1.{p}"),
            (r"layer\.(?P<g>\d+)\.block\.(?P<i>\d+)\.(?P<m>\w+)\.(?P<p>\w+)", "{g+1}.{i}.{m}.{p}"),
            (r"batchnorm\.(?P<p>\w+)", "bn1.{p}"),
            (r"logits\.(?P<p>\w+)", "fc.{p}"),
        ),
        {"batchnorm_0": "bn1", "conv_0": "conv1", "batchnorm_1": "bn2", "conv_1": "conv2", "shortcut": "convShortcut"},
    ),
    Scheme(
        "M", "m", r"layer1\.0\.conv1\.weight",
        (
            (r"conv1\.(?P<p>\w+)", "conv1.{p}"),
            (r"layer(?P<g>\d+)\.(?P<i>\d+)\.(?P<m>\w+?)(?:\.0)?\.(?P<p>\w+)", "{g}.{i}.{m}.{p}"),
            (r"bn1\.(?P<p>\w+)", "bn1.{p}"),
            (rf"(?:{_HEADS})\.(?P<p>\w+)", "fc.{p}"),
        ),
        {"bn1": "bn1", "conv1": "conv1", "bn2": "bn2", "conv2": "conv2", "shortcut": "convShortcut"},
    ),
    Scheme(
        "functional", "x", r"group0\.block0\.conv0",
        (
            (r"conv0", "conv1.weight"),
            (r"group(?P<g>\d+)\.block(?P<i>\d+)\.(?P<m>conv0|conv1|convdim)", "{g+1}.{i}.{m}.weight"),
            (r"group(?P<g>\d+)\.block(?P<i>\d+)\.(?P<m>bn[01])\.(?P<p>\w+)", "{g+1}.{i}.{m}.{p}"),
            (r"bn\.(?P<p>\w+)", "bn1.{p}"),
            (r"fc\.(?P<p>\w+)", "fc.{p}"),
        ),
        {"bn0": "bn1", "conv0": "conv1", "bn1": "bn2", "conv1": "conv2", "convdim": "convShortcut"},
    ),
    Scheme(
        "zoo", "x", r"features\.stage1\.unit1\.body\.conv1\.conv\.weight",
        (
            (r"features\.init_block\.(?:conv\.)?(?P<p>\w+)", "conv1.{p}"),
            (
                r"features\.stage(?P<g>\d+)\.unit(?P<i>\d+)\.body\.(?P<m>conv[12]\.(?:bn|conv))\.(?P<p>\w+)",
                "{g}.{i-1}.{m}.{p}",
            ),
            (r"features\.stage(?P<g>\d+)\.unit(?P<i>\d+)\.(?P<m>identity_conv)\.(?P<p>\w+)", "{g}.{i-1}.{m}.{p}"),
            (r"features\.post_activ\.bn\.(?P<p>\w+)", "bn1.{p}"),
            (r"output\.(?P<p>\w+)", "fc.{p}"),
        ),
        {"conv1.bn": "bn1", "conv1.conv": "conv1", "conv2.bn": "bn2", "conv2.conv": "conv2",
         "identity_conv": "convShortcut"},
    ),
    Scheme(
        "residual", "residual", r"conv2\.0\.residual\.2\.weight",
        (
            (r"(?:init_conv|conv1)\.(?P<p>\w+)", "conv1.{p}"),
            (r"conv(?P<g>\d+)\.(?P<i>\d+)\.residual\.(?P<m>\d+)\.(?P<p>\w+)", "{g-1}.{i}.{m}.{p}"),
            (r"conv(?P<g>\d+)\.(?P<i>\d+)\.(?P<m>shortcut)\.0\.(?P<p>\w+)", "{g-1}.{i}.{m}.{p}"),
            (r"bn\.(?P<p>\w+)", "bn1.{p}"),
            (rf"(?:{_HEADS})\.(?P<p>\w+)", "fc.{p}"),
        ),
        {"0": "bn1", "2": "conv1", "3": "bn2", "6": "conv2", "shortcut": "convShortcut"},
    ),
)  # fmt: skip


class Names(NamedTuple):
    """What the keys of a file mean."""

    scheme: Scheme
    prefix: str
    canonical: dict[str, str]  # key -> canonical name
    mean: str | None
    std: str | None
    left: dict[str, str]  # key -> why it was left


def translate(keys: Iterable[str]) -> Names:
    """Find the scheme and the prefix, and give every key its meaning.

    Raises:
        WrnFastError: no scheme fits, or more than one network is inside.
    """
    keys = list(keys)
    for scheme in SCHEMES:
        anchor = re.compile(rf"(|.*\.){scheme.anchor}")
        prefixes = sorted({m.group(1) for m in map(anchor.fullmatch, keys) if m})
        if len(prefixes) > 1:
            listed = ", ".join(p or "(none)" for p in prefixes)
            raise WrnFastError(f"`src`: expected one network, found {len(prefixes)} with the prefixes {listed}")
        if prefixes:
            return _translate(scheme, prefixes[0], keys)
    shown = ", ".join(keys[:4])
    known = ", ".join(scheme.name for scheme in SCHEMES)
    raise WrnFastError(f"`src`: expected the names of a known family ({known}), got {shown}...")


def _translate(scheme: Scheme, prefix: str, keys: list[str]) -> Names:
    canonical: dict[str, str] = {}
    left: dict[str, str] = {}
    mean = std = None
    for key in keys:
        last = key.rpartition(".")[2]
        inside = key.startswith(prefix)
        name = _canonical(scheme, key.removeprefix(prefix)) if inside else None
        if name is not None:
            canonical[key] = name
        elif last in _MEAN:
            mean = key
        elif last in _STD:
            std = key
        elif re.match(r"sub_block\d+\.", key.removeprefix(prefix)):
            left[key] = "a copy of a group that forward never runs"
        else:
            left[key] = f"no name of the scheme {scheme.name}" if inside else f"outside the prefix {prefix!r}"
    taken: dict[str, str] = {}
    for key, name in canonical.items():
        if name in taken:
            raise WrnFastError(f"`src`: {taken[name]!r} and {key!r} mean the same weight")
        taken[name] = key
    return Names(scheme, prefix, canonical, mean, std, left)


def _canonical(scheme: Scheme, key: str) -> str | None:
    for pattern, template in scheme.patterns:
        match = re.fullmatch(pattern, key)
        if match is None:
            continue
        groups = match.groupdict()
        if "m" in groups:
            if groups["m"] not in scheme.parts:
                return None
            groups["m"] = scheme.parts[groups["m"]]
        shift = {"g+1": ("g", 1), "g-1": ("g", -1), "i-1": ("i", -1)}
        for text, (name, by) in shift.items():
            if f"{{{text}}}" in template:
                template = template.replace(f"{{{text}}}", str(int(groups[name]) + by))
        return template.format(**groups)
    return None
