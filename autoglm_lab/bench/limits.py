"""What the hardware allows, measured in the same run: how fast it multiplies, and how fast it reads weights."""

from __future__ import annotations

import time
from typing import Any

import torch

from autoglm_lab.workbench import Workbench


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of one large matrix product."""
    rows, inner, columns = (8192, 4096, 13_696) if device.type == "cuda" else (512, 512, 512)
    left = torch.randn(rows, inner, device=device, dtype=dtype)
    right = torch.randn(inner, columns, device=device, dtype=dtype)
    return 2.0 * rows * inner * columns / seconds_of(device, lambda: left @ right)


def read_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Bytes a second at which a matrix is read to be multiplied with one vector: what decoding is bound by."""
    rows, inner = (65_536, 4096) if device.type == "cuda" else (4096, 1024)
    matrix = torch.randn(rows, inner, device=device, dtype=dtype)
    vector = torch.randn(inner, 1, device=device, dtype=dtype)
    return matrix.nbytes / seconds_of(device, lambda: matrix @ vector)


def prefill_seconds(workbench: Workbench, tokens: int, rate: float) -> float:
    """The least time to read ``tokens`` tokens at ``rate`` operations a second: two for each weight of the layers and
    token, and the products of attention under a causal mask.
    """
    config: Any = workbench.model.config.get_text_config()
    width = config.num_attention_heads * (getattr(config, "head_dim", None) or _head_dim(config))
    attention = 2.0 * tokens * tokens * width * config.num_hidden_layers
    operations = 2.0 * _layer_weights(workbench)[0] * tokens + float(attention)
    return operations / rate


def decode_rate(workbench: Workbench, kv_bytes: float, batch: int, rate: float) -> float:
    """The most tokens a second of ``batch`` conversations at ``rate`` bytes a second: each step reads the layers and
    the head once, and the keys and values of each conversation.
    """
    head: Any = workbench.model.get_output_embeddings()
    nbytes = _layer_weights(workbench)[1] + int(head.weight.nbytes) + batch * kv_bytes
    return batch * rate / nbytes


def _layer_weights(workbench: Workbench) -> tuple[int, int]:
    """Weights of the decoder's layers, and their bytes."""
    model: Any = workbench.model
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    weights = [one for name, one in decoder.named_parameters() if "layers." in name]
    return sum(one.numel() for one in weights), sum(one.nbytes for one in weights)


def _head_dim(config: Any) -> int:
    return int(config.hidden_size // config.num_attention_heads)


def seconds_of(device: torch.device, run: Any, times: int = 10) -> float:
    """Seconds of one run, the mean of ``times`` after a first one."""
    run()
    _wait(device)
    start = time.perf_counter()
    for _ in range(times):
        run()
    _wait(device)
    return (time.perf_counter() - start) / times


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
