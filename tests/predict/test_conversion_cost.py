"""The counted cost of a conversion against operations that torch counts, and against closed forms."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from kvfold import hf
from kvfold.contracts.effort import EFFORTS, RepairSettings
from kvfold.contracts.requests import COPIED, FoldedKL, FoldedRecall, HeadKL, InputGram, QueryGram
from kvfold.contracts.site import REPAIRABLE, Site
from kvfold.convert.conversion import ConvertSettings, convert
from kvfold.disk import spool
from kvfold.disk.checkpoint import Checkpoint
from kvfold.predict import conversion_cost as conversion_cost_module
from kvfold.predict.conversion_cost import ConversionCost, Speeds, Work, conversion_cost, directions

Make = Callable[..., Path]
TOKENS, LENGTH = 64, 16


@pytest.fixture
def teacher(tiny_checkpoint: Make) -> Checkpoint:
    return Checkpoint.open(tiny_checkpoint(tokenizer=False, num_hidden_layers=2, hidden_size=64, intermediate_size=160))


def cost(
    teacher: Checkpoint, roles: tuple[str, ...] = (), questions: tuple[Any, ...] = (), **settings: Any
) -> ConversionCost:
    repair = replace(RepairSettings(length=LENGTH), **settings)
    student = teacher.shape.with_sites(
        {site: replace(each, num_key_value_heads=1) for site, each in teacher.shape.sites.items()}
    )
    return conversion_cost(
        teacher.family, teacher.config, teacher.shape, student, questions, roles, repair, tokens=TOKENS, length=LENGTH
    )


def test_a_forward_pass_is_what_torch_counts(teacher: Checkpoint) -> None:
    model = AutoModelForCausalLM.from_pretrained(teacher.path, attn_implementation="eager").model
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model(torch.zeros(TOKENS // LENGTH, LENGTH, dtype=torch.int64))
    counted = counter.get_total_flops()  # all logits, also of the future: the cost counts half of them
    attention = teacher.shape.sites[Site(0)]
    unseen = 2 * 2 * attention.num_attention_heads * attention.head_dim * TOKENS * LENGTH / 2 * 2
    assert cost(teacher).forward == pytest.approx(counted - unseen, rel=0.02)  # norms have parameters, but no products


def test_a_forward_pass_of_an_encoder_decoder_is_what_torch_counts(tiny_checkpoint: Make) -> None:
    """The keys and values of cross-attention are made of encoder tokens, all else in the decoder of its own."""
    teacher = Checkpoint.open(tiny_checkpoint("t5", tokenizer=False, num_layers=3, num_decoder_layers=2))
    rows, read, written = 4, 16, 6
    model: Any = hf.load(teacher.path, attention="eager")
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        encoded_BSD = model.encoder(torch.zeros(rows, read, dtype=torch.int64)).last_hidden_state
        model.decoder(torch.zeros(rows, written, dtype=torch.int64), encoder_hidden_states=encoded_BSD)
    found = conversion_cost(
        *(teacher.family, teacher.config, teacher.shape, teacher.shape, (), ("q", "o", "down"), RepairSettings()),
        tokens=rows * written,
        encoded=rows * read,
        length=read,
    )
    own = teacher.shape.sites[Site(0)]
    unseen = 2 * 2 * 2 * own.num_attention_heads * own.head_dim * rows * written * (written - written // 2)
    assert found.forward == pytest.approx(counter.get_total_flops() - unseen, rel=0.02)
    wide = own.num_attention_heads * own.head_dim
    assert found.stages["o"].products == 2 * 2 * 2 * rows * written * wide * (wide + own.hidden_size)
    assert found.memory > 2 * 4 * teacher.shape.parameters  # both models whole


@pytest.mark.parametrize("roles", [(), ("o",), ("q", "o", "down"), ("o", "gate", "up", "down"), REPAIRABLE])
def test_hidden_states_in_memory_are_those_of_a_conversion(
    tiny_checkpoint: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, roles: tuple[str, ...]
) -> None:
    """Against the spools that a conversion opens: the most bytes of those that are open at once."""
    made, close = spool.Spool.__init__, spool.Spool.close
    opened: dict[int, int] = {}
    most = 0

    def counted(self: spool.Spool, *given: Any, **named: Any) -> None:
        nonlocal most
        made(self, *given, **named)
        opened[id(self)] = self.bytes
        most = max(most, sum(opened.values()))

    def closed(self: spool.Spool) -> None:
        opened.pop(id(self), None)
        close(self)

    monkeypatch.setattr(spool.Spool, "__init__", counted)
    monkeypatch.setattr(spool.Spool, "close", closed)
    source = Checkpoint.open(tiny_checkpoint("llama"))
    (tmp_path / "text.txt").write_text("Whan that Aprille with his shoures soote " * 40)
    options = ConvertSettings(
        calibration=str(tmp_path / "text.txt"),
        calibration_tokens=256,
        **{"calibration_length": LENGTH, "repair_length": LENGTH, "repair_q_tokens": 128, "repair_inner_tokens": 192},
        repair=roles,
    )
    convert(source.path, tmp_path / "student", "gqa", {"kv_heads": 2}, options=options)
    found = []
    student = Checkpoint.open(tmp_path / "student").shape
    for in_memory in (0, 1 << 40):
        monkeypatch.setattr(conversion_cost_module, "SPOOLED", in_memory)
        found.append(
            conversion_cost(
                *(source.family, source.config, source.shape, student, (), roles),
                RepairSettings(LENGTH, 128, 192),
                tokens=256,
                length=LENGTH,
            ).memory
        )
    assert not opened
    assert found[1] - found[0] == most


def test_requests_and_regressions_are_their_products(teacher: Checkpoint) -> None:
    shape = teacher.shape
    hidden, heads = shape.hidden_size, shape.sites[Site(0)].num_attention_heads * shape.sites[Site(0)].head_dim
    wide = teacher.spec("model.layers.0.mlp.down_proj.weight").shape[1]
    asked = (InputGram(Site(0)), QueryGram(Site(1)))
    answers = cost(teacher, questions=asked).stages["calibration"]
    width = shape.sites[Site(1)].head_dim
    assert answers.passes == cost(teacher).forward  # one pass for all requests
    assert answers.products == 4 * TOKENS * (hidden * (hidden + 1) + heads * width)  # in float64
    assert cost(teacher, questions=(FoldedKL(Site(1), 1),)).stages.keys() == {"measured sites", "fold"}
    made = cost(teacher, ("o", "down")).stages
    assert made["o"].products == 2 * 2 * TOKENS * heads * (heads + hidden)
    assert made["down"].products == 2 * 2 * TOKENS * wide * (wide + hidden)
    assert directions(teacher.family, teacher.config, shape, ("o", "down")) == wide
    assert directions(teacher.family, teacher.config, shape, ("o",)) == hidden + 1


def test_each_part_grows_with_its_own_tokens(teacher: Checkpoint) -> None:
    few, many = (cost(teacher, ("q", "o", "gate", "up"), q_tokens=n, inner_tokens=2 * n).stages for n in (16, 32))
    assert many["q"].products == 2 * few["q"].products
    assert many["gate"].products == 2 * few["gate"].products == 2 * few["up"].products
    assert many["o"] == few["o"]
    assert cost(teacher, ("q",), q_tokens=10**6).stages["q"] == cost(teacher, ("q",), q_tokens=TOKENS).stages["q"]


def test_seconds_are_work_over_speed() -> None:
    made = ConversionCost(TOKENS, 100.0, {"a": Work(100.0, 60.0, 8.0), "b": Work(100.0, 40.0, 2.0)}, 0)
    assert made.work == Work(200.0, 100.0, 10.0)
    assert made.forward_passes == pytest.approx(3.1)
    assert made.seconds(Speeds(passes=100.0, products=50.0, solves=5.0)) == pytest.approx(2.0 + 2.0 + 2.0)


def test_tokens_follow_the_width_within_bounds() -> None:
    standard = EFFORTS["standard"]
    assert standard.tokens(100) == standard.least
    assert standard.tokens(3000) == 16 * 3000
    assert standard.tokens(10**6) == 65_536
    assert {EFFORTS["thorough"].tokens(width) for width in (1, 3000, 10**6)} == {65_536}
    assert all(EFFORTS["quick"].tokens(width) < standard.tokens(width) for width in (1, 1536, 4000))


def test_gate_and_up_are_refitted_where_they_pay() -> None:
    standard, parts = EFFORTS["standard"], ("gate", "up", "act", "down")
    assert standard.repaired(REPAIRABLE, parts, 256) == REPAIRABLE
    assert standard.repaired(REPAIRABLE, parts, 257) == ("q", "o", "down")
    assert EFFORTS["thorough"].repaired(REPAIRABLE, parts, 4096) == REPAIRABLE
    assert EFFORTS["thorough"].repaired(REPAIRABLE, ("up", "act", "down"), 4096) == ("q", "o", "up", "down")
    assert EFFORTS["quick"].repaired(("q", "o"), parts, 64) == ("o",)


def test_every_change_of_one_site_is_counted_by_its_own_tokens(teacher: Checkpoint) -> None:
    """The layers from the site on, and the logits: as many operations a token, whatever is compared."""

    def passes(question: Any) -> float:
        return cost(teacher, questions=(question,)).stages["measured sites"].passes

    for layer in (0, 1):
        token = passes(FoldedKL(Site(layer), 1)) / 8192
        assert passes(HeadKL(Site(layer), 0)) == pytest.approx(COPIED[HeadKL] * token)
        assert passes(FoldedRecall(Site(layer), 1)) == pytest.approx(COPIED[FoldedRecall] * token)
