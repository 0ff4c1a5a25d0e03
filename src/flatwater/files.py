"""Files that are written whole or not at all.

A reader of such a file, or a run that goes on after a power cut or on a full disk, finds either what stood
there before or all of what was written: never a part of it.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

__all__ = ["write_whole"]


def write_whole(path: Path, content: str | bytes) -> Path:
    """Put ``content`` (text as UTF-8) at ``path``, through a temporary file in the same folder.

    Folders that are missing are made. What stood at ``path`` stays as it was unless everything was written.

    Returns:
        ``path``.

    Raises:
        OSError: the folder cannot be written to, or the disk is full.
    """
    data = content.encode("utf-8") if isinstance(content, str) else content
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        # mkstemp makes files for their owner's eyes only; a report or model is no secret.
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return path


def _umask() -> int:
    """The process's umask, which can be read only by setting it."""
    current = os.umask(0o022)
    os.umask(current)
    return current
