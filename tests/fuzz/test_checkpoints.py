"""Nonsense in a checkpoint's files is one clear line, and what is accepted can be built, converted and loaded."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import mutations
from kvfold.disk.checkpoint import Checkpoint
from kvfold.disk.lineage import steps_since_root
from kvfold.disk.manifest import rooted
from kvfold.errors import KvfoldError
from kvfold.families import all_families, family_of
from kvfold.predict.plan import plan, read_source

SEED = 5
SECONDS = 20  # after which a call is taken to hang


@pytest.fixture(autouse=True)
def _no_hang() -> Iterator[None]:
    """Whatever hangs raises TimeoutError, with its place."""

    def hang(*_: object) -> None:
        raise TimeoutError(f"no answer in {SECONDS} s")

    before = signal.signal(signal.SIGALRM, hang)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def accepted(where: str, call: Callable[[], object]) -> bool:
    """Was nothing refused? What is refused is one printable line; any other error is a failure that says where."""
    signal.alarm(SECONDS)
    try:
        call()
    except KvfoldError as error:
        line = str(error)
        assert line.isprintable(), (where, line)
        assert len(line) < 3000, (where, line)
        return False
    except Exception as error:
        error.add_note(f"for {where}")
        raise
    return True


def built(config: dict[str, Any]) -> int:
    """Parameters of the model that transformers makes of a config, without memory for them and without constants."""
    import torch

    from kvfold import hf

    with torch.device("meta"):
        model = hf.build(config, seed=0, attention="kvfold")
    constants = [each for each in model.modules() if hasattr(each, "create_weight")]  # positions that no one trains
    return sum(each.numel() for each in model.parameters()) - sum(each.weight.numel() for each in constants)


def try_configs(folder: Path, seed: int, count: int) -> list[tuple[str, dict[str, Any]]]:
    """Plan for damaged configs, and return those that are accepted."""
    kept = []
    for where, config in mutations.configs(seed, count):
        (folder / "config.json").write_text(json.dumps(config))
        if accepted(where, lambda: plan(folder, "identity")):
            kept.append((where, json.loads((folder / "config.json").read_text())))
    assert 0 < len(kept) < count
    return kept


# --- config.json ----------------------------------------------------------------------------------------------------


def test_a_damaged_config_is_refused_or_builds(tmp_path: Path) -> None:
    for where, config in try_configs(tmp_path, SEED, 250)[::8]:
        assert built(config) == family_of(config).shape(config).parameters, where


@pytest.mark.slow
def test_many_damaged_configs_are_refused_or_build(tmp_path: Path) -> None:
    for where, config in try_configs(tmp_path, SEED + 1, 700)[::4]:
        assert built(config) == family_of(config).shape(config).parameters, where


@pytest.mark.parametrize("name", sorted(mutations.bases()))
def test_every_base_is_accepted(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(mutations.bases()[name]))
    assert accepted(name, lambda: plan(tmp_path, "identity"))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A model of a base, saved once."""
    from kvfold import hf

    made: dict[str, Path] = {}

    def save(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp("base") / "model"
            model: Any = hf.build(mutations.bases()[name], seed=0)
            model.save_pretrained(made[name])
            (made[name] / "config.json").write_text(json.dumps(mutations.bases()[name]))
        return made[name]

    return save


@pytest.mark.slow
def test_what_is_accepted_is_converted_and_loaded(saved: Callable[[str], Path], tmp_path: Path) -> None:
    from kvfold import hf
    from kvfold.convert.conversion import convert

    done = 0
    for where, config in mutations.configs(SEED + 2, 400):
        source = tmp_path / "source"
        shutil.rmtree(source, ignore_errors=True)
        shutil.copytree(saved(where.partition(":")[0]), source)
        (source / "config.json").write_text(json.dumps(config))
        if done < 25 and accepted(where, lambda source=source: Checkpoint.open(source)):  # type: ignore[misc]
            done += 1
            method = "identity" if done % 3 else "gqa"
            settings = {} if done % 3 else {"kv_heads": 1}
            student = tmp_path / f"student-{done}"
            if accepted(where, lambda: convert(source, student, method, settings)):  # noqa: B023
                loaded = accepted(where, lambda: hf.load(student))  # noqa: B023
                # how wide an MLP is, the headers do not tell: transformers refuses it as it does in the source
                assert loaded or "intermediate_size" in where, f"{where} is converted and cannot be loaded"
            else:
                assert method == "gqa", where
                assert not student.exists()
    assert done == 25


# --- weights --------------------------------------------------------------------------------------------------------


def read_all(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    for name in checkpoint.names():
        checkpoint.read(name).sum()


def weights(folder: Path) -> tuple[dict[str, Any], bytes]:
    """The header of a model's file, and the data."""
    content = (folder / "model.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def test_a_damaged_header_is_refused_or_read(saved: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(saved("llama"), folder)
    header, data = weights(folder)
    for where, changed in mutations.headers(header, SEED, 200):
        (folder / "model.safetensors").write_bytes(mutations.safetensors(changed, data))
        if accepted(where, lambda: read_all(folder)):
            assert changed == header, where


def test_a_damaged_index_is_refused_or_read(saved: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(saved("llama"), folder)
    names = [name for name in weights(folder)[0] if name != "__metadata__"]
    (folder / "model.safetensors").rename(folder / "shard.safetensors")
    index = folder / "model.safetensors.index.json"
    content = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, "shard.safetensors")}
    more = ("../x", "/etc/passwd", "x\0y", "y" * 300, ".", "..", "loop.safetensors")
    (folder / "loop.safetensors").symlink_to(folder / "loop.safetensors")
    for where, changed in mutations.damaged(content, SEED, 150, more):
        index.write_text(json.dumps(changed))
        if accepted(where, lambda: read_all(folder)):
            assert changed["weight_map"] == content["weight_map"], where
    for text in mutations.TEXTS:
        index.write_bytes(text)
        assert not accepted(f"index {text[:20]!r}", lambda: read_all(folder))


# --- kvfold.json, generation_config.json, tokenizer -----------------------------------------------------------------


def read_lineage(folder: Path) -> None:
    """Read a lineage as plan, training and reports do."""
    from kvfold.report.folder import Folded, commands, findings
    from kvfold.train.stages import method_of, method_stages

    config, lineage = read_source(folder)
    rooted(family_of(config).shape(config), lineage)
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.known_length > 0
    steps_since_root(checkpoint)
    checkpoint.root_hash()
    method_of(checkpoint)
    method_stages(checkpoint)
    if lineage is not None:
        findings(lineage)
        commands(Folded(folder, "model", lineage), {})


@pytest.mark.slow
def test_a_damaged_lineage_is_refused_or_read(saved: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(saved("llama"), folder)
    path = folder / "kvfold.json"
    path.write_text(json.dumps(mutations.lineage()))
    assert accepted("whole", lambda: read_lineage(folder))
    for where, changed in mutations.damaged(mutations.lineage(), SEED, 300):
        path.write_text(json.dumps(changed))
        accepted(where, lambda: read_lineage(folder))
    for text in mutations.TEXTS:
        path.write_bytes(text)
        assert not accepted(f"lineage {text[:20]!r}", lambda: read_lineage(folder))


GENERATION: dict[str, Any] = {
    **{"eos_token_id": [1, 2], "pad_token_id": 0, "temperature": 0.5, "max_length": 20, "do_sample": True, "top_k": 5},
    **{"top_p": 0.5, "num_beams": 1, "early_stopping": False, "cache_implementation": None, "compile_config": None},
    **{"watermarking_config": None, "suppress_tokens": [1], "_from_model_config": True, "to_dict": 1},
}


@pytest.mark.slow
def test_damaged_generation_settings_are_refused_or_load(saved: Callable[[str], Path], tmp_path: Path) -> None:
    from kvfold import hf

    folder = tmp_path / "model"
    shutil.copytree(saved("llama"), folder)
    path = folder / "generation_config.json"
    whole = {key: value for key, value in GENERATION.items() if key != "to_dict"}
    path.write_text(json.dumps(whole))
    assert accepted("whole", lambda: hf.load(folder))
    for number, (where, changed) in enumerate(mutations.damaged(whole | {"to_dict": 1}, SEED, 200)):
        if where.startswith("to_dict"):
            changed = whole | {key: value for key, value in changed.items() if key == "to_dict"}
        else:
            del changed["to_dict"]
        path.write_text(json.dumps(changed))
        if accepted(where, lambda: Checkpoint.open(folder)) and number % 6 == 0:
            assert accepted(where, lambda: hf.load(folder)), where
    for text in mutations.TEXTS[:-1]:
        path.write_bytes(text)
        accepted(f"generation {text[:20]!r}", lambda: Checkpoint.open(folder))


def _tokenizers(folder: Path) -> Iterator[tuple[str, str, Any]]:
    """Damaged files of a tokenizer: what, which, and its content."""
    fast = json.loads((folder / "tokenizer.json").read_text())
    fast["model"]["merges"], fast["model"]["vocab"]["ab"] = [["a", "b"]], 260
    for key in ("merges", "vocab", "type", "unk_token", "dropout"):
        for value in (*mutations.NASTY, [["a", "zz"]], ["a b c"], [["a"]], {"a": -1}, {"a": 2**40}, {"a": 0, "b": 0}):
            yield f"{key} {value!r:.40}", "tokenizer.json", {**fast, "model": {**fast["model"], key: value}}
    for regex in ("(", "[", "*", "(?<=a+)b", "a{999999}", "(a*)*$", "\\"):
        split = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
        yield f"regex {regex}", "tokenizer.json", {**fast, "pre_tokenizer": split}
    for where, made in mutations.damaged(fast["added_tokens"], SEED, 40, (2**31, 2**63)):
        yield f"added_tokens.{where}", "tokenizer.json", {**fast, "added_tokens": made}
    yield from ((where, "tokenizer.json", {**fast, **made}) for where, made in _top(fast))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    more = {"added_tokens_decoder": {"7": {"content": "q"}}, "chat_template": "{{ x", "model_max_length": 5}
    yield from ((w, "tokenizer_config.json", made) for w, made in mutations.damaged(settings | more, SEED, 250))
    special = {"bos_token": "<s>", "additional_special_tokens": ["<q>"]}
    yield from ((w, "special_tokens_map.json", made) for w, made in mutations.damaged(special, SEED, 60))


def _top(fast: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for key in fast:
        for value in (*mutations.NASTY, {"type": "Nope"}):
            yield f"{key} {value!r:.40}", {key: value}


def try_tokenizers(byte_tokenizer: Path, folder: Path, step: int) -> None:
    """Load damaged tokenizers, every `step`-th, and use those that load."""
    from kvfold import hf

    shutil.copytree(byte_tokenizer, folder)
    (folder / "config.json").write_text(json.dumps({**all_families()["llama"].tiny(), "vocab_size": 260}))
    for where, file, content in list(_tokenizers(folder))[::step]:
        before = (folder / file).read_bytes() if (folder / file).exists() else None
        (folder / file).write_text(json.dumps(content))
        if accepted(f"{file}: {where}", lambda: hf.load_tokenizer(folder)):
            tokenizer = hf.load_tokenizer(folder)
            ids = tokenizer.encode("Hello <s> world €")
            assert isinstance(tokenizer.decode(ids), str), where
        (folder / file).unlink() if before is None else (folder / file).write_bytes(before)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        before = (folder / file).read_bytes()
        for text in mutations.TEXTS[::step] if step < 10 else mutations.TEXTS[:3]:
            (folder / file).write_bytes(text)
            accepted(f"{file}: {text[:20]!r}", lambda: hf.load_tokenizer(folder))
        (folder / file).write_bytes(before)


def test_a_damaged_tokenizer_is_refused_or_used(byte_tokenizer: Path, tmp_path: Path) -> None:
    try_tokenizers(byte_tokenizer, tmp_path / "model", 20)


@pytest.mark.slow
def test_many_damaged_tokenizers_are_refused_or_used(byte_tokenizer: Path, tmp_path: Path) -> None:
    try_tokenizers(byte_tokenizer, tmp_path / "model", 3)
