"""One group's batch, loss and backward; a CUDA graph once captured."""

from __future__ import annotations

from typing import Any

import torch

from recipes.tiny.losses import LogMel, Losses
from recipes.tiny.stream import Ring


class GroupStep:
    """Draws a batch of a ring and adds its gradients. `outputs` are the last (next-token loss, side loss)."""

    def __init__(self, losses: Losses, front_end: LogMel, ring: Ring, batch: int, side: float) -> None:
        self.losses, self.front_end, self.ring, self.batch, self.side = losses, front_end, ring, batch, side
        self.group, self.every = ring.group, ring.group.every
        self.device = next(losses.parameters()).device
        self.graph: Any = None
        self.inputs: dict[str, torch.Tensor] = {}
        # Written in place: the graphs share one memory pool, where results do not outlive the next graph.
        self.outputs = torch.zeros(2, device=self.device)

    def run(self) -> None:
        """One batch, forward and backward."""
        self._draw()
        if self.graph is None:
            self._compute()
        else:
            self.graph.replay()

    def capture(self, pool: Any) -> None:
        """Record the graph; the group's work stays eager if something in it cannot be captured."""
        self._draw()
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(2):
                self._compute()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                self._compute()
        except RuntimeError as error:
            print(f"{self.group.name} stays eager: {error}", flush=True)
            return
        self.graph = graph

    def milliseconds(self) -> float:
        """What one run of the group takes on the device."""
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        self.run()
        last.record()
        torch.cuda.synchronize()
        return float(first.elapsed_time(last))

    def _draw(self) -> None:
        """Fill the static inputs with random samples of the ring."""
        rows = torch.randint(self.ring.filled, (self.batch,), device=self.device)
        data = self.ring.data
        drawn = {name: values[rows] for name, values in data.items() if name not in ("pcm", "samples")}
        if self.group.sound:
            drawn["mels"], drawn["mel_mask"] = self.front_end(data["pcm"][rows], data["samples"][rows])
        if not self.inputs:
            self.inputs = drawn
            return
        for name, values in drawn.items():
            self.inputs[name].copy_(values)

    def _compute(self) -> None:
        with torch.autocast(self.device.type, torch.bfloat16, cache_enabled=False):
            loss, side = self.losses(self.inputs)
        (loss * self.group.weight + self.side * side).backward()
        self.outputs.copy_(torch.stack((loss.detach(), side.detach())))
