"""Reads, writes and converts quantised checkpoints: AWQ, GPTQ and compressed-tensors folders of safetensors files."""

from .base import Plan, Scheme
from .convert import convert
from .reader import FORMATS, Checkpoint, open_checkpoint
from .writer import write_checkpoint

__all__ = ["FORMATS", "Checkpoint", "Plan", "Scheme", "convert", "open_checkpoint", "write_checkpoint"]
