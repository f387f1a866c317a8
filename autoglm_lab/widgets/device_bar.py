"""The bar of the whole device: who owns its bytes."""

from __future__ import annotations

from typing import Any

from autoglm_lab.memory.ledger import Ledger
from autoglm_lab.widgets.palette import colour_key, rank, scope
from autoglm_lab.widgets.panel import Host, Panel
from autoglm_lab.widgets.snapshot import Snapshot


def segments(ledger: Ledger) -> list[dict[str, Any]]:
    """The device's rows from the model outwards, so that the process is one piece of the bar."""
    return [
        {
            "name": row.name,
            "kind": row.kind,
            "nbytes": row.nbytes,
            "colour": colour_key(row),
            "scope": scope(row),
            "counts": row.counts,
        }
        for row in sorted(ledger.on("device"), key=rank)
    ]


def bar_state(ledger: Ledger) -> dict[str, Any]:
    """The state of the bar: bytes everywhere, None where the machine cannot tell."""
    return {
        "device": ledger.device,
        "total": ledger.total,
        "process": ledger.process,
        "budget": ledger.budget,
        "segments": segments(ledger),
        "beside": [
            {
                "name": row.name,
                "place": row.place,
                "nbytes": row.nbytes,
                "colour": colour_key(row),
                "counts": row.counts,
            }
            for row in ledger.rows
            if row.place != "device" and row.nbytes
        ],
        "notes": list(ledger.notes),
    }


class DeviceBar(Panel):
    """The whole device by owner, with the process and the budget marked; small owners can be magnified.

    Args:
        card: number of the device, where the model lies on several.
    """

    name = "device_bar"
    of_memory = True

    def __init__(self, host: Host | None = None, *, card: int = 0, **settings: Any) -> None:
        self._card = card
        super().__init__(host, **settings)

    def state_of(self, snapshot: Snapshot) -> dict[str, Any]:
        ledger = snapshot.ledgers[min(self._card, len(snapshot.others))]
        return bar_state(ledger) | {"source": "nvml" if snapshot.on_gpu else "psutil"}
