"""The errors of this library.

BMInfError
├── ArgumentError (ValueError)       an argument that cannot be accepted
│   └── UnknownKeywordError (TypeError)
├── BudgetError                      the memory limit cannot be kept
│   └── NothingToStreamError (UnsupportedModelError)
├── CheckpointError                  a wrong or damaged file on disk
├── KernelError                      a CUDA kernel that cannot be found, compiled or launched
├── OffloadError                     memory or a file for streamed blocks that fails
├── RankError                        of several ranks, one that has failed or is missing
└── UnsupportedModelError            a model, or a use of one, that cannot be streamed
"""

from __future__ import annotations


class BMInfError(Exception):
    """Base of all errors of this library."""


class ArgumentError(BMInfError, ValueError):
    """An argument is not acceptable; the message says what is."""


class UnknownKeywordError(ArgumentError, TypeError):
    """A keyword argument that the function does not have."""


class BudgetError(BMInfError):
    """The memory limit is too small for the model; the message gives both numbers."""


class CheckpointError(BMInfError):
    """A checkpoint or configuration file is missing, damaged or of an unknown layout."""


class KernelError(BMInfError):
    """A CUDA kernel could not be found, compiled or launched."""


class OffloadError(BMInfError):
    """Host memory or a file for streamed blocks could not be created, written or read."""


class RankError(BMInfError):
    """Of the ranks that compute a model together, one has failed; the message says which."""


class UnsupportedModelError(BMInfError):
    """The model, or what was asked of it, is not compatible with streaming."""


class NothingToStreamError(BudgetError, UnsupportedModelError):
    """The memory limit is below the size of a model that has no blocks, so that all has to stay."""
