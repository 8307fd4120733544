"""Model folders: headers checked, output laid out before work, a crash while writing harmless."""

from fastmerge.checkpoint.companions import companion_files, merged_config
from fastmerge.checkpoint.files import FileIdentity, identity
from fastmerge.checkpoint.folder import Checkpoint, open_checkpoint
from fastmerge.checkpoint.header import Header, TensorInfo, read_header
from fastmerge.checkpoint.layout import (
    Layout,
    OutputTensor,
    ShardLayout,
    parse_size,
    plan_layout,
)
from fastmerge.checkpoint.writer import OutputFolder

__all__ = [
    "Checkpoint",
    "FileIdentity",
    "Header",
    "Layout",
    "OutputFolder",
    "OutputTensor",
    "ShardLayout",
    "TensorInfo",
    "companion_files",
    "identity",
    "merged_config",
    "open_checkpoint",
    "parse_size",
    "plan_layout",
    "read_header",
]
