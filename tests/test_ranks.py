"""The ranks of a command: what variables describe, shares, and one rank without a process group."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from kvfold import ranks
from kvfold.disk.checkpoint import Checkpoint
from kvfold.disk.rehoused import Rehoused
from kvfold.errors import SettingError
from kvfold.progress import SILENT, Progress
from kvfold.ranks import VARIABLES, Ranks
from kvfold.text.tokens import token_file

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "node7",
    "MASTER_PORT": "29500",
}


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_the_variables_of_torchrun_are_read(environment: pytest.MonkeyPatch) -> None:
    for name, value in TORCHRUN.items():
        environment.setenv(name, value)
    assert ranks.of_environment() == Ranks(5, 8, 1, 4)
    assert not ranks.of_environment().main
    environment.setenv("WORLD_SIZE", "1")
    assert ranks.of_environment() == Ranks()


@pytest.mark.parametrize("name", ["MASTER_ADDR", "MASTER_PORT", "SLURM_PROCID"])
def test_other_variables_alone_are_one_rank(environment: pytest.MonkeyPatch, name: str) -> None:
    environment.setenv(name, "1")
    assert ranks.of_environment() == Ranks()


@pytest.mark.parametrize("name", VARIABLES)
def test_a_missing_variable_is_named(environment: pytest.MonkeyPatch, name: str) -> None:
    for other in TORCHRUN.keys() - {name}:
        environment.setenv(other, TORCHRUN[other])
    with pytest.raises(SettingError, match=rf"environment: {name} is not set \(got .*; start with torchrun or --gpus"):
        ranks.of_environment()


@pytest.mark.parametrize("change", [{"RANK": "8"}, {"RANK": "-1"}, {"LOCAL_RANK": "4"}, {"LOCAL_WORLD_SIZE": "9"}])
def test_ranks_that_contradict_each_other_are_refused(environment: pytest.MonkeyPatch, change: dict[str, str]) -> None:
    for name, value in {**TORCHRUN, **change}.items():
        environment.setenv(name, value)
    with pytest.raises(SettingError, match="the ranks contradict each other"):
        ranks.of_environment()


@pytest.mark.parametrize(("count", "world"), [(10, 4), (3, 4), (0, 2), (8, 1)])
def test_shares_are_whole_and_even(count: int, world: int) -> None:
    shares = [Ranks(rank, world).share(count) for rank in range(world)]
    assert [item for share in shares for item in share] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


class _Seen:
    """A progress that keeps what it is told."""

    def __init__(self) -> None:
        self.advanced: list[float] = []

    def start(self, what: str, total: float, unit: str, done: int = 0) -> None: ...

    def advance(self, amount: float, note: str = "") -> None:
        self.advanced.append(amount)

    def stop(self) -> None: ...

    def say(self, line: str) -> None: ...


def test_one_rank_has_no_process_group() -> None:
    def add(first: int, second: int, *, progress: Progress = SILENT) -> int:
        progress.advance(1)
        return first + second

    seen = _Seen()
    with ranks.joined(Ranks()):
        assert not torch.distributed.is_initialized()
        assert ranks.everywhere(add, 1, 2, progress=seen) == 3
        assert ranks.each(["a", "bc"], len, progress=seen, amounts=[5, 6]) == [1, 2]
    assert seen.advanced == [1, 5, 6]
    total = torch.ones(2)
    assert ranks.sum_in_order(total) is total
    assert ranks.gather_in_order("x") == ["x"]
    assert ranks.broadcast_object("x") == "x"
    assert not ranks.any_rank(False)
    ranks.barrier()


def test_an_error_of_the_command_is_raised() -> None:
    def fail() -> None:
        raise SettingError("wrong", where=Path("x"))

    with pytest.raises(SettingError, match="x: wrong"):
        ranks.lead(fail)


def test_what_other_ranks_are_given_is_read_from_the_same_files(
    tiny_checkpoint: Callable[..., Path], text: Path
) -> None:
    source = Checkpoint.open(tiny_checkpoint("gpt_neox"))
    view = Rehoused(source)
    tokens = token_file(text, source.path, max_tokens=100)
    for_others = pickle.dumps((source, view, tokens))
    assert len(for_others) < 2000
    other, other_view, other_tokens = pickle.loads(for_others)
    assert other.hash() == source.hash()
    assert other_view.names() == view.names()
    assert torch.equal(other_view.read(view.names()[1]), view.read(view.names()[1]))
    assert other_tokens.tokens.tolist() == tokens.tokens.tolist()
    assert (other_tokens.hash, len(other_tokens)) == (tokens.hash, 100)
