"""serve-check: an engine beside transformers, in this process and in one of its own."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exports import HAS_GGUF, Make, needs_ct2, needs_gguf, needs_llama_cpp
from kvfold import hf
from kvfold.cli.main import run_command
from kvfold.convert.conversion import convert
from kvfold.errors import DataError, SettingError, UnsupportedModel
from kvfold.export import agreement, ask_llama_cpp
from kvfold.export.engine_process import TOP
from kvfold.export.serve_check import serve_check
from kvfold.export.settings import ServeSettings

SHORT = ServeSettings(prompts=2, prompt_tokens=9, new_tokens=6)
ENGINES = ["vllm", pytest.param("llama.cpp", marks=needs_gguf)]
Answer = dict[str, Any]

# Reads the script and the question as a Python would, and answers what lies beside it.
FAKE = """#!{python}
import json, pathlib, sys
here = pathlib.Path(__file__).parent
assert sys.argv[1] == "-" and "def answer(" in sys.stdin.read()
(here / "question.json").write_text(sys.argv[2])
print("INFO: a line that is no answer", file=sys.stderr)
print((here / "answer.json").read_text())
"""


@pytest.fixture
def fake(tmp_path: Path) -> Callable[[Answer], str]:
    """Make a Python whose engine gives this answer."""

    def make(answer: Answer) -> str:
        file = tmp_path / "python"
        file.write_text(FAKE.format(python=sys.executable))
        file.chmod(0o755)
        (tmp_path / "answer.json").write_text(json.dumps(answer))
        return str(file)

    return make


@pytest.fixture
def checkpoint(tiny_checkpoint: Make) -> Path:
    return tiny_checkpoint("llama")


def _as_transformers(prompts: list[list[int]], path: Path, new_tokens: int) -> tuple[Answer, list[Any]]:
    """The answer of an engine that computes what transformers does, and transformers' logits of each step."""
    known = agreement.reference(hf.load(path, attention="sdpa"), prompts, new_tokens=new_tokens)
    steps = [rows[len(prompts[0]) - 1 :] for rows in known.logits]
    logits = [[[[int(n), float(row[n])] for n in row.argsort()[-TOP:]] for row in rows] for rows in steps]
    return {"version": "engine 1.0", "answers": known.answers, "logits": logits}, steps


def _asked(checkpoint: Path, fake: Callable[[Answer], str], tmp_path: Path, engine: str) -> tuple[Answer, list[Any]]:
    """The right answer to what this engine is asked."""
    with pytest.raises(UnsupportedModel):
        serve_check(checkpoint, engine, SHORT, python=fake({"error": "not yet"}))
    question = json.loads((tmp_path / "question.json").read_text())
    assert (question["new_tokens"], question["dtype"]) == (6, "float32")
    return _as_transformers(question["prompts"], checkpoint, 6)


@pytest.mark.parametrize("engine", ENGINES)
def test_an_engine_that_answers_as_transformers_is_equal(
    checkpoint: Path, fake: Callable[[Answer], str], tmp_path: Path, engine: str, capsys: pytest.CaptureFixture[str]
) -> None:
    answer, _ = _asked(checkpoint, fake, tmp_path, engine)
    attention = json.loads((checkpoint / "config.json").read_text())
    layers, heads, width = (attention[key] for key in ("num_hidden_layers", "num_key_value_heads", "head_dim"))
    answer["cache_bytes_per_token"] = predicted = 4 * 2 * layers * heads * width
    python = fake(answer)
    words = ["--prompts", "2", "--prompt-tokens", "9", "--new-tokens", "6", "--python", python]
    assert run_command(["serve-check", str(checkpoint), "--engine", engine, *words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["equal"]
    assert found["tokens"] == found["same_tokens"] == 12
    assert found["positions"] == 12
    assert found["max_difference"] == 0
    assert found["predicted_cache_bytes_per_token"] == predicted
    assert run_command(["serve-check", str(checkpoint), "--engine", engine, *words]) == 0
    assert f"{predicted:,}, predicted {predicted:,}" in capsys.readouterr().out

    answer["cache_bytes_per_token"] = 2 * predicted
    fake(answer)
    assert run_command(["serve-check", str(checkpoint), "--engine", engine, *words]) == 3
    assert f"its cache takes {2 * predicted:,} bytes per token, not {predicted:,}" in capsys.readouterr().err


def test_vllm_runs_students_of_mla_in_transformers_classes(
    fake: Callable[[Answer], str], tmp_path: Path, tiny_checkpoint: Make
) -> None:
    """Its own class would not read the bias that holds their norm still."""
    for norm, options in (("exact", {"model_impl": "transformers"}), ("trained", {})):
        sizes = {"rope_dim": 4, "latent_dim": 12, "norm": norm}
        student = convert(tiny_checkpoint("llama", name=f"for-{norm}"), tmp_path / norm, "mla", sizes)
        answer, _ = _asked(student, fake, tmp_path, "vllm")
        assert json.loads((tmp_path / "question.json").read_text())["options"] == options
        answer["cache_bytes_per_token"] = 4 * 4 * (4 + 12)
        assert serve_check(student, "vllm", SHORT, python=fake(answer)).equal


def test_another_token_differs_and_a_near_tie_does_not(
    checkpoint: Path, fake: Callable[[Answer], str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answer, steps = _asked(checkpoint, fake, tmp_path, "vllm")
    best, second = (int(n) for n in steps[1][2].argsort()[::-1][:2])
    answer["answers"][1][2:] = [second, 0, 0, 0]
    found = serve_check(checkpoint, "vllm", SHORT, python=fake(answer))
    assert not found.equal
    assert (found.same_tokens, found.near_ties, len(found.partings)) == (8, 0, 1)
    parting = found.partings[0]
    assert (parting.prompt, parting.step, parting.token, parting.other) == (1, 2, best, second)
    np.testing.assert_allclose((parting.logit, parting.other_logit), steps[1][2][[best, second]], rtol=1e-6)
    words = ["--prompts", "2", "--prompt-tokens", "9", "--new-tokens", "6", "--python", fake(answer)]
    assert run_command(["serve-check", str(checkpoint), "--engine", "vllm", *words]) == 3
    said = capsys.readouterr()
    assert "prompt 2, token 3: differs" in said.out
    assert "1 greedy answers differ where it is no near tie" in said.err

    # an engine whose logits are off by half of the margin may choose either, if the format allows so much
    off = (float(steps[1][2][best]) - float(steps[1][2][second])) * 0.51
    answer["logits"][1][2] = [[n, logit - off if n == best else logit] for n, logit in answer["logits"][1][2]]
    tied = serve_check(checkpoint, "vllm", SHORT, python=fake(answer))
    assert tied.near_ties == 1
    assert tied.max_difference == pytest.approx(off, rel=1e-4)


@pytest.mark.parametrize("engine", ENGINES)
def test_what_cannot_be_run_is_one_line(
    checkpoint: Path,
    fake: Callable[[Answer], str],
    tmp_path: Path,
    engine: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    module = {"vllm": "vllm", "llama.cpp": "llama_cpp"}[engine]
    for answer, python, said in (
        ({"error": "No module", "missing": module}, None, "is not installed in this Python; pip install"),
        ({"error": "No module", "missing": "another"}, None, "cannot run the model: No module"),
        (
            {"error": "ValueError: no such\n architecture"},
            None,
            "cannot run the model: ValueError: no such architecture",
        ),
        ({"version": "1", "answers": [[1], [1]], "logits": [[], []]}, None, "answers with another number of tokens"),
        ({}, None, "cannot run the model: it stopped: INFO: a line that is no answer"),
        ({}, str(tmp_path / "nowhere"), "cannot be run: No such file"),
    ):
        made = fake(answer)
        words = ["--prompts", "2", "--prompt-tokens", "9", "--new-tokens", "6", "--python", python or made]
        assert run_command(["serve-check", str(checkpoint), "--engine", engine, *words]) == 2
        err = capsys.readouterr().err
        assert said in err.splitlines()[-1]


def test_an_engine_that_is_killed_is_one_line(checkpoint: Path, tmp_path: Path) -> None:
    killed = tmp_path / "killed"
    killed.write_text("#!/bin/sh\necho Illegal instruction >&2\nkill -9 $$\n")
    killed.chmod(0o755)
    with pytest.raises(UnsupportedModel, match="^vLLM cannot run the model: it stopped: Illegal instruction"):
        serve_check(checkpoint, "vllm", SHORT, python=str(killed))


@pytest.mark.slow
def test_a_python_without_the_engine_is_told_by_the_script_itself(checkpoint: Path) -> None:
    if importlib.util.find_spec("vllm") is not None:
        pytest.skip("vllm is installed")
    with pytest.raises(SettingError, match="vLLM is not installed in this Python.*; pip install vllm"):
        serve_check(checkpoint, "vllm", SHORT, python=sys.executable)


@needs_ct2
def test_ctranslate2_is_equal(checkpoint: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("a text of one's own, which is read from its beginning to its end")
    found = serve_check(checkpoint, "ctranslate2", ServeSettings(str(text), 2, 9, 6))
    assert found.equal
    assert found.max_difference < 1e-4
    assert found.same_tokens == found.tokens > 0
    assert found.positions == 2 * (9 + 6 - 1)
    assert found.version.startswith("CTranslate2 ")
    with pytest.raises(DataError, match="shorter than a prompt"):
        serve_check(checkpoint, "ctranslate2", ServeSettings(str(text), 2, 90, 6))
    with pytest.raises(SettingError, match="runs in kvfold's own Python"):
        serve_check(checkpoint, "ctranslate2", SHORT, python=sys.executable)


@needs_ct2
def test_ctranslate2_with_other_heads_differs(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights of another model: what the comparison is there to find."""
    from kvfold.export.ctranslate2 import CTranslate2

    write = CTranslate2.write

    def other(self: Any, source: Any, model: Any, folder: Path, weights: str) -> dict[str, Any]:
        model.model.layers[0].self_attn.v_proj.weight.data.neg_()
        return write(self, source, model, folder, weights)

    monkeypatch.setattr(CTranslate2, "write", other)
    found = serve_check(checkpoint, "ctranslate2", SHORT)
    assert found.problem is not None
    assert "of their spread" in found.problem


class _Counts:
    """Stands for llama.cpp's model: after the token n, it says n + the number of tokens that it has read."""

    n_tokens = 0
    scores = np.zeros((20, 50), dtype=np.float32)

    def reset(self) -> None:
        self.n_tokens = 0

    def eval(self, tokens: list[int]) -> None:
        for token in tokens:
            self.n_tokens += 1
            self.scores[self.n_tokens - 1] = 0
            self.scores[self.n_tokens - 1, token + self.n_tokens] = 1


def test_llama_cpp_continues_its_own_tokens() -> None:
    tokens, rows = ask_llama_cpp.greedy(_Counts(), [7, 7, 1], 4)
    assert tokens == [1 + 3, 4 + 4, 8 + 5, 13 + 6]
    assert [int(row.argmax()) for row in rows] == tokens


def test_engines_that_cannot_hold_the_model_are_refused(tiny_checkpoint: Make) -> None:
    paired = tiny_checkpoint("t5")
    with pytest.raises(UnsupportedModel, match="vLLM has no encoder-decoders"):
        serve_check(paired, "vllm", SHORT)
    if HAS_GGUF:
        with pytest.raises(UnsupportedModel, match="its architecture is not supported"):
            serve_check(paired, "llama.cpp", SHORT)
    with pytest.raises(SettingError, match="no engine is called 'vlm'.*did you mean 'vllm'"):
        serve_check(paired, "vlm", SHORT)


@pytest.mark.slow
@needs_llama_cpp
def test_llama_cpp_is_equal(checkpoint: Path) -> None:
    found = serve_check(checkpoint, "llama.cpp", SHORT)
    assert found.equal
    assert found.same_tokens == found.tokens == 12


@pytest.mark.slow
def test_vllm_is_equal(tiny_checkpoint: Make) -> None:
    python = os.environ.get("KVFOLD_VLLM_PYTHON")
    if python is None:
        pytest.skip("KVFOLD_VLLM_PYTHON names no Python that has vLLM")
    subprocess.run([python, "-c", "import vllm"], check=True, capture_output=True)
    wide = tiny_checkpoint("llama", head_dim=64)  # vLLM's attention for CPUs has no narrow heads
    found = serve_check(wide, "vllm", SHORT, python=python)
    assert found.equal
    assert found.cache_bytes_per_token == pytest.approx(found.predicted_cache_bytes_per_token, rel=0.01)
