"""Backends in order of preference. Each is a module of this package with `NAME`, `unsupported` and the primitives of `aten`."""

BACKENDS = ("triton", "cpu", "aten")
