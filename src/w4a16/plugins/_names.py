"""Every undocumented name of transformers that w4a16 uses, looked up once. Seen in 5.16 to 5.23."""

from __future__ import annotations

import functools
import importlib
from types import SimpleNamespace

from ..errors import Unsupported

NAMES = {
    "transformers.quantizers.auto": ("AUTO_QUANTIZATION_CONFIG_MAPPING", "AUTO_QUANTIZER_MAPPING"),
    "transformers.conversion_mapping": ("get_model_conversion_mapping",),
    "transformers.core_model_loading": (
        "Concatenate",
        "MergeModulelist",
        "WeightConverter",
        "WeightRenaming",
        "dot_natural_key",
        "rename_source_key",
    ),
    "transformers.modeling_utils": ("PreTrainedModel",),
}
METHODS = {
    "PreTrainedModel": (
        "_adjust_missing_and_unexpected_keys",
        "_keys_to_ignore_on_load_unexpected",
        "get_init_context",
    ),
    "WeightRenaming": ("rename_source_key",),
}


@functools.cache
def private() -> SimpleNamespace:
    """The names above as attributes; raises Unsupported with the one that this transformers does not have."""
    found = SimpleNamespace()
    for module, names in NAMES.items():
        for name in names:
            try:
                setattr(found, name, getattr(importlib.import_module(module), name))
            except (ImportError, AttributeError):
                raise _gone(f"{module}.{name}") from None
    for owner, methods in METHODS.items():
        for method in methods:
            if not hasattr(getattr(found, owner), method):
                raise _gone(f"{owner}.{method}")
    return found


def _gone(name: str) -> Unsupported:
    import transformers

    return Unsupported(
        f"transformers {transformers.__version__} has no {name}, which w4a16 needs to load a model. "
        "Install a version that was tested: pip install 'transformers>=5.16,<=5.23'"
    )
