"""The tasks ask what they say, in Python's plain words; and a model that can know the answers learns them."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from tilewise.models import GPT, GPTConfig
from tilewise.train import TrainConfig, Trainer
from tilewise.train.tasks import (
    MARK,
    NOTHING,
    TASKS,
    accuracy,
    copy,
    dialogue,
    needle,
    questions,
    recall,
    summaries,
    words,
)

STORY = " ".join(f"the {i} foxes of the {i * i}th hill ran over {i + 7} dogs;" for i in range(40))
TEXT = np.frombuffer(STORY.encode(), np.uint8)


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
                assert all(0 < key < 20 <= value < 40 for key, value in pairs.items())
                assert all(pairs[ids[i]] == targets[i] for i in asked)
                assert {ids[i] for i in asked} == set(pairs)
            else:
                assert asked == [length - 1]
                assert targets[-1] == ids[ids.index(MARK) + 1]
                assert ids.count(MARK) == 2


@pytest.mark.parametrize(("length", "asks"), [(64, 2), (65, 3), (113, 4), (113, 99)])
def test_keys_are_asked_again(length: int, asks: int) -> None:
    batch = recall(1, 0, 3, length, 40, 4, asks=asks)
    for ids, targets in zip(batch.ids.tolist(), batch.targets.tolist(), strict=True):
        pairs = dict(zip(ids[:8:2], ids[1:8:2], strict=True))
        asked = [i for i, target in enumerate(targets) if target != NOTHING]
        assert len(asked) == min(4 * asks, (length - 8) // 2)
        assert all(pairs[ids[i]] == targets[i] for i in asked)
        times = [sum(ids[i] == key for i in asked) for key in pairs]
        assert max(times) - min(times) <= 1
        assert all(ids[i] == MARK for i in range(8, length) if i not in asked and i - 1 not in asked)


FACT = re.compile(r"@([A-Z])([0-9])")


@pytest.mark.parametrize(("length", "facts", "asks"), [(113, 4, 1), (64, 3, 2), (193, 1, 1), (256, 26, 1)])
def test_questions_are_about_what_the_document_says(length: int, facts: int, asks: int) -> None:
    """Read as a text: every fact is in it once, with the real text around; every question at its end repeats one."""
    for index in range(5):
        batch = questions(TEXT, 3, index, 4, length, facts, asks=asks)
        assert questions(TEXT, 3, index, 4, length, facts, asks=asks).ids.equal(batch.ids)
        assert not questions(TEXT, 3, index + 1, 4, length, facts, asks=asks).ids.equal(batch.ids)
        for ids, targets in zip(batch.ids.tolist(), batch.targets.tolist(), strict=True):
            end = length + 1 - 3 * facts * asks
            document, asked = bytes(ids[:end]).decode(), bytes(ids[end:]).decode()
            told = dict(FACT.findall(document))
            assert len(told) == len(FACT.findall(document)) == facts
            around = [part for part in FACT.split(document)[::3] if part]
            assert all(part in STORY for part in around)
            wanted = {i: target for i, target in enumerate(targets) if target != NOTHING}
            assert [told[chr(ids[i])] for i in wanted] == [chr(target) for target in wanted.values()]
            assert sorted(chr(ids[i]) for i in wanted) == sorted([*told] * asks)
            assert re.fullmatch(r"(@[A-Z][0-9])*@[A-Z]", asked)


@pytest.mark.parametrize(("length", "facts", "turn"), [(191, 2, 24), (200, 4, 13), (64, 1, 31)])
def test_a_dialogue_asks_at_its_end_what_was_told_at_its_beginning(length: int, facts: int, turn: int) -> None:
    for index in range(5):
        batch = dialogue(TEXT, 3, index, 4, length, facts, turn=turn)
        for ids, targets in zip(batch.ids.tolist(), batch.targets.tolist(), strict=True):
            text = bytes(ids).decode()
            turns = re.split(r"\n(?=[AB]:)", text)[1:]
            whole = (length + 1) // turn
            assert [each[0] for each in turns] == [("A", "B")[i % 2] for i in range(whole)]
            told = dict(FACT.findall("".join(turns[:facts])))
            assert len(told) == facts
            assert not FACT.search("".join(turns[facts:-facts]))
            wanted = {i: target for i, target in enumerate(targets) if target != NOTHING}
            assert [told[chr(ids[i])] for i in wanted] == [chr(target) for target in wanted.values()]
            assert sorted(chr(ids[i]) for i in wanted) == sorted(told)
            assert all(re.match(r"[AB]:@[A-Z]", each) for each in turns[-facts:])


def test_summaries_are_the_first_lines_of_docstrings(tmp_path: Path) -> None:
    sentences = [f"This is what sentence number {word} says." for word in ("one", "two", "three", "four", "five")]
    body = " ".join(sentences[:3]) + " Too short.\n\n" + "\n".join(sentences[3:])
    source = (
        f'"""Sum up what follows here.\n\n{body}"""\n'
        f'def f():\n    """Few words.\n\n    {" ".join(sentences)}"""\n'
        f'class A:\n    """Another class with four sentences.\n\n    {" ".join(sentences[:4])}"""\n'
    )
    path = tmp_path / "a.py"
    path.write_text(source, encoding="utf-8")
    assert summaries([path]) == [("Sum up what follows here.", sentences)]
    assert words("Of A-B, the x2 File!") == ["the", "file"]


def test_sizes() -> None:
    with pytest.raises(ValueError, match="length: got 63; wants at least 64"):
        recall(0, 0, 1, 63, 40)
    with pytest.raises(ValueError, match="vocab: got 2; wants at least 3"):
        copy(0, 0, 1, 8, 2)
    with pytest.raises(ValueError, match="length: got 3"):
        needle(0, 0, 1, 3, 8)
    with pytest.raises(ValueError, match="length: got 22; wants at least 23"):
        questions(TEXT, 0, 0, 1, 22, 4)
    with pytest.raises(ValueError, match="facts: got 27; wants 1 to 26"):
        questions(TEXT, 0, 0, 1, 500, 27)
    with pytest.raises(ValueError, match="text: got 7 bytes; wants more than 65"):
        questions(TEXT[:7], 0, 0, 1, 64, 1)
    with pytest.raises(ValueError, match="turn: got 5"):
        dialogue(TEXT, 0, 0, 1, 64, 1, turn=5)
    with pytest.raises(ValueError, match="length: got 190; wants at least 191"):
        dialogue(TEXT, 0, 0, 1, 190, 4, turn=24)


def test_attention_learns_to_copy(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = GPT(GPTConfig(32, 33, dim=32, layers=2, heads=2, positions="learned"))
    plan = TrainConfig(steps=150, batch=32, length=33, lr=5e-3, warmup=20, checkpoint_every=1000, log_every=50)
    fresh = copy(1, 0, 64, 33, 32)
    assert accuracy(model, fresh) < 0.1
    trainer = Trainer(model, lambda i: copy(0, i, 32, 33, 32), plan, tmp_path, described={})
    list(trainer.run())
    assert accuracy(model, fresh) > 0.95
