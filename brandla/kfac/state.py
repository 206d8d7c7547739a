"""The state of a preconditioner as nested mappings: saved, loaded, and read from distributed checkpoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten_with_path

from brandla import _check
from brandla.kfac.capture.layer import Layer
from brandla.kfac.systems.strategy import Curvature

FORMAT = 6
_FUNCTION = "KFAC.load_state_dict"


def of_layer(layer: Layer) -> dict[str, Any]:
    """Return a layer's state: numbers, strings and copies of tensors. It has no tensors before any data."""
    curvature = layer.curvature.state_dict() if layer.curvature.started else {}
    return {
        "strategy": str(layer.strategy),
        "curvature": curvature,
        "linear": layer.gradient_is_pair,
        "refusal": layer.capture.refusal,
        "direction": None if layer.direction is None else layer.direction.clone(),
        "tensors": ", ".join(_tensor_names(curvature)),
    }


def load(layers: Sequence[Layer], state: Mapping[str, Any]) -> None:
    """Load ``state`` into the layers, or raise before anything is changed."""
    if state.get("format") != FORMAT:
        rule = f"the state must have format {FORMAT}; got {state.get('format')!r}"
        remedy = "other versions cannot be read: continue with new factors, or with the version that wrote the state"
        _check.fail_value(_FUNCTION, f"{rule}; {remedy}")
    saved = state["layers"]
    names = [layer.name for layer in layers]
    if sorted(saved) != sorted(names):
        missing, extra = sorted(set(names) - set(saved)), sorted(set(saved) - set(names))
        _check.fail_value(_FUNCTION, f"the state must have the same layers; missing {missing}, unexpected {extra}")
    curvatures = [_loaded_curvature(layer, saved[layer.name]) for layer in layers]
    for layer, curvature in zip(layers, curvatures, strict=True):
        parts, shape = saved[layer.name], layer.shape
        layer.curvature, layer.gradient_is_pair, layer.capture.refusal = curvature, parts["linear"], parts["refusal"]
        direction: Tensor | None = parts["direction"]
        layer.direction = None if direction is None else direction.to(shape.device, shape.dtype, copy=True)


def read_state(checkpoint: str | PathLike[str], name: str = "kfac") -> dict[str, Any]:
    """Read the state of a preconditioner from a checkpoint of ``torch.distributed.checkpoint``.

    ``torch.distributed.checkpoint.load`` fills only the tensors that the object already has, and a preconditioner that
    has seen no data has no factors. This function reads everything that was saved.

    Parameters
    ----------
    checkpoint
        The directory.
    name
        The key that the preconditioner was saved under.

    Returns
    -------
    dict
        For `KFAC.load_state_dict`. The values are the saved ones, but their order in memory may differ. If a
        decomposition was stored by columns, the continued training agrees up to rounding.

    Raises
    ------
    ValueError
        If the checkpoint has nothing under ``name``.

    Examples
    --------
    >>> dcp.save({"kfac": preconditioner}, checkpoint_id=path)  # doctest: +SKIP
    >>> preconditioner.load_state_dict(brandla.kfac.read_state(path))  # doctest: +SKIP
    """
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import load

    reader = FileSystemReader(checkpoint)
    metadata = reader.read_metadata()
    state: dict[str, Any] = {}
    for key, path in (metadata.planner_data or {}).items():
        if path[0] == name and len(path) > 1:
            entry: Any = metadata.state_dict_metadata[key]
            parent = state
            for part in path[1:-1]:
                parent = parent.setdefault(part, {})
            is_tensor = hasattr(entry, "properties")
            memory = torch.empty(entry.size, dtype=entry.properties.dtype, device="cpu") if is_tensor else None
            parent[path[-1]] = memory
    if not state:
        names = sorted({str(path[0]) for path in (metadata.planner_data or {}).values()})
        _check.fail_value("read_state", f"the checkpoint must have {name!r}; it has {names}")
    loaded = {name: state}
    load(loaded, storage_reader=reader)
    return loaded[name]


def _loaded_curvature(layer: Layer, saved: Mapping[str, Any]) -> Curvature:
    if saved["strategy"] != str(layer.strategy):
        rule = f"{layer.name}: the strategy must be {layer.strategy}, as in this preconditioner"
        _check.fail_value(_FUNCTION, f"{rule}; the state has {saved['strategy']}")
    curvature = saved.get("curvature", {})
    if not saved["tensors"]:
        return layer.strategy.curvature(layer.shape)
    if missing := sorted(set(saved["tensors"].split(", ")) - set(_tensor_names(curvature))):
        remedy = (
            "torch.distributed.checkpoint.load cannot fill a preconditioner that has no data yet: use"
            " brandla.kfac.read_state"
        )
        _check.fail_value(_FUNCTION, f"{layer.name}: the state lacks {', '.join(missing)}; {remedy}")
    layer.match_weight(thaws=True)
    try:
        return layer.curvature.loaded(_with_empty_mappings(curvature, layer.curvature.state_dict()), layer.name)
    except KeyError as key:
        message = f"{_FUNCTION}: {layer.name}: the state must come from the same kind of layer; it lacks {key}"
        raise ValueError(message) from key


def _with_empty_mappings(state: Mapping[str, Any], fresh: Mapping[str, Any]) -> dict[str, Any]:
    """Restore empty mappings, which torch.distributed.checkpoint does not keep."""
    inner = {key: part for key, part in fresh.items() if isinstance(part, Mapping)}
    return {**state, **{key: _with_empty_mappings(state.get(key, {}), part) for key, part in inner.items()}}


def _tensor_names(state: Mapping[str, Any]) -> list[str]:
    """Return the dotted names of all tensors in nested mappings."""
    parts: list[tuple[Any, Any]] = tree_flatten_with_path(state)[0]
    return [".".join(str(entry.key) for entry in path) for path, part in parts if isinstance(part, Tensor)]
