"""Packs of fixed shape."""

from __future__ import annotations

from lclm.data.settings import PackSettings

__all__ = ["PackSettings"]
