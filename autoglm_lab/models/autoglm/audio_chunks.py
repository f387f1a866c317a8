"""How many samples, log-mel frames and tokens a stream's chunks hold: the arithmetic that clip and stream share.

The encoder attends in chunks of `lookahead + 1` tokens. A token needs mel frames up to `subsampling` times its index,
and mel frame i needs the samples [160 i - 200, 160 i + 200), so a chunk is complete at a fixed number of samples. Clips
are padded with silence to whole chunks, which is what makes a clip and a live stream of one sound the same tokens.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class AudioChunks:
    """The chunks of a sound at one sampling rate. Lengths in samples, mel frames or tokens as named.

    Source: NVIDIA's cache-aware streaming Conformer as in transformers' NemotronAsrStreamingEncoder.
    """

    lookahead: int
    subsampling: int = 8
    hop: int = 160
    half_window: int = 200
    half_fft: int = 256

    @property
    def tokens(self) -> int:
        """Tokens a chunk."""
        return self.lookahead + 1

    def frames(self, chunks: int) -> int:
        """Mel frames that the first `chunks` chunks take: 1 + 8 lookahead for one, 8 (lookahead + 1) for each more."""
        return 0 if chunks == 0 else 1 + self.subsampling * (self.tokens * chunks - 1)

    def samples(self, chunks: int) -> int:
        """Samples that must have been heard before the first `chunks` chunks can be encoded."""
        return 0 if chunks == 0 else (self.frames(chunks) - 1) * self.hop + self.half_window

    def ready(self, samples: int) -> int:
        """Chunks that can be encoded once `samples` samples were heard."""
        first, step = self.samples(1), self.subsampling * self.tokens * self.hop
        return 0 if samples < first else 1 + (samples - first) // step

    def covering(self, samples: int) -> int:
        """Chunks that a finished sound of `samples` samples takes, the last one padded with silence; 0 for no sound."""
        complete = self.ready(samples)
        return complete + (self.samples(complete) < samples)

    def padded(self, samples: int) -> int:
        """Samples to pad a finished sound to, so that the front-end counts exactly the frames of its chunks."""
        return self.frames(self.covering(samples)) * self.hop

    def num_tokens(self, samples: int) -> int:
        """Tokens of a finished sound of `samples` samples."""
        return self.covering(samples) * self.tokens
