"""Sound files as the input of an encoder: features in an `.npy`, or speech in a `.wav`.

A Whisper reads a log-mel spectrogram `(M, F)` of F frames, two for each position of its encoder's output; transformers'
feature extractor makes it of a waveform, filled up with silence. A `.npy` holds such an array as float32 or float16.
"""

from __future__ import annotations

import io
import wave
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvfold.disk.output import read_object
from kvfold.errors import DataError
from kvfold.families import family_of
from kvfold.inputs import read_bytes

FRAMES = 2  # of a position of the encoder's output
KINDS = (".npy", ".wav")


@dataclass(frozen=True)
class Reader:
    """Reads the sound files of a data set for one checkpoint."""

    folder: Path  # of the checkpoint
    bins: int  # M
    positions: int  # of the encoder's output

    @classmethod
    def of(cls, folder: str | Path) -> Reader | None:
        """The reader for a checkpoint; None for one that reads text, and for a folder of a tokenizer alone."""
        config = read_object(Path(folder) / "config.json")
        if "model_type" not in config or not family_of(config).audio:
            return None
        return cls(Path(folder), config["num_mel_bins"], config["max_source_positions"])

    def features(self, path: Path) -> NDArray[np.float32]:
        """The features `(M, F)` of a file. Raises DataError for a file that does not hold what the encoder reads."""
        if path.suffix.lower() not in KINDS:
            raise DataError("is no sound file", where=path, got=path.suffix or path.name, allowed=" or ".join(KINDS))
        content = read_bytes(path, error=DataError)
        found = self._array(path, content) if path.suffix.lower() == ".npy" else self._speech(path, content)
        wanted = (self.bins, FRAMES * self.positions)
        if found.shape != wanted or not np.issubdtype(found.dtype, np.floating) or not np.isfinite(found).all():
            what = f"{found.dtype} {found.shape}" if np.issubdtype(found.dtype, np.number) else str(found.dtype)
            raise DataError("does not hold features of this model", where=path, got=what, allowed=f"finite {wanted}")
        return found.astype(np.float32)

    def _array(self, path: Path, content: bytes) -> NDArray[Any]:
        try:
            found = np.load(io.BytesIO(content), allow_pickle=False)
        except (ValueError, EOFError, OSError) as error:
            raise DataError("is no array of numpy", where=path, got=str(error)) from error
        return np.asarray(found)

    def _speech(self, path: Path, content: bytes) -> NDArray[Any]:
        """The features of a `.wav`: one channel of 16 bits, at the extractor's rate, no longer than it takes."""
        from kvfold import hf  # imports transformers, which features in files do not need

        extractor = hf.load_extractor(self.folder)
        try:
            with wave.open(io.BytesIO(content)) as sound:
                form = (sound.getnchannels(), 8 * sound.getsampwidth(), sound.getframerate())
                samples = np.frombuffer(sound.readframes(sound.getnframes()), dtype="<i2") if form[1] == 16 else None
        except (wave.Error, EOFError, ValueError) as error:
            raise DataError("is no .wav file", where=path, got=str(error)) from error
        wanted = (1, 16, extractor.sampling_rate)
        if samples is None or form != wanted:
            raise DataError(
                "has another format",
                where=path,
                got="{} channels, {} bits, {} Hz".format(*form),
                allowed="{} channel, {} bits, {} Hz".format(*wanted),
                next=f"ffmpeg -i {path.name} -ac 1 -ar {extractor.sampling_rate} -c:a pcm_s16le OUT.wav",
            )
        if len(samples) > extractor.n_samples:
            raise DataError(
                "is too long",
                where=path,
                got=f"{len(samples) / extractor.sampling_rate:.1f} s",
                allowed=f"{extractor.n_samples / extractor.sampling_rate:g} s",
                next="cut it",
            )
        made = extractor(samples.astype(np.float32) / (1 << 15), sampling_rate=wanted[-1], return_tensors="np")
        return np.asarray(made["input_features"][0])


@dataclass(frozen=True)
class Clip:
    """One sound file of a data set, read when a batch needs it. Its length is that of the encoder's output."""

    path: Path
    reader: Reader

    def __len__(self) -> int:
        return self.reader.positions

    def __getitem__(self, tokens: slice) -> Clip:
        """The whole clip: an encoder of sound reads no less."""
        return self

    def features(self) -> NDArray[np.float32]:
        """The features `(M, F)`."""
        return self.reader.features(self.path)
