"""``python -m flatwater`` is the command ``flatwater``."""

from flatwater.cli import main

__all__: list[str] = []

if __name__ == "__main__":
    main()
