"""The tasks ask what they say, in Python's plain words; and a model that can know the answers learns them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tilewise.models import GPT, GPTConfig
from tilewise.train import TrainConfig, Trainer
from tilewise.train.tasks import MARK, NOTHING, TASKS, accuracy, copy, needle, recall


@pytest.mark.parametrize("length", [64, 65, 113])
@pytest.mark.parametrize("task", TASKS)
def test_answers_are_in_the_text(task: str, length: int) -> None:
    for index in range(5):
        batch = TASKS[task](3, index, 4, length, 40)
        assert batch.ids.shape == batch.targets.shape == (4, length)
        assert TASKS[task](3, index, 4, length, 40).ids.equal(batch.ids)
        assert not TASKS[task](3, index + 1, 4, length, 40).ids.equal(batch.ids)
        for ids, targets in zip(batch.ids.tolist(), batch.targets.tolist(), strict=True):
            asked = [i for i, target in enumerate(targets) if target != NOTHING]
            if task == "copy":
                assert asked == list(range(length // 2, length // 2 * 2))
                assert [targets[i] for i in asked] == ids[: length // 2]
                assert ids[length // 2] == MARK
            elif task == "recall":
                pairs = dict(zip(ids[:32:2], ids[1:32:2], strict=True))
                assert len(pairs) == len(asked) == 16
                assert all(pairs[ids[i]] == targets[i] for i in asked)
                assert {ids[i] for i in asked} == set(pairs)
            else:
                assert asked == [length - 1]
                assert targets[-1] == ids[ids.index(MARK) + 1]
                assert ids.count(MARK) == 2


def test_sizes() -> None:
    with pytest.raises(ValueError, match="length: got 63; wants at least 64"):
        recall(0, 0, 1, 63, 40)
    with pytest.raises(ValueError, match="vocab: got 2; wants at least 3"):
        copy(0, 0, 1, 8, 2)
    with pytest.raises(ValueError, match="length: got 3"):
        needle(0, 0, 1, 3, 8)


def test_attention_learns_to_copy(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = GPT(GPTConfig(32, 33, dim=32, layers=2, heads=2, positions="learned"))
    plan = TrainConfig(steps=150, batch=32, length=33, lr=5e-3, warmup=20, checkpoint_every=1000, log_every=50)
    fresh = copy(1, 0, 64, 33, 32)
    assert accuracy(model, fresh) < 0.1
    trainer = Trainer(model, lambda i: copy(0, i, 32, 33, 32), plan, tmp_path, described={})
    list(trainer.run())
    assert accuracy(model, fresh) > 0.95
