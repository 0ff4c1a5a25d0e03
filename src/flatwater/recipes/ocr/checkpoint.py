"""A checkpoint: all that training needs to go on as if it had never stopped, bit for bit, in one file.

The file is two lines of text and a NumPy archive::

    flatwater checkpoint 1          what it is, and the version of the format
    9f86d081884c7d65…               SHA-256 of everything after this line
    PK…                             an .npz, in which nothing is pickled: reading it runs no code

The archive holds each tensor of the model as ``model/<its name in state_dict()>``, each accumulator of the optimizer
as ``optimizer/<name of the parameter>/<kind>``, and in ``description`` the rest as JSON. Accumulators are known by
the parameter's place in the model, since the names by which Paddle knows them (``conv2d_7.w_0_velocity_0``) come
from counters of the process, and another process, or a second model in this one, counts differently.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import paddle

from flatwater.errors import CheckpointError
from flatwater.files import write_whole

__all__ = ["Checkpoint", "load", "restore", "save", "snapshot"]

_MAGIC = b"flatwater checkpoint "
_VERSION = 1
_HEADER = re.compile(_MAGIC + rb"(\d{1,9})\n([0-9a-f]{64})\n")
_SCHEDULER = "LR_Scheduler"  # Paddle's keys, in an optimizer's state_dict(), for what is no accumulator
_MASTER_WEIGHTS = "master_weights"

_Arrays = dict[str, npt.NDArray[Any]]


class Checkpoint(NamedTuple):
    """The state of a training run, copied out of Paddle."""

    model: _Arrays
    """By name in the model's ``state_dict()``: parameters and persistent buffers."""
    optimizer: _Arrays
    """Accumulators by ``<name of the parameter>/<kind>``, for instance ``stem.conv.weight/velocity``."""
    optimizer_kind: str
    """The name of its class."""
    scheduler: dict[str, Any] | None
    """Of the learning rate; None where that is a number, which is for the caller to set."""
    progress: dict[str, Any]
    """Whatever else training goes on from."""


def snapshot(model: paddle.nn.Layer, optimizer: paddle.optimizer.Optimizer, progress: dict[str, Any]) -> Checkpoint:
    """Copy the state of a run: training may go on while the copy is written.

    Args:
        model: what is trained.
        optimizer: of parameters of ``model``, float32 or float64.
        progress: numbers, text, lists, and dicts with text as keys, such as JSON can hold; tuples come back as lists.

    Raises:
        CheckpointError: the optimizer keeps float32 copies of lower precision weights, or accumulators of parameters
            that are not the model's.
    """
    scheduler = optimizer.state_dict().get(_SCHEDULER)
    return Checkpoint(
        model=_copy(model.state_dict()),
        optimizer=_copy(_accumulators(model, optimizer)),
        optimizer_kind=type(optimizer).__name__,
        scheduler=None if scheduler is None else dict(scheduler),
        progress=progress,
    )


def save(path: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint; the one at ``path`` before it stays until this one is whole.

    Raises:
        CheckpointError: ``progress`` or ``scheduler`` holds what JSON cannot.
        OSError: the folder cannot be written to, or the disk is full.
    """
    arrays = {f"model/{name}": array for name, array in checkpoint.model.items()}
    arrays |= {f"optimizer/{name}": array for name, array in checkpoint.optimizer.items()}
    described = {name: getattr(checkpoint, name) for name in ("optimizer_kind", "scheduler", "progress")}
    try:
        description = json.dumps(described).encode("ascii")
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path}: cannot hold this progress ({error}); give numbers, text, lists and dicts"
        ) from error
    arrays["description"] = np.frombuffer(description, np.uint8)

    archive = io.BytesIO()
    # Not np.savez, which takes names as keyword arguments, some of which are its own.
    with zipfile.ZipFile(archive, "w") as members:
        for name, array in arrays.items():
            with members.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.save(member, array, allow_pickle=False)
    payload = archive.getvalue()
    header = _MAGIC + f"{_VERSION}\n{hashlib.sha256(payload).hexdigest()}\n".encode("ascii")
    write_whole(path, header + payload)


def load(path: Path) -> Checkpoint:
    """Read a checkpoint, all of it or nothing.

    Raises:
        CheckpointError: there is none; or it is damaged, of another version, or no checkpoint at all.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"{path}: there is no checkpoint that can be read ({error.strerror}); "
            "give the folder of a run that wrote one, or train from the start"
        ) from error
    if not content.startswith(_MAGIC) and not _MAGIC.startswith(content):
        raise CheckpointError(
            f"{path}: is not a checkpoint of Flatwater; give the folder of a run, or train from the start"
        )
    damaged = CheckpointError(f"{path}: is damaged or cut off; restore it from a copy, or train from the start")
    header = _HEADER.match(content)
    if header is None:
        raise damaged
    if int(header[1]) != _VERSION:
        raise CheckpointError(
            f"{path}: has version {int(header[1])} of the format, and this Flatwater reads version {_VERSION}; "
            "resume with the Flatwater that wrote it, or train from the start"
        )
    payload = content[header.end() :]
    if hashlib.sha256(payload).hexdigest().encode("ascii") != header[2]:
        raise damaged
    try:
        with np.load(io.BytesIO(payload), allow_pickle=False) as archive:
            arrays = dict(archive.items())
        description = json.loads(arrays.pop("description").tobytes())
        return Checkpoint(_section(arrays, "model/"), _section(arrays, "optimizer/"), **description)
    except (EOFError, ValueError, KeyError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        raise damaged from error


def restore(checkpoint: Checkpoint, model: paddle.nn.Layer, optimizer: paddle.optimizer.Optimizer) -> None:
    """Put a model and its optimizer, built as they were for the run, where they stood; gradients are cleared.

    Raises:
        CheckpointError: the checkpoint is of another model or optimizer; the model's values are as they were.
    """
    kind, scheduled = type(optimizer).__name__, _SCHEDULER in optimizer.state_dict()
    if checkpoint.optimizer_kind != kind or (checkpoint.scheduler is not None) != scheduled:
        raise CheckpointError(
            f"the checkpoint is of {_describe(checkpoint.optimizer_kind, checkpoint.scheduler is not None)}, "
            f"not of {_describe(kind, scheduled)}; resume with the settings of its run"
        )
    tensors = model.state_dict()
    _check_same("model", checkpoint.model, tensors)
    if scheduled:
        # While a new optimizer has no accumulators: Paddle keeps this dict, and would later want those of any parameter
        # that had no gradient yet to be in it.
        with warnings.catch_warnings():
            # LinearWarmup also hands its base class the schedule that follows it, which that warns it cannot use.
            warnings.filterwarnings("ignore", "There are some unused values in state_dict", UserWarning)
            optimizer.set_state_dict({**optimizer.state_dict(), _SCHEDULER: checkpoint.scheduler})

    before = _copy(tensors)
    try:
        _make_accumulators(model, optimizer, {name.rpartition("/")[0] for name in checkpoint.optimizer})
        accumulators = _accumulators(model, optimizer)
        _check_same("optimizer", checkpoint.optimizer, accumulators)
    except CheckpointError:
        _assign(tensors, before)
        raise
    _assign(accumulators, checkpoint.optimizer)
    _assign(tensors, checkpoint.model)


def _accumulators(model: paddle.nn.Layer, optimizer: paddle.optimizer.Optimizer) -> dict[str, paddle.Tensor]:
    """The optimizer's own tensors, by the parameter's name in the model and their kind.

    Paddle calls them ``<parameter.name>_<kind>_<number>``, and a parameter's name may begin another's.
    """
    state = optimizer.state_dict()
    if _MASTER_WEIGHTS in state:
        raise CheckpointError(
            f"{type(optimizer).__name__} keeps float32 copies of lower precision weights, which no checkpoint here "
            "holds; train with multi_precision=False"
        )
    places = {parameter.name: name for name, parameter in model.named_parameters()}
    found: dict[str, paddle.Tensor] = {}
    for key, tensor in state.items():
        if key == _SCHEDULER:
            continue
        owners = sorted((name for name in places if key.startswith(f"{name}_")), key=len, reverse=True)
        kinds = ((owner, re.fullmatch(r"_(.+)_\d+", key[len(owner) :])) for owner in owners)
        place = next((f"{places[owner]}/{kind[1]}" for owner, kind in kinds if kind), None)
        if place is None:
            raise CheckpointError(
                f"the optimizer's {key} is of no parameter of the model; give the model that it trains"
            )
        found[place] = tensor
    return found


def _make_accumulators(model: paddle.nn.Layer, optimizer: paddle.optimizer.Optimizer, names: set[str]) -> None:
    """Have the accumulators of these parameters made, which Paddle does in the first step that has their gradients.

    The step may move the parameters (weight decay); the caller assigns them anew.
    """
    optimizer.clear_grad(set_to_zero=False)
    for name, parameter in model.named_parameters():
        if name in names:
            parameter.grad = paddle.zeros_like(parameter)
    optimizer.step()
    optimizer.clear_grad(set_to_zero=False)


def _check_same(what: str, saved: _Arrays, tensors: Mapping[str, paddle.Tensor]) -> None:
    """Refuse unless both have the same names, shapes and dtypes."""
    built = {name: _signature(array) for name, array in _copy(tensors).items()}
    stored = {name: _signature(array) for name, array in saved.items()}
    for name in sorted(built.keys() | stored.keys()):
        if built.get(name) != stored.get(name):
            raise CheckpointError(
                f"the checkpoint is of another {what}: {name} is {stored.get(name, 'not in it')} there and "
                f"{built.get(name, 'nothing')} here; resume with the settings of its run"
            )


def _signature(array: npt.NDArray[Any]) -> str:
    return f"{array.dtype}{list(array.shape)}"


def _describe(kind: str, scheduled: bool) -> str:
    return f"{kind} with{'' if scheduled else 'out'} a learning rate schedule"


def _section(arrays: _Arrays, prefix: str) -> _Arrays:
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}


def _copy(tensors: Mapping[str, paddle.Tensor]) -> _Arrays:
    return {name: tensor.numpy() for name, tensor in tensors.items()}


def _assign(tensors: Mapping[str, paddle.Tensor], arrays: _Arrays) -> None:
    for name, tensor in tensors.items():
        tensor.set_value(arrays[name])
