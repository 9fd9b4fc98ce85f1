"""Lineage: who descends from whom, where the first teacher is found again, and what makes its tokens other ones."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvfold.disk.checkpoint import Checkpoint
from kvfold.disk.lineage import descend, root_teacher, steps_since_root, vocabulary_difference
from kvfold.disk.output import MANIFEST, write_json
from kvfold.disk.source import remember, remembered
from kvfold.errors import CheckpointError

Make = Callable[..., Path]


@pytest.fixture(autouse=True)
def _cache_of_this_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVFOLD_CACHE", str(tmp_path / "cache"))


def student_of(teacher: Path, folder: Path) -> Checkpoint:
    """A checkpoint with the teacher's weights nudged by a field of its config, and a lineage."""
    shutil.copytree(teacher, folder)
    config = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", {**config, "rms_norm_eps": 1e-5})
    (folder / MANIFEST).unlink(missing_ok=True)
    lineage = descend(Checkpoint.open(teacher), inputs="i", stage="convert", settings={"method": "gqa"})
    write_json(folder / MANIFEST, {**lineage, "hash": Checkpoint.open(folder).hash()})
    return Checkpoint.open(folder)


def test_a_checkpoint_without_lineage_is_its_own_root(tiny_checkpoint: Make) -> None:
    checkpoint = Checkpoint.open(tiny_checkpoint())
    assert checkpoint.lineage is None
    assert checkpoint.root_hash() == checkpoint.hash()
    assert root_teacher(checkpoint) is None
    lineage = descend(checkpoint, inputs="i", stage="uptrain", settings={"tokens": 5}, tokens=5, seed=1)
    assert lineage["root"]["hash"] == checkpoint.hash()
    assert lineage["root"]["name"] == "teacher"
    assert lineage["root"]["config"] == checkpoint.config
    assert lineage["root"]["parameters"] == checkpoint.shape.parameters
    assert [step["stage"] for step in lineage["steps"]] == ["uptrain"]


def test_a_students_student_descends_from_the_same_root(tiny_checkpoint: Make, tmp_path: Path) -> None:
    teacher = Checkpoint.open(tiny_checkpoint())
    student = student_of(teacher.path, tmp_path / "student")
    lineage = descend(student, inputs="i", stage="uptrain", settings={})
    assert lineage["root"]["hash"] == student.root_hash() == teacher.hash()
    assert [step["stage"] for step in lineage["steps"]] == ["convert", "uptrain"]
    assert [step["source"] for step in lineage["steps"]] == [teacher.hash(), student.hash()]


def test_steps_since_the_root_have_seconds_and_tokens(tiny_checkpoint: Make, tmp_path: Path) -> None:
    teacher = tiny_checkpoint()
    assert steps_since_root(Checkpoint.open(teacher)) == []
    before = descend(Checkpoint.open(teacher), inputs="i", stage="pretrain", settings={"text": "t"}, tokens=9)
    write_json(teacher / MANIFEST, {**before, "hash": Checkpoint.open(teacher).hash()})
    student = student_of(teacher, tmp_path / "student")
    assert steps_since_root(student) == [
        {"stage": "convert", "seconds": None, "tokens": None, "settings": {"method": "gqa"}}
    ]
    trained = descend(student, inputs="i", stage="uptrain", settings={"data": "d"}, tokens=5, wall_seconds=1.5)
    write_json(student.path / MANIFEST, {**trained, "hash": student.hash()})
    told = steps_since_root(Checkpoint.open(student.path))
    assert told[1:] == [{"stage": "uptrain", "seconds": 1.5, "tokens": 5}]


def test_a_teacher_is_found_by_its_content_beside_the_student_or_where_it_was(
    tiny_checkpoint: Make, tmp_path: Path
) -> None:
    teacher = tiny_checkpoint()
    hashed = Checkpoint.open(teacher).hash()
    near, far = student_of(teacher, tmp_path / "near"), student_of(teacher, tmp_path / "a" / "b" / "c" / "far")
    found = root_teacher(near)
    assert found is not None
    assert found.hash() == hashed
    assert root_teacher(far) is None, "too many folders above"
    assert remembered(hashed) is None
    remember(hashed, teacher)
    assert remembered(hashed) == teacher
    found = root_teacher(far)
    assert found is not None
    assert found.path == teacher

    config = json.loads((teacher / "config.json").read_text())
    write_json(teacher / "config.json", {**config, "rms_norm_eps": 1e-4})
    assert root_teacher(far) is None, "another model lies there now"
    shutil.rmtree(teacher)
    assert root_teacher(near) is None


def test_a_cache_that_cannot_be_written_is_no_mistake(
    tiny_checkpoint: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("KVFOLD_CACHE", str(tmp_path / "file"))
    teacher = Checkpoint.open(tiny_checkpoint())
    remember(teacher.hash(), teacher.path)
    assert remembered(teacher.hash()) is None


def test_differences_between_vocabularies(tiny_checkpoint: Make) -> None:
    def opened(name: str, **changes: object) -> Checkpoint:
        return Checkpoint.open(tiny_checkpoint(name=name, **changes))

    student, larger, bare = (
        opened("student"),
        opened("larger", vocab_size=1300),
        opened("bare", tokenizer=False, vocab_size=260),
    )
    assert vocabulary_difference(student, larger) == "1,300 tokens against 260"
    assert vocabulary_difference(student, opened("same")) is None
    assert vocabulary_difference(student, bare) is None
    assert vocabulary_difference(bare, student) is None
    spelled = opened("spelled")
    tokenizer = json.loads((spelled.path / "tokenizer.json").read_text())
    tokenizer["pre_tokenizer"]["add_prefix_space"] = True
    write_json(spelled.path / "tokenizer.json", tokenizer)
    assert vocabulary_difference(student, spelled) == "another tokenizer"


@pytest.mark.parametrize(
    ("step", "says"),
    [
        ({"settings": {}}, "steps.0"),
        ({"settings": {"method": "gqa", "sequence_length": 0}}, "steps.0.settings.sequence_length"),
        ({"found": {"mix": {"kv_heads": "2", "kl": 0.1}}}, "steps.0.found"),
        ({"found": {"chosen": None, "budget": 1.0}}, "steps.0.found"),
        ({"found": {"sites": {"layer 0": {"planes": None, "lost": 1.0}}}}, "steps.0.found.sites.layer 0"),
        ({"found": {"sites": {"layer 0": {"planes": [[0]]}}}}, "steps.0.found.sites.layer 0"),
        ({"found": {"sites": {"layer 0": {"lossless": [1], "lost": 0.5}}}}, "steps.0.found.sites.layer 0"),
        ({"found": {"sites": {"layer 0": {"planes": []}}}}, "steps.0.found.sites.layer 0.planes"),
        ({"seed": True}, "steps.0.seed"),
    ],
)
def test_a_step_that_lacks_what_its_kind_needs_is_refused(
    step: dict[str, Any], says: str, tiny_checkpoint: Make, tmp_path: Path
) -> None:
    student = student_of(tiny_checkpoint(), tmp_path / "student")
    lineage = json.loads((student.path / MANIFEST).read_text())
    lineage["steps"][0] |= step
    write_json(student.path / MANIFEST, lineage)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(student.path)
    assert says in str(caught.value)
    assert str(caught.value).endswith("restore it, or delete it to start a new one")
