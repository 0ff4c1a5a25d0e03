"""From a model to files that others run, and the proof that all of them compute the same."""

from __future__ import annotations

__all__: list[str] = []
