"""Worked examples: whole jobs, built from the public interface alone."""

__all__: list[str] = []
