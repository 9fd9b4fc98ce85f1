"""What identifies an output of training: the settings that differ from their default."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from kvfold.settings import differing
from kvfold.train.pretrain import PretrainSettings
from kvfold.train.settings import DEFAULTS
from kvfold.train.uptrain import UptrainSettings

COMMON = {
    "tokens": None,
    "sequence_length": 256,
    "batch_size": 16,
    "micro_batch": None,
    "warmup": 0.02,
    "decay": 0.2,
    "final_rate": 0.0,
    "optimizer": "adamw",
    "dropout": None,
    "weight_decay": 0.1,
    "beta1": 0.9,
    "beta2": 0.95,
    "clip": 1.0,
    "precision": "auto",
    "compile": False,
    "seed": 0,
}
KNOWN = {  # defaults under `DEFAULTS = 1`
    PretrainSettings: {**COMMON, "learning_rate": 0.003, "schedule": "wsd", "tokenizer_data": ()},
    UptrainSettings: {
        **COMMON,
        "learning_rate": None,  # 0.001, unless the model is wide
        "schedule": "cosine",
        "alpha": None,
        "pretraining_tokens": None,
        "loss": None,
        "stages": None,
        "temperature": 1.0,
        "attention_inputs": "own",
        "trainable": (),
        "lora": None,
        "converted_only": False,
    },
}


@pytest.mark.parametrize("settings", KNOWN, ids=lambda each: each.__name__)
def test_a_default_that_changes_raises_defaults(settings: Any) -> None:
    found = {each.name: each.default for each in dataclasses.fields(settings)}
    changed = [name for name, value in KNOWN[settings].items() if found[name] != value]
    assert (changed, DEFAULTS) == ([], 1), "raise DEFAULTS in train/settings.py, and write the new defaults here"


def test_a_wide_model_has_another_learning_rate_and_identity() -> None:
    plain = UptrainSettings("text", tokens=100)
    assert (plain.rated(256).peak, plain.rated(257).peak, plain.peak) == (1e-3, 2e-4, 1e-3)
    assert (
        plain.rated(256).identity() == plain.identity() == UptrainSettings("text", 100, learning_rate=1e-3).identity()
    )
    assert plain.rated(257).identity() == {**plain.identity(), "learning_rate": 2e-4}
    given = UptrainSettings("text", tokens=100, learning_rate=5e-4)
    assert given.rated(4096) == given
    assert UptrainSettings("text", tokens=100, optimizer="adafactor").rated(4096).peak == 1e-3


def test_the_default_rate_of_a_student_is_not_that_of_pretraining() -> None:
    same = PretrainSettings(tokens=100).identity()
    assert PretrainSettings(tokens=100, learning_rate=3e-3).identity() == same
    assert PretrainSettings(tokens=100, learning_rate=1e-3).identity() == {**same, "learning_rate": 1e-3}


def test_what_decides_the_weights_is_the_identity() -> None:
    plain = UptrainSettings("text", tokens=100)
    assert plain.identity() == {"defaults": DEFAULTS, "tokens": 100}
    same = UptrainSettings("elsewhere", tokens=100, log_every=1, checkpoint_minutes=1.0, checkpoint_steps=2)
    assert same.identity() == plain.identity()
    assert UptrainSettings("text", tokens=100, lora=4).identity() == {**plain.identity(), "lora": 4}
    assert differing(same).keys() - plain.identity().keys() >= {"data", "log_every"}
