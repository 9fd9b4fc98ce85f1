"""Quality of an encoder-decoder: loss on targets, distance to the teacher, and its answers, greedily or by beam search.

With answers and targets as strings, over all pairs:

    exact_match = mean of [answer = target]
    cer         = sum of edit distances / characters of the targets      (insertions count, so it may exceed 1)
    bleu        = sacrebleu's corpus BLEU, 0 to 100, with its default tokeniser
    rouge1, rouge2, rougeL = mean F of rouge-score without stemming, 0 to 100

Edit distance is Levenshtein's: insertions, deletions and substitutions cost 1. Answers to questions with passages
have SQuAD's exact match and F1 to the best of the right answers instead (`kvfold.evaluate.squad`), and the share of
the time of each part of the model (`kvfold.evaluate.reader`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kvfold import hf, ranks
from kvfold.evaluate import loss, reader, squad
from kvfold.evaluate.finished import Finished
from kvfold.evaluate.settings import EvaluateSettings
from kvfold.progress import SILENT, Progress, task
from kvfold.text.pairs import UNSEEN, Corpus, PairFile, Row, batched
from kvfold.train import losses

ROUGE = ("rouge1", "rouge2", "rougeL")


def score(
    models: Mapping[str, nn.Module], rows: Sequence[Row], *, batch_size: int, progress: Progress = SILENT
) -> dict[str, Tensor]:
    """Sums over each row's target tokens, as `loss.collect` defines them.

    `models` is a `student`, and a `teacher` where there is one.
    """
    device = next(models["student"].parameters()).device

    def read(part: Sequence[Row]) -> loss.Scored:
        batch = batched(part).to(device)
        counts_BT = batch.target_BT != UNSEEN
        logits = [
            losses.Head.of(model).logits(losses.hidden_states(model, batch)[counts_BT]) for model in models.values()
        ]
        return logits, batch.target_BT[counts_BT], counts_BT.sum(1).tolist()

    parts = _parts(rows, batch_size)
    return loss.collect(parts, read, [sum(len(target) for _, target in part) for part in parts], progress)


def _parts(rows: Sequence[Row], batch_size: int) -> list[Sequence[Row]]:
    return [rows[first : first + batch_size] for first in range(0, len(rows), batch_size)]


# --- answers ---------------------------------------------------------------------------------------------------------


def answers(
    model: Any,
    tokenizer: Any,
    pairs: PairFile,
    settings: EvaluateSettings,
    *,
    beams: int,
    length: int,
    progress: Progress = SILENT,
) -> list[str]:
    """A model's answers to the first `settings.answers` inputs, each cut to `length` tokens, by beam search."""
    device = next(model.parameters()).device
    rows = [(given[:length], target) for given, target in pairs.pairs[: settings.answers]]

    def answer(part: Sequence[Row]) -> list[str]:
        batch = batched(part).to(device)
        generate = hf.FusionInDecoder(model).generate if pairs.answers else partial(hf.generate, model)
        ids_BT = generate(
            batch.input_BS,
            attention_mask=batch.seen_BS.long(),
            num_beams=beams,
            max_new_tokens=settings.answer_tokens,
        )
        return list(tokenizer.batch_decode(ids_BT, skip_special_tokens=True))

    parts = _parts(rows, settings.batch_size)
    with task(progress, f"answers, {beams} beam{'s' if beams > 1 else ''}", len(rows), "pairs"):
        found = ranks.each(parts, answer, progress=progress, amounts=[len(part) for part in parts])
    return [text for texts in found for text in texts]


def judge(answers: Sequence[str], targets: Sequence[str], accepted: Sequence[Sequence[str]] = ()) -> dict[str, float]:
    """The metrics of answers, without those of a library that is not installed; `accepted` are right answers."""
    if accepted:
        named = (("exact_match", squad.exact_match), ("f1", squad.f1))
        return {name: squad.best(metric, answers, accepted) for name, metric in named}
    pairs = [(answer.strip(), target.strip()) for answer, target in zip(answers, targets, strict=True)]
    found = {
        "exact_match": sum(answer == target for answer, target in pairs) / len(pairs),
        "cer": sum(edit_distance(*pair) for pair in pairs) / max(1, sum(len(target) for _, target in pairs)),
    }
    with suppress(ImportError):
        import sacrebleu

        found["bleu"] = float(sacrebleu.corpus_bleu(list(answers), [list(targets)]).score)
    with suppress(ImportError):
        from rouge_score.rouge_scorer import RougeScorer

        scorer = RougeScorer(list(ROUGE))
        scores = [scorer.score(target, answer) for answer, target in zip(answers, targets, strict=True)]
        found |= {name: 100 * sum(row[name].fmeasure for row in scores) / len(scores) for name in ROUGE}
    return found


def edit_distance(one: str, other: str) -> int:
    """Insertions, deletions and substitutions that make one string the other (Levenshtein 1966)."""
    row = list(range(len(other) + 1))
    for number, letter in enumerate(one, 1):
        before, row[0] = row[0], number
        for place, wanted in enumerate(other, 1):
            before, row[place] = row[place], min(row[place] + 1, row[place - 1] + 1, before + (letter != wanted))
    return row[-1]


def measure(
    models: Mapping[str, Any],
    tokenizer_dir: str | Path,
    read: Corpus,
    settings: EvaluateSettings,
    finished: Finished,
    *,
    length: int,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """The metrics of a `student`, compared with a `teacher` if there is one, on corrupted text or on pairs.

    Of pairs, the first `settings.answers` are answered with each number of beams, and the first samples are kept; those
    of sound are not answered.
    """
    with torch.inference_mode():
        rows = list(read.rows(length, settings.seed))
        run = partial(score, models, rows, batch_size=settings.batch_size, progress=progress)
        sums = finished.sums("loss", run)
    own = {who: loss.summary(sums, who, 0) for who in models}
    answered: list[dict[str, str]] = []
    if isinstance(read, PairFile) and not read.sounds and settings.answers and settings.beams:
        tokenizer, pairs = hf.load_tokenizer(tokenizer_dir), read.texts[: settings.answers]
        targets = [target for _, target in pairs]
        answered = [{"input": given, "target": target} for given, target in pairs[: settings.samples]]
        for who, model in models.items():
            for beams in sorted(settings.beams):
                ask = partial(answers, model, tokenizer, read, settings, beams=beams, length=length, progress=progress)
                texts = finished.once(f"{who}: answers, {beams} beams", ask)
                for name, value in judge(texts, targets, read.answers[: settings.answers]).items():
                    own[who].setdefault(name, {})[str(beams)] = value
                if beams == min(settings.beams):
                    answered = [{**row, who: text} for row, text in zip(answered, texts, strict=False)]
        if read.answers:
            for who, model in models.items():
                own[who] |= reader.measure(model, read, settings, length=length)  # times, which one run compares
    return loss.metrics(own, sums) | ({"answered": answered} if answered else {})
