"""A live sound, packet by packet, is the same tokens as the whole clip."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from autoglm_lab.models.autoglm import AudioChunks, AudioStreamState, AutoGlmForConditionalGeneration, AutoGlmProcessor


def noise(samples: int, seed: int = 0) -> np.ndarray:
    return (0.2 * np.random.default_rng(seed).standard_normal(samples)).astype(np.float32)


def stream(model: AutoGlmForConditionalGeneration, sound: np.ndarray, packets: list[int]) -> torch.Tensor:
    heard, state, at = [], None, 0
    for packet in packets:
        features, state = model.encode_audio_chunk(sound[at : at + packet], state)
        heard.append(features)
        at += packet
    features, _ = model.encode_audio_chunk(sound[at:], state, final=True)
    return torch.cat([*heard, features], dim=1)


@pytest.mark.parametrize("lookahead", [0, 1, 3])
@pytest.mark.parametrize("samples", [1, 150, 1479, 1480, 1481, 4040, 16_000, 23_456, 60_000])
def test_streamed_packets_equal_the_whole_clip(
    autoglm_model: AutoGlmForConditionalGeneration, autoglm_processor: AutoGlmProcessor, lookahead: int, samples: int
) -> None:
    model, processor = autoglm_model, copy.copy(autoglm_processor)
    model.config.audio_config.default_num_lookahead_tokens = lookahead
    processor.feature_extractor = copy.copy(autoglm_processor.feature_extractor)
    processor.feature_extractor.lookahead_tokens = lookahead
    sound = noise(samples, seed=samples)
    whole = model.get_audio_features(**processor.log_mels([sound])).pooler_output
    rng = np.random.default_rng(samples)
    for sizes in ([1, 7, 160], [800, 1600], [5000, 40_000]):
        packets: list[int] = []
        while sum(packets) < samples and len(packets) < 60:
            packets.append(int(rng.choice(sizes)))
        streamed = stream(model, sound, packets)
        assert streamed.shape == (1, processor.num_audio_tokens(samples), whole.shape[-1])
        torch.testing.assert_close(streamed[0], whole, atol=1e-4, rtol=0)


def test_no_sound_is_no_tokens(autoglm_model: AutoGlmForConditionalGeneration) -> None:
    features, state = autoglm_model.encode_audio_chunk(np.zeros(0, np.float32), final=True)
    assert features.shape == (1, 0, 64)
    assert state.finished


def test_a_stream_keeps_a_bounded_state(autoglm_model: AutoGlmForConditionalGeneration) -> None:
    state: AudioStreamState | None = None
    for second in range(12):
        _, state = autoglm_model.encode_audio_chunk(noise(16_000, seed=second), state)
    assert state is not None
    assert state.samples == 12 * 16_000
    assert len(state.pending) < AudioChunks(1).samples(1) + 2560
    assert state.past_key_values is not None
    assert state.past_key_values.layers[0].keys.shape[-2] == 70


def test_a_stream_may_enter_and_leave_inference_mode(autoglm_model: AutoGlmForConditionalGeneration) -> None:
    with torch.inference_mode():
        first, state = autoglm_model.encode_audio_chunk(noise(8000))
    second, _ = autoglm_model.encode_audio_chunk(noise(8000, seed=1), state, final=True)
    sound = np.concatenate([noise(8000), noise(8000, seed=1)])
    whole, _ = autoglm_model.encode_audio_chunk(sound, final=True)
    torch.testing.assert_close(torch.cat([first, second], 1), whole, atol=1e-4, rtol=0)


def test_a_finished_sound_takes_no_more(autoglm_model: AutoGlmForConditionalGeneration) -> None:
    _, state = autoglm_model.encode_audio_chunk(noise(100), final=True)
    with pytest.raises(ValueError, match="begin the next one with state=None"):
        autoglm_model.encode_audio_chunk(noise(100), state)


def test_clips_of_one_batch_do_not_change_one_another(
    autoglm_model: AutoGlmForConditionalGeneration, autoglm_processor: AutoGlmProcessor
) -> None:
    short, long = noise(8_000), noise(16_000 * 9, seed=1)
    for attention in ("sdpa", "eager"):
        autoglm_model.set_attn_implementation(attention)
        together = autoglm_model.get_audio_features(**autoglm_processor.log_mels([short, long])).pooler_output
        alone = [
            autoglm_model.get_audio_features(**autoglm_processor.log_mels([s])).pooler_output for s in (short, long)
        ]
        torch.testing.assert_close(together, torch.cat(alone), atol=1e-4, rtol=0)
        together.sum().backward()
        assert all(weight.grad.isfinite().all() for weight in autoglm_model.model.audio_tower.parameters())


def test_the_attentions_hear_the_same(
    autoglm_model: AutoGlmForConditionalGeneration, autoglm_processor: AutoGlmProcessor
) -> None:
    mels = autoglm_processor.log_mels([noise(30_000)])
    heard = []
    for attention in ("sdpa", "eager"):
        autoglm_model.set_attn_implementation(attention)
        heard.append(autoglm_model.get_audio_features(**mels).pooler_output)
    torch.testing.assert_close(heard[0], heard[1], atol=1e-5, rtol=0)


def test_the_feature_extractor_alone_pads_to_whole_chunks(autoglm_processor: AutoGlmProcessor) -> None:
    mels = autoglm_processor.feature_extractor(noise(16_000), sampling_rate=16_000)
    assert mels["input_features"].shape == (1, 105, 80)
    assert mels["input_features_mask"].all()
    with pytest.raises(ValueError, match="8000"):
        autoglm_processor.feature_extractor(noise(16_000), sampling_rate=8000)


@pytest.mark.parametrize("lookahead", [0, 1, 6, 13])
def test_chunks_cover_every_sample_and_no_chunk_more(lookahead: int) -> None:
    chunks = AudioChunks(lookahead)
    for samples in range(0, 40_000, 37):
        covering = chunks.covering(samples)
        assert chunks.samples(covering) >= samples
        assert covering == 0 or chunks.samples(covering - 1) < samples
        assert chunks.samples(chunks.ready(samples)) <= samples < chunks.samples(chunks.ready(samples) + 1)
