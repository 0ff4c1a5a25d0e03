"""Which norm for which batch, and what helps batch norm where batches are small."""

from __future__ import annotations

__all__: list[str] = []
