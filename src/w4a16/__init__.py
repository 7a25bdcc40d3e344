"""w4a16: 4-bit weights, 16-bit activations; one packed copy of the weights, several kernels, chosen at every call."""

from .api import linear, load, moe, pack, pack_experts
from .dense_cache import cache_dense
from .device import DEVICES, Device, current_device
from .dispatch import choose, record
from .errors import BadCheckpoint, BadInput, KernelFailed, OverBudget, Unsupported, W4A16Error
from .layouts import PackedWeight, unpack
from .problem import Problem
from .residency import report
from .weight import QuantizedWeight

__version__ = "0.1.0"

__all__ = [
    "DEVICES",
    "BadCheckpoint",
    "BadInput",
    "Device",
    "KernelFailed",
    "OverBudget",
    "PackedWeight",
    "Problem",
    "QuantizedWeight",
    "Unsupported",
    "W4A16Error",
    "cache_dense",
    "choose",
    "current_device",
    "linear",
    "load",
    "moe",
    "pack",
    "pack_experts",
    "record",
    "report",
    "unpack",
]
