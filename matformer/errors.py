"""The exceptions a user or the world can cause; each message is one sentence with the key to change."""


class MatformerError(Exception):
    """Base of all of ours: the doors print the message alone and leave with `exit_code`."""

    exit_code = 2


class ConfigError(MatformerError):
    """A config cannot run as written."""


class DataError(MatformerError):
    """Data are missing, damaged, or not what the config expects."""


class ParcelError(MatformerError):
    """A record handed from one part to the next breaks its contract."""


class ParallelError(MatformerError):
    """Ranks, groups or their agreement are not as the plan says."""

    exit_code = 3


class CheckpointError(MatformerError):
    """A checkpoint cannot be written, found or trusted."""


class TrainingError(MatformerError):
    """A run learns nothing any more."""
