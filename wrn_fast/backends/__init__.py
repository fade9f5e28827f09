"""Backends in order of preference: modules of this package with `NAME`, `unsupported` and the primitives of `aten`."""

BACKENDS = ("cuda", "triton", "cpu", "aten")
# Not run on a GPU yet: these serve where they are named, or where a tuned row says that they measured faster.
OPT_IN = ("cuda",)
