"""What can go wrong, as one tree.

FlatwaterError
├── InputError              a tensor or argument that the call cannot take (also a ValueError)
│   └── SingleValueError    one value per channel in training: no batch statistics exist
├── StatisticsError         running statistics that are NaN, infinite or negative
├── ConfigError             an unknown, misspelt or contradictory setting
├── DataError               a font, corpus, image or label list that cannot be used
├── CheckpointError         a checkpoint or model file that is missing, damaged or of another kind
├── SurgeryError            a model that cannot be changed as asked; it is left as it was
├── ExportError             a model that cannot be exported; nothing was written
│   └── VerificationError   an exported form that does not compute what the model computes
├── DistributedError        a process that died, is late, or does something else than the others
└── BackendError            a kernel or optional package that this machine lacks
    └── LaunchError         a command that cannot be started

Every message is one line: what was wrong, the value received, what to do.
"""

from __future__ import annotations

__all__ = [
    "BackendError",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "DistributedError",
    "ExportError",
    "FlatwaterError",
    "InputError",
    "LaunchError",
    "SingleValueError",
    "StatisticsError",
    "SurgeryError",
    "VerificationError",
]


class FlatwaterError(Exception):
    """The root: catch it to catch everything Flatwater raises on purpose."""


class InputError(FlatwaterError, ValueError):
    """A tensor or argument that the call cannot take."""


class SingleValueError(InputError):
    """One value per channel in training: the variance of a single value says nothing."""


class StatisticsError(FlatwaterError):
    """Running statistics that are NaN, infinite or negative."""


class ConfigError(FlatwaterError, ValueError):
    """An unknown, misspelt or contradictory setting."""


class DataError(FlatwaterError):
    """A font, corpus, image or label list that cannot be used."""


class CheckpointError(FlatwaterError):
    """A checkpoint or model file that is missing, damaged or of another kind."""


class SurgeryError(FlatwaterError):
    """A model that cannot be changed as asked; it is left as it was."""


class ExportError(FlatwaterError):
    """A model that cannot be exported; nothing was written."""


class VerificationError(ExportError):
    """An exported form that does not compute what the model computes."""


class DistributedError(FlatwaterError):
    """A process that died, is late, or does something else than the others."""


class BackendError(FlatwaterError):
    """A kernel or optional package that this machine lacks."""


class LaunchError(BackendError):
    """A command that cannot be started.

    Attributes:
        status: what shells exit with then: 127 where there is no such program, 126 where it cannot be executed.
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status
