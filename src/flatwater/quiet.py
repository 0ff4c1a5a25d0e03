"""Running what has much to say about this machine without hearing it."""

from __future__ import annotations

import contextlib
import io
import os
import warnings
from collections.abc import Iterator

__all__ = ["quiet"]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Import Paddle without what it has to say about this machine: no ccache, more than one thread."""
    os.environ.setdefault("GLOG_minloglevel", "2")  # errors only, from its C++ side
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
