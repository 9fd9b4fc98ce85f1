"""What the machine is: its precision under limits of instruction sets, its cores; and a run keeps its precision."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kvfold import machine
from kvfold.convert.conversion import convert
from kvfold.disk.output import fingerprint, read_json, standing
from kvfold.errors import OutputError
from kvfold.progress import Silent
from kvfold.train.pretrain import PretrainSettings, pretrain
from kvfold.train.settings import decide
from kvfold.train.uptrain import UptrainSettings, uptrain

SMALL: dict[str, Any] = {"sequence_length": 16, "batch_size": 2, "tokens": 64, "log_every": 1, "loss": "ce"}


class Heard(Silent):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


class Unplugged(Silent):
    """Break off in the second step, when the state of the first is saved."""

    steps = 0

    def advance(self, amount: float, note: str = "") -> None:
        self.steps += note.startswith("loss")
        if self.steps == 2:
            raise RuntimeError("pulled the plug")


@pytest.fixture
def student(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    return convert(tiny_checkpoint("llama"), tmp_path / "student", "gqa", {"kv_heads": 1})


@pytest.fixture
def native(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Say whether this machine multiplies bf16."""

    def choose(yes: bool) -> None:
        monkeypatch.setattr(machine, "multiplies_bf16", lambda: yes)

    return choose


def _precision(out: Path) -> str:
    return str(json.loads((out / "kvfold.json").read_text())["steps"][-1]["settings"]["precision"])


# --- what auto is ---------------------------------------------------------------------------


@pytest.fixture
def x86(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A processor without a GPU: its instructions, PyTorch's own limit, and what oneDNN says and is limited to."""

    def choose(instructions: str, *, aten: str = "AVX512", onednn: str | None = None, can: bool = True) -> None:
        for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
            monkeypatch.delenv(name, raising=False)
        if onednn is not None:
            monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", onednn)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(machine.platform, "machine", lambda: "x86_64")
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: aten)
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: can, raising=False)
        monkeypatch.setattr(machine, "_instructions", lambda: frozenset(instructions.split()))

    return choose


ZEN4, SAPPHIRE = "avx2 avx512_f avx512_vnni avx512_bf16", "avx2 avx512_f avx512_vnni avx512_bf16 amx_bf16 amx_tile"


@pytest.mark.parametrize(
    ("instructions", "limits", "expected"),
    [
        (ZEN4, {}, "bf16"),
        (SAPPHIRE, {}, "bf16"),
        (SAPPHIRE, {"onednn": "AVX512_CORE_AMX"}, "bf16"),
        (SAPPHIRE, {"onednn": "default"}, "bf16"),
        (ZEN4, {"onednn": "avx512_core_bf16"}, "bf16"),
        (ZEN4, {"onednn": "AVX512_CORE_VNNI"}, "fp32"),
        (ZEN4, {"onednn": "AVX512_CORE"}, "fp32"),
        (ZEN4, {"onednn": "AVX2", "can": False}, "fp32"),
        (SAPPHIRE, {"aten": "AVX2"}, "fp32"),
        (SAPPHIRE, {"aten": "DEFAULT"}, "fp32"),
        ("avx2 avx512_f avx512_vnni", {}, "fp32"),
        ("avx2 avx_ne_convert avx_vnni", {"aten": "AVX2"}, "fp32"),  # converts bf16, and multiplies fp32
        ("avx2", {"aten": "AVX2", "can": False}, "fp32"),
    ],
)
def test_auto_is_what_the_processor_multiplies_natively(
    x86: Callable[..., None], instructions: str, limits: dict[str, Any], expected: str
) -> None:
    x86(instructions, **limits)
    assert machine.best_precision() == expected


@pytest.mark.parametrize(("can", "expected"), [(True, "bf16"), (False, "fp32")])
def test_auto_on_arm_asks_onednn(
    x86: Callable[..., None], monkeypatch: pytest.MonkeyPatch, can: bool, expected: str
) -> None:
    x86("", aten="DEFAULT", can=can)
    monkeypatch.setattr(machine.platform, "machine", lambda: "aarch64")
    assert machine.best_precision() == expected
    assert machine.multiplies_int8()


@pytest.mark.parametrize(("major", "expected"), [(7, "fp32"), (8, "bf16"), (9, "bf16")])
def test_auto_on_a_gpu(monkeypatch: pytest.MonkeyPatch, major: int, expected: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: major >= 8)
    assert machine.best_device() == "cuda"
    assert machine.best_precision() == expected


@pytest.mark.parametrize(
    ("instructions", "limit", "expected"),
    [
        (ZEN4, None, True),
        (ZEN4, "AVX512_CORE_VNNI", True),
        (ZEN4, "AVX512_CORE", False),
        (ZEN4, "AVX2", False),
        ("avx2 avx_vnni", None, True),
        ("avx2 avx_vnni", "AVX2_VNNI", True),
        ("avx2 avx_vnni", "AVX2", False),
        ("avx2", None, False),
    ],
)
def test_int8_needs_vnni(x86: Callable[..., None], instructions: str, limit: str | None, expected: bool) -> None:
    x86(instructions, onednn=limit)
    assert machine.multiplies_int8() is expected


@pytest.mark.slow
def test_a_limit_of_the_environment_is_seen_by_a_fresh_process() -> None:
    for name in ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA"):
        code = "from kvfold import machine; print(machine.best_precision())"
        ended = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, name: "avx2", "CUDA_VISIBLE_DEVICES": ""},
            capture_output=True,
            text=True,
            check=True,
        )
        assert ended.stdout.strip() == "fp32" or machine.platform.machine() != "x86_64", name


# --- a run keeps its precision ---------------------------------------------------------------------------


@pytest.mark.slow
def test_auto_and_what_it_stands_for_are_one_run(
    student: Path, text: Path, tmp_path: Path, native: Callable[[bool], None]
) -> None:
    native(False)
    heard, auto = Heard(), UptrainSettings(data=str(text), **SMALL)
    out = uptrain(student, tmp_path / "out", auto, progress=heard)
    assert any(line.startswith("training in fp32 on ") for line in heard.lines)
    assert _precision(out) == "fp32"
    named = UptrainSettings(data=str(text), **SMALL, precision="fp32")
    uptrain(student, out, named, progress=heard)
    assert heard.lines[-1].endswith("it was trained from this student with these settings")
    with pytest.raises(OutputError, match="from other inputs or settings"):
        uptrain(student, out, UptrainSettings(data=str(text), **SMALL, precision="bf16"))
    native(True)  # the output of another kind of machine is the very output that was asked for
    uptrain(student, out, auto, progress=heard)
    assert heard.lines[-1].endswith("it was trained from this student with these settings")
    uptrain(student, out, auto, progress=heard, overwrite=True)
    assert _precision(out) == "bf16"


@pytest.mark.slow
@pytest.mark.parametrize("begun", [True, False])
def test_a_run_goes_on_in_its_own_precision_on_another_kind_of_machine(
    student: Path, text: Path, tmp_path: Path, native: Callable[[bool], None], begun: bool
) -> None:
    native(begun)
    settings = UptrainSettings(data=str(text), **SMALL, checkpoint_steps=1)
    whole = uptrain(student, tmp_path / "whole", settings)
    with pytest.raises(RuntimeError, match="pulled the plug"):
        uptrain(student, tmp_path / "out", settings, progress=Unplugged())
    native(not begun)
    for overwrite in (False, True):  # the same command, also when it replaces an output
        assert standing(tmp_path / "out", overwrite=overwrite) == [
            read_json(tmp_path / "out.partial" / ".inputs.json")["inputs"]
        ]
    out = uptrain(student, tmp_path / "out", settings)
    assert _precision(out) == ("bf16" if begun else "fp32")
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_outputs_of_the_old_default_are_recognised(
    student: Path, text: Path, tmp_path: Path, native: Callable[[bool], None]
) -> None:
    native(False)
    old = uptrain(student, tmp_path / "old", UptrainSettings(data=str(text), **SMALL, precision="bf16"))
    before = (old / "kvfold.json").read_bytes()
    uptrain(student, old, UptrainSettings(data=str(text), **SMALL))
    assert (old / "kvfold.json").read_bytes() == before


def test_pretraining_decides_too(text: Path, tmp_path: Path, native: Callable[[bool], None]) -> None:
    from kvfold.families import all_families

    native(False)
    config = {**all_families()["llama"].tiny(), "vocab_size": 300}
    settings = PretrainSettings(data=str(text), sequence_length=16, batch_size=2, tokens=32)
    out = pretrain(config, tmp_path / "out", settings)
    assert _precision(out) == "fp32"
    native(True)
    before = (out / "kvfold.json").read_bytes()
    pretrain(config, out, settings)
    assert (out / "kvfold.json").read_bytes() == before


def test_what_is_hashed_never_says_auto(tmp_path: Path, native: Callable[[bool], None]) -> None:
    hashed: list[str] = []

    def identity(asked: UptrainSettings) -> dict[str, Any]:
        hashed.append(asked.precision)
        return asked.identity()

    native(True)
    decided = decide(UptrainSettings(data="t", tokens=1), tmp_path / "out", identity)
    assert sorted(hashed) == ["bf16", "fp32"]
    assert fingerprint(decided.identity()) == fingerprint(
        UptrainSettings(data="t", tokens=1, precision="bf16").identity()
    )


# --- threads ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 8),
        ({"cpu.max": "max 100000\n"}, 8),
        ({"cpu.max": "200000 100000\n"}, 2),
        ({"cpu.max": "250000 100000\n"}, 2),
        ({"cpu.max": "20000 100000\n"}, 1),
        ({"cpu.max": "6400000 100000\n"}, 8),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 8),
        ({"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 3),
    ],
)
def test_cores_are_those_of_the_container(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], expected: int
) -> None:
    monkeypatch.setattr(machine, "available", lambda: 8)
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    assert machine.cores(tmp_path) == expected


def test_threads_wait_briefly_unless_the_user_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_NUM_THREADS")
    monkeypatch.setattr(machine, "cores", lambda: 2)
    monkeypatch.setattr(machine, "available", lambda: 64)

    def after(**given: str) -> list[str | None]:
        for name in names:
            monkeypatch.setenv(name, given.get(name, ""))
            if name not in given:
                monkeypatch.delenv(name)
        machine.prepare_torch()
        return [os.environ.get(name) for name in names]

    assert after() == [None, machine.SPINS, "2"]
    assert after(OMP_WAIT_POLICY="ACTIVE", OMP_NUM_THREADS="5") == ["ACTIVE", None, "5"]
    assert after(GOMP_SPINCOUNT="7") == [None, "7", "2"]
    monkeypatch.setattr(machine, "cores", lambda: 64)
    assert after() == [None, machine.SPINS, None]


@pytest.mark.parametrize("given", [None, "0"])
def test_large_tensors_have_huge_pages_unless_the_user_says_otherwise(
    given: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", given or "")
    if given is None:
        monkeypatch.delenv("THP_MEM_ALLOC_ENABLE")
    machine.prepare_torch()
    assert os.environ["THP_MEM_ALLOC_ENABLE"] == (given or "1")


def test_the_device_is_asked_of_the_machine_alone() -> None:
    package = Path(machine.__file__).parent
    asking = [path.name for path in package.rglob("*.py") if "cuda.is_available" in path.read_text(encoding="utf-8")]
    assert asking == ["machine.py"]
