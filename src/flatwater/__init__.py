"""Flatwater: batch normalization you can trust from the first training step to the deployed model.

Importing this package imports no framework. ``import flatwater.paddle as fw`` is the front end
for PaddlePaddle; ``flatwater.host.tune()``, before a framework is imported, makes this process fast.
"""

from flatwater import errors, host
from flatwater.errors import FlatwaterError
from flatwater.spec import NormSpec

__all__ = ["FlatwaterError", "NormSpec", "__version__", "errors", "host"]

__version__ = "0.1.0"
