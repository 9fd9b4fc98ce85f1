"""Ranks: the processes of one command, one for each device, as `--gpus`, torchrun or accelerate start them.

Rank 0 runs the command. It alone reads settings, claims outputs, writes files and shows progress, so that one rank
makes what all share. The others wait in `serve` until rank 0 calls `everywhere(function, ...)`: then all ranks run that
function together, each on its share of the work, with the collectives below. Without ranks there is no process group,
and every function here is what it is for one process.

torch is imported by the functions that need it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from kvfold.errors import SettingError
from kvfold.machine import available
from kvfold.progress import SILENT, Progress

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
R = TypeVar("R")

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
JOINING = timedelta(minutes=5)  # until all ranks are there
WAITING = timedelta(days=7)  # in a collective: rank 0 may read and hash for hours before it needs the others
TRIED = 8  # ranks that a machine without GPUs starts, if it has fewer cores: to try what a cluster runs
PRECEDENCE = timedelta(seconds=1)  # of rank 0, where several ranks report the same error
FAILED = "failed"  # key of the store: the rank that reports the error of all


@dataclass(frozen=True)
class Ranks:
    """This process among the ranks of a command; one rank by default."""

    rank: int = 0
    world: int = 1  # number of ranks
    local_rank: int = 0  # on this machine
    local_world: int = 1

    @property
    def main(self) -> bool:
        """Whether this is rank 0, which writes and reports."""
        return self.rank == 0

    def share(self, count: int) -> range:
        """This rank's part of `count` things in a row. Shares differ by one thing at most."""
        return range(count * self.rank // self.world, count * (self.rank + 1) // self.world)


def of_environment() -> Ranks:
    """The ranks that the variables of torchrun describe; one rank without them.

    Raises SettingError for variables that are incomplete or contradict each other.
    """
    given = {name: value for name in VARIABLES if (value := os.environ.get(name))}
    if not {"RANK", "WORLD_SIZE"} & given.keys() or given.get("WORLD_SIZE") == "1":
        return Ranks()
    remedy = "start with torchrun or --gpus, or unset RANK and WORLD_SIZE"
    if missing := [name for name in VARIABLES if name not in given]:
        named = ", ".join(f"{name}={value}" for name, value in given.items())
        raise SettingError(f"{missing[0]} is not set", where="environment", got=named, next=remedy)
    numbers = [given[name] for name in VARIABLES[:4]]
    rank, world, local_rank, local_world = (int(each) if each.isdecimal() else -1 for each in numbers)
    if not (0 <= rank < world and 0 <= local_rank < local_world <= world):
        named = ", ".join(f"{name}={given[name]}" for name in VARIABLES[:4])
        raise SettingError("the ranks contradict each other", where="environment", got=named, next=remedy)
    return Ranks(rank, world, local_rank, local_world)


def check_local(count: int) -> None:
    """Raise SettingError for more ranks on this machine than GPUs; without GPUs, for more than `TRIED` or its cores."""
    import torch

    gpus = torch.cuda.device_count()
    most = gpus or max(available(), TRIED)
    if count > most:
        what = "GPUs" if gpus else "processors, and no GPU"
        raise SettingError(f"this machine has fewer {what}", where="ranks", got=count, allowed=f"at most {most}")


# --- the process group -----------------------------------------------------------------------------------------------


@dataclass
class _Joined:
    """The process group of this process, if it has joined one."""

    ranks: Ranks = Ranks()
    store: Any = None
    together: bool = False  # whether all ranks run the same function


_joined = _Joined()


def current() -> Ranks:
    """The ranks of the process group that this process has joined; one rank if there is none."""
    return _joined.ranks


@contextmanager
def joined(ranks: Ranks) -> Iterator[None]:
    """A context in which the ranks form a process group.

    Each rank uses the GPU of its local rank. One rank forms no group. After an error the group is left as it is: the
    process must end. Raises SettingError as `check_local` does, and if the ranks cannot connect.
    """
    if ranks.world == 1:
        yield
        return
    import torch
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    check_local(ranks.local_world)
    gpus = torch.cuda.device_count()
    if gpus:
        torch.cuda.set_device(ranks.local_rank)
    try:
        store, _, _ = next(rendezvous("env://", ranks.rank, ranks.world, timeout=JOINING))
        dist.init_process_group(
            _backends(),
            store=PrefixStore("ranks", store),
            rank=ranks.rank,
            world_size=ranks.world,
            timeout=WAITING,
        )
    except (dist.DistError, ValueError, OSError) as error:
        place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise SettingError(
            f"the ranks cannot connect: {str(error).splitlines()[0]}",
            where=place,
            next="is the port in use, or another rank not started?",
        ) from error
    _joined.ranks, _joined.store = ranks, store
    yield
    dist.barrier()  # rank 0 holds the store, and leaves last
    dist.destroy_process_group()
    _joined.ranks, _joined.store = Ranks(), None


def _backends() -> str:
    """gloo for tensors of the CPU, and nccl for those of GPUs."""
    import torch

    return "cpu:gloo,cuda:nccl" if torch.cuda.device_count() else "gloo"


@contextmanager
def single() -> Iterator[None]:
    """A context in which a process without other ranks has a process group of its own, which sharding needs."""
    import torch.distributed as dist
    from torch._C._distributed_c10d import HashStore

    if dist.is_initialized():  # that of several ranks, or of a context around this one
        yield
        return
    dist.init_process_group(_backends(), store=HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def lead(command: Callable[[], None]) -> None:
    """Run a command on rank 0, while the other ranks `serve` it."""
    if not current().main:
        serve()
        return
    try:
        command()
    finally:
        if (
            current().world > 1 and not _joined.together
        ):  # else the others are inside a function, and this error ends it
            broadcast_object(None)


def serve() -> None:
    """Run what rank 0 calls by `everywhere`, until its command has ended."""
    while (call := broadcast_object(None)) is not None:
        function, arguments = call
        _joined.together = True
        function(*arguments, progress=SILENT)
        _joined.together = False


def everywhere(function: Callable[..., T], *arguments: Any, progress: Progress = SILENT) -> T:
    """Run `function(*arguments, progress=progress)` on all ranks, and return its result on this one.

    Rank 0 calls it. The function is one of a module, and the arguments can be pickled; on the other ranks, the progress
    is silent and the result is dropped. Inside such a function, it is an ordinary call.
    """
    if current().world == 1 or _joined.together:
        return function(*arguments, progress=progress)
    broadcast_object((function, arguments))
    _joined.together = True
    result = function(*arguments, progress=progress)
    _joined.together = False
    return result


# --- collectives: every rank calls them, in the same order ------------------------------------------------------------


def barrier() -> None:
    """Wait until every rank is here."""
    if current().world > 1:
        import torch.distributed as dist

        dist.barrier()


def broadcast_object(value: T | None) -> Any:
    """The value of rank 0 on every rank; it can be pickled. The value of another rank is ignored."""
    if current().world == 1:
        return value
    import torch.distributed as dist

    found = [value]
    dist.broadcast_object_list(found, src=0)
    return found[0]


def gather_in_order(value: T) -> list[T]:
    """The values of all ranks in their order, on every rank; they can be pickled."""
    if current().world == 1:
        return [value]
    import torch.distributed as dist

    found: list[Any] = [None] * current().world
    dist.all_gather_object(found, value)
    return found


def any_rank(flag: bool) -> bool:
    """Whether the flag of any rank is set, on every rank."""
    return any(gather_in_order(flag))


def sum_to_main(total: Tensor) -> Tensor:
    """The sum of a contiguous tensor over all ranks, added in their order, on rank 0; others keep their own part."""
    if current().world > 1:
        import torch
        import torch.distributed as dist

        if current().main:
            part = torch.empty_like(total)
            for rank in range(1, current().world):
                dist.recv(part, rank)
                total += part
        else:
            dist.send(total, 0)
    return total


def sum_in_order(total: Tensor) -> Tensor:
    """The sum of a contiguous tensor over all ranks, added in their order and in place: all have the same bits."""
    return spread(sum_to_main(total))


def spread(tensor: Tensor) -> Tensor:
    """Replace a contiguous tensor by that of rank 0."""
    if current().world > 1:
        import torch.distributed as dist

        dist.broadcast(tensor, 0)
    return tensor


def whole(tensor: Any) -> Tensor:
    """The whole of a tensor that may be sharded over ranks, with its gradient, on every rank: all ranks call it."""
    found: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return found


def solved(
    solve: Callable[[Callable[[Tensor], Tensor]], Tensor], apply: Callable[[Tensor], Tensor], like: Tensor
) -> Tensor:
    """`solve(apply)` by rank 0: each call of `apply` runs on all ranks, with its argument, a tensor as `like`.

    Rank 0 alone decides when it ends, and gives the solution to all.
    """
    if current().world == 1:
        return solve(apply)
    if current().main:

        def together(argument: Tensor) -> Tensor:
            broadcast_object(True)
            return apply(spread(argument.contiguous()))

        solution = solve(together)
        broadcast_object(False)
        return spread(solution.contiguous())
    while broadcast_object(None):
        apply(spread(like.new_empty(like.shape)))
    return spread(like.new_empty(like.shape))


def each(
    items: Sequence[T], work: Callable[[T], R], *, progress: Progress = SILENT, amounts: Sequence[float] = ()
) -> list[R]:
    """`work(item)` of all items in their order, on every rank; each item is the work of one rank.

    The results can be pickled. `amounts` are what the progress of an item is.
    """
    ranks, mine = current(), []
    for first in range(0, len(items), ranks.world):
        if first + ranks.rank < len(items):
            mine.append(work(items[first + ranks.rank]))
        if amounts:
            progress.advance(sum(amounts[first : first + ranks.world]))
    found = gather_in_order(mine)
    return [found[number % ranks.world][number // ranks.world] for number in range(len(items))]


# --- errors ----------------------------------------------------------------------------------------------------------


def reports() -> bool:
    """Whether this rank reports the error that ends the command: the first rank that fails, and rank 0 of several."""
    if _joined.store is None:
        return os.environ.get("RANK", "0") == "0" or os.environ.get("WORLD_SIZE", "1") == "1"
    import torch.distributed as dist

    own = str(current().rank)
    try:
        if not current().main:
            with suppress(dist.DistStoreError):  # rank 0 reports nothing
                _joined.store.wait([FAILED], PRECEDENCE)
        return bool(_joined.store.compare_set(FAILED, "", own) == own.encode())
    except dist.DistError:  # rank 0 has ended, and with it the store
        return False


def lost(error: BaseException) -> bool:
    """Whether an error says that another rank has ended."""
    if _joined.store is None:
        return False
    import torch.distributed as dist

    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))
