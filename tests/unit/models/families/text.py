"""Families that read text: dense, and with layers that slide, recur or choose experts."""

from __future__ import annotations

from typing import Any

import transformers as tf
from transformers import PreTrainedConfig

from tests.unit.models.families.family import Family
from tests.unit.models.families.rendering import VOCABULARY

TEXT: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 1,
}


def without(*names: str, **other: Any) -> dict[str, Any]:
    return {name: value for name, value in TEXT.items() if name not in names} | other


def qwen3_next() -> PreTrainedConfig:
    return tf.Qwen3NextConfig(
        **TEXT,
        layer_types=["linear_attention", "full_attention"],
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
    )


def mamba2() -> PreTrainedConfig:
    return tf.Mamba2Config(
        hidden_size=32,
        num_hidden_layers=2,
        vocab_size=VOCABULARY,
        num_heads=8,
        head_dim=8,
        state_size=8,
        n_groups=1,
        chunk_size=8,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=1,
    )


def mamba() -> PreTrainedConfig:
    return tf.MambaConfig(
        hidden_size=32,
        num_hidden_layers=2,
        vocab_size=VOCABULARY,
        state_size=8,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=1,
    )


def jamba() -> PreTrainedConfig:
    return tf.JambaConfig(
        **without("head_dim"),
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        num_experts=2,
        mamba_d_state=8,
        use_mamba_kernels=False,
    )


def zamba2() -> PreTrainedConfig:
    return tf.BambaConfig(
        **without("head_dim"),
        attn_layer_indices=[1],
        mamba_n_heads=16,
        mamba_d_head=8,
        mamba_d_state=8,
        mamba_n_groups=1,
        mamba_chunk_size=8,
    )


def falcon_h1() -> PreTrainedConfig:
    return tf.FalconH1Config(
        **TEXT, mamba_d_ssm=64, mamba_n_heads=8, mamba_d_head=8, mamba_d_state=8, mamba_n_groups=1, mamba_chunk_size=8
    )


def lfm2() -> PreTrainedConfig:
    return tf.Lfm2Config(**without("head_dim"), layer_types=["conv", "full_attention"], conv_L_cache=3)


def gemma2() -> PreTrainedConfig:
    return tf.Gemma2Config(**TEXT, sliding_window=16, query_pre_attn_scalar=16)


def gpt_oss() -> PreTrainedConfig:
    return tf.GptOssConfig(
        **TEXT,
        sliding_window=16,
        num_local_experts=4,
        num_experts_per_tok=2,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    )


def deepseek_v3() -> PreTrainedConfig:
    return tf.DeepseekV3Config(
        **without("head_dim", "num_key_value_heads"),
        num_key_value_heads=4,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=16,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        n_shared_experts=1,
        moe_intermediate_size=32,
        first_k_dense_replace=1,
    )


def phi3() -> PreTrainedConfig:
    return tf.Phi3Config(**without("head_dim"), sliding_window=None)


FAMILIES = (
    Family("Llama", lambda: tf.LlamaConfig(**TEXT), ("text", "head")),
    Family("Llama, tied head", lambda: tf.LlamaConfig(**TEXT, tie_word_embeddings=True), ("text",)),
    Family("Glm4", lambda: tf.Glm4Config(**TEXT), ("text", "head")),
    Family("ChatGLM (Glm)", lambda: tf.GlmConfig(**TEXT), ("text", "head")),
    Family("Qwen2", lambda: tf.Qwen2Config(**without("head_dim")), ("text", "head")),
    Family("Qwen3", lambda: tf.Qwen3Config(**TEXT), ("text", "head")),
    Family("Mistral, sliding", lambda: tf.MistralConfig(**TEXT, sliding_window=16), ("text", "head")),
    Family("Gemma 2", gemma2, ("text",)),
    Family("Phi-3", phi3, ("text", "head")),
    Family(
        "GPT-2",
        lambda: tf.GPT2Config(
            n_embd=64, n_layer=2, n_head=4, vocab_size=VOCABULARY, n_positions=512, bos_token_id=2, eos_token_id=1
        ),
        ("text",),
    ),
    Family("GPT-NeoX", lambda: tf.GPTNeoXConfig(**without("head_dim", "num_key_value_heads")), ("text", "head")),
    Family(
        "Bloom",
        lambda: tf.BloomConfig(
            hidden_size=64, n_layer=2, n_head=4, vocab_size=VOCABULARY, bos_token_id=2, eos_token_id=1, pad_token_id=0
        ),
        ("text",),
    ),
    Family(
        "OPT",
        lambda: tf.OPTConfig(
            hidden_size=64,
            ffn_dim=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            vocab_size=VOCABULARY,
            word_embed_proj_dim=64,
            max_position_embeddings=512,
            pad_token_id=0,
            bos_token_id=2,
            eos_token_id=1,
        ),
        ("text",),
    ),
    Family(
        "Falcon",
        lambda: tf.FalconConfig(
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            vocab_size=VOCABULARY,
            bos_token_id=2,
            eos_token_id=1,
        ),
        ("text",),
    ),
    Family("Mixtral", lambda: tf.MixtralConfig(**TEXT, num_local_experts=4, num_experts_per_tok=2), ("text", "head")),
    Family("Cohere", lambda: tf.CohereConfig(**without("head_dim")), ("text",)),
    Family("DeepSeek-V3", deepseek_v3, ("text", "head")),
    Family("gpt-oss", gpt_oss, ("text", "head")),
    Family("Qwen3-Next", qwen3_next, ("text", "head")),
    Family("LFM2", lfm2, ("text",)),
    Family("Jamba", jamba, ("text", "head")),
    Family("Bamba", zamba2, ("text", "head")),
    Family("Falcon-H1", falcon_h1, ("text", "head")),
    Family("Mamba", mamba, ("text",)),
    Family("Mamba 2", mamba2, ("text", "head")),
)
