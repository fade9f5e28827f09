"""A user's own models and checkpoints: found, proven, made fast, and put back."""

from wrn_fast.convert.checkpoint import LoadReport, load_checkpoint
from wrn_fast.convert.entry import accelerate, report, restore
from wrn_fast.convert.report import Report

__all__ = ["LoadReport", "Report", "accelerate", "load_checkpoint", "report", "restore"]
