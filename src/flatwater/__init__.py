"""Flatwater: batch normalization you can trust from the first training step to the deployed model.

Importing this package imports no framework. ``import flatwater.paddle as fw`` is the front end
for PaddlePaddle.
"""

from flatwater import errors
from flatwater.errors import FlatwaterError
from flatwater.spec import NormSpec

__all__ = ["FlatwaterError", "NormSpec", "__version__", "errors"]

__version__ = "0.1.0"
