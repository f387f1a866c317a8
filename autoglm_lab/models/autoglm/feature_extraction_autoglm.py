"""Log-mels of whole sounds, padded with silence to the chunks that a live stream would have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from transformers import BatchFeature, NemotronAsrStreamingFeatureExtractor

from .attachments import flat, read_audio
from .audio_chunks import AudioChunks


class AutoGlmFeatureExtractor(NemotronAsrStreamingFeatureExtractor):
    """The streaming Conformer's front-end for whole sounds.

    Args:
        lookahead_tokens: `config.audio_config.default_num_lookahead_tokens`.
        subsampling_factor: `config.audio_config.subsampling_factor`.
        **kwargs: As NemotronAsrStreamingFeatureExtractor; `feature_size` is `config.audio_config.num_mel_bins`.
    """

    model_input_names = ["input_features", "input_features_mask"]

    def __init__(self, lookahead_tokens: int = 1, subsampling_factor: int = 8, **kwargs: Any) -> None:
        super().__init__(**kwargs)  # type: ignore[no-untyped-call]
        self.lookahead_tokens = lookahead_tokens
        self.subsampling_factor = subsampling_factor

    @classmethod
    def of(
        cls, front_end: NemotronAsrStreamingFeatureExtractor, lookahead_tokens: int | None
    ) -> AutoGlmFeatureExtractor:
        """`front_end` itself, or one with its settings where it is the library's; None keeps its lookahead."""
        if not isinstance(front_end, cls):
            settings = front_end.to_dict()
            settings.pop("feature_extractor_type", None)
            front_end = cls(**settings)
        if lookahead_tokens is not None:
            front_end.lookahead_tokens = lookahead_tokens
        return front_end

    @property
    def chunks(self) -> AudioChunks:
        """How a sound is cut into chunks."""
        return AudioChunks(
            self.lookahead_tokens,
            self.subsampling_factor,
            hop=self.hop_length,
            half_window=self.win_length // 2,
            half_fft=self.n_fft // 2,
        )

    def __call__(self, raw_speech: Any, **kwargs: Any) -> BatchFeature:  # type: ignore[override]
        """Log-mels of 16 kHz mono sounds [samples], each padded with silence to whole chunks.

        Returns:
            input_features [n, frames, mels] and input_features_mask [n, frames], false behind the end of a sound.
        """
        chunks = self.chunks
        sounds: Sequence[np.ndarray] = [read_audio(sound) for sound in flat(raw_speech)]
        padded = [np.pad(sound, (0, max(0, chunks.padded(len(sound)) - len(sound)))) for sound in sounds]
        mels = super().__call__(padded, **kwargs)
        # The library's front-end counts one frame more than it marks as heard.
        frames = max(chunks.frames(chunks.covering(len(sound))) for sound in sounds)
        names = {"input_features": "input_features", "attention_mask": "input_features_mask"}
        return BatchFeature({new: mels[old][:, :frames] for old, new in names.items()})


__all__ = ["AutoGlmFeatureExtractor"]
