"""The streaming Conformer as AutoGLM's audio tower, and the state of a sound that is still being heard."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import (
    NemotronAsrStreamingEncoder,
    NemotronAsrStreamingEncoderConfig,
    NemotronAsrStreamingFeatureExtractor,
)
from transformers.cache_utils import DynamicCache
from transformers.models.nemotron_asr_streaming.modeling_nemotron_asr_streaming import (
    NemotronAsrStreamingEncoderBlock,
    NemotronAsrStreamingEncoderCausalConvPaddingCache,
)

from .attachments import SAMPLING_RATE, read_audio
from .audio_chunks import AudioChunks

# Chunks encoded in one forward: bounds what a long packet of a stream takes.
_MAX_CHUNKS = 16


class AutoGlmAudioBlock(NemotronAsrStreamingEncoderBlock):
    """A Conformer block that takes the library's mask of either attention, and rows that see nothing.

    transformers 5.23 reads the eager attention's float mask (0 to attend) as if it were boolean, which inverts it; and
    a padded frame far behind the end of a short sound sees no frame at all, which is NaN in eager attention.
    """

    def forward(  # type: ignore[override]
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        all_masked_rows: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        if attention_mask is not None:
            seen = attention_mask if attention_mask.dtype == torch.bool else attention_mask == 0
            all_masked_rows = ~seen.any(-1)
            attention_mask = seen | all_masked_rows.unsqueeze(-1)
        return super().forward(hidden_states, attention_mask=attention_mask, all_masked_rows=all_masked_rows, **kwargs)


class AutoGlmAudioTower(NemotronAsrStreamingEncoder):
    """Log-mels [n, frames, mels] -> frames of 80 ms [n, tokens, hidden]; whole, or chunk by chunk with its caches."""

    _no_split_modules = ["AutoGlmAudioBlock"]

    def __init__(self, config: NemotronAsrStreamingEncoderConfig) -> None:
        super().__init__(config)
        self.layers = nn.ModuleList(AutoGlmAudioBlock(config, index) for index in range(config.num_hidden_layers))
        self.post_init()  # type: ignore[no-untyped-call]


@dataclass
class AudioStreamState:
    """A sound that is still being heard: samples that wait for their chunk, and the encoder's caches.

    Bounded: less than one chunk and a window of samples, `sliding_window` frames of keys and values, convolution tails.
    """

    pending: NDArray[np.float32] = field(default_factory=lambda: np.zeros(0, np.float32))
    start: int = 0
    """Index of `pending[0]` in the sound, in samples."""
    chunks: int = 0
    """Chunks encoded so far."""
    finished: bool = False
    past_key_values: DynamicCache | None = None
    padding_cache: NemotronAsrStreamingEncoderCausalConvPaddingCache | None = None

    @property
    def samples(self) -> int:
        """Samples heard so far."""
        return self.start + len(self.pending)


def hear(
    tower: AutoGlmAudioTower, pcm: Any, state: AudioStreamState | None = None, *, final: bool = False
) -> tuple[torch.Tensor, AudioStreamState]:
    """Encode what became complete with the next samples of a sound.

    Args:
        pcm: 16 kHz mono samples [any number].
        state: Of the samples before; None begins a sound.
        final: No more will come: pad the last chunk with silence.

    Returns:
        Frames [1, n, hidden], n = 0 while a chunk is incomplete, and the state for the next call.

    Raises:
        ValueError: The sound was finished before.
    """
    state = state or AudioStreamState(
        past_key_values=DynamicCache(config=tower.config),
        padding_cache=NemotronAsrStreamingEncoderCausalConvPaddingCache(),
    )
    if state.finished:
        raise ValueError("this sound was finished with final=True: begin the next one with state=None")
    chunks = AudioChunks(tower.config.default_num_lookahead_tokens, tower.config.subsampling_factor)
    state.pending = np.concatenate([state.pending, read_audio(pcm)])
    ready = chunks.ready(state.samples)
    if final:
        state.finished = True
        ready = chunks.covering(state.samples)
        silence = max(0, chunks.samples(ready) - state.samples)
        state.pending = np.pad(state.pending, (0, silence))
    weight = tower.subsampling.linear.weight
    frames = [weight.new_zeros(1, 0, tower.config.hidden_size)]
    while state.chunks < ready:
        mels = _next_mels(tower.config, chunks, state, min(ready - state.chunks, _MAX_CHUNKS))
        output = tower(
            mels.to(weight.device, weight.dtype),
            past_key_values=state.past_key_values,
            padding_cache=state.padding_cache,
            use_cache=True,
            num_lookahead_tokens=chunks.lookahead,
        )
        frames.append(output.last_hidden_state)
    return torch.cat(frames, dim=1), state


@lru_cache
def front_end(mels: int) -> NemotronAsrStreamingFeatureExtractor:
    """The log-mel front-end at 16 kHz."""
    return NemotronAsrStreamingFeatureExtractor(feature_size=mels, sampling_rate=SAMPLING_RATE)


def _next_mels(
    config: NemotronAsrStreamingEncoderConfig, chunks: AudioChunks, state: AudioStreamState, count: int
) -> torch.Tensor:
    """Log-mels [1, frames, mels] of the next `count` chunks; forgets the samples that no later frame needs."""
    first_frame, next_frame = chunks.frames(state.chunks), chunks.frames(state.chunks + count)
    n = next_frame - first_frame
    centred = state.chunks == 0
    # A centred frame reaches half an FFT to both sides, but its window is zero beyond `half_window`.
    begin = 0 if centred else first_frame * chunks.hop - chunks.half_fft
    length = (n - 1) * chunks.hop + (chunks.half_window if centred else 2 * chunks.half_fft)
    # With no lookahead the second chunk's first window begins before the sound.
    before = max(0, -begin)
    segment = state.pending[max(0, begin) - state.start :][: length - before]
    mels: torch.Tensor = front_end(config.num_mel_bins)(
        np.pad(segment, (before, length - before - len(segment))),
        sampling_rate=SAMPLING_RATE,
        center=centred,
    )["input_features"][:, :n]
    keep = next_frame * chunks.hop - chunks.half_fft - state.start
    state.pending, state.start = state.pending[max(0, keep) :].copy(), state.start + max(0, keep)
    state.chunks += count
    return mels
