"""Batch norm by the statistics of all ranks, and what carries them between processes."""

from __future__ import annotations

__all__: list[str] = []
