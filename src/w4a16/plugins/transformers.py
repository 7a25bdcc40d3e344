"""transformers on w4a16's layers: load a model, hook `from_pretrained`, serve.

After `enable()`, `from_pretrained` of an AWQ, GPTQ or compressed-tensors checkpoint keeps its weights in 4 bits on
W4A16Linear and W4A16Experts. transformers loads what is dense; w4a16 reads and packs the rest.
"""

from __future__ import annotations

import functools
import gc
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.quantizers import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..checkpoints import Checkpoint, open_checkpoint
from ..dense_cache import cache_loaded
from ..errors import BadInput, Unsupported, explain_mismatch
from ..problem import ACT_NAMES
from ..residency import report
from ._layers import device_of, fill, packed_state, raise_if_missing, read, skip_quantized, swap, warm
from ._names import private
from ._places import find_places
from ._tp import drop_expert_tensors, prepare, shards_of

FORMATS = ("awq", "gptq", "compressed-tensors")


@dataclass(frozen=True)
class _Load:
    """What `load_model` tells the quantiser: the checkpoint it has opened, and who ends what a failing load began."""

    checkpoint: Checkpoint | None
    cleanup: ExitStack


_load: ContextVar[_Load | None] = ContextVar("w4a16_load", default=None)


class W4A16Config(QuantizationConfigMixin):  # type: ignore[misc]
    """The `quantization_config` of a checkpoint, kept as it is; no library of the format needs to be installed."""

    def __init__(self, source: dict[str, Any]):
        self.source, self.quant_method = source, source["quant_method"]

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        config = cls(deepcopy(config_dict))
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        return deepcopy(self.source)


class W4A16Quantizer(HfQuantizer):  # type: ignore[misc]
    """Puts our layers into the model before transformers loads it, and the packed weights into them after."""

    requires_calibration = True
    is_trainable = False
    is_compileable = True

    def validate_environment(self, *_: Any, device_map: Any = None, **__: Any) -> None:
        devices = {str(device) for device in device_map.values()} if isinstance(device_map, dict) else set()
        if "disk" in devices or ("cpu" in devices and len(devices) > 1):
            raise Unsupported(
                f"device_map: got {sorted(devices)}, wanted no offload: a packed weight stays where it is used. "
                "Name one device, or several accelerators, or 'cpu' alone."
            )

    def update_device_map(self, device_map: Any) -> Any:
        if not isinstance(device_map, str):
            return device_map
        # a strategy ('auto', 'balanced') weighs parameters, and here most of the weight is not yet there
        found = torch.accelerator.current_accelerator(check_available=True)
        return {"": found if found is not None and found.type == "cuda" else torch.device("cpu")}

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        if dtype not in ACT_NAMES:
            raise Unsupported(f"dtype: got {dtype}, wanted one of {list(ACT_NAMES)}. Pass dtype=torch.bfloat16.")
        return dtype

    def _process_model_before_weight_loading(
        self,
        model: Any,
        checkpoint_files: Sequence[str] | None = None,
        dtype: torch.dtype | None = None,
        device_map: Any = None,
        **_: Any,
    ) -> None:
        if not checkpoint_files:
            raise Unsupported("got a state dict, wanted a folder: w4a16 reads packed weights from files.")
        folder, self.dtype = Path(checkpoint_files[0]).parent, dtype or model.dtype
        load = _load.get()
        opened = None if load is None else load.checkpoint
        self.checkpoint = opened if opened is not None and opened.path == folder else open_checkpoint(folder)
        self.places = find_places(model, self.checkpoint)
        gpu = _only_gpu(model, device_map)
        if gpu is None:  # transformers reads as fast, or cuts what it reads
            self.places.large.clear()
        swap(model, self.places, self.dtype)
        prepare(model, self.places)
        raise_if_missing(model, self.places, folder)
        self.stream = None
        if load is not None and gpu is not None:
            # both work while transformers does its part
            self.stream = load.cleanup.enter_context(read(self.checkpoint, self.places, lambda _: gpu))
            self.stream.begin()
            warming = threading.Thread(target=warm, args=(self.checkpoint, gpu, self.dtype), daemon=True)
            warming.start()
            load.cleanup.callback(warming.join)
        # before 5.22 the loader leaves a renamed tensor of a pre-quantised model in the dtype that it has on disk
        self.pre_quantized = hasattr(HfQuantizer, "get_new_dtype")

    def update_parallel_plan(self, model: Any, plan: dict[str, str]) -> None:
        super().update_parallel_plan(model, plan)
        drop_expert_tensors(plan, self.places)

    def update_weight_conversions(self, weight_conversions: list[Any], *_: Any) -> list[Any]:
        return [*weight_conversions, skip_quantized(self.places)]

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> None:
        self.pre_quantized = True
        stream = self.stream or read(self.checkpoint, self.places, functools.partial(device_of, model))
        fill(model, self.checkpoint, self.places, self.dtype, shards_of(model), stream)
        del self.checkpoint, self.stream
        cache_loaded(model)
        type(model).w4a16_report = report  # a bound function in the model would keep it alive until a collection

    def is_serializable(self) -> bool:
        return True

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        if shards_of(model).world > 1:
            raise Unsupported("got one rank's part of a model to save, wanted all of it. Save from one process.")
        state, scheme = packed_state(model, self.places)
        model.config.quantization_config = self.quantization_config = W4A16Config(scheme)
        return state, {}


def _only_gpu(model: Any, device_map: Any) -> torch.device | None:
    """The GPU that all of the model goes to, or None."""
    if not isinstance(device_map, dict) or list(device_map) != [""]:
        return None
    device = torch.device(device_map[""])
    cut = getattr(model.config, "distributed_config", None) is not None
    return device if device.type == "cuda" and not cut else None


def _serves(config: dict[str, Any]) -> bool:
    """Whether a `quantization_config` is of 4-bit weights and 16-bit activations; all others stay transformers' own."""
    if config.get("quant_method") != "compressed-tensors":
        return config.get("bits", config.get("w_bit")) == 4
    groups = (config.get("config_groups") or {}).values()
    return bool(groups) and all(
        isinstance(group, dict)
        and (group.get("format") or config.get("format")) == "pack-quantized"
        and not group.get("input_activations")
        and (group.get("weights") or {}).get("num_bits") == 4
        for group in groups
    )


def _config_of(stock: Any) -> Any:
    return SimpleNamespace(
        from_dict=lambda config, **kwargs: (W4A16Config if _serves(config) else stock).from_dict(config, **kwargs)
    )


def _quantizer_of(stock: Any) -> Any:
    def build(config: Any, **kwargs: Any) -> Any:
        return (W4A16Quantizer if isinstance(config, W4A16Config) else stock)(config, **kwargs)

    return build


_lock = threading.Lock()
_holders: set[object] = set()  # who wants the hook; it goes with the last
_stock: dict[str, tuple[Any, Any]] = {}


def _hold(who: object) -> None:
    api = private()
    configs, quantizers = api.AUTO_QUANTIZATION_CONFIG_MAPPING, api.AUTO_QUANTIZER_MAPPING
    with _lock:
        for name in FORMATS if not _holders else ():
            _stock[name] = configs[name], quantizers[name]
            configs[name], quantizers[name] = _config_of(configs[name]), _quantizer_of(quantizers[name])
        _holders.add(who)


def _release(who: object) -> None:
    api = private()
    with _lock:
        _holders.discard(who)
        for name in () if _holders else tuple(_stock):
            api.AUTO_QUANTIZATION_CONFIG_MAPPING[name], api.AUTO_QUANTIZER_MAPPING[name] = _stock.pop(name)


def enable() -> None:
    """From here on `from_pretrained` puts 4-bit AWQ, GPTQ and compressed-tensors checkpoints on w4a16's layers."""
    _hold("enable")


def disable() -> None:
    """Gives `from_pretrained` back to transformers; models already loaded stay as they are."""
    _release("enable")


@contextmanager
def _enabled() -> Iterator[None]:
    who = object()
    _hold(who)
    try:
        yield
    finally:
        _release(who)


@contextmanager
def _loading(checkpoint: Checkpoint | None) -> Iterator[None]:
    """One load: no garbage is collected, which takes 0.15 s among the million objects that transformers imports."""
    collects = gc.isenabled()
    gc.disable()
    with ExitStack() as cleanup:
        token = _load.set(_Load(checkpoint, cleanup))
        try:
            yield
        finally:
            _load.reset(token)
            if collects:
                gc.enable()


def config_dict(path_or_id: str, **kwargs: Any) -> dict[str, Any]:
    """config.json of a folder or a Hub id. Raises BadInput when there is none."""
    try:
        config, _ = PreTrainedConfig.get_config_dict(path_or_id, **kwargs)
    except OSError as error:
        wanted = "a folder with config.json, or a Hub id that can be reached"
        then = f"Check the name ({str(error).splitlines()[0]})"
        raise BadInput(explain_mismatch("model", got=path_or_id, wanted=wanted, then=then)) from error
    found: dict[str, Any] = config
    return found


def load_model(path_or_id: str, device: torch.device | str = "cpu", **kwargs: Any) -> Any:
    """A causal LM from a folder or a Hub id. kwargs go to `from_pretrained`; a `device_map` overrides `device`."""
    # what is wrong with it, before anything is loaded
    opened = open_checkpoint(path_or_id) if Path(path_or_id).is_dir() else None
    config = config_dict(path_or_id, **kwargs)
    scheme = config.get("quantization_config") or (config.get("text_config") or {}).get("quantization_config") or {}
    if scheme.get("quant_method") not in FORMATS or not _serves(scheme):
        raise Unsupported(
            f"{path_or_id}: got {scheme or 'no'} quantization_config in config.json, wanted 4-bit weights as one of "
            f"{', '.join(FORMATS)}. Run `w4a16 quantize` on the dense model, or `w4a16 convert` on an old one."
        )
    if torch.device(device).type != "cpu":  # the CPU is transformers' own default, and asks for no accelerate
        kwargs.setdefault("device_map", {"": torch.device(device)})
    with _enabled(), _loading(opened):
        return AutoModelForCausalLM.from_pretrained(path_or_id, **kwargs)


def serve(argv: Sequence[str]) -> None:
    """`transformers serve` with the hook on: an OpenAI-compatible server. argv is its arguments, the model first."""
    config_dict(argv[0])  # here one sentence says what is wrong with it
    enable()
    try:
        from transformers.cli.transformers import app
    except ImportError as missing:
        raise Unsupported(f"the server needs {missing.name}: pip install 'w4a16[serve]'") from None
    app(["serve", *argv], prog_name="w4a16")
