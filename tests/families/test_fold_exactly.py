"""Every family: a twin whose key/value heads are equal in groups loses nothing when each group becomes one head.

What is merged by calibration and repaired loses nothing either: nothing is left to repair. That costs half a second a
family, and is tried where a fact of the wiring is new.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from examples import CORE, SOURCES, clips, read
from kvfold import hf
from kvfold.contracts.cache import grouped_cache
from kvfold.contracts.family import MLP
from kvfold.contracts.packed import Packed
from kvfold.contracts.site import REPAIRABLE
from kvfold.convert.conversion import ConvertSettings, convert
from kvfold.disk.checkpoint import Checkpoint
from kvfold.families import all_families

GROUPS = 2
TEXT = "Whan that Aprille with his shoures soote, the droghte of March hath perced to the roote. " * 8
TOKENS, BATCH = 24, 2  # longer than the windows of the tiny models


@dataclass(frozen=True)
class Fold:
    """A twin in float64, and its student."""

    teacher: Checkpoint
    student: Checkpoint
    text: Path
    known: dict[tuple[Path, str], Any] = field(default_factory=dict)  # what each computed

    def load(self, which: Checkpoint, attention: str) -> Any:
        """A model, strictly; by transformers alone where its class is stock."""
        if str(which.config["model_type"]).startswith("kvfold_"):
            return hf.load(which.path, dtype="float64")  # whose attention is kvfold's alone
        paired = transformers.AutoModelForSpeechSeq2Seq if which.family.audio else transformers.AutoModelForSeq2SeqLM
        auto = paired if which.family.encoder_decoder else transformers.AutoModelForCausalLM
        kernels = {"attn_implementation": attention, "experts_implementation": "eager"}  # others lack float64
        model, found = auto.from_pretrained(which.path, output_loading_info=True, **kernels)
        assert not any(found[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        return model.eval()

    def outputs(self, which: Checkpoint, attention: str) -> Any:
        """Logits and cache of the last token after all others: a window lets go of what lies before it."""
        if (which.path, attention) not in self.known:
            self.known[which.path, attention] = self._computed(which, attention)
        return self.known[which.path, attention]

    @torch.inference_mode()
    def _computed(self, which: Checkpoint, attention: str) -> Any:
        model, ids_BT = self.load(which, attention), 3 + torch.arange(BATCH * TOKENS).view(BATCH, TOKENS) % 90
        given, name = {}, "input_ids"
        if which.family.encoder_decoder:
            given, name = {"encoder_outputs": model.get_encoder()(**read(model, ids_BT.flip(1)))}, "decoder_input_ids"
        first = model(**given, **{name: ids_BT[:, :-1]}, use_cache=True)
        return model(**given, **{name: ids_BT[:, -1:]}, past_key_values=first.past_key_values, use_cache=True), first


def twin(folder: Path) -> Checkpoint:
    """Repeat the first key/value head of each group over the group, in the checkpoint itself."""
    source, file = Checkpoint.open(folder), folder / "model.safetensors"
    tensors = load_file(file)
    for site, attention in source.shape.sites.items():
        if site.kind == "encoder":
            continue
        roles = source.roles(site).roles
        for role in attention.head_roles:
            heads = roles[role].unflatten(0, (GROUPS, -1, attention.head_dim))
            roles[role] = heads[:, :1].expand_as(heads).flatten(0, 2).contiguous()
        for name, held in source.family.stored(site, attention).items():
            tensors[source.spelled.get(name, name)] = source.family.joined(
                attention, {role: roles[role] for role in held}
            ).contiguous()
    save_file(tensors, file, metadata={"format": "pt"})
    return Checkpoint.open(folder)


def facts(name: str) -> set[object]:
    """What tells the wiring of one family from another's, fact by fact."""
    family = all_families()[name]
    body, found = family.body, set[object]()
    for site, each in family.shape(family.tiny()).sites.items():
        rope = each.rope and (each.rope.half_split, each.rope.dims == each.head_dim)
        found |= {(site.kind, each.norms), (site.kind, each.biases), (site.kind, "rope", rope)}
        found |= {("window", each.window is None), ("softcap", each.softcap is None), ("scale", each.scale is None)}
        found |= {("offset", each.norm_offset), ("sinks", each.sinks)}
    found |= {(role, repr(place)) for role, place in family.tensors.items() if isinstance(place, Packed)}
    found |= {("mlp", *((part, isinstance(place, Packed)) for part, place in body.mlp.items())), ("after", *body.after)}
    found |= {("residual", body.residual), ("stacked", bool(body.stacked)), ("rehoused", family.rehouse is not None)}
    return found | {("audio", family.audio), ("heads first", family.heads_first), ("interface", family.interface)}


def unlike() -> list[str]:
    """`CORE`, and each other family with a fact that none before it has."""
    known, found = set[object](), []
    for name in dict.fromkeys((*CORE, *SOURCES)):
        if name in CORE or facts(name) - known:
            found.append(name)
        known |= facts(name)
    return found


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=() if name in unlike() else pytest.mark.slow) for name in SOURCES],
)
def fold(
    request: pytest.FixtureRequest,
    _built: Callable[..., Path],
    byte_tokenizer: Path,
    span_tokenizer: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Fold:
    folder, pairs = tmp_path_factory.mktemp(request.param), all_families()[request.param].encoder_decoder
    built = _built(request.param, 0, None, "safetensors", {"dtype": "float64", "vocab_size": 300 if pairs else 260})
    shutil.copytree(span_tokenizer if pairs else byte_tokenizer, folder / "teacher")
    teacher = twin(Path(shutil.copytree(built, folder / "teacher", dirs_exist_ok=True)))
    student = convert(teacher.path, folder / "student", "gqa", {"kv_heads": GROUPS, "init": "mean"})
    (folder / "text.txt").write_text(TEXT)
    text = clips(folder) if teacher.family.audio else folder / "text.txt"
    return Fold(teacher, Checkpoint.open(student), text)


def test_the_fold_of_a_twin_is_exact(fold: Fold) -> None:
    """To the last bits of float64, in which a narrower map may round otherwise.

    Norms over all heads are in float32, and so is the softmax, which another class than the teacher's rounds otherwise.
    """
    cached = [fold.student.shape.sites[site] for site in fold.student.shape.cached_sites]
    assert {each.num_key_value_heads for each in cached} == {GROUPS}
    found, expected = (fold.outputs(which, "eager") for which in (fold.student, fold.teacher))
    other = fold.student.config["architectures"] != fold.teacher.config["architectures"]
    tolerance = 1e-6 if other or any(each.norms == "all_heads" for each in cached) else 1e-12
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine.logits, theirs.logits, rtol=0, atol=tolerance)


@pytest.mark.slow
def test_eager_is_sdpa(fold: Fold) -> None:
    """Eager attention computes its softmax in float32. Where logits have a cap or sinks, kvfold's is in for sdpa."""
    if str(fold.student.config["model_type"]).startswith("kvfold_"):
        pytest.skip("a class of kvfold's own, which has one attention")
    names = ("eager", "sdpa" if fold.student.shape.fused else hf.ATTENTION)
    (eager, _), (other, _) = (fold.outputs(fold.student, name) for name in names)
    torch.testing.assert_close(other.logits, eager.logits, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("fold", unlike(), indirect=True)
def test_what_is_fitted_and_repaired_is_the_teacher(fold: Fold, tmp_path: Path) -> None:
    """Every role that the method repairs is repaired, and lacks what float32 rounds."""
    options = ConvertSettings(
        calibration=str(fold.text), calibration_tokens=600, calibration_length=64, effort="thorough"
    )
    student = Checkpoint.open(convert(fold.teacher.path, tmp_path / "student", "gqa", {"kv_heads": 2}, options=options))
    assert student.lineage is not None
    roles = [role for role in REPAIRABLE if role not in MLP or role in student.family.body.mlp]
    assert student.lineage["steps"][-1]["settings"]["repair"] == roles
    (found, _), (expected, _) = (fold.outputs(which, "eager") for which in (student, fold.teacher))
    # where keys are normed by head, a fitted one has another length, to which the norm adds its epsilon; those of a
    # tiny exaone4 are short, because nothing norms the inputs of its first layer
    tolerance = 5e-3 if student.family.name == "exaone4" else 1e-3
    torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=tolerance)


def test_the_cache_is_as_predicted(fold: Fold) -> None:
    last, _ = fold.outputs(fold.student, "eager")
    shape = fold.student.shape
    encoded = shape.encoder_positions or TOKENS
    predicted = grouped_cache(shape).bytes(TOKENS, batch=BATCH, itemsize=8, encoder_tokens=encoded)
    assert hf.live_cache_bytes(last.past_key_values) == predicted
