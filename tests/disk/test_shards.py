"""Tensors on disk: the writer against safetensors' own loader, and files that are not what they say."""

from __future__ import annotations

import io
import json
import os
import pickle
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from kvfold.disk.headers import TensorSpec
from kvfold.disk.shards import CHUNK, JOURNAL, Writer, digest, stored_tensors
from kvfold.errors import CheckpointError

DTYPES = ("float32", "bfloat16", "float16", "float64", "int64", "uint8", "bool")
SPECS = st.builds(TensorSpec, st.lists(st.integers(0, 5), max_size=3).map(tuple), st.sampled_from(DTYPES))


def random_tensor(spec: TensorSpec, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2 if spec.dtype == "bool" else 100, spec.shape, generator=generator).to(
        getattr(torch, spec.dtype)
    )


@given(
    specs=st.dictionaries(st.text("abc.é0", min_size=1, max_size=6), SPECS, max_size=6),
    shard_bytes=st.integers(1, 500),
    order=st.randoms(use_true_random=False),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_writer_round_trips_through_safetensors(
    specs: dict[str, TensorSpec], shard_bytes: int, order: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("w")
    tensors = {name: random_tensor(spec, seed) for seed, (name, spec) in enumerate(specs.items())}
    names = list(specs)
    order.shuffle(names)
    with Writer(folder, specs, shard_bytes=shard_bytes) as writer:
        for name in names:
            assert writer.write(name, tensors[name]) == digest(tensors[name])
        hashed = writer.close()

    files = sorted(folder.glob("*.safetensors"))
    loaded = {name: tensor for file in files for name, tensor in load_file(file).items()}
    stored = stored_tensors(folder)
    assert loaded.keys() == stored.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)
        assert stored[name].spec == specs[name]
        assert torch.equal(stored[name].read(), tensor)
    assert not (folder / JOURNAL).exists()
    if len(files) > 1:
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
        assert all(name in load_file(folder / file) for name, file in index["weight_map"].items())
    else:
        assert [file.name for file in files] == ["model.safetensors"]

    whole = tmp_path_factory.mktemp("whole")
    with Writer(whole, dict(reversed(specs.items()))) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
        assert writer.close() == hashed


def test_writer_splits_at_the_size_that_was_set(tmp_path: Path) -> None:
    specs = {f"t{number}": TensorSpec((10,), "float32") for number in range(5)}
    with Writer(tmp_path, specs, shard_bytes=80) as writer:
        for name in specs:
            writer.write(name, torch.zeros(10))
        writer.close()
    assert [sorted(load_file(file)) for file in sorted(tmp_path.glob("*.safetensors"))] == [
        ["t0", "t1"],
        ["t2", "t3"],
        ["t4"],
    ]


def test_writer_casts_to_the_declared_dtype_in_many_chunks(tmp_path: Path) -> None:
    tensor = torch.randn(3, CHUNK // 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64).t()
    with Writer(tmp_path, {"w": TensorSpec(tuple(tensor.shape), "bfloat16")}) as writer:
        writer.write("w", tensor)
        writer.close()
    assert torch.equal(load_file(tmp_path / "model.safetensors")["w"], tensor.bfloat16())


def test_writer_takes_tensors_from_many_threads(tmp_path: Path) -> None:
    tensors = {f"t{number}": torch.full((1000,), float(number)) for number in range(64)}
    specs = {name: TensorSpec((1000,), "float32") for name in tensors}
    with Writer(tmp_path, specs, shard_bytes=30_000) as writer:
        threads = [threading.Thread(target=writer.write, args=item) for item in tensors.items()]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        writer.close()
    stored = stored_tensors(tmp_path)
    assert all(torch.equal(stored[name].read(), tensor) for name, tensor in tensors.items())


def test_writer_refuses_what_was_not_declared(tmp_path: Path) -> None:
    with Writer(tmp_path, {"a": TensorSpec((2,), "float32"), "b": TensorSpec((2,), "float32")}) as writer:
        with pytest.raises(ValueError, match=r"a has shape \(3,\), declared \(2,\)"):
            writer.write("a", torch.zeros(3))
        with pytest.raises(ValueError, match="c is not declared"):
            writer.write("c", torch.zeros(2))
        writer.write("a", torch.zeros(2))
        with pytest.raises(ValueError, match="a is written twice"):
            writer.write("a", torch.zeros(2))
        with pytest.raises(ValueError, match="1 tensors were never written, the first is b"):
            writer.close()


def test_resuming_keeps_whole_shards_and_nothing_else(tmp_path: Path) -> None:
    specs = {name: TensorSpec((10,), "float32") for name in "abcdef"}
    tensors = {name: torch.full((10,), float(number)) for number, name in enumerate(specs)}
    with Writer(tmp_path, specs, shard_bytes=80) as writer:  # shards ab, cd, ef
        for name in "abc":
            writer.write(name, tensors[name])
    first = tmp_path / "model-00001-of-00003.safetensors"
    before = first.stat().st_mtime_ns
    with Writer(tmp_path, specs, shard_bytes=80, resume=True) as writer:
        assert sorted(writer.digests) == ["a", "b"]
        with pytest.raises(ValueError, match="twice"):
            writer.write("a", tensors["a"])
        for name in "cdef":
            writer.write(name, tensors[name])
        writer.close()
    assert first.stat().st_mtime_ns == before
    assert all(torch.equal(stored.read(), tensors[name]) for name, stored in stored_tensors(tmp_path).items())


@pytest.mark.parametrize("damage", ["short", "gone", "unjournaled"])
def test_resuming_does_not_trust_a_shard_that_is_not_whole(tmp_path: Path, damage: str) -> None:
    specs = {name: TensorSpec((10,), "float32") for name in "ab"}
    with Writer(tmp_path, specs, shard_bytes=40) as writer:
        writer.write("a", torch.ones(10))
    first = tmp_path / "model-00001-of-00002.safetensors"
    if damage == "short":
        os.truncate(first, first.stat().st_size - 1)
    elif damage == "gone":
        first.unlink()
    else:
        (tmp_path / JOURNAL).unlink()
    with Writer(tmp_path, specs, shard_bytes=40, resume=True) as writer:
        assert writer.digests == {}


@pytest.mark.parametrize("shard_bytes", [10**6, 80])
def test_a_tensor_that_was_written_is_replaced_in_its_place(tmp_path: Path, shard_bytes: int) -> None:
    specs = {name: TensorSpec((10,), "bfloat16" if name == "c" else "float32") for name in "abcdef"}
    tensors = {name: torch.full((10,), float(number)) for number, name in enumerate(specs)}
    new = {name: torch.randn(10, generator=torch.Generator().manual_seed(0)) for name in "bc"}
    whole = tensors | new
    with Writer(tmp_path, specs, shard_bytes=shard_bytes) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
        sizes = {path.name: path.stat().st_size for path in tmp_path.glob("*.safetensors")}
        for name, tensor in new.items():
            writer.replace(name, tensor)
            assert writer.digests[name] == digest(tensor.to(getattr(torch, specs[name].dtype)))
        hashed = writer.close()
    assert {path.name: path.stat().st_size for path in tmp_path.glob("*.safetensors")} == sizes
    stored = stored_tensors(tmp_path)
    for name, tensor in whole.items():
        assert torch.equal(stored[name].read(), tensor.to(getattr(torch, specs[name].dtype)))
    again = tmp_path / "again"
    again.mkdir()
    with Writer(again, specs) as writer:
        for name, tensor in whole.items():
            writer.write(name, tensor)
        assert writer.close() == hashed


def test_only_what_was_written_is_replaced(tmp_path: Path) -> None:
    with Writer(tmp_path, {"a": TensorSpec((2,), "float32"), "b": TensorSpec((2,), "float32")}) as writer:
        writer.write("a", torch.zeros(2))
        with pytest.raises(ValueError, match=r"b of shape \(2,\) is not one that was written"):
            writer.replace("b", torch.zeros(2))
        with pytest.raises(ValueError, match=r"a of shape \(3,\) is not one that was written"):
            writer.replace("a", torch.zeros(3))
        with pytest.raises(ValueError, match="1 tensors were never written, the first is b"):
            writer.index()


@pytest.mark.parametrize("shard_bytes", [10**6, 80])
def test_an_indexed_folder_can_be_read_before_it_is_closed_and_continued(tmp_path: Path, shard_bytes: int) -> None:
    specs = {name: TensorSpec((10,), "float32") for name in "abcd"}
    with Writer(tmp_path, specs, shard_bytes=shard_bytes) as writer:
        for name in specs:
            writer.write(name, torch.ones(10))
        writer.index()
        assert stored_tensors(tmp_path).keys() == specs.keys()
        assert (tmp_path / JOURNAL).exists()
    with Writer(tmp_path, specs, shard_bytes=shard_bytes, resume=True) as writer:
        assert writer.digests.keys() == specs.keys()
        writer.replace("d", torch.zeros(10))
        writer.close()
    assert stored_tensors(tmp_path)["d"].read().sum() == 0
    assert not (tmp_path / JOURNAL).exists()


# --- files that are not what they say -------------------------------------------------------------------------------


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.arange(100.0), "b": torch.ones(3, 4, dtype=torch.bfloat16)}, file)
    return file


def refusal(folder: Path) -> str:
    """The one line with which a folder's weights are refused."""
    with pytest.raises(CheckpointError) as caught:
        stored_tensors(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("kept", [0, 5, 8, 60, -1])
def test_truncated_file(shard: Path, kept: int) -> None:
    size = shard.stat().st_size
    os.truncate(shard, kept % size)
    line = refusal(shard.parent)
    assert str(shard) in line
    assert "is truncated" in line
    assert f"(got {kept % size:,} bytes)" in line
    assert "download it again" in line


def test_file_that_is_too_long(shard: Path) -> None:
    with shard.open("ab") as opened:
        opened.write(b"x")
    assert "is longer than its header says" in refusal(shard.parent)


@pytest.mark.parametrize(
    ("header", "said"),
    [
        (b"{not json", "its safetensors header: is not JSON"),
        (b'["a list"]', "header cannot be read"),
        (b'{"a": {"dtype": "F7", "shape": [1], "data_offsets": [0, 4]}}', "a.dtype: String should match pattern"),
        (b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}', "a 4 bytes, its shape needs 8"),
        (
            b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}',
            "a.data_offsets.0: Input should be greater than or equal to 0 (got -4)",
        ),
        (
            b'{"a": {"dtype": "F32", "shape": [-1, -1], "data_offsets": [0, 4]}}',
            "a.shape.0: Input should be greater than or equal to 0 (got -1)",
        ),
        (
            b'{"a": {"dtype": "F32", "shape": ["1"], "data_offsets": [0, 4]}}',
            "a.shape.0: Input should be a valid integer",
        ),
    ],
)
def test_damaged_header(tmp_path: Path, header: bytes, said: str) -> None:
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    assert said in refusal(tmp_path)


def test_git_lfs_pointer(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert "is a git-lfs pointer, not weights; run `git lfs pull`" in refusal(tmp_path)


def test_header_that_is_not_padded_is_read_all_the_same(tmp_path: Path) -> None:
    header = b'{"a":{"dtype":"F32","shape":[3],"data_offsets":[0,12]}}'
    assert len(header) % 4
    data = torch.tensor([1.0, 2.0, 3.0])
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + data.numpy().tobytes())
    assert torch.equal(stored_tensors(tmp_path)["a"].read(), data)


def test_no_weights(tmp_path: Path) -> None:
    assert "no weights" in refusal(tmp_path)
    save_file({"a": torch.ones(1)}, tmp_path / "model-00001-of-00002.safetensors")
    line = refusal(tmp_path)
    assert "got model-00001-of-00002.safetensors" in line
    assert "model.safetensors.index.json" in line


# --- indices --------------------------------------------------------------------------------------------------------


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    folder = tmp_path / "sharded"
    folder.mkdir()
    for name in "ab":
        save_file({name: torch.ones(4)}, folder / f"{name}.safetensors")
    write_index(folder, {"a": "a.safetensors", "b": "b.safetensors"})
    return folder


def write_index(folder: Path, weight_map: object) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_missing_shard(sharded: Path) -> None:
    (sharded / "b.safetensors").unlink()
    assert refusal(sharded) == f"{sharded}: shard b.safetensors is missing; download it again"


def test_renamed_shard(sharded: Path) -> None:
    (sharded / "b.safetensors").rename(sharded / "c.safetensors")
    assert refusal(sharded) == f"{sharded}: shard b.safetensors is missing; is it c.safetensors, renamed?"


def test_shards_that_changed_places(sharded: Path) -> None:
    os.replace(sharded / "b.safetensors", sharded / "a.safetensors")
    save_file({"a": torch.ones(4)}, sharded / "b.safetensors")
    line = refusal(sharded)
    assert "a.safetensors: tensor a of model.safetensors.index.json is not in it" in line
    assert "renamed" in line


@pytest.mark.parametrize("name", ["../outside.safetensors", "{tmp}/outside.safetensors", "link.safetensors"])
def test_index_that_points_outside(sharded: Path, name: str) -> None:
    outside = sharded.parent / "outside.safetensors"
    save_file({"b": torch.ones(4)}, outside)
    (sharded / "link.safetensors").symlink_to(outside)
    write_index(sharded, {"a": "a.safetensors", "b": name.format(tmp=sharded.parent)})
    line = refusal(sharded)
    assert "the index names a file outside the checkpoint's directory" in line
    assert name.format(tmp=sharded.parent) in line


def test_links_of_the_hubs_cache_are_followed(sharded: Path) -> None:
    snapshot, blobs = sharded.parent / "models--x" / "snapshots" / "0f", sharded.parent / "models--x" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(sharded.iterdir())):
        os.replace(file, blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    assert sorted(stored_tensors(snapshot)) == ["a", "b"]


@pytest.mark.parametrize("weight_map", [None, [], {"a": 1}])
def test_index_that_is_none(sharded: Path, weight_map: object) -> None:
    write_index(sharded, weight_map)
    assert "is not an index" in refusal(sharded)


# --- .bin -----------------------------------------------------------------------------------------------------------


def test_bin_is_read_lazily_and_transposed_tensors_in_order(tmp_path: Path) -> None:
    tensor = torch.arange(6.0).view(2, 3)
    torch.save({"a": tensor, "t": tensor.t()}, tmp_path / "pytorch_model.bin")
    stored = stored_tensors(tmp_path)
    assert stored["t"].spec == TensorSpec((3, 2), "float32")
    assert torch.equal(stored["t"].read(), tensor.t())
    assert stored["t"].read().is_contiguous()


def test_bin_that_would_run_code_is_refused_and_does_not_run(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"a": torch.ones(1), "b": Bomb()}, tmp_path / "pytorch_model.bin")
    line = refusal(tmp_path)
    assert "cannot be loaded as tensors alone" in line
    assert "safetensors" in line
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", ["", "not a pickle", pickle.dumps([1]).decode("latin1")])
def test_bin_that_is_damaged(tmp_path: Path, content: str) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(content.encode("latin1"))
    assert "cannot be loaded as tensors alone" in refusal(tmp_path)


def test_bin_that_is_truncated(tmp_path: Path) -> None:
    written = io.BytesIO()
    torch.save({"a": torch.ones(1000)}, written)
    (tmp_path / "pytorch_model.bin").write_bytes(written.getvalue()[:-500])
    assert "cannot be loaded as tensors alone" in refusal(tmp_path)


def test_bin_that_holds_something_else(tmp_path: Path) -> None:
    torch.save({"epoch": 3}, tmp_path / "pytorch_model.bin")
    assert "is not a mapping of names to tensors" in refusal(tmp_path)


def test_safetensors_are_preferred(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    assert stored_tensors(tmp_path)["a"].read().item() == 1
