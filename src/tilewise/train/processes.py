"""Several processes that train one model: each holds a part of every weight and works on a part of every batch.

`torchrun` starts them and tells them apart. The weights, their gradients and moments are sharded (Rajbhandari et al.,
ZeRO, 2020, stage 3, by PyTorch's `fully_shard`): a block's weights are whole while it computes and nowhere else. All
here is also true of one process, which shares nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, distributed, nn

from tilewise.errors import bad_value
from tilewise.train.shards import Batch
from tilewise.train.tasks import NOTHING


class ElsewhereError(RuntimeError):
    """Another process failed, and says why."""


@dataclass(frozen=True, slots=True)
class Processes:
    """The processes of a run, as one of them sees them; by default the only one."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the one that prints and writes."""
        return self.rank == 0

    def own(self, device: torch.device) -> torch.device:
        """Of several GPUs this process's, which becomes the current one; the CPU is everyone's.

        Raises:
            ValueError: more processes than GPUs.
        """
        if self.size == 1 or device.type != "cuda":
            return device
        local, there = distributed.get_node_local_rank(), torch.cuda.device_count()
        if local >= there:
            raise bad_value("--nproc-per-node", f"process {local} where there are {there} GPUs", f"at most {there}")
        torch.cuda.set_device(local)
        return torch.device("cuda", local)

    def shard(self, model: nn.Module, blocks: Iterable[nn.Module]) -> None:
        """Keep a part of the weights of `model`, which are the same in every process; each of `blocks` is gathered
        for itself."""
        if self.size > 1:
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            mesh = init_device_mesh(next(model.parameters()).device.type, (self.size,))
            for block in blocks:
                fully_shard(block, mesh=mesh)
            fully_shard(model, mesh=mesh)

    def part(self, batch: Batch) -> tuple[Batch, float]:
        """This process's rows of a batch, and their share of all targets that count.

        Raises:
            ValueError: rows that cannot be shared out evenly.
        """
        rows = batch.ids.shape[0]
        if rows % self.size:
            raise bad_value("batch", rows, f"a multiple of the {self.size} processes")
        if self.size == 1:
            return batch, 1.0
        own = Batch(*(None if x is None else x.chunk(self.size)[self.rank] for x in batch))  # type: ignore[arg-type]
        everything = int((batch.targets != NOTHING).sum())
        return own, int((own.targets != NOTHING).sum()) / max(1, everything)

    def total(self, x: Tensor) -> Tensor:
        """The sum of x over all processes, in place."""
        if self.size > 1:
            distributed.all_reduce(x)
        return x

    def whole(self, x: Tensor) -> Tensor:
        """All of x, in every process."""
        if self.size > 1:
            from torch.distributed.tensor import DTensor

            return x.full_tensor() if isinstance(x, DTensor) else x
        return x

    def gathered(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """All of the tensors, on the CPU of the first process; nothing in the others, which have to call this too."""
        found: dict[str, Tensor] = {}
        for name, x in tensors.items():
            whole = self.whole(x)
            if self.first:
                found[name] = whole.cpu()
        return found

    def placed(self, x: Tensor, like: Tensor) -> Tensor:
        """x, the same in every process, on the device of `like` and sharded as that is; nothing is sent."""
        x = x.to(like.device)
        if self.size > 1:
            from torch.distributed.tensor import DTensor, distribute_tensor

            if isinstance(like, DTensor):
                return distribute_tensor(x, like.device_mesh, like.placements, src_data_rank=None)
        return x

    @contextmanager
    def together(self) -> Iterator[None]:
        """What is done inside succeeds in all processes or raises in all: none waits for one that has stopped.

        Raises:
            ElsewhereError: another process failed, before this one or this one not at all.
        """
        problem: Exception | None = None
        try:
            yield
        except Exception as raised:  # noqa: BLE001 - whatever it is, the others have to hear of it; it is raised below
            problem = raised
        failed = [problem is not None] * self.size
        if self.size > 1:
            distributed.all_gather_object(failed, problem is not None)
        if problem is not None and failed.index(True) == self.rank:
            raise problem
        if any(failed):
            raise ElsewhereError(f"process {failed.index(True)} failed") from problem


@contextmanager
def joined() -> Iterator[Processes]:
    """This process among those that `torchrun` started, or alone. A process group that is there already is taken as
    it is."""
    there = distributed.is_available()
    begun = there and distributed.is_initialized()
    if not begun and not (there and distributed.is_torchelastic_launched()):
        yield Processes()
        return
    if not begun:
        distributed.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    yield Processes(distributed.get_rank(), distributed.get_world_size())
    # Not after an error: the others may be waiting for this process, and would not answer.
    if not begun:
        distributed.destroy_process_group()
