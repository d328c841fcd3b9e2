"""Checkpoints as safetensors: everything that a run needs to go on bit for bit, whole or not there at all."""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tilewise.errors import bad_value

VERSION = 1
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

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    metadata = {"tilewise": json.dumps({"version": VERSION} | described)}
    try:
        save_file({name: x.detach().cpu().contiguous() for name, x in tensors.items()}, temporary, metadata=metadata)
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(path)
    except (OSError, SafetensorError) as problem:
        temporary.unlink(missing_ok=True)
        raise OSError(f"{path}: could not be written ({problem}); what was there before is untouched") from problem
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def read(path: Path, device: torch.device | str = "cpu") -> Checkpoint:
    """Read what `write` wrote.

    Raises:
        ValueError: a file that is no checkpoint, or one of another version.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt", device=str(device)) as file:
            described = json.loads((file.metadata() or {}).get("tilewise", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    except (SafetensorError, FileNotFoundError) as problem:
        raise bad_value("checkpoint", f"{path} ({problem})", "a file that `tilewise train` wrote") from problem
    if described.get("version") != VERSION:
        got = f"{path} of version {described.get('version')}"
        raise bad_value("checkpoint", got, f"version {VERSION}", "the release of tilewise that wrote it")
    return Checkpoint(tensors, described)


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
