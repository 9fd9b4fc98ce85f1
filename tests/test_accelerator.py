"""Every stage on a device that is not the CPU, without one: a tensor left on the CPU is an error there, as on a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kvfold.cli.main import run_command

SCRIPT = """
import sys
from far_device import Far
import kvfold.machine
kvfold.machine.best_device = lambda: "far:0"
kvfold.machine.device_memory = lambda device: 1 << 32
from kvfold.cli.main import run_command
with Far():
    for line in sys.stdin.read().splitlines():
        print("$", line, flush=True)
        if status := run_command(line.split()):
            sys.exit(status)
"""
CALIBRATED = "--calibration text.txt --calibration-length 64 --calibration-tokens 4k"


def run_script(script: str, folder: Path, given: str = "") -> None:
    """Run a script in a process of its own, which may register the device."""
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", script],
        check=False,
        input=given,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def test_the_device_refuses_tensors_of_the_cpu(tmp_path: Path) -> None:
    code = """
import torch
from far_device import Far
with Far():
    x = torch.eye(2, device="far")
    assert (x @ x).device.type == "far" and x.cpu().device.type == "cpu" and float(x[0, 0]) == 1
    layer = torch.nn.Linear(2, 2).to("far")
    layer(x).sum().backward()
    assert layer.weight.grad.device.type == "far"
    try:
        layer(torch.eye(2))
    except RuntimeError as error:
        assert "same device" in str(error)
    else:
        raise SystemExit("tensors of two devices met")
"""
    run_script(code, tmp_path)


@pytest.mark.slow
def test_the_sums_of_a_repair_stay_on_the_device(tmp_path: Path) -> None:
    code = """
import torch
import kvfold.machine
from far_device import Far
from kvfold.repair.mlp import InnerFit
kvfold.machine.best_device = lambda: "far:0"

@torch.inference_mode()
def fitted(device):
    draw = torch.Generator().manual_seed(0)
    up_FD, down_DF, x_BTD, lacks_BTD, slope_BTF = (
        torch.randn(size, generator=draw).to(device) for size in ((8, 6), (6, 8), (2, 5, 6), (2, 5, 6), (2, 5, 8))
    )
    up, down = torch.nn.Linear(6, 8), torch.nn.Linear(8, 6)
    up.weight, down.weight = (torch.nn.Parameter(each.clone(), requires_grad=False) for each in (up_FD, down_DF))
    with InnerFit([up], down, [5, 5]) as fit:
        fit.add(0, x_BTD, [slope_BTF], lacks_BTD)
        sums = (fit.gram_DD, fit.slopes_MFF, fit.missing_MFD)
        assert {(each.device.type, each.dtype) for each in sums} == {(device, torch.float64)}
        fit.solve(steps=4, damping=1e-2, batches=[(0, 2)])
    assert not torch.equal(up.weight, up_FD)
    return up.weight.cpu()

with Far():
    far_FD = fitted("far")
torch.testing.assert_close(far_FD, fitted("cpu"), rtol=1e-6, atol=1e-6)
"""
    run_script(code, tmp_path)


@pytest.mark.slow
def test_every_stage_of_a_decoder(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "source").symlink_to(tiny_checkpoint("llama"))
    words = "".join(each.read_text() for each in sorted(Path(__file__).parent.glob("*.py")))
    (tmp_path / "text.txt").write_text(words)
    commands = {
        "gqa": f"convert source {{}} --kv-heads 2 {CALIBRATED} --effort thorough --weigh ablation",
        "mixed": f"convert source {{}} --kv-heads auto --budget 0.5 --budget-metric both {CALIBRATED} --repair none",
        "elitekv": f"convert source {{}} --method elitekv --ratio 0.5 {CALIBRATED}",
        "cla": f"convert source {{}} --method cla {CALIBRATED}",
        "supra": "convert source {} --method supra",
    }
    trained = [f"uptrain {name} {name}-trained --data text.txt --tokens 512 --sequence-length 32 --batch-size 4"
               " --precision fp32" for name in ("gqa", "elitekv", "supra")]  # fmt: skip
    evaluated = ["evaluate gqa-trained --teacher source --data text.txt --tokens 512 --sequence-length 64 --samples 1"
                 " --sample-tokens 4 --copy-trials 2 --copy-distances 16 --last-words 2 --records records"]  # fmt: skip
    made = [line.format(name) for name, line in commands.items()]
    run_script(SCRIPT, tmp_path, "\n".join([*made, *trained, *evaluated]))
    for name in ("gqa", "elitekv"):  # the same numbers as on the CPU, to the rounding of other orders of sums
        assert run_command(commands[name].format(f"{name}-cpu").split()) == 0
        ours, theirs = (load_file(tmp_path / folder / "model.safetensors") for folder in (name, f"{name}-cpu"))
        assert ours.keys() == theirs.keys()
        for key, tensor in ours.items():
            torch.testing.assert_close(tensor, theirs[key], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_conversions_of_an_encoder_decoder(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "source").symlink_to(tiny_checkpoint("t5"))
    (tmp_path / "text.txt").write_text(Path(__file__).read_text())
    commands = {
        "gqa": f"convert source {{}} --kv-heads 2 {CALIBRATED} --effort thorough",
        "mixed": f"convert source {{}} --kv-heads auto --budget 0.5 {CALIBRATED} --repair q,o",
    }
    run_script(SCRIPT, tmp_path, "\n".join(line.format(name) for name, line in commands.items()))
    for name, line in commands.items():
        assert run_command(line.format(f"{name}-cpu").split()) == 0
        ours, theirs = (load_file(tmp_path / folder / "model.safetensors") for folder in (name, f"{name}-cpu"))
        assert ours.keys() == theirs.keys()
        for key, tensor in ours.items():
            torch.testing.assert_close(tensor, theirs[key], rtol=1e-4, atol=1e-5)
