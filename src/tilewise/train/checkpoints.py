"""Checkpoints as safetensors: everything that a run needs to go on bit for bit, whole or not there at all."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tilewise.errors import bad_value
from tilewise.train import files

VERSION = 2
"""Of the format; another one is refused."""

_NAME = re.compile(r"step-(\d+)\.safetensors")


class Checkpoint(NamedTuple):
    """What a file holds."""

    tensors: dict[str, Tensor]
    described: dict[str, Any]
    """Step, configs, tokenizer and fingerprint, as JSON has them."""


def write(path: Path, tensors: dict[str, Tensor], described: dict[str, Any]) -> None:
    """Write a file that is whole under its name, or leave what was there.

    Raises:
        OSError: it cannot be written (the disk is full, say); nothing of the attempt is left behind.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    held = {name: x.detach().cpu().contiguous() for name, x in tensors.items()}
    described = {"version": VERSION} | described
    # One entry: safetensors writes several in any order, and the same run has to end with the same bytes.
    metadata = {"tilewise": json.dumps(described | {"checksum": _checksum(held, described)})}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with files.whole(path) as temporary:
            save_file(held, temporary, metadata=metadata)
    except (OSError, SafetensorError) as problem:
        raise OSError(f"{path}: could not be written ({problem}); what was there before is untouched") from problem


def read(path: Path) -> Checkpoint:
    """Read what `write` wrote, to the CPU.

    Raises:
        ValueError: a file that is no checkpoint, one of another version, or a damaged one.
    """
    from safetensors import SafetensorError, safe_open

    fix = "without this file `--resume` goes on from the checkpoint before it"
    try:
        with safe_open(path, "pt") as file:
            described = json.loads((file.metadata() or {}).get("tilewise", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    except (SafetensorError, OSError, json.JSONDecodeError) as problem:
        raise bad_value("checkpoint", f"{path} ({problem})", "a file that `tilewise train` wrote", fix) from problem
    if described.get("version") != VERSION:
        got = f"{path} of version {described.get('version')}"
        raise bad_value("checkpoint", got, f"version {VERSION}", "the release of tilewise that wrote it")
    if described.pop("checksum", None) != _checksum(tensors, described):
        raise bad_value("checkpoint", f"{path}, which has changed", "the bytes that were written", fix)
    return Checkpoint(tensors, described)


def _checksum(tensors: Mapping[str, Tensor], described: Mapping[str, Any]) -> int:
    """CRC-32 of everything in the file: a disk's or a network's error must not become a weight."""
    found = zlib.crc32(json.dumps(described, sort_keys=True).encode())
    for name, x in sorted(tensors.items()):
        found = zlib.crc32(x.reshape(-1).view(torch.uint8).numpy().data, zlib.crc32(name.encode(), found))
    return found


def numbered(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest step first."""
    found = {int(match[1]): path for path in folder.glob("step-*") if (match := _NAME.fullmatch(path.name))}
    return [found[step] for step in sorted(found)]


def latest(folder: Path) -> Path | None:
    """The newest checkpoint in a folder, or None."""
    return (numbered(folder) or [None])[-1]


def path_of(folder: Path, step: int) -> Path:
    return folder / f"step-{step:07d}.safetensors"


def prune(folder: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints, and what a killed run left unfinished."""
    for path in [*numbered(folder)[:-keep], *folder.glob(".step-*.part")]:
        path.unlink(missing_ok=True)


def check_same(kind: str, found: dict[str, Any], wanted: Any, *, free: tuple[str, ...] = ()) -> None:
    """Raises ValueError where a checkpoint's config is another than the run's, naming the first difference."""
    for name, value in json.loads(json.dumps(asdict(wanted))).items():
        if name not in free and found.get(name) != value:
            got = f"a checkpoint with {kind} {name} = {found.get(name)!r}"
            raise bad_value("resume", got, f"{value!r}, as asked for", "the same settings, or another folder")
