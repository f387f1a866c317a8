"""What one group of samples costs: next-token loss on answers, and what the encoders should notice early on.

The two side tasks (what is on each patch, which key sounds in each 80 ms) exist in training only. Without them the
encoders learn nothing until the decoder looks at them, and the decoder looks nowhere until they say something.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import NemotronAsrStreamingFeatureExtractor
from transformers.models.glm.modeling_glm import GlmRMSNorm

from autoglm_lab.models.autoglm import AutoGlmForConditionalGeneration
from recipes.tiny.encode import CHUNKS, COLOUR_CLASS, ID, KEY_CLASS, THING_CLASS

IMAGE_ID, AUDIO_ID = ID["<|image|>"], ID["<|audio|>"]


class LogMel(nn.Module):
    """The shipped front-end on the device: int16 PCM [n, samples] -> log-mels [n, frames, 80], mask [n, frames]."""

    window: torch.Tensor
    filters: torch.Tensor

    def __init__(self, extractor: NemotronAsrStreamingFeatureExtractor) -> None:
        super().__init__()
        self.extractor = extractor
        self.register_buffer("window", torch.hann_window(extractor.win_length, periodic=False), persistent=False)
        self.register_buffer("filters", extractor.mel_filters.clone(), persistent=False)

    @torch.no_grad()
    def forward(self, pcm: torch.Tensor, samples: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        made = self.extractor
        wave = pcm.float() / 32767
        wave = torch.cat([wave[:, :1], wave[:, 1:] - made.preemphasis * wave[:, :-1]], 1)
        spectrum = torch.stft(
            wave,
            made.n_fft,
            made.hop_length,
            made.win_length,
            self.window,
            center=True,
            pad_mode="constant",
            return_complex=True,
        )
        power = spectrum.real**2 + spectrum.imag**2
        mels = torch.log(self.filters @ power + 2**-24).transpose(1, 2)
        frames = pcm.shape[1] // made.hop_length
        chunks = (samples.long() + 1080 + 2559) // 2560
        real = torch.arange(frames, device=pcm.device)[None] < (1 + 8 * (CHUNKS.tokens * chunks - 1))[:, None]
        return mels[:, :frames] * real[..., None], real


class Losses(nn.Module):
    """The model and its training-only heads; `forward` gives the losses of one batch of a group."""

    def __init__(self, model: AutoGlmForConditionalGeneration) -> None:
        super().__init__()
        self.model = model
        seen, heard = model.config.vision_config.hidden_size, model.config.audio_config.hidden_size
        self.things = nn.Linear(seen, len(COLOUR_CLASS) + 1 + len(THING_CLASS) + 1 + 2)
        self.keys = nn.Linear(heard, len(KEY_CLASS) + 1)

    def forward(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """(next-token loss, side loss) of `ids`, `labels`, `blocks` [batch, seq] and the encoders' inputs, if any.

        `pixels` [batch, 224, 224, 3] uint8 with `things` [batch, 196, 4]; `mels` [batch, frames, 80] with `mel_mask`
        and `keys` [batch, tokens].
        """
        core = self.model.model
        ids = batch["ids"].long()
        embeds = core.language_model.embed_tokens(ids)
        side = embeds.new_zeros((), dtype=torch.float32)
        if "pixels" in batch:
            pixels = batch["pixels"].permute(0, 3, 1, 2).float() / 127.5 - 1
            seen = core.vision_tower(pixels)
            embeds = place(embeds, ids == IMAGE_ID, core.vision_projector(seen.pooler_output))
            side = side + self._things(seen.last_hidden_state[:, 1:], batch["things"])
        if "mels" in batch:
            heard = core.audio_tower(
                batch["mels"], attention_mask=batch["mel_mask"], num_lookahead_tokens=1, use_cache=False
            ).last_hidden_state
            embeds = place(embeds, ids == AUDIO_ID, core.audio_projector(heard))
            side = side + F.cross_entropy(self.keys(heard).float().flatten(0, 1), batch["keys"].long().flatten())
        blocks = batch["blocks"]
        length = ids.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=ids.device).tril()
        together = (blocks[:, :, None] == blocks[:, None]) & (blocks[:, :, None] >= 0)
        if torch.is_autocast_enabled(embeds.device.type):
            embeds = embeds.to(torch.get_autocast_dtype(embeds.device.type))
        hidden = core.language_model(
            inputs_embeds=embeds, attention_mask=(together | causal)[:, None], use_cache=False
        ).last_hidden_state
        labels = batch["labels"][:, 1:].long()
        # Only positions with a label need logits; a fixed number, the last ones, keeps shapes independent of data.
        order = torch.arange(1, length, device=ids.device) * (labels != -100)
        at = order.topk(length // 2, dim=1).indices
        picked = hidden.gather(1, at[..., None].expand(-1, -1, hidden.shape[2]))
        logits = self.model.lm_head(picked).float()
        return F.cross_entropy(logits.flatten(0, 1), labels.gather(1, at).flatten(), ignore_index=-100), side

    def _things(self, patches: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        guess = self.things(patches).float().flatten(0, 1)
        colours, things = len(COLOUR_CLASS) + 1, len(THING_CLASS) + 1
        target = targets.flatten(0, 1)
        there = (target[:, 1] > 0).float()
        away = F.smooth_l1_loss(guess[:, -2:], target[:, 2:].float() / 8, reduction="none").mean(-1)
        return (
            F.cross_entropy(guess[:, :colours], target[:, 0].long())
            + F.cross_entropy(guess[:, colours : colours + things], target[:, 1].long())
            + (away * there).sum() / there.sum().clamp(min=1)
        )


def slim_norms(model: AutoGlmForConditionalGeneration) -> None:
    """Training only: norms in one kernel each and in the activations' dtype, where autocast would go through float32.

    Under autocast most of a step's time is spent moving float32 activations of norms and residuals.
    """

    def layer_norm(self: nn.LayerNorm, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)

    def rms_norm(self: Any, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return F.rms_norm(x, (x.shape[-1],), self.weight.to(x.dtype), self.variance_epsilon)

    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.forward = MethodType(layer_norm, module)  # type: ignore[method-assign]
        elif isinstance(module, GlmRMSNorm):
            module.forward = MethodType(rms_norm, module)  # type: ignore[method-assign]

    def to_half(_module: nn.Module, _args: Any, output: torch.Tensor) -> torch.Tensor:
        kind = output.device.type
        return output.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else output

    model.model.vision_tower.encoder.embeddings.register_forward_hook(to_half)


def place(embeds: torch.Tensor, where: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """Put features [batch, n, hidden] into the first n places of each row; no shape depends on the data."""
    order = (where.long().cumsum(1) - 1).clamp(0, features.shape[1] - 1)
    return torch.where(
        where[..., None],
        features.gather(1, order[..., None].expand(-1, -1, features.shape[2])).to(embeds.dtype),
        embeds,
    )
