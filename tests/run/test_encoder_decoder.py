"""A run over an encoder-decoder from nothing: pre-trained, folded, uptrained, fine-tuned over seeds, one table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kvfold.disk import record
from kvfold.disk.checkpoint import Checkpoint
from kvfold.errors import SettingError
from kvfold.families import all_families, family_of
from kvfold.predict.plan import PlanSettings, plan
from kvfold.report.studies import studies
from kvfold.report.tables import headline
from kvfold.run.recipe import Recipe, cells, read_recipe
from kvfold.run.runner import run
from kvfold.settings import decode
from kvfold.train.pretrain import PretrainSettings
from kvfold.train.uptrain import UptrainSettings

ROOT = Path(__file__).parents[2]
TEXT = "Whan that Aprille with his shoures soote, the droghte of March hath perced to the roote. " * 40
SMALL: dict[str, Any] = {"sequence_length": 32, "batch_size": 4, "precision": "fp32"}


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(TEXT)
    Path("pairs.tsv").write_text("".join(f"{'abcdefgh'[n % 8] * (1 + n % 5)}\t{n:b}\n" for n in range(24)))
    config = {**all_families()["t5"].tiny(), "vocab_size": 400, "num_layers": 2}
    return Recipe(
        name="tiny",
        source="runs/tiny/teacher",
        data="text.txt",
        heldout="pairs.tsv",
        pretrain={"config": config, "tokens": 640, **SMALL},
        convert={},
        uptrain={"alpha": 0.2, "loss": "ce", **SMALL},
        finetune={"data": "pairs.tsv", "tokens": 512, "optimizer": "adafactor", **SMALL},
        evaluate={"answers": 4, "answer_tokens": 4, "beams": [1], "sequence_length": 32},
        matrix=(
            {"convert.method": "identity", "uptrain.alpha": 0},
            {"convert.method": "gqa", "convert.init": "mean", "convert.kv_heads": "self=2,cross=1"},
        ),
        seeds=(0, 1),
    )


@pytest.mark.slow
def test_a_table_from_nothing(recipe: Recipe) -> None:
    page = run(recipe)
    folder = page.parent
    made = record.read_all(folder)
    kinds = [each.kind for each in made]
    assert {kind: kinds.count(kind) for kind in kinds} == {"plan": 2, "evaluate": 5}
    uptrained, finetuned = (
        sorted(each.name for each in (folder / name).iterdir()) for name in ("uptrained", "finetuned")
    )
    assert len(uptrained) == 1  # one uptraining, whatever the seeds of the task
    assert len(finetuned) == 5
    assert len({Checkpoint.open(folder / "finetuned" / name).hash() for name in finetuned}) == 4  # MHA's seed 0 twice
    (study,) = studies(made)
    columns, rows = headline(study)
    assert {"exact match", "CER", "loss", "KL"} <= set(columns)
    assert [row[0] for row in rows] == ["teacher", "identity", "gqa, init mean, kv heads self=2,cross=1"]
    assert [row[columns.index("training")] for row in rows[1:]] == [
        "512 tokens, the task (2 seeds)",
        "alpha 0.2, 512 tokens, ce, then the task (2 seeds)",
    ]
    said = page.read_text()
    assert "exact match" in said
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}
    run(recipe)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")} == before


def test_a_pretraining_without_a_config_is_one_line(recipe: Recipe) -> None:
    with pytest.raises(SettingError, match="tiny: pretrain has no config"):
        run(Recipe(**{**vars(recipe), "pretrain": {"tokens": 640}}))


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"finetune": {"tokens": 1, "los": "ce"}}, "finetune: unknown setting 'los'; did you mean 'loss'?"),
        ({"uptrain": {"tokens": 1, "schedule": "slow"}}, "uptrain: schedule cannot be 'slow'"),
        ({"control": True}, "tiny: the control cannot be fine-tuned; add a row of method identity"),
    ],
)
def test_a_typing_error_costs_no_pretraining(recipe: Recipe, changes: dict[str, Any], line: str) -> None:
    with pytest.raises(SettingError) as told:
        run(Recipe(**{**vars(recipe), **changes}))
    assert str(told.value).startswith(line)
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("name", "count"), [("t5-table1", 9), ("t5-small", 3), ("t5-ablations", 8), ("crosslatent", 16)]
)
def test_the_recipes_of_the_paper_say_what_can_be(name: str, count: int) -> None:
    recipe = read_recipe(ROOT / "recipes" / f"{name}.yaml")
    pretrain = recipe.pretrain or read_recipe(ROOT / "recipes" / "t5-table1.yaml").pretrain
    assert pretrain is not None
    config = pretrain["config"]
    rows = cells(recipe)
    assert len(rows) == count
    for settings, where in ((recipe.uptrain, "uptrain"), (recipe.finetune, "finetune")):
        if settings is not None:
            decode(UptrainSettings, {"data": "x", **settings}, where)
    decode(PretrainSettings, {key: value for key, value in pretrain.items() if key != "config"}, "pretrain")
    shape = family_of(config).shape(config)
    assert 0.5e6 < shape.parameters < 6e6


def test_a_plan_counts_both_caches(tmp_path: Path) -> None:
    """T5.1.1-XXL: 24 layers, 64 heads of 64, input 512, output 256, bf16."""
    import json

    config = {
        **all_families()["t5"].tiny(),
        "vocab_size": 32128,
        "d_model": 4096,
        "d_kv": 64,
        "d_ff": 10240,
        "num_layers": 24,
        "num_heads": 64,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    options = PlanSettings(context=256, encoder_context=512, batch=8)
    made = plan(tmp_path, "gqa", {"kv_heads": "self=8,cross=1"}, options=options)
    layer = 2 * 64 * 2
    assert made.before.cache_bytes == 8 * 24 * layer * (64 * 256 + 64 * 512)
    assert made.after.cache_bytes == 8 * 24 * layer * (8 * 256 + 1 * 512)
    assert made.after.cache_bytes_per_token == 24 * layer * 8
    assert made.after.cache_bytes_per_encoder_token == 24 * layer
    assert made.after.kv_heads == "self 8, cross 1"
    assert made.after.model_type == "kvfold_t5"
    assert 11.1e9 < made.before.parameters < 11.2e9  # 11B, as published
    loads = {engine.name for engine in made.engines if engine.loads}
    assert loads == {"transformers", "CTranslate2"}
    assert ("cache per token of the encoder's", "384 KiB", "6 KiB") in made.rows()
    # a step reads the decoder without k and v of the cross-attention, and the output matrix; of the encoder nothing
    read = 24 * (2 * 4 * 4096**2 - 2 * 4096**2 + 3 * 4096 * 10240 + 3 * 4096) + 4096 + 32128 * 4096 + 32 * 64
    step = 2 * read / (2 * read + made.before.cache_bytes)
    assert made.before.weight_share == pytest.approx(step)
