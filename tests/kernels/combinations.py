"""Which parts of the operator stand together: a list of cases in which every pair of choices occurs."""

from __future__ import annotations

import itertools
import random

from hypothesis import strategies as st
from kernels.oracle import ACTS, PADS

CHOICES = {
    "taps": ((3, 3), (1, 1), (3, 1)),
    "stride": (1, 2, 3),
    "pad": tuple(dict.fromkeys(PADS)),
    "source": ("raw", "bn", "bn+affine"),
    "act": ACTS,
    "short": ("none", "raw", "bn+affine"),
    "bias": (False, True),
    "residual": (False, True),
    "drop_at": ("none", "prologue", "output", "output_act"),
    "act_out": ("none", *ACTS),
    "want_y": (True, False),
    "want_stats": (False, True),
    "N": (1, 3),
}


def possible(choice: dict) -> bool:
    """The operator's own rules; the rest of the cases are drawn from what they leave."""
    if choice["taps"] == (1, 1) and choice["pad"] != (0, 0, 0, 0):
        return False
    if choice["drop_at"] == "output_act" and choice["act_out"] == "none":
        return False
    return choice["want_y"] or (choice["act_out"] != "none" and not choice["want_stats"])


def pairs(choice: dict) -> set:
    return set(itertools.combinations(sorted(choice.items(), key=lambda item: item[0]), 2))


def draw(rng: random.Random, drop_share: float = 0.25) -> dict:
    """A possible choice; dropout in one case of four: Philox is slow in the interpreter."""
    while True:
        choice = {name: rng.choice(values) for name, values in CHOICES.items()}
        if rng.random() > drop_share:
            choice["drop_at"] = "none"
        if possible(choice):
            return choice


def feasible_pairs() -> set:
    """Every pair of choices that some case can have."""
    found = set()
    small = {
        name: values for name, values in CHOICES.items() if name not in ("N", "bias", "residual", "short", "stride")
    }
    free = {name: CHOICES[name] for name in CHOICES if name not in small}
    for values in itertools.product(*small.values()):
        choice = dict(zip(small, values))
        if possible(choice):
            found |= pairs(choice)
    for a, b in itertools.combinations(sorted(CHOICES), 2):
        if a in free or b in free:
            found |= {((a, u), (b, v)) for u in CHOICES[a] for v in CHOICES[b]}
    return found


def covering(seed: int) -> list[dict]:
    """Cases, drawn by the seed, in which every pair occurs: the best of a few draws each time."""
    rng = random.Random(seed)
    left, cases = feasible_pairs(), []
    while left:
        (a, u), (b, v) = rng.choice(sorted(left, key=repr))
        best: dict = {}
        for _ in range(20):
            choice = draw(rng, 0.5) | {a: u, b: v}
            if possible(choice) and (not best or len(pairs(choice) & left) > len(pairs(best) & left)):
                best = choice
        if best:
            cases.append(best)
            left -= pairs(best)
    return cases


def cases(seed: int, count: int) -> list[dict]:
    """At least `count`: the covering ones, then random ones. As arguments of `oracle.draw`."""
    rng = random.Random(seed)
    chosen = covering(seed)
    chosen += [draw(rng) for _ in range(count - len(chosen))]
    return [fixed(choice, rng) for choice in chosen]


@st.composite
def drawn(draw: st.DrawFn) -> dict:
    """The same as a strategy: what does not fit goes, and the simplest stands first everywhere."""
    choice = {name: draw(st.sampled_from(values)) for name, values in CHOICES.items()}
    if draw(st.sampled_from((True, True, True, False))):
        choice["drop_at"] = "none"
    if choice["taps"] == (1, 1):
        choice["pad"] = (0, 0, 0, 0)
    if choice["drop_at"] == "output_act" and choice["act_out"] == "none":
        choice["drop_at"] = "output"
    choice["want_y"] |= choice["act_out"] == "none" or choice["want_stats"]
    assert possible(choice)
    return fixed(choice, random.Random(draw(st.integers(0, 2**31 - 1))))


def fixed(choice: dict, rng: random.Random) -> dict:
    """The fields of ConvProblem that a choice settles. Half of the images have whole rows in a block of pixels."""
    source, short, drop_at = choice["source"], choice["short"], choice["drop_at"]
    image = {} if rng.random() < 0.5 else {"H": rng.choice((4, 6)), "W": rng.choice((4, 8))}
    values = {n: choice[n] for n in ("taps", "stride", "pad", "act", "bias", "residual", "act_out", "want_y", "N")}
    return (
        values
        | image
        | {
            "prologue": source != "raw",
            "affine": source == "bn+affine",
            "short_C": 0 if short == "none" else rng.choice((1, 5, 16, 18)),
            "short_prologue": short == "bn+affine",
            "short_affine": short == "bn+affine",
            "drop_at": drop_at,
            "p": 0.0 if drop_at == "none" else rng.choice((0.3, 0.3, 0.999, 1.0)),
            "want_stats": choice["want_stats"],
        }
    )
