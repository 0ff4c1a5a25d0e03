"""Policies, and what they do to the norm layers of a model."""

from __future__ import annotations

__all__: list[str] = []
