"""Pre-training: a model from a config, with a tokenizer that is trained on its text, in the loop of uptraining.

The result is an ordinary checkpoint. Its lineage holds the number of tokens, which `kvfold uptrain --alpha` reads.
"""

from __future__ import annotations

import dataclasses
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from kvfold import hf, ranks
from kvfold.contracts.site import Shape
from kvfold.disk.checkpoint import FORMAT, save_model
from kvfold.disk.output import (
    MANIFEST,
    Output,
    cache_folder,
    check_apart,
    disk_errors,
    fingerprint,
    prepare_cache,
    write_json,
)
from kvfold.disk.record_commit import versions
from kvfold.disk.sidecar import tokenizer_identity
from kvfold.disk.source import read_config
from kvfold.errors import SettingError
from kvfold.families import family_of
from kvfold.progress import SILENT, Progress
from kvfold.settings import decode, read_yaml
from kvfold.text.documents import TextFacts, read_texts, text_facts
from kvfold.text.pairs import Corpus, Pairs, check_text, read_tokens
from kvfold.text.tokens import TokenFile
from kvfold.train import losses
from kvfold.train.loop import Work, parameter_groups, train, train_into
from kvfold.train.placing import blocks_of, place_fresh
from kvfold.train.settings import PretrainSettings

END = "<|endoftext|>"  # token 0: between documents, and before the first
IDS: Mapping[str, int | None] = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
PAIRED_IDS: Mapping[str, int | None] = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
PAIRED = ("<pad>", "</s>", *(f"<extra_id_{number}>" for number in range(100)))  # of an encoder-decoder, as in T5


def pretrain(
    config: str | Path | Mapping[str, Any],
    out: str | Path,
    settings: PretrainSettings = PretrainSettings(),
    *,
    overwrite: bool = False,
    progress: Progress = SILENT,
) -> Path:
    """Train a fresh model of a `config.json` into `out`, and return its path.

    `config` may also be a recipe: a YAML file with `config` (the same keys) and `pretrain` (settings, which those of
    `settings` override unless they are at their defaults). The tokenizer is a byte-level BPE, as large as the config's
    vocabulary. An encoder-decoder learns span corruption, and its tokenizer has sentinels.

    Raises SettingError, DataError or UnsupportedModel before anything is written, TrainingError if the run diverges,
    and Interrupted on a signal: the same call then continues.
    """
    given = None if isinstance(config, Mapping) else config
    config, settings = _read(config, settings)
    texts = (settings.data, *settings.tokenizer_data)
    for text in texts:
        check_apart(out, {"config": given, "data": text})
    family = family_of(config)
    if family.audio:
        raise SettingError("pretrain reads texts, and this model sound", got=config["model_type"])
    shape, paired = family.shape(config), family.encoder_decoder
    special = PAIRED if paired else (END,)
    amount = _check(config, shape, settings, len(special))
    for text in texts:
        check_text(text, paired=paired)
    facts = text_facts(settings.data)
    tokenizer = train_tokenizer(texts, facts, shape.vocab_size, shape.max_positions, progress, special=special)
    tokens = read_tokens(settings.data, tokenizer, paired=paired, progress=progress)
    tokens.check(batch_size=settings.batch_size, length=settings.sequence_length, vocab_size=shape.vocab_size)
    ids = PAIRED_IDS if paired else IDS
    run = _Run({**config, **ids}, ids, shape.parameters, amount, tokenizer, tokens, facts.hash)

    def make(settings: PretrainSettings, output: Output) -> None:
        ranks.everywhere(_train, run, settings, output.work, output.path.name, output.inputs, progress=progress)

    return train_into(out, settings, run.identity, make, source="config", overwrite=overwrite, progress=progress)


@dataclass(frozen=True)
class _Run:
    """What is trained, and on what: all that is read before the output is claimed."""

    config: Mapping[str, Any]
    ids: Mapping[str, int | None]  # of special tokens
    parameters: int
    amount: int  # tokens
    tokenizer: Path
    tokens: TokenFile | Corpus
    text: str  # hash

    def identity(self, settings: PretrainSettings) -> dict[str, Any]:
        """The settings and inputs that decide the weights."""
        return {**settings.identity(), "stage": "pretrain", "config": self.config, "text": self.text}


def _train(run: _Run, settings: PretrainSettings, work: Path, name: str, inputs: str, *, progress: Progress) -> None:
    """Train on every rank, and save the model as the root of its own lineage."""
    model = hf.build(run.config, seed=settings.seed, attention=hf.ATTENTION)
    family, architecture = family_of(run.config), type(model).__name__
    root = place_fresh(model, blocks_of(model, family, family.shape(run.config)), settings)
    named = dict(model.named_parameters())

    def objective(batch: Tensor | Pairs, done: float) -> tuple[Tensor, dict[str, Tensor]]:
        read, target_BT, counts_BT = losses.parted(batch)
        counted = slice(None) if counts_BT is None else counts_BT
        h_BTD, targets = losses.hidden_states(model, read), batch.targets if isinstance(batch, Pairs) else None
        return losses.token_losses(
            h_BTD[counted], losses.Head.of(model), target_BT[counted], {"ce": 1.0}, targets=targets
        )

    steps = math.ceil(run.amount / settings.step_tokens)
    stretch = Work("ce", steps, objective, lambda: parameter_groups(named, settings.weight_decay))
    position = train(root, [stretch], run.tokens, settings, work, progress)
    # state_dict of a T5 holds its one embedding three times
    tied = getattr(model, "all_tied_weights_keys", {})
    found = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    state = {name: ranks.whole(tensor.detach()).cpu() for name, tensor in found.items()}
    if not ranks.current().main:
        return
    shutil.copytree(run.tokenizer, work, dirs_exist_ok=True)
    write_json(work / "generation_config.json", {**run.ids, "pad_token_id": 0})
    step = {
        "stage": "pretrain",
        "settings": {**dataclasses.asdict(settings), "text": run.text},
        "source": None,
        "calibration": None,
        "tokens": position.tokens,
        "seed": settings.seed,
        "versions": versions(),
        "wall_seconds": position.seconds,
    }
    config = {**run.config, "architectures": [architecture]}
    hashed = save_model(work, config=config, state=state, lineage={})
    lineage = {
        "format": FORMAT,
        "inputs": inputs,
        "hash": hashed,
        "root": {"hash": hashed, "name": name, "config": config, "parameters": run.parameters},
        "steps": [step],
        "tokenizer": fingerprint(tokenizer_identity(work)),
    }
    write_json(work / MANIFEST, lineage)


def _check(config: Mapping[str, Any], shape: Shape, settings: PretrainSettings, special: int) -> int:
    """The number of tokens to train on. Raises SettingError for a model that cannot be trained with these settings."""
    if any(isinstance(part, Mapping) and "vocab_size" in part for part in config.values()):
        raise SettingError(
            "a config whose encoder and decoder have vocabularies of their own is not pre-trained",
            where="pretrain",
            got=shape.model_type,
            next="start from a checkpoint, or from a config of t5",
        )
    if shape.vocab_size < special + 256:
        raise SettingError(
            "vocab_size is too small for a byte-level tokenizer",
            where="pretrain",
            got=shape.vocab_size,
            allowed=f"at least {special + 256}",
        )
    settings.check_length(shape, "pretrain")
    settings.pass_rows(ranks.current().world)
    if settings.tokens is None:
        raise SettingError("the number of tokens is not set", where="pretrain", next="give --tokens")
    return settings.tokens


def _read(
    config: str | Path | Mapping[str, Any], settings: PretrainSettings
) -> tuple[dict[str, Any], PretrainSettings]:
    """The model's config, and the settings over those of a recipe."""
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
    """Train a byte-level BPE on texts, the first with these `facts`, or find it in the cache, and return its folder.

    Token 0 starts and ends a document. With several `special` tokens, 0 is padding and 1 ends a document. `positions`
    is the longest sequence of the model.
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
    """Put a tokenizer in its place, unless another process has made the same one in the meantime."""
    try:
        made.rename(folder)
    except OSError:
        if not (folder / "tokenizer.json").is_file():
            raise
