"""Batches of packs."""

from __future__ import annotations

from lclm.data.settings import DataSettings, PackSettings, SourceSettings, TaskSettings

__all__ = ["DataSettings", "PackSettings", "SourceSettings", "TaskSettings"]
