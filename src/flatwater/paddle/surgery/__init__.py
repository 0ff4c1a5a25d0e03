"""Changing a model's norm layers: converted, frozen, recalibrated, folded."""

from __future__ import annotations

__all__: list[str] = []
