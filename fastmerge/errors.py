"""What can go wrong, as one line a user can act on.

Messages are lower case and name the value, the place and the remedy. The command line prints them as
they are and exits with status 2.
"""


class MergeError(Exception):
    """Base class of every error that is the caller's to mend."""


class RecipeError(MergeError):
    """The recipe (YAML or parameters) is wrong: names the key, its place and the nearest valid one."""


class CheckpointError(MergeError):
    """A model folder or file is wrong: names the file and what is wrong in it."""


class ReadError(CheckpointError):
    """An input could not be read for a reason outside it, such as a device error: another try may do."""


class ConflictError(MergeError):
    """The inputs do not fit together: names both tensors and both models."""


class NonFiniteError(MergeError):
    """An input holds NaN or infinity: names model, tensor and first flat index."""


class BackendError(MergeError):
    """No backend can run what was asked for: carries the reason of each."""


class DeviceError(MergeError):
    """A GPU failed, or does not exist: carries the driver's reason. What is written is kept."""


class DeviceMemoryError(DeviceError):
    """A GPU has less memory free than was asked of it: names the bytes and the remedy."""


class WorkerError(MergeError):
    """A process or machine with a share of a merge is gone: says which and how. What is written is kept."""
