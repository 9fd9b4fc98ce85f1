"""Pre-training: a model from a config, with a tokenizer that it trains itself, in the loop of uptraining.

What comes out is an ordinary checkpoint with a lineage of its own, so `kvfold uptrain --alpha` knows its tokens.
"""

from __future__ import annotations

import dataclasses
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from kvfold import hf
from kvfold.disk.checkpoint import FORMAT, read_config, save_model
from kvfold.disk.output import (
    MANIFEST,
    Output,
    cache_folder,
    check_apart,
    disk_errors,
    dropped_on_error,
    fingerprint,
    open_output,
    prepare_cache,
    write_json,
)
from kvfold.disk.record_commit import versions
from kvfold.disk.sidecar import tokenizer_hash
from kvfold.errors import SettingError
from kvfold.families import family_of
from kvfold.progress import SILENT, Progress
from kvfold.settings import decode, read_yaml
from kvfold.text.documents import TextFacts, read_texts, text_facts
from kvfold.text.pairs import Pairs, corpus
from kvfold.text.tokens import token_file
from kvfold.train import losses
from kvfold.train.loop import State, TrainSettings, Work, parameter_groups, place, train
from kvfold.train.precision import decide
from kvfold.train.state import STATE

END = "<|endoftext|>"  # token 0: between documents, and before the first
PAIRED = ("<pad>", "</s>", *(f"<extra_id_{number}>" for number in range(100)))  # of an encoder-decoder, as in T5


@dataclass(frozen=True)
class PretrainSettings(TrainSettings):
    """How a model is trained from nothing."""

    data: str = field(
        default="stdlib",
        metadata={
            "help": "Training text: a .txt, .md, .jsonl, .json or .parquet file (also .gz, .bz2, .xz), a "
            "folder of .txt, .jsonl and .parquet files, a hub data set (owner/name), or stdlib "
            "(the source of Python's library). An encoder-decoder also reads pairs from a .tsv or "
            ".jsonl file."
        },
    )
    learning_rate: float = field(default=3e-3, metadata={"help": "Peak learning rate."})
    schedule: Literal["cosine", "wsd"] = field(
        default="wsd", metadata={"help": "Learning-rate schedule; wsd is warmup-stable-decay."}
    )

    tokenizer_data: tuple[str, ...] = field(
        default=(), metadata={"help": "Texts that the tokenizer also trains on, besides --data. Default: none."}
    )

    def __post_init__(self) -> None:
        """Refuse what cannot be, with SettingError."""
        super().__post_init__()
        if self.data == "self":
            raise SettingError("there is no teacher to sample text from", where="pretrain", next="give --data TEXT")


def pretrain(
    config: str | Path | Mapping[str, Any],
    out: str | Path,
    settings: PretrainSettings = PretrainSettings(),
    *,
    overwrite: bool = False,
    progress: Progress = SILENT,
) -> Path:
    """Train a fresh model of a `config.json` into `out`, and return its path.

    `config` may be a recipe too: a YAML file whose `config` holds the same keys and whose `pretrain` holds settings,
    over which those of `settings` go that are not at their defaults. The tokenizer is a byte-level BPE of the text,
    as large as the config's vocabulary; that of an encoder-decoder, which learns span corruption, has sentinels.
    Raises SettingError, DataError or UnsupportedModel before anything is written, TrainingError when the run diverges,
    Interrupted on a signal: the same call then continues.
    """
    given = None if isinstance(config, Mapping) else config
    config, settings = _read(config, settings)
    texts = (settings.data, *settings.tokenizer_data)
    for text in texts:
        check_apart(out, {"config": given, "data": text})
    family = family_of(config)
    shape, paired = family.shape(config), family.encoder_decoder
    special = PAIRED if paired else (END,)
    if any(isinstance(said, Mapping) and "vocab_size" in said for said in config.values()):
        raise SettingError(
            "an encoder and a decoder that each name their own ids are not pre-trained: the tokenizer names its own",
            where="pretrain",
            got=shape.model_type,
            next="start from a checkpoint, or from a config of t5",
        )
    amount = settings.tokens
    if amount is None:
        raise SettingError("say how long to train", where="pretrain", next="give --tokens")
    if shape.vocab_size < len(special) + 256:
        raise SettingError(
            "vocab_size is too small for a byte-level tokenizer",
            where="pretrain",
            got=shape.vocab_size,
            allowed=f"at least {len(special) + 256}",
        )
    if settings.sequence_length > shape.max_positions:
        raise SettingError(
            "sequence_length is longer than the model's positions",
            where="pretrain",
            got=settings.sequence_length,
            allowed=f"1 to {shape.max_positions}",
        )
    ids: dict[str, int | None] = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
    if paired:
        ids = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
    config = {**config, **ids}
    facts = text_facts(settings.data)

    def identity(asked: PretrainSettings) -> dict[str, Any]:
        return {**asked.identity(), "stage": "pretrain", "config": config, "text": facts.hash}

    settings = decide(settings, out, identity, overwrite=overwrite)
    tokenizer = train_tokenizer(texts, facts, shape.vocab_size, shape.max_positions, progress, special=special)
    tokens = (corpus if paired else token_file)(settings.data, tokenizer, progress=progress)
    tokens.check(batch_size=settings.batch_size, length=settings.sequence_length, vocab_size=shape.vocab_size)
    output = open_output(out, identity(settings), overwrite=overwrite)
    if output.complete:
        progress.say(f"{out} is complete: it was trained from this config with these settings")
        return output.path
    work = output.work
    if not output.written():
        with disk_errors(work), dropped_on_error(output, STATE):
            model = place(hf.build(config, seed=settings.seed, attention=hf.ATTENTION), settings)

            def objective(batch: Tensor | Pairs) -> tuple[Tensor, dict[str, Tensor]]:
                read, target_BT, _ = losses.parted(batch)  # a text: every target counts
                return losses.token_losses(
                    losses.hidden_states(model, read), losses.Head.of(model), target_BT, {"ce": 1.0}
                )

            named = dict(model.named_parameters())
            steps = math.ceil(amount / settings.step_tokens)
            stretch = Work("ce", steps, objective, lambda: parameter_groups(named, settings.weight_decay))
            position = train(model, [stretch], tokens, settings, work, progress)
            shutil.copytree(tokenizer, work, dirs_exist_ok=True)
            write_json(work / "generation_config.json", {**ids, "pad_token_id": 0})
            step = {
                "stage": "pretrain",
                "settings": {**dataclasses.asdict(settings), "text": facts.hash},
                "source": None,
                "calibration": None,
                "tokens": position.tokens,
                "seed": settings.seed,
                "versions": versions(),
                "wall_seconds": position.seconds,
            }
            config = {**config, "architectures": [type(model).__name__]}
            _save(output, config, model, step, shape.parameters)
    State(work).remove()
    output.commit()
    return output.path


def _save(
    output: Output, config: Mapping[str, Any], model: nn.Module, step: Mapping[str, Any], parameters: int
) -> None:
    """Write the model, which is the root of its own lineage."""
    # a T5 names its one embedding three times; state_dict has them all
    tied = getattr(model, "all_tied_weights_keys", {})
    state = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items() if name not in tied}
    hashed = save_model(output.work, config=config, state=state, lineage={})
    root = {"hash": hashed, "name": output.path.name, "config": config, "parameters": parameters}
    lineage = {
        "format": FORMAT,
        "inputs": output.inputs,
        "hash": hashed,
        "root": root,
        "steps": [step],
        "tokenizer": tokenizer_hash(output.work),
    }
    write_json(output.work / MANIFEST, lineage)


def _read(
    config: str | Path | Mapping[str, Any], settings: PretrainSettings
) -> tuple[dict[str, Any], PretrainSettings]:
    """The model's config, and the settings with those of a recipe below them."""
    if isinstance(config, Mapping):
        return dict(config), settings
    path = Path(config)
    if path.suffix not in (".yaml", ".yml"):
        return read_config(path.parent if path.name == "config.json" else path), settings
    content = read_yaml(path)
    recipe = decode(_Recipe, content, str(path))
    defaults = {each.name: each.default for each in dataclasses.fields(PretrainSettings)}
    given = {name: value for name, value in vars(settings).items() if value != defaults[name]}
    return dict(recipe.config), decode(PretrainSettings, {**recipe.pretrain, **given}, f"{path}: pretrain")


@dataclass(frozen=True)
class _Recipe:
    """A recipe of `kvfold pretrain`."""

    config: Mapping[str, Any] = field(metadata={"help": "Keys of config.json."})
    pretrain: Mapping[str, Any] = field(default_factory=dict)
    about: str = ""


def train_tokenizer(
    sources: Sequence[str],
    facts: TextFacts,
    vocab_size: int,
    positions: int,
    progress: Progress,
    *,
    special: Sequence[str] = (END,),
) -> Path:
    """A byte-level BPE of texts, the first with these `facts`, as transformers reads it: a folder of the cache.

    It is made once. Token 0 ends a document, and begins one; where there are more `special` tokens, 0 pads and 1 ends.
    `positions` is the longest sequence that the model takes.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    identity: list[Any] = [facts.hash, vocab_size, positions]
    if len(sources) > 1 or len(special) > 1:
        identity += [list(special), *(text_facts(source).hash for source in sources[1:])]
    folder = cache_folder() / "tokenizers" / fingerprint(identity)[:32]
    if folder.exists():
        return folder
    progress.say(f"training a tokenizer of {vocab_size:,} tokens on {facts.characters:,} characters")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text for source in sources for text in read_texts(source)), trainer)
    with disk_errors(folder):
        prepare_cache(folder.parent)
        made = folder.with_name(f"{folder.name}.{os.urandom(4).hex()}.tmp")
        try:
            made.mkdir()
            tokenizer.save(str(made / "tokenizer.json"))
            settings = {
                "tokenizer_class": "PreTrainedTokenizerFast",
                **({"bos_token": END} if len(special) == 1 else {}),
                "eos_token": special[min(1, len(special) - 1)],
                "pad_token": special[0],
                "model_max_length": positions,
                "clean_up_tokenization_spaces": False,
            }
            write_json(made / "tokenizer_config.json", settings)
            _rename(made, folder)
        finally:
            shutil.rmtree(made, ignore_errors=True)
    return folder


def _rename(made: Path, folder: Path) -> None:
    """Put a tokenizer in its place; where another process has made the same one meanwhile, that one stays."""
    try:
        made.rename(folder)
    except OSError:
        if not (folder / "tokenizer.json").is_file():
            raise
