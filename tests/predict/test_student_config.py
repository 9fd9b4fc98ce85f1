"""A student's config.json is read back before a tensor is; what nothing could load is refused at plan time."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import transformers

from kvfold import families, hf, methods
from kvfold.contracts.family import Family
from kvfold.contracts.site import Shape
from kvfold.convert.conversion import convert
from kvfold.disk.checkpoint import Checkpoint
from kvfold.disk.output import read_json, write_json
from kvfold.errors import SettingError, UnsupportedModel
from kvfold.families import all_families
from kvfold.predict.plan import plan
from kvfold.predict.student_config import student_config, student_family

Make = Callable[..., Path]
assert hf.load  # importing it registers our classes

CLASSES = [
    (name, model_type, architecture)
    for name, family in all_families().items()
    for model_type, architecture in family.architectures.items()
]


@pytest.mark.parametrize(("family", "model_type", "architecture"), CLASSES)
def test_every_class_that_a_family_names_is_registered(family: str, model_type: str, architecture: str) -> None:
    paired, audio = all_families()[family].encoder_decoder, all_families()[family].audio
    auto = transformers.AutoModelForSeq2SeqLM if paired else transformers.AutoModelForCausalLM
    auto = transformers.AutoModelForSpeechSeq2Seq if audio else auto
    assert auto._model_mapping[type(transformers.CONFIG_MAPPING[model_type]())].__name__ == architecture


@pytest.mark.parametrize("family", sorted(all_families()))
@pytest.mark.parametrize("method", sorted(methods.all_methods()))
def test_every_student_of_every_family_is_read_back(family: str, method: str) -> None:
    found, chosen = all_families()[family], methods.get(method)
    config = found.tiny()
    shape = found.shape(config)
    settings = chosen.lossless(shape)
    try:
        methods.check(method, settings, shape)
    except (SettingError, UnsupportedModel):
        pytest.skip(f"{method} does not take {family}")
    student = chosen.student(settings, shape)
    made = student_config(config, found, shape, student, method=method, dtype="bfloat16")
    home = student_family(found, student)
    assert home.shape(made) == replace(student.shape, dtype="bfloat16")
    assert made["architectures"] == [home.architectures[made["model_type"]]]


def forgetful(family: Family) -> Family:
    """The family as one would write it that knows of no layers that share: its config.json does not say so."""

    def fields(shape: Shape) -> dict[str, Any]:
        found = family.fields(shape)
        return {key: value for key, value in found.items() if key != "kv_source_layers"}

    return replace(family, fields=fields)


def classless(family: Family) -> Family:
    """The family as one would write it for stock classes alone."""
    return replace(family, architectures={"llama": "LlamaForCausalLM"})


def wordless(family: Family) -> Family:
    """A family whose words do not cover the shape at all."""

    def fields(shape: Shape) -> dict[str, Any]:
        if shape.owners:
            raise KeyError(shape.model_type)
        return family.fields(shape)

    return replace(family, fields=fields)


@pytest.mark.parametrize("broken", [forgetful, classless, wordless])
def test_a_family_that_cannot_express_a_student_is_refused_before_anything_is_written(
    tiny_checkpoint: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: Callable[[Family], Family]
) -> None:
    folder, llama = tiny_checkpoint(), broken(all_families()["llama"])
    monkeypatch.setattr(families, "all_families", lambda: {"llama": llama})
    for attempt in (lambda: plan(folder, "cla"), lambda: convert(folder, tmp_path / "out", "cla")):
        with pytest.raises(UnsupportedModel, match="cla: no architecture of family llama expresses this student"):
            attempt()
    assert not list(tmp_path.glob("out*"))
    plan(folder, "gqa", {"kv_heads": 2})
    convert(folder, tmp_path / "out", "gqa", {"kv_heads": "2"})


def test_the_second_of_two_conversions_is_planned_from_the_config_of_the_first(tiny_checkpoint: Make) -> None:
    made = plan(tiny_checkpoint(), "elitekv", {"rope_chunks": 2, "latent_dim": 16}, after=[("gqa", {"kv_heads": 2})])
    assert made.after.model_type == "kvfold_latent_llama"


def test_a_plan_imports_neither_torch_nor_transformers(tiny_checkpoint: Make) -> None:
    code = (
        "import sys; from kvfold.predict.plan import plan; plan(sys.argv[1], 'cla'); "
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tiny_checkpoint())], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


# --- other heads ----------------------------------------------------------------------------------------------------

HEADS = {
    "llama": [
        "LlamaForSequenceClassification",
        "LlamaForTokenClassification",
        "LlamaForQuestionAnswering",
        "LlamaModel",
    ],
    "qwen2": ["Qwen2ForSequenceClassification", "Qwen2Model", "Qwen2ForRewardModel"],
    "qwen3": ["Qwen3ForSequenceClassification", "Qwen3ForTokenClassification"],
    "t5": ["T5EncoderModel", "T5Model", "T5ForSequenceClassification", "T5ForTokenClassification"],
    "bart": ["BartModel", "BartForSequenceClassification", "BartForCausalLM"],
    "t5gemma": ["T5GemmaEncoderModel", "T5GemmaForSequenceClassification"],
}
METHODS = {"gqa": {"kv_heads": "2"}, "cla": {}, "supra": {}, "identity": {}, "crosslatent": {}, "elitekv": {}}


@pytest.mark.parametrize(("family", "head"), [(family, head) for family, heads in HEADS.items() for head in heads])
def test_a_model_with_another_head_is_refused_by_its_architecture(
    tiny_checkpoint: Make, tmp_path: Path, family: str, head: str
) -> None:
    folder = tiny_checkpoint(family)
    write_json(folder / "config.json", {**read_json(folder / "config.json"), "architectures": [head]})
    told = f"architecture {head} is not one with a language model's head; allowed: .*; convert the language model"
    with pytest.raises(UnsupportedModel, match=told):
        Checkpoint.open(folder)
    for method, settings in METHODS.items():
        with pytest.raises(UnsupportedModel, match=told):
            plan(folder, method, settings)
        with pytest.raises(UnsupportedModel, match=told):
            convert(folder, tmp_path / "out", method, settings)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("name", ["score.weight", "classifier.bias", "v_head.summary.weight", "qa_outputs.weight"])
def test_tensors_of_another_head_are_refused_whatever_the_architecture_is_called(
    tiny_checkpoint: Make, name: str
) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    folder = tiny_checkpoint(tie_word_embeddings=True)
    save_file({**load_file(folder / "model.safetensors"), name: torch.ones(2, 32)}, folder / "model.safetensors")
    with pytest.raises(UnsupportedModel, match=f"tensor {name} belongs to another head"):
        Checkpoint.open(folder)


@pytest.mark.parametrize("named", [None, [], ["LLaMAForCausalLM"], ["LlamaForCausalLM"], "LlamaForCausalLM"])
def test_an_old_name_of_the_architecture_or_none_is_taken(tiny_checkpoint: Make, tmp_path: Path, named: Any) -> None:
    folder = tiny_checkpoint()
    write_json(folder / "config.json", {**read_json(folder / "config.json"), "architectures": named})
    student = convert(folder, tmp_path / "out", "gqa", {"kv_heads": "2"})
    assert json.loads((student / "config.json").read_text())["architectures"] == (
        ["LlamaForCausalLM"] if named else named
    )


def test_an_old_t5_is_taken(tiny_checkpoint: Make) -> None:
    folder = tiny_checkpoint("t5")
    write_json(folder / "config.json", {**read_json(folder / "config.json"), "architectures": ["T5WithLMHeadModel"]})
    assert plan(folder, "identity").after.model_type == "t5"
