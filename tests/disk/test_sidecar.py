"""Files beside the weights: what goes with a student and what never does, and what tells tokenizers apart."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvfold.convert.conversion import convert
from kvfold.disk.checkpoint import Checkpoint
from kvfold.disk.lineage import vocabulary_difference
from kvfold.disk.output import MANIFEST, read_json, write_json
from kvfold.disk.sidecar import carry_over
from kvfold.errors import CheckpointError, SettingError
from kvfold.export.exporting import ExportSettings, export
from kvfold.hf import load_tokenizer
from kvfold.text.tokens import token_file, tokenizer_hash
from kvfold.train.uptrain import UptrainSettings, uptrain

Make = Callable[..., Path]

DATA = (
    *(
        "vocab.txt",
        "tokenizer.model",
        "tokenizer.model.v3",
        "spiece.model",
        "source.spm",
        "qwen.tiktoken",
        "tekken.json",
    ),
    *("special_tokens_map.json", "added_tokens.json", "chat_template.json", "preprocessor_config.json"),
    *("LICENSE", "LICENSE.txt", "LICENCE-APACHE-2.0", "NOTICE", "Third_Party_Notices.md", "USE_POLICY.md"),
)
OTHERS = (
    *("modeling_teacher.py", "configuration_teacher.py", "kvfold_families.py", "LICENSE.py", "licenses.so", "run.sh"),
    *("rust_model.ot", "model.ckpt.index", "model.ckpt.data-00000-of-00001", "model.ckpt.meta", "tf_model.h5"),
    *(
        "flax_model.msgpack",
        "model.onnx",
        "pytorch_model.bin.index.json",
        "optimizer.pt",
        "scheduler.pkl",
        "weights.gguf",
    ),
    *("training_args.bin", "adapter_config.json", "adapter_model.safetensors", "README.md", "train.jsonl", "notes.txt"),
    *(".gitattributes", "trainer_state.json", "consolidated.00.pth", "data.npz", "model.tflite", "libkernel.so"),
)


def edit(path: Path, **changes: Any) -> None:
    write_json(path, {**(read_json(path) or {}), **changes})


def loaded(folder: Path) -> str:
    return tokenizer_hash(load_tokenizer(folder))


# --- what goes along ------------------------------------------------------------------------------------------------


def test_data_goes_along_and_code_and_weights_do_not(tiny_checkpoint: Make, tmp_path: Path) -> None:
    folder, out = tiny_checkpoint(), tmp_path / "out"
    before = {path.name for path in folder.iterdir()}
    for name in (*DATA, *OTHERS):
        (folder / name).write_text(name)
    out.mkdir()
    carry_over(folder, out)
    assert {path.name for path in out.iterdir()} == set(DATA) | before - {"config.json", "model.safetensors"}
    assert (out / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()


@pytest.mark.parametrize(("method", "settings"), [("gqa", {"kv_heads": "2"}), ("cla", {}), ("identity", {})])
def test_no_student_names_code_of_its_teacher(
    tiny_checkpoint: Make, tmp_path: Path, method: str, settings: dict[str, Any]
) -> None:
    folder = tiny_checkpoint()
    for name in ("config.json", "tokenizer_config.json", "generation_config.json", "preprocessor_config.json"):
        edit(folder / name, auto_map={"AutoModelForCausalLM": "modeling_teacher.Teacher"}, kept="yes")
    edit(folder / "config.json", part={"auto_map": {"AutoModel": "evil.Evil"}, "kept": "yes"})
    (folder / "modeling_teacher.py").write_text("raise SystemExit('the code of the teacher ran')")
    student = convert(folder, tmp_path / "student", method, settings)
    for path in {*student.glob("*.json")} - {student / MANIFEST}:  # which keeps the teacher's config, as it was
        assert "auto_map" not in path.read_text(), path.name
    assert read_json(student / "tokenizer_config.json")["kept"] == "yes"
    assert read_json(student / "config.json")["part"] == {"kept": "yes"}
    assert not list(student.glob("*.py"))
    assert Checkpoint.open(student).hash() == read_json(student / MANIFEST)["hash"]


def test_a_trained_student_names_no_code_either(alone: None, tiny_checkpoint: Make, text: Path, tmp_path: Path) -> None:
    folder = tiny_checkpoint()
    edit(folder / "config.json", auto_map={"AutoModelForCausalLM": "modeling_teacher.Teacher"})
    (folder / "modeling_teacher.py").write_text("raise SystemExit('the code of the teacher ran')")
    settings = UptrainSettings(data=str(text), loss="ce", tokens=64, sequence_length=16, batch_size=2, precision="fp32")
    trained = uptrain(folder, tmp_path / "trained", settings)
    assert "auto_map" not in read_json(trained / "config.json")
    assert not list(trained.glob("*.py"))
    assert Checkpoint.open(trained).hash() == read_json(trained / MANIFEST)["hash"]


@pytest.mark.slow
def test_the_code_of_an_export_is_kvfolds_own_whatever_lies_in_the_source(
    tiny_checkpoint: Make, tmp_path: Path
) -> None:
    student = convert(tiny_checkpoint(), tmp_path / "student", "cla")
    for name in ("kvfold_hf_per_layer.py", "kvfold_families.py", "modeling_other.py"):
        (student / name).write_text("raise SystemExit('hostile')")
    (student / "stray.safetensors").write_bytes(b"x")
    out = export(student, tmp_path / "out", "transformers", ExportSettings(prompt_tokens=6, new_tokens=2))
    code = {path.name: path.read_text() for path in out.glob("*.py")}
    assert "kvfold_hf_per_layer.py" in code
    assert "modeling_other.py" not in code
    assert all(text.startswith("# Written by kvfold") for text in code.values())
    assert not (out / "stray.safetensors").exists()
    again = convert(out, tmp_path / "again", "identity")  # and a student of the export has neither code nor its names
    assert not list(again.glob("*.py"))
    assert "auto_map" not in read_json(again / "config.json")


def test_a_link_to_elsewhere_is_not_followed(tiny_checkpoint: Make, tmp_path: Path) -> None:
    folder = tiny_checkpoint()
    (tmp_path / "secret").write_text("secret")
    for name in ("LICENSE", "additional_chat_templates/tool.jinja"):
        link = folder / name
        link.parent.mkdir(exist_ok=True)
        link.symlink_to(tmp_path / "secret")
        with pytest.raises(
            CheckpointError, match=r"is a link to a file outside the checkpoint's directory; .*copy it in"
        ):
            convert(folder, tmp_path / "student", "gqa", {"kv_heads": "2"})
        assert not list(tmp_path.glob("student*")), "nothing is left behind"
        link.unlink()
    (folder / "notes").symlink_to(tmp_path / "secret")  # of no kind that goes along: not looked at
    (folder / "NOTICE").symlink_to("nowhere")
    (folder / "LICENSE.md").symlink_to("tokenizer.json")  # inside
    student = convert(folder, tmp_path / "student", "gqa", {"kv_heads": "2"})
    assert (student / "LICENSE.md").read_text() == (folder / "tokenizer.json").read_text()
    assert not (student / "LICENSE.md").is_symlink()
    assert not os.path.lexists(student / "notes")


def test_links_of_the_hubs_cache_are_followed(tiny_checkpoint: Make, tmp_path: Path) -> None:
    folder = tiny_checkpoint()
    blobs, snapshot = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for path in folder.iterdir():
        path.rename(blobs / f"{path.name}-hash")
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}-hash")
    student = convert(snapshot, tmp_path / "student", "gqa", {"kv_heads": "2"})
    assert (student / "tokenizer.json").is_file()
    assert not any(path.is_symlink() for path in student.iterdir())


def test_a_pipe_beside_the_weights_does_not_block(tiny_checkpoint: Make, tmp_path: Path) -> None:
    folder = tiny_checkpoint()
    os.mkfifo(folder / "LICENSE")
    (folder / "NOTICE").mkdir()
    student = convert(folder, tmp_path / "student", "gqa", {"kv_heads": "2"})
    assert not (student / "LICENSE").exists()


# --- the tokenizer --------------------------------------------------------------------------------------------------

SPECIAL = {
    "end": ("tokenizer_config.json", {"eos_token": "<unk>"}, "eos_token '<unk>' against '</s>'"),
    "end as an object": ("tokenizer_config.json", {"eos_token": {"content": "<unk>"}}, "eos_token '<unk>' against"),
    "no end": ("tokenizer_config.json", {"eos_token": None}, "eos_token None against '</s>'"),
    "start": ("tokenizer_config.json", {"bos_token": "<pad>"}, "bos_token '<pad>' against '<s>'"),
    "separator": ("tokenizer_config.json", {"sep_token": "<s>"}, "sep_token '<s>' against None"),
    "start put before": ("tokenizer_config.json", {"add_bos_token": True}, "add_bos_token True against None"),
    "older file": ("special_tokens_map.json", {"eos_token": "<unk>"}, "eos_token '<unk>' against '</s>'"),
    "added tokens of an older file": ("added_tokens.json", {"<|call|>": 300}, "added_tokens ['<|call|>'] against None"),
    "more tokens": (
        "tokenizer_config.json",
        {"extra_special_tokens": ["<|call|>"]},
        "added_tokens ['<|call|>'] against None",
    ),
}


@pytest.mark.parametrize("case", sorted(SPECIAL))
def test_other_special_tokens_are_another_tokenizer(tiny_checkpoint: Make, case: str) -> None:
    name, changes, told = SPECIAL[case]
    first, second = tiny_checkpoint(name="first"), tiny_checkpoint(name="second")
    assert Checkpoint.open(first).tokenizer_hash == Checkpoint.open(second).tokenizer_hash
    edit(second / name, **changes)
    assert read_json(first / "tokenizer.json") == read_json(second / "tokenizer.json")
    student, teacher = Checkpoint.open(first), Checkpoint.open(second)
    assert student.tokenizer_hash != teacher.tokenizer_hash
    difference = vocabulary_difference(student, teacher)
    assert difference is not None
    assert told in difference


@pytest.mark.parametrize(
    "changes",
    [
        {"pad_token": "<unk>"},
        {"eos_token": {"content": "</s>", "lstrip": False}},
        {"model_max_length": 7, "padding_side": "left", "auto_map": {"AutoTokenizer": ["a.A", None]}},
        {"extra_special_tokens": ["<s>"], "added_tokens_decoder": {"1": {"content": "<s>"}}},
        {"chat_template": "{{ messages }}"},
    ],
)
def test_what_decides_no_ids_is_no_difference(tiny_checkpoint: Make, changes: dict[str, Any]) -> None:
    first, second = tiny_checkpoint(name="first"), tiny_checkpoint(name="second")
    edit(second / "tokenizer_config.json", **changes)
    assert vocabulary_difference(Checkpoint.open(first), Checkpoint.open(second)) is None


def test_a_student_written_by_an_older_kvfold_still_has_its_teachers_tokenizer(
    tiny_checkpoint: Make, tmp_path: Path
) -> None:
    teacher = tiny_checkpoint()
    student = convert(teacher, tmp_path / "student", "gqa", {"kv_heads": "2"})
    edit(student / MANIFEST, tokenizer="the hash of another version")
    assert vocabulary_difference(Checkpoint.open(student), Checkpoint.open(teacher)) is None


def test_a_teacher_with_another_end_is_refused(alone: None, tiny_checkpoint: Make, text: Path, tmp_path: Path) -> None:
    teacher = tiny_checkpoint()
    student = convert(teacher, tmp_path / "student", "gqa", {"kv_heads": "2"})
    edit(teacher / "tokenizer_config.json", eos_token="<unk>")
    settings = UptrainSettings(data=str(text), tokens=64, sequence_length=16, batch_size=2, precision="fp32")
    with pytest.raises(SettingError, match=r"different vocabularies .got eos_token '<unk>' against '</s>'"):
        uptrain(student, tmp_path / "out", settings)


def test_two_models_with_one_definition_and_different_ends_do_not_share_cached_tokens(
    alone: None, tiny_checkpoint: Make, tmp_path: Path
) -> None:
    (tmp_path / "t.jsonl").write_text('{"text": "ab"}\n{"text": "c"}\n')
    first, second = tiny_checkpoint(name="base"), tiny_checkpoint(name="instruct")
    edit(second / "tokenizer_config.json", eos_token="<unk>")
    ours, theirs = (token_file(tmp_path / "t.jsonl", folder) for folder in (first, second))
    assert ours.path != theirs.path
    ends = {2: list(ours.tokens), 3: list(theirs.tokens)}
    for end, tokens in ends.items():
        assert [place for place, token in enumerate(tokens) if token == end] == [2, 4]
    assert ours.hash == theirs.hash, "the text is the same"
    assert token_file(tmp_path / "t.jsonl", first).path == ours.path


def test_a_start_put_before_texts_is_another_tokenizer(tiny_checkpoint: Make) -> None:
    first, second = tiny_checkpoint(name="first"), tiny_checkpoint(name="second")
    assert loaded(first) == loaded(second)
    content = json.loads((second / "tokenizer.json").read_text())
    start = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [start, text],
        "pair": [start, text, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    }
    write_json(second / "tokenizer.json", content)
    assert loaded(first) != loaded(second)


def test_a_hash_of_a_tokenizer_without_a_backend_counts_its_file(tmp_path: Path) -> None:
    class Slow:
        eos_token_id, bos_token_id = 2, 1

        def __init__(self, file: Path) -> None:
            self.vocab_file = str(file)

        def get_vocab(self) -> dict[str, int]:
            return {"a": 0}

        def __call__(self, text: str) -> dict[str, list[int]]:
            return {"input_ids": [self.bos_token_id]}

    for name in ("one", "same", "other"):
        (tmp_path / name).write_text("pieces" if name != "other" else "other pieces")
    one, same, other = (tokenizer_hash(Slow(tmp_path / name)) for name in ("one", "same", "other"))
    assert one == same != other
    changed = Slow(tmp_path / "one")
    changed.eos_token_id = 5
    assert tokenizer_hash(changed) != one
