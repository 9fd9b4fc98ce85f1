"""The calibration of a conversion: its text, and the answers that the teacher and the method give on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvfold.contracts.effort import EFFORTS
from kvfold.contracts.method import Method
from kvfold.contracts.requests import Alone, Answers, Computed, Question, RecallDrop, Request
from kvfold.contracts.site import Shape
from kvfold.convert.settings import ConvertSettings
from kvfold.disk.checkpoint import Checkpoint
from kvfold.errors import SettingError
from kvfold.formats import size
from kvfold.predict.conversion_cost import conversion_cost
from kvfold.progress import SILENT, Progress, task

if TYPE_CHECKING:
    from kvfold.text.pairs import Corpus
    from kvfold.text.tokens import TokenFile


@dataclass(frozen=True)
class Calibration:
    """The requests of a method, and the text on which they are answered."""

    questions: Sequence[Question]
    tokens: TokenFile | Corpus
    options: ConvertSettings
    hash: str

    @classmethod
    def prepare(
        cls,
        source: Checkpoint,
        method: str,
        questions: Sequence[Question],
        options: ConvertSettings,
        progress: Progress,
    ) -> Calibration | None:
        """Tokenise the text; None if neither method nor repair needs any.

        Raises SettingError if a text is needed and none is given, or if it is too short.
        """
        if not questions and not options.repair:
            return None
        if options.calibration is None:
            raise SettingError(
                f"{method if questions else 'repair'} needs calibration text, and none is given",
                where="convert",
                next="add --calibration TEXT (a file, a folder, a hub data set, stdlib or self)",
            )
        # these load transformers: only for conversions that need calibration
        from kvfold.calibrate.decoder import calibration_hash, check_enough, directions
        from kvfold.text.pairs import check_text, read_tokens, text_tokens

        paired = source.family.encoder_decoder
        check_text(options.calibration, paired=paired)
        source.require_finite(progress)  # before the teacher reads or writes a text
        needed, sampled = directions(source, questions, options.repair or ())
        least = EFFORTS[options.effort].tokens(needed)
        if paired and options.repair:
            least = text_tokens(least, options.calibration)
        chosen = options.calibration_tokens or max(least, sampled)
        tokens = read_tokens(
            options.calibration,
            source.path,
            paired=paired,
            max_tokens=chosen,
            spread=True,
            seed=options.calibration_seed,
            teacher=source.path,
            progress=progress,
        )
        check_enough(needed, tokens)
        return cls(questions, tokens, options, calibration_hash(tokens, options.reading))

    def text(self) -> TokenFile:
        """The text of a decoder. Raises SettingError for the pairs of an encoder-decoder."""
        from kvfold.text.tokens import TokenFile

        if not isinstance(self.tokens, TokenFile):
            raise SettingError("what a window costs is measured only for decoders", where="convert")
        return self.tokens

    def announce(self, source: Checkpoint, student: Shape, progress: Progress) -> None:
        """Say how many tokens are read, and how long that will take."""
        if progress is SILENT:
            return
        from kvfold.convert.estimate import measured_speeds
        from kvfold.text.tokens import TokenFile

        options = self.options
        text, encoded = len(self.tokens), 0
        if not isinstance(self.tokens, TokenFile):
            text, encoded = self.tokens.read_tokens, self.tokens.encoded_tokens
        cost = conversion_cost(
            source.family,
            source.config,
            source.shape,
            student,
            self.questions,
            options.repair or (),
            options.repairing,
            tokens=text,
            encoded=encoded,
            length=options.calibration_length,
            sensitivity_tokens=options.sensitivity_tokens,
        )
        seconds = cost.seconds(measured_speeds(source, cost, options.repairing.length))
        progress.say(
            f"{text + encoded:,} tokens of text, {cost.forward_passes:.1f} forward passes of the teacher over it: "
            f"about {seconds:.0f} s and {size(cost.memory)} of memory"
        )

    def answers(self, source: Checkpoint, method: Method[Any], config: Any, progress: Progress) -> Answers:
        """Answer all requests: the moments of one pass first, then what is computed or measured with them."""
        from kvfold.calibrate.decoder import calibrate
        from kvfold.calibrate.sensitivity import measure

        moments = [each for each in self.questions if isinstance(each, Request)]
        alone = [each for each in self.questions if isinstance(each, Alone)]
        recalls = [each for each in self.questions if isinstance(each, RecallDrop)]
        sites = sorted(each.site for each in self.questions if isinstance(each, Computed))
        reading = self.options.reading
        answers = dict(calibrate(source, moments, self.tokens, reading, progress=progress))
        if alone:
            answers |= measure(source, method, config, alone, answers, self.tokens, reading, progress=progress)
        if recalls:
            from kvfold.calibrate.recall import measure_recall

            answers |= measure_recall(source, recalls, self.text(), progress=progress)
        if sites:
            with task(progress, "computing", len(sites), "sites"):
                for site in sites:
                    answers[Computed(site)] = method.compute(site, source.roles(site), answers, config)
                    progress.advance(1)
        return answers
