"""Backends in order of preference: modules of this package with `NAME`, `unsupported` and the primitives of `aten`."""

BACKENDS = ("triton", "cpu", "aten")
