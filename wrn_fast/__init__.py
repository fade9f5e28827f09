"""wrn_fast: a drop-in fast WideResNet for PyTorch. Same weights, same outputs."""

from wrn_fast.dispatch import backend
from wrn_fast.errors import FallbackWarning, WrnFastError
from wrn_fast.functional import bn_act_conv, channel_stats
from wrn_fast.model import WideResNet, classic

__version__ = "0.1.0"
__all__ = ["FallbackWarning", "WideResNet", "WrnFastError", "backend", "bn_act_conv", "channel_stats", "classic"]
