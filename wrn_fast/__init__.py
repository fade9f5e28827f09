"""wrn_fast: a drop-in fast WideResNet for PyTorch. Same weights, same outputs."""

from wrn_fast.convert import accelerate, load_checkpoint, report, restore
from wrn_fast.dispatch import backend
from wrn_fast.errors import FallbackWarning, WrnFastError
from wrn_fast.functional import bn_act_conv, channel_stats
from wrn_fast.graphs import graphed
from wrn_fast.mc import MCPrediction, mc_predict
from wrn_fast.model import WideResNet, classic
from wrn_fast.packing import refresh
from wrn_fast.precision import precision
from wrn_fast.verify import verify

__version__ = "0.1.0"
__all__ = [
    "FallbackWarning",
    "MCPrediction",
    "WideResNet",
    "WrnFastError",
    "accelerate",
    "backend",
    "bn_act_conv",
    "channel_stats",
    "classic",
    "graphed",
    "load_checkpoint",
    "mc_predict",
    "precision",
    "refresh",
    "report",
    "restore",
    "verify",
]
