"""Model folders: headers checked, output laid out before work, a crash while writing harmless."""

from fastmerge.checkpoint.adapter import Adapter, read_adapter, with_adapter
from fastmerge.checkpoint.checksum import digest, file_checksum, word_bytes
from fastmerge.checkpoint.companions import companion_files, merged_config
from fastmerge.checkpoint.durable import open_direct
from fastmerge.checkpoint.files import FileIdentity, identity
from fastmerge.checkpoint.folder import EMBEDDINGS, HEAD, Checkpoint, open_checkpoint
from fastmerge.checkpoint.header import Header, TensorInfo, header_digest, read_header
from fastmerge.checkpoint.journal import JOURNAL, Binding, Journal, Part, difference
from fastmerge.checkpoint.layout import (
    Layout,
    OutputTensor,
    ShardLayout,
    parse_size,
    plan_layout,
)
from fastmerge.checkpoint.shards import PartialShards, RemoteJournal
from fastmerge.checkpoint.writer import OutputFolder

__all__ = [
    "EMBEDDINGS",
    "HEAD",
    "JOURNAL",
    "Adapter",
    "Binding",
    "Checkpoint",
    "FileIdentity",
    "Header",
    "Journal",
    "Layout",
    "OutputFolder",
    "OutputTensor",
    "Part",
    "PartialShards",
    "RemoteJournal",
    "ShardLayout",
    "TensorInfo",
    "companion_files",
    "difference",
    "digest",
    "file_checksum",
    "header_digest",
    "identity",
    "merged_config",
    "open_checkpoint",
    "open_direct",
    "parse_size",
    "plan_layout",
    "read_adapter",
    "read_header",
    "with_adapter",
    "word_bytes",
]
