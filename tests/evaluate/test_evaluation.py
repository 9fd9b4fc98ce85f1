"""The evaluation stage: its record, its states, its gate, and everything that it refuses before it measures."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from kvfold import evaluate as package_evaluate
from kvfold import hf
from kvfold.disk import record
from kvfold.disk.checkpoint import Checkpoint
from kvfold.disk.lineage import root_teacher
from kvfold.errors import CheckpointError, DataError, GateMissed, OutputError, SettingError
from kvfold.evaluate import evaluation, loss
from kvfold.evaluate.checks import check_same
from kvfold.evaluate.evaluation import EvaluateSettings, evaluate, teacher_of
from kvfold.evaluate.lm_eval import Harness
from kvfold.evaluate.recall import Recall
from kvfold.progress import Silent
from kvfold.text.tokens import token_file

Make = Callable[..., Path]


class Listener(Silent):
    """Keeps what was said."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)


@pytest.fixture
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A held-out text, and a cache of its own."""
    monkeypatch.setenv("KVFOLD_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "heldout.txt"
    path.write_text(
        "".join(f"Chapter {n}: the {n * n} sheep of Fähnlein went by, {n % 7} at a time.\n" for n in range(40))
    )
    return str(path)


@pytest.fixture
def settings(text: str) -> EvaluateSettings:
    return EvaluateSettings(
        data=text, tokens=400, sequence_length=64, copy_distances=(0, 8), copy_trials=4, samples=2, sample_tokens=5
    )


@pytest.fixture
def pair(tiny_checkpoint: Make) -> tuple[Path, Path]:
    """A student and a teacher: other weights, the same tokenizer."""
    return tiny_checkpoint(name="student", seed=1), tiny_checkpoint(name="teacher")


@pytest.fixture
def measured(pair: tuple[Path, Path], settings: EvaluateSettings, tmp_path: Path) -> record.Record:
    return evaluate(pair[0], settings, teacher=pair[1], records=tmp_path / "records", row={"alpha": 0.05})


@pytest.fixture
def nothing_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on, whoever loads a model fails the test."""

    def refuse(*args: Any, **options: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(hf, "load", refuse)


def records_in(folder: Path) -> list[record.Record]:
    return record.read_all(folder / "records")


# --- the record ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_record_says_what_transformers_says(
    pair: tuple[Path, Path], settings: EvaluateSettings, measured: record.Record
) -> None:
    """Loss of both models on the same tokens, by transformers' own loss; bytes by the text itself."""
    ids_N = torch.from_numpy(token_file(settings.data, pair[0], max_tokens=401).tokens.astype("int64"))
    assert len(ids_N) == 401
    rows_BT = torch.stack([ids_N[b : b + 65] for b in range(0, 6 * 64, 64)])
    metrics = measured.metrics
    for folder, mine in zip(pair, (metrics, metrics["teacher"]), strict=True):
        model = hf.load(folder, attention="eager")
        whole = 384 * model(rows_BT, labels=rows_BT).loss.item()
        last = model(ids_N[None, -65:], labels=torch.cat([torch.full((49,), -100), ids_N[-16:]])[None]).loss.item()
        assert mine["loss"] == pytest.approx((whole + 16 * last) / 400, rel=1e-5)
        assert mine["perplexity"] == pytest.approx(math.exp(mine["loss"]))
    assert metrics["tokens"] == 400
    assert metrics["windows"] == 7
    assert metrics["text_bytes"] == 400  # one byte a token
    assert metrics["bits_per_byte"] == pytest.approx(metrics["loss"] / math.log(2))
    assert metrics["teacher_loss"] == metrics["teacher"]["loss"]
    assert metrics["loss_gap"] == pytest.approx(metrics["loss"] - metrics["teacher_loss"])
    assert metrics["kl"] > 0
    assert 0 <= metrics["agreement"] <= 1
    assert set(metrics["copy_loss"]) == set(metrics["teacher"]["copy_loss"]) == {"0", "8"}
    assert metrics["copy_gain"]["8"] == metrics["copy_loss_first"] - metrics["copy_loss"]["8"]
    assert [set(sample) for sample in metrics["samples"]] == [{"prompt", "student", "teacher"}] * 2
    assert "gate" not in metrics


def test_an_fp8_cache_costs_a_little(
    pair: tuple[Path, Path], settings: EvaluateSettings, measured: record.Record, tmp_path: Path
) -> None:
    for metrics in (measured.metrics, measured.metrics["teacher"]):
        assert metrics["loss_fp8_cache"] != metrics["loss"]
        assert metrics["loss_fp8_cache"] == pytest.approx(metrics["loss"], rel=0.02)
    without = evaluate(pair[0], replace(settings, fp8=False), teacher=pair[1], records=tmp_path / "other")
    assert "loss_fp8_cache" not in without.metrics
    assert without.metrics["loss"] == measured.metrics["loss"]


def test_record_on_disk_is_the_record(
    measured: record.Record, pair: tuple[Path, Path], settings: EvaluateSettings, tmp_path: Path
) -> None:
    (found,) = records_in(tmp_path)
    assert found.metrics == measured.metrics
    assert (found.kind, found.name, found.status, found.seed) == ("evaluate", "student", "done", 0)
    assert found.hashes["student"] == Checkpoint.open(pair[0]).hash()
    assert found.hashes["teacher"] == Checkpoint.open(pair[1]).hash()
    assert found.hashes["data"]
    assert found.settings["row"] == {"alpha": 0.05}
    assert found.settings["stride"] == found.settings["sequence_length"] == 64
    assert found.wall_seconds is not None
    (path,) = (tmp_path / "records").iterdir()
    assert json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_the_same_inputs_are_not_measured_twice(
    measured: record.Record,
    pair: tuple[Path, Path],
    settings: EvaluateSettings,
    tmp_path: Path,
    nothing_loads: None,
) -> None:
    told = Listener()
    again = evaluate(
        pair[0], settings, teacher=pair[1], records=tmp_path / "records", row={"alpha": 0.05}, progress=told
    )
    assert again.metrics == measured.metrics
    assert again.date == measured.date
    assert any("measured already" in line for line in told.lines)
    with pytest.raises(AssertionError, match="a model was loaded"):
        evaluate(pair[0], settings, teacher=pair[1], records=tmp_path / "records", row={"alpha": 0.05}, overwrite=True)


@pytest.mark.slow
def test_a_record_of_another_checkpoint_is_not_overwritten_unasked(
    pair: tuple[Path, Path], settings: EvaluateSettings, tmp_path: Path
) -> None:
    student, teacher = pair
    evaluate(student, settings, records=tmp_path / "records")
    shutil.copyfile(teacher / "model.safetensors", student / "model.safetensors")
    with pytest.raises(OutputError, match=r"of another checkpoint or text.*--overwrite"):
        evaluate(student, settings, records=tmp_path / "records")
    evaluate(student, settings, records=tmp_path / "records", overwrite=True)
    (found,) = records_in(tmp_path)
    assert found.hashes["student"] == Checkpoint.open(teacher).hash()


def test_a_stopped_evaluation_measures_only_what_is_missing(
    pair: tuple[Path, Path], settings: EvaluateSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = evaluate(pair[0], settings, teacher=pair[1], records=tmp_path / "whole")
    calls: list[str] = []
    measure, score = Recall.measure, loss.score

    def stopped(self: Recall, model: Any, *, what: str, **others: Any) -> dict[str, Any]:
        calls.append(what)
        if calls.count("teacher: recall") == 1 and what == "teacher: recall":
            raise KeyboardInterrupt
        return measure(self, model, what=what, **others)

    def counted(*given: Any, **others: Any) -> Any:
        calls.append("loss")
        return score(*given, **others)

    monkeypatch.setattr(Recall, "measure", stopped)
    monkeypatch.setattr(loss, "score", counted)
    with pytest.raises(KeyboardInterrupt):
        evaluate(pair[0], settings, teacher=pair[1], records=tmp_path / "records")
    assert [each.suffix for each in (tmp_path / "records").iterdir()] == [".partial"]
    assert record.read_all(tmp_path / "records") == []
    told = Listener()
    again = evaluate(pair[0], settings, teacher=pair[1], records=tmp_path / "records", progress=told)
    assert "continuing after loss, student: recall" in told.lines
    assert calls == ["loss", "student: recall", "teacher: recall", "teacher: recall", "loss"]  # the last over fp8
    assert again.metrics == whole.metrics
    assert [each.suffix for each in (tmp_path / "records").iterdir()] == [".json"]


def test_measurements_of_other_code_or_with_overwrite_are_not_used(
    pair: tuple[Path, Path], settings: EvaluateSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*given: Any, **others: Any) -> None:
        raise KeyboardInterrupt

    def scores(**others: Any) -> int:
        calls: list[None] = []

        def counted(*given: Any, **inner: Any) -> Any:
            calls.append(None)
            return score(*given, **inner)

        with monkeypatch.context() as patched:
            patched.setattr(loss, "score", counted)
            patched.setattr(Recall, "measure", stopped)
            with pytest.raises(KeyboardInterrupt):
                evaluate(pair[0], settings, teacher=pair[1], records=tmp_path / "records", **others)
        return len(calls)

    score = loss.score
    assert (scores(), scores(), scores(overwrite=True)) == (1, 0, 1)
    monkeypatch.setattr(evaluation, "versions", lambda: {"kvfold": "another"})
    assert scores() == 1


def test_a_file_with_the_name_of_unfinished_measurements_is_refused(
    pair: tuple[Path, Path], settings: EvaluateSettings, tmp_path: Path
) -> None:
    made = evaluate(pair[0], settings, teacher=pair[1], records=tmp_path)
    other = record.path_of(tmp_path, "evaluate", made.name, made.identity).with_suffix(".partial")
    other.write_text("mine")
    with pytest.raises(OutputError, match="is there and is no unfinished evaluation: it is not replaced"):
        evaluate(pair[0], settings, teacher=pair[1], records=tmp_path, overwrite=True)
    assert other.read_text() == "mine"


def test_a_model_against_itself(tiny_checkpoint: Make, settings: EvaluateSettings, tmp_path: Path) -> None:
    folder = tiny_checkpoint()
    found = evaluate(folder, settings, teacher=folder, records=tmp_path / "records").metrics
    assert (found["kl"], found["agreement"], found["loss_gap"]) == (0.0, 1.0, 0.0)
    assert found["copy_loss"] == found["teacher"]["copy_loss"]
    assert all(sample["student"] == sample["teacher"] for sample in found["samples"])


def test_without_a_teacher_nothing_is_compared(
    tiny_checkpoint: Make, settings: EvaluateSettings, tmp_path: Path
) -> None:
    asked = replace(settings, samples=0, copy_distances=(), last_words=0)
    found = evaluate(tiny_checkpoint(), asked, records=tmp_path / "records")
    assert set(found.metrics) == {
        "tokens", "windows", "text_bytes", "loss", "loss_stderr", "perplexity", "bits_per_byte",
        "loss_fp8_cache", "quantised_cache", "cache",
    }  # fmt: skip
    assert found.hashes["teacher"] is None


def test_a_model_alone_is_measured_with_quantised_caches(
    tiny_checkpoint: Make, settings: EvaluateSettings, tmp_path: Path
) -> None:
    found = evaluate(tiny_checkpoint(), settings, records=tmp_path / "records").metrics
    quantised = found["quantised_cache"]
    assert {name: each["bits"] for name, each in quantised.items()} == {"fp8": 8.0, "q4_0": 4.5}
    assert found["loss_fp8_cache"] == quantised["fp8"]["loss"]
    for each in quantised.values():
        assert each["loss"] != found["loss"]
        assert each["copy_gain"].keys() == found["copy_gain"].keys()
    fewer_bits, more_bits = (abs(quantised[name]["loss"] - found["loss"]) for name in ("q4_0", "fp8"))
    assert more_bits < 0.1
    assert fewer_bits < 0.5


def test_passkeys_are_measured_when_asked_for(
    pair: tuple[Path, Path], settings: EvaluateSettings, tmp_path: Path
) -> None:
    asked = replace(settings, passkey_contexts=(180, 220), passkey_trials=3, copy_distances=(), samples=0)
    found = evaluate(pair[0], asked, teacher=pair[1], records=tmp_path / "records").metrics
    for metrics in (found, found["teacher"]):
        assert set(metrics["passkey"]) == set(metrics["passkey_loss"]) == {"180", "220"}
        assert metrics["passkey_loss"]["180"] > 1.0


def test_last_words_are_asked_of_both_and_a_gate_may_name_them(
    pair: tuple[Path, Path], settings: EvaluateSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard = Listener()
    gated = replace(settings, gate="last_word<=1, last_word_perplexity<=9*teacher")
    found = evaluate(pair[0], gated, teacher=pair[1], records=tmp_path / "records", progress=heard).metrics
    assert 0 < found["last_word_questions"] == found["teacher"]["last_word_questions"] < 200
    assert f"{found['last_word_questions']} of 200 last-word questions: the text has no more" in heard.lines
    assert [row["left"] for row in found["gate"]["rows"]] == [found["last_word"], found["last_word_perplexity"]]
    assert found["last_word_perplexity"] > 100  # random weights, about 260 guesses for each letter
    Path(settings.data).write_text(" ".join(map(str, range(60))))
    monkeypatch.setattr(hf, "load", None)
    with pytest.raises(DataError, match=r"no passage of the text.*got 170 tokens, gate last_word<=1.*more text"):
        evaluate(pair[0], replace(gated, copy_distances=()), teacher=pair[1], records=tmp_path / "others")


def test_it_is_the_packages_own_name() -> None:
    assert package_evaluate is evaluate


# --- the teacher by lineage ------------------------------------------------------------------------------------------


def with_root(student: Path, name: str, root_hash: str) -> Checkpoint:
    own = Checkpoint.open(student).hash()
    lineage = {"format": 1, "inputs": "", "hash": own, "root": {"hash": root_hash, "name": name}, "steps": []}
    (student / "kvfold.json").write_text(json.dumps(lineage))
    return Checkpoint.open(student)


def test_default_teacher_is_the_root_of_the_lineage(
    pair: tuple[Path, Path], settings: EvaluateSettings, tmp_path: Path
) -> None:
    student, teacher = pair
    root_hash = Checkpoint.open(teacher).hash()
    with_root(student, "teacher", root_hash)
    found = evaluate(student, settings, records=tmp_path / "records")
    assert found.hashes["teacher"] == root_hash
    assert "kl" in found.metrics


def test_the_root_itself_has_no_teacher(pair: tuple[Path, Path]) -> None:
    told = Listener()
    assert teacher_of(with_root(pair[0], "student", Checkpoint.open(pair[0]).hash()), None, told) is None
    assert teacher_of(Checkpoint.open(pair[1]), None, told) is None
    assert not told.lines


@pytest.mark.parametrize("name", ["gone", "owner/gone"])
def test_a_root_that_is_gone_is_said(pair: tuple[Path, Path], name: str) -> None:
    told = Listener()
    assert teacher_of(with_root(pair[0], name, "0" * 64), None, told) is None
    assert any("nothing is compared" in line and name in line for line in told.lines)


def test_another_checkpoint_of_that_name_is_not_the_root(pair: tuple[Path, Path]) -> None:
    assert root_teacher(with_root(pair[0], "teacher", "0" * 64)) is None
    (pair[1] / "model.safetensors").write_bytes(b"damaged")
    assert root_teacher(Checkpoint.open(pair[0])) is None


# --- the gate --------------------------------------------------------------------------------------------------------


def test_a_gate_that_holds(pair: tuple[Path, Path], settings: EvaluateSettings, tmp_path: Path) -> None:
    gated = replace(settings, gate="loss<=teacher+9, kl<=99, copy_loss@8<=2*teacher")
    found = evaluate(pair[0], gated, teacher=pair[1], records=tmp_path / "records")
    assert found.status == "done"
    assert found.metrics["gate"]["passed"] is True
    loss, _, copy = found.metrics["gate"]["rows"]
    assert loss == {
        "expr": "loss<=teacher+9", "left": found.metrics["loss"], "right": found.metrics["teacher_loss"] + 9,
        "passed": True,
    }  # fmt: skip
    assert copy["right"] == 2 * found.metrics["teacher"]["copy_loss"]["8"]


def test_a_missed_gate_is_recorded_then_raised(
    pair: tuple[Path, Path], settings: EvaluateSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gated = replace(settings, gate="agreement>=1.5, loss<=teacher+9")
    with pytest.raises(GateMissed) as missed:
        evaluate(pair[0], gated, teacher=pair[1], records=tmp_path / "records")
    (found,) = records_in(tmp_path)
    assert missed.value.exit_code == 3
    assert f"agreement>=1.5 ({found.metrics['agreement']:.6g} against 1.5)" in str(missed.value)
    assert "loss<=" not in str(missed.value)
    assert "\n" not in str(missed.value)
    assert found.status == "gate_missed"
    assert [row["passed"] for row in found.metrics["gate"]["rows"]] == [False, True]
    monkeypatch.setattr(hf, "load", None)  # what is on disk is not measured again, and is still missed
    with pytest.raises(GateMissed, match=r"agreement>=1\.5"):
        evaluate(pair[0], gated, teacher=pair[1], records=tmp_path / "records")


@pytest.mark.slow
def test_a_gate_against_the_control(
    pair: tuple[Path, Path],
    settings: EvaluateSettings,
    tmp_path: Path,
    text: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    control = evaluate(pair[1], settings, records=tmp_path / "records", name="control")
    path = str(record.path_of(tmp_path / "records", "evaluate", "control", control.identity))
    gated = replace(settings, gate="loss<=control+9, copy_loss@8<=control+9", control=path)
    found = evaluate(pair[0], gated, records=tmp_path / "records")
    assert [row["right"] for row in found.metrics["gate"]["rows"]] == [
        control.metrics["loss"] + 9,
        control.metrics["copy_loss"]["8"] + 9,
    ]
    monkeypatch.setattr(hf, "load", None)
    for changed, words in (
        ({"tokens": 300}, "other data"),
        ({"stride": 32}, "other stride"),
        ({"gate": "agreement>=control"}, "lacks a metric of the gate"),
        ({"control": text}, "is not the record of an evaluation"),
        ({"control": str(tmp_path / "absent.json")}, "is not the record of an evaluation"),
    ):
        with pytest.raises(SettingError, match=words):
            evaluate(pair[0], replace(gated, **changed), teacher=pair[1], records=tmp_path / "records")


def test_a_control_of_an_older_version_lacks_newer_settings(settings: EvaluateSettings) -> None:
    old = {key: value for key, value in asdict(settings).items() if key != "last_words"}
    control = {"hashes": {"tokens": "these"}, "settings": old}
    check_same(settings, control, "these")
    for changed, tokens, words in (({}, "others", "other data"), ({"seed": 1}, "these", "other seed")):
        with pytest.raises(SettingError, match=words):
            check_same(replace(settings, **changed), control, tokens)


def test_a_gate_needs_its_teacher(
    pair: tuple[Path, Path], settings: EvaluateSettings, tmp_path: Path, nothing_loads: None
) -> None:
    for row in ("loss<=teacher", "kl<=1"):
        with pytest.raises(SettingError, match="compares with a teacher, but there is none"):
            evaluate(pair[0], replace(settings, gate=row), records=tmp_path / "records")
    assert not (tmp_path / "records").exists()


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"tokens": 0}, "tokens must be at least 1"),
        ({"stride": 0}, "stride must be at least 1"),
        ({"batch_size": -1}, "batch_size must be at least 1"),
        ({"samples": -1}, "samples must be at least 0"),
        ({"copy_distances": (4, -4)}, "copy_distances must be at least 0"),
        ({"last_words": -1}, "last_words must be at least 0"),
        ({"gate": "last_word>=0.5", "last_words": 0}, "last_word is not measured.*set last_words"),
        ({"lm_eval_tasks_dir": "tasks"}, "lm_eval_tasks_dir needs tasks"),
        ({"gate": "lose<=1"}, "did you mean 'loss'"),
        ({"gate": "copy_loss@5<=1"}, "not measured at 5.*16, 64 or 128.*add it to copy_distances"),
        ({"gate": "copy_gain@5>=1"}, "not measured at 5.*add it to copy_distances"),
        ({"gate": "passkey@256>=0.5"}, "not measured at 256.*add it to passkey_contexts"),
        ({"gate": "lm_eval@piqa.acc>=0.5"}, "add it to lm_eval"),
        ({"gate": "loss<=control"}, "names the control, and none is given"),
    ],
)
def test_settings_refuse_before_anything_is_opened(given: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingError, match=words) as error:
        EvaluateSettings(data="text", **given)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (
            {"sequence_length": 257},
            r"sequence_length is too large for the model's 256 positions \(got 257\); allowed: at most 256",
        ),
        ({"stride": 65}, r"stride skips tokens.*allowed: 1 to 64"),
        ({"copy_distances": (240,)}, r"copy_distances is too large.*\(got 240\); allowed: at most 224"),
        ({"passkey_contexts": (300,)}, "passkey_contexts is too large"),
        ({"sample_tokens": 300}, "sample_tokens is too large.*at most 224"),
    ],
)
def test_refuses_what_the_model_cannot_do(
    pair: tuple[Path, Path],
    settings: EvaluateSettings,
    tmp_path: Path,
    nothing_loads: None,
    given: dict[str, Any],
    words: str,
) -> None:
    with pytest.raises(SettingError, match=words):
        evaluate(pair[0], replace(settings, **given), records=tmp_path / "records")
    assert not (tmp_path / "records").exists()


def test_refuses_another_vocabulary(
    tiny_checkpoint: Make, settings: EvaluateSettings, tmp_path: Path, nothing_loads: None
) -> None:
    student = tiny_checkpoint(name="student")
    with pytest.raises(CheckpointError, match=r"different vocabularies.*300 tokens against 260"):
        evaluate(student, settings, teacher=tiny_checkpoint(vocab_size=300), records=tmp_path / "records")
    other = tiny_checkpoint(name="other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(CheckpointError, match=r"different vocabularies.*another tokenizer"):
        evaluate(student, settings, teacher=other, records=tmp_path / "records")


def test_refuses_text_and_tokenizers(
    tiny_checkpoint: Make, settings: EvaluateSettings, tmp_path: Path, nothing_loads: None
) -> None:
    folder = tiny_checkpoint()
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(DataError, match="empty"):
        evaluate(folder, replace(settings, data=str(tmp_path / "empty.txt")), records=tmp_path / "records")
    small = tiny_checkpoint(name="small", vocab_size=100)
    with pytest.raises(DataError, match="more tokens than the model has embeddings"):
        evaluate(small, settings, records=tmp_path / "records")
    bare = tiny_checkpoint(name="bare", tokenizer=False)
    with pytest.raises(DataError, match="no tokenizer"):
        evaluate(bare, settings, records=tmp_path / "records")
    for given, words in (
        ({"copy_distances": (200,)}, "too short to probe copying"),
        ({"passkey_contexts": (250,)}, "too short to fill a passkey context"),
    ):
        with pytest.raises(DataError, match=words):
            evaluate(folder, replace(settings, tokens=60, **given), records=tmp_path / "records")
    assert not (tmp_path / "records").exists()


@pytest.mark.slow
def test_a_loss_that_is_no_number_is_a_failed_record(
    tiny_checkpoint: Make, settings: EvaluateSettings, tmp_path: Path
) -> None:
    folder = tiny_checkpoint()
    sound = load_file(folder / "model.safetensors")
    save_file({**sound, "model.norm.weight": sound["model.norm.weight"] * math.nan}, folder / "model.safetensors",
              metadata={"format": "pt"})  # fmt: skip
    with pytest.raises(CheckpointError, match="the loss is nan"):
        evaluate(folder, settings, records=tmp_path / "records")
    (failed,) = records_in(tmp_path)
    assert (failed.status, failed.metrics) == ("failed", {})
    save_file(sound, folder / "model.safetensors", metadata={"format": "pt"})
    assert evaluate(folder, settings, records=tmp_path / "records").status == "done"  # a failure is tried again
    assert [each.status for each in records_in(tmp_path)] == ["done"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_refuses_a_place_that_cannot_be_written(
    tiny_checkpoint: Make, settings: EvaluateSettings, tmp_path: Path, nothing_loads: None
) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    with pytest.raises(OutputError, match="no permission to write"):
        evaluate(tiny_checkpoint(), settings, records=closed / "records")


def test_refuses_a_place_below_a_file(
    tiny_checkpoint: Make, settings: EvaluateSettings, text: str, nothing_loads: None
) -> None:
    with pytest.raises(OutputError, match="a part of the path is a file"):
        evaluate(tiny_checkpoint(), settings, records=Path(text) / "records")


def test_an_interruption_leaves_no_record(tiny_checkpoint: Make, settings: EvaluateSettings, tmp_path: Path) -> None:
    class Interrupting(Silent):
        def advance(self, amount: float, note: str = "") -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(tiny_checkpoint(), settings, records=tmp_path / "records", progress=Interrupting())
    assert not (tmp_path / "records").exists()


# --- lm-eval ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_lm_eval_in_the_record_and_in_the_gate(
    pair: tuple[Path, Path], settings: EvaluateSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval")
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    (tmp_path / "made.jsonl").write_text("".join(f'{{"text": "line {n} of a text"}}\n' for n in range(6)))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "made.yaml").write_text(
        f"task: made\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path / 'made.jsonl'}}}}}\n"
        'test_split: test\noutput_type: loglikelihood_rolling\ndoc_to_text: ""\ndoc_to_target: "{{text}}"\n'
        "metric_list: [{metric: bits_per_byte}]\n"
    )
    asked = replace(
        settings, lm_eval=("made",), lm_eval_tasks_dir=str(tmp_path / "tasks"), lm_eval_limit=3, samples=0,
        gate="lm_eval@made.bits_per_byte<=2*teacher, lm_eval@made.bits_per_byte<=0.5",
    )  # fmt: skip
    with pytest.raises(GateMissed, match=r"lm_eval@made.bits_per_byte<=0.5 \("):
        evaluate(pair[0], asked, teacher=pair[1], records=tmp_path / "records")
    (found,) = records_in(tmp_path)
    mine, theirs = (each["lm_eval"]["made"]["bits_per_byte"] for each in (found.metrics, found.metrics["teacher"]))
    assert found.metrics["gate"]["rows"][0] == {
        "expr": "lm_eval@made.bits_per_byte<=2*teacher", "left": mine, "right": 2 * theirs, "passed": True
    }  # fmt: skip
    assert 1 < mine < 20
    assert mine != theirs
    evaluate(pair[1], replace(asked, gate=None, fp8=False), records=tmp_path / "records")
    runs = iter([{"made": {"bits_per_byte": mine}}])  # the student's alone: the teacher's are known
    monkeypatch.setattr(Harness, "run", lambda *args, **how: next(runs))
    known = evaluate(pair[0], replace(asked, gate=None), teacher=pair[1], records=tmp_path / "records", name="again")
    assert known.metrics["teacher"]["lm_eval"]["made"]["bits_per_byte"] == theirs
    monkeypatch.setattr(hf, "load", None)
    for row, words in (
        ("lm_eval@made.acc>=0.5", "made has no metric 'acc'.*allowed: bits_per_byte"),
        ("lm_eval@mode.acc>=0.5", "task 'mode' is not measured.*allowed: made"),
    ):
        with pytest.raises(SettingError, match=words):
            evaluate(pair[0], replace(asked, gate=row), records=tmp_path / "records")
    (tmp_path / "made.jsonl").unlink()
    with pytest.raises(DataError, match=r"lm-eval cannot load its tasks.*made\.jsonl"):
        evaluate(pair[0], replace(asked, gate=None), records=tmp_path / "records")
