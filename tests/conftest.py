"""Shared fixtures: tiny random checkpoints of every family, with a byte-level tokenizer, offline and in a moment."""

from __future__ import annotations

import gc
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

settings.register_profile("kvfold", deadline=None)  # a busy machine is slow, not wrong
settings.load_profile("kvfold")

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers or huggingface_hub is imported by any test
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models crawl when threads wait for one another

# a suite that a shell runs in the background inherits an ignored Ctrl-C; what Ctrl-C does is tested
signal.signal(signal.SIGINT, signal.default_int_handler)

VOCABULARY = 260  # <pad>, <s>, </s>, <unk> and 256 bytes
SENTINELS = 40  # more, for encoder-decoders
CHAT_TEMPLATE = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"


def pytest_collection_finish() -> None:
    """Take what was imported out of the garbage collector's hands: converters of engines call it for every layer."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _no_wait_for_the_disk() -> Iterator[None]:
    """Take a descriptor that could be flushed for flushed: no test cuts the power."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", os.fstat)
        yield


@pytest.fixture(autouse=True)
def _cache_of_its_own(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the user's own cache out of the tests."""
    monkeypatch.setenv("KVFOLD_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One thread and an empty cache: a training says the same twice, and nothing that another test kept."""
    import torch

    monkeypatch.setenv("KVFOLD_CACHE", str(tmp_path / "cache"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A file of 120 lines to train on."""
    path = tmp_path / "text.txt"
    path.write_text("".join(f"{n} quick brown foxes jump over {n * n} lazy dogs\n" for n in range(120)))
    return path


@pytest.fixture(scope="session")
def byte_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a byte-level tokenizer of 260 entries: every text encodes, one byte a token."""
    return _save_tokenizer(tmp_path_factory.mktemp("tokenizer"), [])


@pytest.fixture(scope="session")
def span_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with sentinels `<extra_id_0>` to `<extra_id_39>` behind, the first the last id, as in T5's own."""
    return _save_tokenizer(
        tmp_path_factory.mktemp("span-tokenizer"), [f"<extra_id_{number}>" for number in range(SENTINELS)][::-1]
    )


def _save_tokenizer(folder: Path, sentinels: list[str]) -> Path:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", "<unk>", *sorted(pre_tokenizers.ByteLevel.alphabet()), *sentinels]
    tokenizer = Tokenizer(models.BPE(vocab={word: number for number, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(sentinels)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder)
    return folder


def changed(config: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A config.json with other settings, also in the parts (`encoder`, `decoder`) that have settings of that name."""
    made = {**config, **changes}
    for part, said in made.items():
        if isinstance(said, dict) and "vocab_size" in said:
            made[part] = {**said, **{key: value for key, value in changes.items() if key in said}}
    return made


def _build(folder: Path, family: str, seed: int, changes: dict[str, Any]) -> None:
    """Save a random model of `family.tiny()` with these fields changed; biases and norms are random too."""
    import torch
    import transformers

    from kvfold import hf
    from kvfold.families import all_families

    config = changed(all_families()[family].tiny(), changes)
    kept = transformers.AutoConfig.for_model(**config)
    kept.architectures = config["architectures"]
    named = str(config["architectures"][0])
    own = hf.encoder_decoder if kept.is_encoder_decoder else hf.per_layer
    with torch.random.fork_rng(devices=[]):
        model = getattr(own if named.startswith("Kvfold") else transformers, named)(kept)
    _draw(model, seed, 0.1).to(getattr(torch, config["dtype"])).save_pretrained(folder)


def _draw(model: Any, seed: int, spread: float) -> Any:
    """The model with every parameter drawn anew, biases and norms too."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.1 * noise if "norm" in name or ".ln_" in name else spread * noise)
    return model


def _reshape(folder: Path, shard_size: int | None, form: str) -> None:
    """Write the weights again as shards of about `shard_size` bytes, or as `.bin`."""
    import torch
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    stem, suffix = ("model", ".safetensors") if form == "safetensors" else ("pytorch_model", ".bin")
    shards: list[dict[str, Any]] = [{}]
    for name, tensor in sorted(tensors.items()):
        if shard_size and shards[-1] and sum(kept.nbytes for kept in shards[-1].values()) + tensor.nbytes > shard_size:
            shards.append({})
        shards[-1][name] = tensor
    files = [f"{stem}-{n:05d}-of-{len(shards):05d}{suffix}" for n in range(1, len(shards) + 1)]
    for file, shard in zip(files if shard_size else [f"{stem}{suffix}"], shards, strict=True):
        if form == "safetensors":
            save_file(shard, folder / file, metadata={"format": "pt"})
        else:
            torch.save(shard, folder / file)
    if shard_size:
        index = {
            "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())},
            "weight_map": {name: file for file, shard in zip(files, shards, strict=True) for name in shard},
        }
        (folder / f"{stem}{suffix}.index.json").write_text(json.dumps(index))


@pytest.fixture(scope="session")
def layered_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A checkpoint whose layers have these key/value heads, and read those of `sources`, or have the value heads of
    `values`. Made once: not to be changed.

    `layered_checkpoint("qwen2", (4, 2, 1, 2), tie_word_embeddings=True)`. Greedy answers of it never end.
    """
    from kvfold import hf
    from kvfold.families import all_families, family_of

    made: dict[str, Path] = {}

    def make(
        family: str,
        heads: Sequence[int],
        sources: Sequence[int] | None = None,
        values: Sequence[tuple[int, ...] | None] = (None,) * 4,
        **changes: Any,
    ) -> Path:
        key = json.dumps([family, heads, sources, values, changes], sort_keys=True)
        if key not in made:
            config = {**all_families()[family].tiny(), **changes, "eos_token_id": None}
            shape = family_of(config).shape(config)
            sites = {
                site: replace(
                    each,
                    num_key_value_heads=heads[site.layer],
                    value_heads=values[site.layer],
                    source=None if sources is None or sources[site.layer] == site.layer else sources[site.layer],
                )
                for site, each in shape.sites.items()
            }
            model = hf.build(config | family_of(config).fields(shape.with_sites(sites)), seed=0)
            made[key] = tmp_path_factory.mktemp("layered") / "model"
            _draw(model, 0, 0.3).save_pretrained(made[key])
        return made[key]

    return make


@pytest.fixture(scope="session")
def _built(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    made: dict[str, Path] = {}

    def build(family: str, seed: int, shard_size: int | None, form: str, changes: dict[str, Any]) -> Path:
        key = json.dumps([family, seed, shard_size, form, changes], sort_keys=True)
        if key not in made:
            folder = tmp_path_factory.mktemp(family) / "model"
            _build(folder, family, seed, changes)
            if shard_size or form != "safetensors":
                _reshape(folder, shard_size, form)
            made[key] = folder
        return made[key]

    return build


@pytest.fixture
def tiny_checkpoint(
    _built: Callable[..., Path], byte_tokenizer: Path, span_tokenizer: Path, tmp_path: Path
) -> Callable[..., Path]:
    """Make a fresh copy of a tiny random checkpoint, to read or to damage.

    `tiny_checkpoint("llama", num_hidden_layers=2)` is a path below `tmp_path`. Keywords that are not named here
    change fields of `family.tiny()`; the vocabulary is the byte-level tokenizer's unless `tokenizer=False`.
    `shard_size` is in bytes; `form` is "safetensors" or "bin". The tokenizer of an encoder-decoder has sentinels.
    """
    from kvfold.families import all_families

    def make(
        family: str = "llama",
        *,
        name: str = "teacher",
        seed: int = 0,
        shard_size: int | None = None,
        form: str = "safetensors",
        tokenizer: bool = True,
        **changes: Any,
    ) -> Path:
        pairs = all_families()[family].encoder_decoder
        if tokenizer:
            changes.setdefault("vocab_size", VOCABULARY + SENTINELS * pairs)
        folder = tmp_path / name
        shutil.copytree(_built(family, seed, shard_size, form, changes), folder)
        if tokenizer:
            shutil.copytree(span_tokenizer if pairs else byte_tokenizer, folder, dirs_exist_ok=True)
        return folder

    return make
