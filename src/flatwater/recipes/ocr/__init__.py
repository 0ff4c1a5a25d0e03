"""Chinese text lines, from fonts to a deployed recogniser. Importing this package imports nothing heavy."""

__all__: list[str] = []
