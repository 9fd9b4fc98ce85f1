"""Checkpoints: what is refused and how, the content hash, lineage, and saving."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from examples import CORE
from kvfold.disk.checkpoint import Checkpoint, save_model
from kvfold.disk.lineage import descend
from kvfold.disk.output import MANIFEST, open_output, read_json, write_json
from kvfold.disk.sidecar import carry_over
from kvfold.disk.source import locate
from kvfold.errors import CheckpointError, UnsupportedModel

Make = Callable[..., Path]


def refusal(source: str | Path, kind: type[CheckpointError] = CheckpointError) -> str:
    """The one line with which a source is refused."""
    with pytest.raises(kind) as caught:
        Checkpoint.open(source)
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)
    return str(caught.value)


def change(folder: Path, *drop: str, **tensors: torch.Tensor) -> None:
    """Rewrite the single file of weights without some tensors, and with others (`__` for `.`)."""
    state = load_file(folder / "model.safetensors")
    for name in drop:
        del state[name]
    state |= {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    save_file(state, folder / "model.safetensors")


def edit_config(folder: Path, **changes: Any) -> None:
    write_json(folder / "config.json", {**read_json(folder / "config.json"), **changes})


# --- opening --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("family", CORE)
@pytest.mark.parametrize("form", [{}, {"shard_size": 30_000}, {"form": "bin"}, {"form": "bin", "shard_size": 30_000}])
def test_every_family_and_container_opens(tiny_checkpoint: Make, family: str, form: dict[str, Any]) -> None:
    folder = tiny_checkpoint(family, **form)
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.family.name == family
    buffers = {"final_logits_bias"}  # of a BART: saved, and no parameter
    learnt = [name for name in checkpoint.names() if name not in buffers]
    assert sum(checkpoint.spec(name).numel for name in learnt) == checkpoint.shape.parameters
    for site, attention in checkpoint.shape.sites.items():
        for role, tensor in checkpoint.roles(site).roles.items():
            assert tuple(tensor.shape) == attention.roles()[role]
            assert tensor.std() > 0


def test_names_are_in_order_of_layers(tiny_checkpoint: Make) -> None:
    names = Checkpoint.open(tiny_checkpoint(num_hidden_layers=11)).names()
    layers = [int(name.split(".")[2]) for name in names if name.startswith("model.layers.")]
    assert layers == sorted(layers)


def test_a_tensor_that_is_read_can_be_changed_without_a_trace(tiny_checkpoint: Make) -> None:
    checkpoint = Checkpoint.open(tiny_checkpoint())
    before = checkpoint.read("model.norm.weight").clone()
    checkpoint.read("model.norm.weight").zero_()
    assert torch.equal(checkpoint.read("model.norm.weight"), before)


def test_missing_directory_and_file(tmp_path: Path) -> None:
    assert refusal(tmp_path / "nothing") == f"{tmp_path / 'nothing'}: no such directory"
    (tmp_path / "file").write_text("x")
    assert "is a file, not a checkpoint's directory" in refusal(tmp_path / "file")


def test_unknown_hub_id_names_both_places() -> None:
    line = refusal("nobody/nothing-of-that-name")
    assert "no such directory" in line
    assert "not found on the hub" in line


def test_hub_id_is_downloaded_without_other_engines_files(
    tiny_checkpoint: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, asked = tiny_checkpoint(), []

    def download(name: str, **given: Any) -> str:
        asked.append((name, given))
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    checkpoint = Checkpoint.open("org/model@v2")
    assert checkpoint.name == "org/model@v2"
    ((name, given),) = asked
    assert (name, given["revision"]) == ("org/model", "v2")
    assert {"*.json", "*.safetensors"} <= set(given["allow_patterns"])
    assert "*.bin" not in given["allow_patterns"]
    assert not [pattern for pattern in given["allow_patterns"] if pattern.endswith(".py")], "code is never read"
    locate("org/model", weights=False)
    assert "*.safetensors" not in asked[1][1]["allow_patterns"]


def test_hub_id_with_bin_alone_is_downloaded_in_a_second_pass(
    tiny_checkpoint: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, patterns = tiny_checkpoint(form="bin"), []

    def download(name: str, **given: Any) -> str:
        patterns.extend(given["allow_patterns"])
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    Checkpoint.open("org/model")
    assert patterns[-1] == "*.bin"


def test_unfinished_work_is_not_read(tiny_checkpoint: Make, tmp_path: Path) -> None:
    work = open_output(tmp_path / "out", {}).work
    assert "is unfinished work" in refusal(work)
    assert "is not finished; repeat the command" in refusal(tmp_path / "out")


def test_missing_config(tiny_checkpoint: Make) -> None:
    folder = tiny_checkpoint()
    (folder / "config.json").unlink()
    assert refusal(folder) == f"{folder}: no config.json; is this a transformers checkpoint?"


@pytest.mark.parametrize("text", ["{", "[]", "", "\x00"])
def test_config_that_is_no_json_object(tiny_checkpoint: Make, text: str) -> None:
    folder = tiny_checkpoint()
    (folder / "config.json").write_text(text)
    assert ("config.json: is not a JSON object" if text == "[]" else "config.json: is not JSON: ") in refusal(folder)


def test_unknown_architecture_and_the_nearest_known(tiny_checkpoint: Make) -> None:
    folder = tiny_checkpoint()
    edit_config(folder, model_type="lama")
    line = refusal(folder, UnsupportedModel)
    assert "architecture 'lama' is not supported" in line
    assert "did you mean 'llama'?" in line


def test_quantised_source(tiny_checkpoint: Make) -> None:
    folder = tiny_checkpoint()
    edit_config(folder, quantization_config={"quant_method": "gptq"})
    line = refusal(folder, UnsupportedModel)
    assert "quantised (gptq)" in line
    assert "convert the unquantised checkpoint" in line


def test_missing_tensor_of_an_attention(tiny_checkpoint: Make) -> None:
    folder = tiny_checkpoint()
    change(folder, "model.layers.2.self_attn.k_proj.weight")
    assert "tensor model.layers.2.self_attn.k_proj.weight is missing (k of layer 2)" in refusal(folder)


def test_missing_tensor_elsewhere_is_named(tiny_checkpoint: Make) -> None:
    folder = tiny_checkpoint()
    change(folder, "model.layers.1.mlp.up_proj.weight")
    line = refusal(folder)
    assert "tensors are missing" in line
    assert "is model.layers.1.mlp.up_proj.weight lost?" in line


def test_names_of_a_bare_model_are_recognised(tiny_checkpoint: Make) -> None:
    folder = tiny_checkpoint()
    state = {name.removeprefix("model."): tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(state, folder / "model.safetensors")
    assert "is it named otherwise, as layers.0.self_attn.q_proj.weight?" in refusal(folder)


def test_wrong_dtype(tiny_checkpoint: Make) -> None:
    folder = tiny_checkpoint()
    change(folder, model__layers__0__self_attn__v_proj__weight=torch.zeros(32, 32, dtype=torch.int8))
    line = refusal(folder)
    assert "model.layers.0.self_attn.v_proj.weight does not hold floating-point numbers (got int8)" in line
    assert "bfloat16, float16, float32, float64" in line


def test_wrong_shape(tiny_checkpoint: Make) -> None:
    folder = tiny_checkpoint()
    change(folder, model__layers__3__self_attn__k_proj__weight=torch.zeros(16, 32))
    line = refusal(folder)
    assert "model.layers.3.self_attn.k_proj.weight does not have the shape that config.json implies" in line
    assert "(got (16, 32)); allowed: (32, 32)" in line


# --- hashes ---------------------------------------------------------------------------------------------------------


def test_hash_is_the_same_for_every_container(tiny_checkpoint: Make) -> None:
    forms = [{}, {"shard_size": 10_000}, {"shard_size": 50_000}, {"form": "bin"}, {"form": "bin", "shard_size": 30_000}]
    hashes = {Checkpoint.open(tiny_checkpoint(name=f"t{number}", **form)).hash() for number, form in enumerate(forms)}
    assert len(hashes) == 1


def test_hash_depends_on_bytes_names_shapes_and_config(tiny_checkpoint: Make) -> None:
    base = Checkpoint.open(tiny_checkpoint()).hash()
    other = [tiny_checkpoint(name=name) for name in ("value", "name", "dtype", "config")]
    norm = load_file(other[0] / "model.safetensors")["model.norm.weight"]
    nudged = norm.clone()
    nudged[-1] = torch.nextafter(nudged[-1], torch.tensor(9.0))
    change(other[0], model__norm__weight=nudged)
    change(other[1], model__norm__extra=norm)
    change(other[2], model__norm__weight=norm.double())
    edit_config(other[3], rms_norm_eps=1e-5)
    hashes = {Checkpoint.open(folder).hash() for folder in other}
    assert len(hashes) == 4
    assert base not in hashes


def test_hash_does_not_depend_on_book_keeping(tiny_checkpoint: Make) -> None:
    folder = tiny_checkpoint()
    base = Checkpoint.open(folder).hash()
    config = read_json(folder / "config.json")
    config["torch_dtype"] = config.pop("dtype")
    write_json(folder / "config.json", dict(reversed({**config, "transformers_version": "4.0.0"}.items())))
    assert Checkpoint.open(folder).hash() == base


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_a_tied_output_projection_counts_once(tiny_checkpoint: Make, form: str) -> None:
    folder = tiny_checkpoint(tie_word_embeddings=True)
    single = Checkpoint.open(folder)
    base = single.hash()
    state = load_file(folder / "model.safetensors")
    assert "lm_head.weight" not in state

    def store(head: torch.Tensor) -> Checkpoint:
        (folder / "model.safetensors").unlink(missing_ok=True)
        both = {**state, "lm_head.weight": head}
        if form == "bin":
            torch.save(both, folder / "pytorch_model.bin")
        else:
            save_file(both, folder / "model.safetensors")
        return Checkpoint.open(folder)

    twice = store(state["model.embed_tokens.weight"].clone())
    assert twice.names() == single.names()
    assert twice.hash() == base
    with pytest.raises(CheckpointError, match=r"ties lm_head\.weight to model\.embed_tokens\.weight"):
        store(state["model.embed_tokens.weight"] + 1)


def test_tokenizer_hash(tiny_checkpoint: Make) -> None:
    folder = tiny_checkpoint()
    base = Checkpoint.open(folder).tokenizer_hash
    content = read_json(folder / "tokenizer.json")
    write_json(folder / "tokenizer.json", {**content, "padding": {"strategy": "BatchLongest"}})
    assert Checkpoint.open(folder).tokenizer_hash == base
    content["model"]["vocab"]["<pad>"] = 7
    write_json(folder / "tokenizer.json", content)
    assert Checkpoint.open(folder).tokenizer_hash not in (base, None)
    (folder / "tokenizer.json").unlink()
    assert Checkpoint.open(folder).tokenizer_hash is None
    (folder / "vocab.json").write_text("{}")
    assert Checkpoint.open(folder).tokenizer_hash is not None


# --- lineage --------------------------------------------------------------------------------------------------------


def test_weights_that_changed_behind_the_lineage_are_noticed(tiny_checkpoint: Make, tmp_path: Path) -> None:
    folder = saved(tiny_checkpoint, tmp_path / "student")
    Checkpoint.open(folder).hash()
    shard = sorted(folder.glob("*.safetensors"))[-1]
    content = shard.read_bytes()
    shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(CheckpointError, match=r"have changed since kvfold\.json was written"):
        Checkpoint.open(folder).hash()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "kvfold.json: is not JSON"),
        ("[]", "is not a lineage of format 1; restore it, or delete it to start a new one"),
        ('{"format": true}', "is not a lineage of format 1"),
        ('{"format": 99}', "is a lineage of format 99, and this kvfold reads format 1; use a newer kvfold"),
    ],
)
def test_lineage_that_cannot_be_read(tiny_checkpoint: Make, text: str, said: str) -> None:
    folder = tiny_checkpoint()
    (folder / MANIFEST).write_text(text)
    assert said in refusal(folder)


# --- saving ---------------------------------------------------------------------------------------------------------


def saved(tiny_checkpoint: Make, folder: Path, **changes: Any) -> Path:
    """A checkpoint that `save_model` wrote, in bfloat16, of a state in float32."""
    source = Checkpoint.open(tiny_checkpoint(dtype="bfloat16", **changes))
    folder.mkdir()
    state = {name: source.read(name).float() + 0.25 for name in source.names()}
    state["lm_head.weight"] = state.get("lm_head.weight", state["model.embed_tokens.weight"])
    lineage = descend(source, inputs="i", stage="uptrain", settings={}, tokens=1)
    hashed = save_model(folder, config=source.config, state=state, lineage=lineage, like=source, shard_bytes=20_000)
    assert read_json(folder / MANIFEST)["hash"] == hashed
    return folder


@pytest.mark.parametrize("tied", [True, False])
def test_saved_model_opens_in_the_sources_dtype(tiny_checkpoint: Make, tmp_path: Path, tied: bool) -> None:
    made = Checkpoint.open(saved(tiny_checkpoint, tmp_path / "student", tie_word_embeddings=tied))
    source = Checkpoint.open(tmp_path / "teacher")
    assert made.names() == source.names()
    assert made.hash() == made.lineage["hash"]
    assert made.root_hash() == source.hash()
    for name in made.names():
        assert torch.equal(made.read(name), (source.read(name).float() + 0.25).bfloat16())


def test_saving_without_a_model_to_be_like(tiny_checkpoint: Make, tmp_path: Path) -> None:
    source = Checkpoint.open(tiny_checkpoint(tie_word_embeddings=True))
    state = {name: source.read(name) for name in source.names()}
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    lineage = descend(source, inputs="i", stage="pretrain", settings={})
    save_model(tmp_path, config=source.config, state=state, lineage=lineage, dtype="bfloat16")
    made = Checkpoint.open(tmp_path)
    assert made.names() == source.names()
    assert {made.spec(name).dtype for name in made.names()} == {"bfloat16"}


def test_saving_a_state_that_lost_a_tensor(tiny_checkpoint: Make, tmp_path: Path) -> None:
    source = Checkpoint.open(tiny_checkpoint())
    with pytest.raises(CheckpointError, match=r"the trained model lost 1 tensors, the first is lm_head\.weight"):
        save_model(
            tmp_path,
            config=source.config,
            state={name: source.read(name) for name in source.names() if name != "lm_head.weight"},
            lineage={},
            like=source,
        )


def test_what_is_carried_over(tiny_checkpoint: Make, tmp_path: Path) -> None:
    folder = tiny_checkpoint(shard_size=30_000)
    for name in ("LICENSE", "README.md", "train.jsonl", ".gitattributes", "consolidated.pth", "added_tokens.json"):
        (folder / name).write_text(name)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool.jinja").write_text("x")
    (folder / "original").mkdir()
    out = tmp_path / "out"
    out.mkdir()
    carry_over(folder, out)
    assert sorted(path.name for path in out.iterdir()) == [
        "LICENSE",
        "added_tokens.json",
        "additional_chat_templates",
        "chat_template.jinja",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert (out / "additional_chat_templates" / "tool.jinja").read_text() == "x"
    assert json.loads((out / "tokenizer.json").read_text()) == json.loads((folder / "tokenizer.json").read_text())
