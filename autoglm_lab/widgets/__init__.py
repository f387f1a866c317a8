"""The dashboard: one file a panel, each with its browser side beside it."""

from __future__ import annotations
