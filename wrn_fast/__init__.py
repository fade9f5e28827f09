"""wrn_fast: a drop-in fast WideResNet for PyTorch. Same weights, same outputs."""

__version__ = "0.1.0"
