"""A LoRA adapter as PEFT saves it: factors of what weights gain, and tensors that take others' place."""

from __future__ import annotations

import dataclasses
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from fastmerge.checkpoint.coded import CodedInfo, LowRank
from fastmerge.checkpoint.files import FileIdentity, identity, read_json_object
from fastmerge.checkpoint.folder import EMBEDDINGS, HEAD, SINGLE, Checkpoint, list_folder
from fastmerge.checkpoint.header import TensorInfo, read_header
from fastmerge.checkpoint.wording import place, shown
from fastmerge.coding import Coding, Format
from fastmerge.dtypes import DType
from fastmerge.errors import CheckpointError

_T = TypeVar("_T")

ADAPTER = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"

_REMEDY = "merge it into its base with peft's merge_and_unload() and give the result"

PREFIX = "base_model.model."  # of the model inside peft's own
_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<factor>[AB])\.weight")

_FACTOR_TYPES = (DType.F32, DType.F16, DType.BF16)

#: What factors were before training, where that left the base as it is. The first product of other factors
#: was taken out of the base, so that those that were trained belong to a model that is stored nowhere.
_STARTS = ("gaussian", "eva", "orthogonal", "mica")

#: Settings of training and of loading, which do not change what factors mean.
_IDLE = {
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_dropout",
    "lora_ga_config",
    "megatron_core",
    "modules_to_save",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
}

#: Settings that do, when on: what they make of the adapter.
_VARIANTS = {
    "alora_invocation_tokens": "works on some tokens only",
    "fan_in_fan_out": "adapts weights that are stored transposed, [in, out]",
    "layer_replication": "belongs to a model with repeated layers",
    "lora_bias": "has biases of its own",
    "target_parameters": "adapts parameters that are not weights of linear layers",
    "trainable_token_indices": "changes single rows of an embedding",
    "use_dora": "is of DoRA, which also rescales columns",
    "use_qalora": "is of QALoRA, whose factors act on pooled inputs",
}


@dataclass(frozen=True)
class Adapter:
    """One adapter folder, checked as far as it can be without its model.

    low_rank: module -> what is added to its weight. whole: tensor of the model -> what takes its place.
    """

    path: Path
    low_rank: Mapping[str, LowRank]
    whole: Mapping[str, TensorInfo]
    identities: tuple[FileIdentity, ...]


@dataclass(frozen=True)
class _Settings:
    """What factors' shapes and scales follow from: of patterns, the first that matches a module's name."""

    where: str
    rank: int
    alpha: float
    by_root: bool
    ranks: Sequence[tuple[re.Pattern[str], int]]
    alphas: Sequence[tuple[re.Pattern[str], float]]

    def rank_of(self, module: str) -> int:
        return next((r for pattern, r in self.ranks if pattern.match(module)), self.rank)

    def scale_of(self, module: str) -> float:
        """Return what B A is multiplied by."""
        rank = self.rank_of(module)
        alpha = next((a for pattern, a in self.alphas if pattern.match(module)), self.alpha)
        return alpha / math.sqrt(rank) if self.by_root else alpha / rank


def read_adapter(path: Path | str) -> Adapter:
    """Read an adapter's settings and its file's header; no factor is read.

    Raises:
        CheckpointError: no such folder, a kind of adapter that cannot be added to weights, or files that are
            broken or do not fit together; names the file, and the setting or tensor.
    """
    path = Path(path)
    names = list_folder(path)
    for name in (ADAPTER_CONFIG, ADAPTER):
        if name not in names:
            raise CheckpointError(_missing(path, name, names))
    file = path / ADAPTER
    # Before they are read, so that a change while they are is noticed.
    marks = (identity(file), identity(path / ADAPTER_CONFIG))
    settings = _read_settings(path / ADAPTER_CONFIG)
    factors: dict[str, dict[str, TensorInfo]] = {}
    whole: dict[str, TensorInfo] = {}
    for stored, info in read_header(file).tensors.items():
        name = stored.removeprefix(PREFIX)
        if match := _FACTOR.fullmatch(name):
            key, known = match["factor"], factors.setdefault(match["module"], {})
        elif ".lora_" in f".{name}":
            _refuse_factor(info)
        else:
            # What an adapted module holds beside its factors is its inner module's.
            key, known = re.sub(r"\.base_layer(?=\.[^.]+$)", "", name), whole
        if key in known:
            raise CheckpointError(
                f"{place(file)}: tensors {shown(known[key].name)} and {shown(stored)} are for the same "
                f"weight; {_REMEDY}"
            )
        known[key] = info
    if not factors and not whole:
        raise CheckpointError(f"{place(file)} holds no tensors")
    low_rank = {module: _low_rank(module, pair, settings) for module, pair in factors.items()}
    return Adapter(path, low_rank, whole, marks)


def with_adapter(checkpoint: Checkpoint, adapter: Adapter) -> Checkpoint:
    """Return the checkpoint with an adapter's changes: its weights are `CodedInfo`s with low-rank parts.

    Raises:
        CheckpointError: a tensor of the adapter belongs to no tensor of the model, or does not fit it.
    """
    tensors = dict(checkpoint.tensors)
    for name, info in adapter.whole.items():
        tensors[name] = _replaced(name, info, checkpoint)
    tied = _tied_to_head(checkpoint)
    if tied in adapter.whole and HEAD not in tensors:
        # Only the embedding was trained: the head stays what it was tied to.
        tensors[HEAD] = dataclasses.replace(checkpoint.tensors[tied], name=HEAD)
    for module, low in adapter.low_rank.items():
        name = f"{module}.weight"
        if name not in tensors:
            _refuse_unknown(low.a, name, checkpoint)
        tensors[name] = _added(name, tensors[name], low, checkpoint)
    return dataclasses.replace(
        checkpoint,
        tensors=tensors,
        weight_files=[*checkpoint.weight_files, adapter.path / ADAPTER],
        identities=[*checkpoint.identities, *adapter.identities],
        adapter=adapter.path,
    )


# ---- adapter_config.json ------------------------------------------------------------------------


def _missing(path: Path, name: str, names: set[str]) -> str:
    if name == ADAPTER and "adapter_model.bin" in names:
        return (
            f"{place(path)} holds its adapter as 'adapter_model.bin', which is not supported; "
            "load it with peft and save_pretrained() it to get safetensors"
        )
    what = "holds a whole model, not an adapter" if SINGLE in names else "holds no adapter"
    return f"{place(path)} {what}: it has no {name}; give the folder that peft saved"


def _read_settings(path: Path) -> _Settings:
    where = place(path)
    config = read_json_object(path, strict=True)
    kind = config.pop("peft_type", None)
    if kind != "LORA":
        raise CheckpointError(
            f"{where} has peft_type {shown(kind)}; only LORA is supported; {_REMEDY}"
        )
    settings = _Settings(
        where,
        rank=_rank(config.pop("r", None), f"{where}: r"),
        alpha=_number(config.pop("lora_alpha", None), f"{where}: lora_alpha"),
        by_root=_flag(config.pop("use_rslora", None), f"{where}: use_rslora"),
        ranks=_patterns(config.pop("rank_pattern", None), f"{where}: rank_pattern", _rank),
        alphas=_patterns(config.pop("alpha_pattern", None), f"{where}: alpha_pattern", _number),
    )
    start = config.pop("init_lora_weights", True)
    if not isinstance(start, bool | None) and str(start).lower() not in _STARTS:
        raise CheckpointError(
            f"{where} has init_lora_weights {shown(start)}: its training began by changing the base; save it "
            "with peft's path_initial_model_for_weight_conversion to get an adapter for the base as it is"
        )
    bias = config.pop("bias", "none")
    if bias not in ("none", "all", "lora_only"):
        raise CheckpointError(f"{where}: bias must be none, all or lora_only, got {shown(bias)}")
    _check_variants(config, where)
    return settings


def _check_variants(config: Mapping[str, Any], where: str) -> None:
    """Refuse settings that are on and change what the factors mean, or may do so."""
    for key, value in config.items():
        if not value or key in _IDLE:
            continue
        if key in _VARIANTS:
            raise CheckpointError(
                f"{where}: the adapter {_VARIANTS[key]} ({key} is {shown(value)}), which is not supported; "
                f"{_REMEDY}"
            )
        raise CheckpointError(
            f"{where} has an unknown setting {shown(key)}: {shown(value)}; remove it if it does not change "
            f"what the adapter adds to weights, else {_REMEDY}"
        )


def _rank(value: Any, where: str) -> int:
    if type(value) is not int or value < 1:  # bool is an int to Python
        raise CheckpointError(f"{where} must be a whole number above 0, got {shown(value)}")
    return value


def _number(value: Any, where: str) -> float:
    if type(value) not in (int, float) or not abs(value) < 2**64:
        raise CheckpointError(f"{where} must be a number, got {shown(value)}")
    return float(value)


def _flag(value: Any, where: str) -> bool:
    if not isinstance(value, bool | None):
        raise CheckpointError(f"{where} must be true or false, got {shown(value)}")
    return bool(value)


def _patterns(
    value: Any, where: str, check: Callable[[Any, str], _T]
) -> list[tuple[re.Pattern[str], _T]]:
    """Return a map's values by what matches the last components of a module's name."""
    if not isinstance(value, dict | None):
        raise CheckpointError(f"{where} is not a map but {shown(value)}")
    found = []
    for key, of_module in (value or {}).items():
        try:
            with warnings.catch_warnings():  # of what expressions may come to mean
                warnings.simplefilter("ignore")
                pattern = re.compile(rf"(.*\.)?({key})$")
        except (re.error, OverflowError, RecursionError) as error:
            raise CheckpointError(
                f"{where} has {shown(key)}, which is no regular expression ({error})"
            ) from None
        found.append((pattern, check(of_module, f"{where}[{shown(key)}]")))
    return found


# ---- tensors ------------------------------------------------------------------------------------


def _refuse_factor(info: TensorInfo) -> NoReturn:
    what = "of a kind of LoRA that is not supported"
    if ".lora_embedding_" in info.name:
        what = "of an embedding, whose factors are stored transposed, which is not supported"
    elif ".lora_magnitude_vector" in info.name:
        what = "of DoRA, which also rescales columns and is not supported"
    elif info.name.endswith(".lora_B.bias"):
        what = "a bias of its own of the adapter, which is not supported"
    raise CheckpointError(f"{place(info.file)}: tensor {shown(info.name)} is {what}; {_REMEDY}")


def _low_rank(module: str, pair: Mapping[str, TensorInfo], settings: _Settings) -> LowRank:
    for missing, other in (("A", "B"), ("B", "A")):
        if missing not in pair:
            raise CheckpointError(
                f"{place(pair[other].file)}: tensor {shown(pair[other].name)} has no lora_{missing} beside it"
            )
    a, b = pair["A"], pair["B"]
    rank = settings.rank_of(module)
    for info, at in ((a, 0), (b, 1)):
        where = f"{place(info.file)}: tensor {shown(info.name)}"
        if len(info.shape) > 2:
            raise CheckpointError(
                f"{where} is of a convolution ({shown(list(info.shape))}), which is not supported; {_REMEDY}"
            )
        if info.dtype not in _FACTOR_TYPES:
            raise CheckpointError(
                f"{where} is {info.dtype.torch}; factors must be float32, float16 or bfloat16"
            )
        if len(info.shape) != 2 or info.shape[at] != rank:
            wanted = "[rank, in]" if at == 0 else "[out, rank]"
            raise CheckpointError(
                f"{where} is {shown(list(info.shape))}, not {wanted} of the rank {rank} that "
                f"{settings.where} gives it"
            )
    if a.dtype is not b.dtype:
        raise CheckpointError(
            f"{place(a.file)}: tensor {shown(a.name)} is {a.dtype.torch} but {shown(b.name)} is "
            f"{b.dtype.torch}; save both as one type"
        )
    return LowRank(a, b, settings.scale_of(module))


def _tied_to_head(checkpoint: Checkpoint) -> str:
    """Return the embedding that a model's head is tied to, where it is; else an empty text."""
    # Models that do not say so are tied: it is what transformers takes for granted and leaves out.
    if not (checkpoint.config or {}).get("tie_word_embeddings", True):
        return ""
    return next((e for e in EMBEDDINGS if e in checkpoint.tensors), "")


def _replaced(name: str, info: TensorInfo, checkpoint: Checkpoint) -> TensorInfo:
    """Return the adapter's own tensor in place of the model's."""
    old = checkpoint.tensors.get(name)
    if old is None and name != HEAD:  # a head that was tied to the embedding comes into its own
        _refuse_unknown(info, name, checkpoint)
    # More or fewer rows are those of a vocabulary that was resized.
    if old is not None and (
        len(info.shape) != len(old.shape)
        or info.shape[1:] != old.shape[1:]
        or info.dtype.is_merged != old.dtype.is_merged
    ):
        raise CheckpointError(
            f"{place(info.file)}: tensor {shown(info.name)} is {_described(info)} but {shown(name)} is "
            f"{_described(old)} in {place(checkpoint.path)}; the adapter belongs to another model"
        )
    return dataclasses.replace(info, name=name)


def _added(
    name: str, info: TensorInfo | CodedInfo, low: LowRank, checkpoint: Checkpoint
) -> CodedInfo:
    """Return a weight with an adapter's product added to it."""
    if info.shape != (low.b.shape[0], low.a.shape[1]):
        raise CheckpointError(
            f"{place(low.a.file)}: tensors {shown(low.a.name)} and {shown(low.b.name)} are for a weight "
            f"[{low.b.shape[0]}, {low.a.shape[1]}] but {shown(name)} is {shown(list(info.shape))} in "
            f"{place(checkpoint.path)}; the adapter belongs to another model"
        )
    if isinstance(info, CodedInfo):
        return dataclasses.replace(info, low_rank=low)
    if info.dtype not in _FACTOR_TYPES:
        raise CheckpointError(
            f"{shown(name)} in {place(checkpoint.path)} is {info.dtype.torch}, to which "
            f"{place(low.a.file)} cannot be added; convert the model to bfloat16 first"
        )
    coding = Coding(Format.DENSE, info.dtype)
    return CodedInfo(name, info.dtype, info.shape, coding, {"codes": info}, low_rank=low)


def _refuse_unknown(info: TensorInfo, name: str, checkpoint: Checkpoint) -> NoReturn:
    what = f"{place(info.file)}: tensor {shown(info.name)} is for {shown(name)}"
    if name == HEAD:
        raise CheckpointError(
            f"{what}, but in {place(checkpoint.path)} the output head is tied to the embedding; {_REMEDY}"
        )
    raise CheckpointError(
        f"{what}, which {place(checkpoint.path)} does not have; the adapter belongs to another model"
    )


def _described(info: TensorInfo | CodedInfo) -> str:
    return f"{shown(list(info.shape))} {info.dtype.torch}"
