"""Which work of a GPU uses one module's weights: what has to wait for them to come, what they have to wait for."""

from __future__ import annotations

import torch


class Streams:
    """The streams that ran one module. On a CPU machine there are none and nothing waits.

    Attributes:
        arriving: when weights that are being copied will be there; None: they are.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._cuda = device, device.type == "cuda"
        self.arriving: torch.cuda.Event | None = None
        self._last: dict[int, torch.cuda.Event] = {}

    def enter(self) -> None:
        """A forward begins on the current stream: it waits for weights on their way."""
        arriving = self.arriving
        if arriving is None or torch.cuda.is_current_stream_capturing():
            return
        if arriving.query():
            self.arriving = None
        else:
            torch.cuda.current_stream(self._device).wait_event(arriving)

    def leave(self) -> None:
        """A forward has been given to the current stream."""
        # A captured graph is replayed later, when no hook runs: who replays it answers for its stream.
        if not self._cuda or torch.cuda.is_current_stream_capturing():
            return
        stream = torch.cuda.current_stream(self._device)
        event = self._last.get(stream.cuda_stream)
        if event is None:
            event = self._last[stream.cuda_stream] = torch.cuda.Event(blocking=True)
        event.record(stream)

    def uses(self, after: torch.cuda.Event | None = None) -> tuple[torch.cuda.Event, ...]:
        """What the device has to pass before the weights may go.

        The last forward on each stream, the copy that brings them, and whatever the current and the default stream
        were given so far, since that may use the weights without a forward.

        Args:
            after: take this instead of those two streams: for who knows that nothing after it uses the weights.
        """
        if not self._cuda:
            return ()
        last = tuple(self._last.values())
        arriving = () if self.arriving is None else (self.arriving,)
        if after is not None:
            return (*last, *arriving, after)
        marks = []
        for stream in {torch.cuda.current_stream(self._device), torch.cuda.default_stream(self._device)}:
            mark = torch.cuda.Event(blocking=True)
            mark.record(stream)
            marks.append(mark)
        return (*last, *arriving, *marks)
