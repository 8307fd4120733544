"""Small quantised model folders: by the libraries where they run on a CPU, else by numpy from the layout.

Every writer returns nothing but a folder; what it should decode to is the library's word, or `values_of`.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from damage import read_shard, write_shard
from safetensors.torch import load_file, save_file

from fastmerge.checkpoint import Checkpoint, open_checkpoint
from fastmerge.checkpoint.coded import CodedInfo
from fastmerge.quant import recognise

DOWN = "model.layers.1.mlp.down_proj"

#: Formats that a library writes here too, each as the folder of that name.
WRITTEN = [
    *("nf4", "fp4", "nf4-dq", "fp4-dq", "int4", "int4-g32", "int4-g64", "int4-channel"),
    *("int4-asym", "nvfp4", "mxfp4", "fp8", "fp8-tensor"),
]

ROWS, COLS = 256, 128  # of the widest matrix of the tiny model: intermediate and hidden size

Tensors = dict[str, torch.Tensor]


def write_dense(path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=COLS,
        intermediate_size=ROWS,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(path)


def linears(tensors: Mapping[str, Any]) -> list[str]:
    """The weights of the linear modules of a dense model's blocks."""
    return [n for n in tensors if n.endswith("_proj.weight")]


# ---- any folder ---------------------------------------------------------------------------------

Entry = tuple[str, list[int], bytes]


def copied(path: Path, to: Path) -> Path:
    to = to / "damaged"
    to.mkdir(exist_ok=True)
    for file in path.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return to


def entries_of(path: Path) -> dict[str, Entry]:
    header, data = read_shard(path / "model.safetensors")
    header.pop("__metadata__", None)
    return {n: (e["dtype"], e["shape"], data[slice(*e["data_offsets"])]) for n, e in header.items()}


def write_entries(path: Path, entries: dict[str, Entry]) -> None:
    header, data = {}, b""
    for name, (dtype, shape, content) in entries.items():
        offsets = [len(data), len(data) + len(content)]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        data += content
    write_shard(path / "model.safetensors", header, data)


def opened(path: Path) -> Checkpoint:
    return recognise(open_checkpoint(path))


def coded(model: Checkpoint) -> dict[str, CodedInfo]:
    return {n: t for n, t in model.tensors.items() if isinstance(t, CodedInfo)}


# ---- by the libraries ---------------------------------------------------------------------------


def load(path: Path, **options: Any) -> Any:
    from transformers import LlamaForCausalLM

    options.setdefault("dtype", torch.bfloat16)
    return LlamaForCausalLM.from_pretrained(path, device_map={"": "cpu"}, **options)


def load_dequantised(path: Path) -> Any:
    """The library's own dense model of a folder that it can decode."""
    from transformers import CompressedTensorsConfig

    config = json.loads((path / "config.json").read_text())["quantization_config"]
    if config["quant_method"] == "bitsandbytes":
        return load(path).dequantize(torch.bfloat16)
    if config["format"] == "mixed-precision":  # is decoded by the first use alone
        model = load(path)
        model(torch.arange(2)[None])
        return model
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", UserWarning
        )  # that one attribute of the folder's is replaced
        return load(path, quantization_config=CompressedTensorsConfig(dequantize=True))


def write_bitsandbytes(dense: Path, path: Path, **options: Any) -> None:
    from transformers import BitsAndBytesConfig

    load(dense, quantization_config=BitsAndBytesConfig(**options)).save_pretrained(path)


def _ranges(w: torch.Tensor, args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Least and largest of each group, shaped as the scales."""
    rows, cols = w.shape
    if args.strategy == "block":
        r, c = args.block_structure
        w = torch.nn.functional.pad(w, (0, -cols % c, 0, -rows % r))
        w = w.reshape(-(-rows // r), r, -(-cols // c), c).transpose(1, 2).flatten(2)
    elif args.strategy == "tensor":
        w = w.reshape(1, -1)
    else:
        size = cols if args.strategy == "channel" else args.group_size
        w = w.reshape(rows, cols // size, size)
    return w.amin(-1), w.amax(-1)


def _fused(module: str) -> str:
    """What a module is called together with those that read the same input."""
    parent, _, last = module.rpartition(".")
    return f"{parent}.{'qkv' if last[0] in 'qkv' else 'gate_up' if last[0] in 'gu' else last}"


def write_compressed_tensors(
    dense: Path, path: Path, groups: Mapping[str, Mapping[str, Any]], *, fused: bool = False
) -> None:
    """groups: target -> arguments of its weights, and `act`, those of its inputs. fused: modules that
    runtimes make one of have one scale of the tensor."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        apply_quantization_config,
    )
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    model = load(dense)
    together = _fused if fused else str
    ranges: dict[str, list[torch.Tensor]] = {}  # ends of all weights that have one scale
    for name, module in model.named_modules():
        if name.endswith("_proj"):
            ends = [module.weight.data.min(), module.weight.data.max()]
            ranges.setdefault(together(name), []).extend(ends)
    schemes = {}
    for i, (target, options) in enumerate(groups.items()):
        weights = {k: v for k, v in options.items() if k != "act"}
        act = QuantizationArgs(**options["act"]) if "act" in options else None
        schemes[f"group_{i}"] = QuantizationScheme(
            targets=[target], weights=QuantizationArgs(**weights), input_activations=act
        )
    config = QuantizationConfig(config_groups=schemes, ignore=["lm_head"])
    apply_quantization_config(model, config, show_progress=False)
    for name, module in model.named_modules():
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is None:
            continue
        args, w = scheme.weights, module.weight.data
        overall = None
        if args.strategy == "tensor_group":
            overall = module.weight_global_scale.data = generate_gparam(
                min(ranges[together(name)]), max(ranges[together(name)])
            )
        scale, zero = calculate_qparams(*_ranges(w, args), args, global_scale=overall)
        module.weight_scale.data = scale
        if hasattr(module, "weight_zero_point"):
            module.weight_zero_point.data = zero.to(module.weight_zero_point.dtype)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(path)
    compressor.update_config(str(path))


# ---- by numpy, from the layout ------------------------------------------------------------------


def write_by_hand(
    dense: Path,
    path: Path,
    code: Callable[[str, tuple[int, int], np.random.Generator], Tensors],
    config: Mapping[str, Any] | None,
    files: Mapping[str, Any] | None = None,
) -> None:
    """Replace each linear weight by what `code` gives for its module and shape."""
    tensors: Tensors = {}
    rng = np.random.default_rng(0)
    for name, tensor in load_file(dense / "model.safetensors").items():
        if name in linears([name]):
            tensors |= code(name.removesuffix(".weight"), tuple(tensor.shape), rng)
        else:
            tensors[name] = tensor
    path.mkdir()
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    own = json.loads((dense / "config.json").read_text())
    if config is not None:
        own["quantization_config"] = dict(config)
    (path / "config.json").write_text(json.dumps(own))
    for name, content in (files or {}).items():
        (path / name).write_text(json.dumps(content))


def _words(codes: np.ndarray, axis: int) -> torch.Tensor:
    """Eight codes of 0..15 along `axis` in an int32, the first lowest."""
    codes = np.moveaxis(codes, axis, -1).astype(np.uint32)
    codes = codes.reshape(*codes.shape[:-1], -1, 8) << (4 * np.arange(8, dtype=np.uint32))
    return torch.from_numpy(
        np.ascontiguousarray(np.moveaxis(codes.sum(-1, dtype=np.uint32), -1, axis)).view(np.int32)
    )


def gptq(
    module: str, shape: tuple[int, int], rng: np.random.Generator, *, order: bool = False
) -> Tensors:
    """Version 1, groups of 32; order: columns belong to groups in any order."""
    rows, cols = shape
    groups = cols // 32
    group_of = np.arange(cols, dtype=np.int32) // 32
    if order:
        rng.shuffle(group_of)
    return {
        f"{module}.qweight": _words(rng.integers(0, 16, (cols, rows)), 0),
        f"{module}.qzeros": _words(rng.integers(0, 15, (groups, rows)), 1),
        f"{module}.scales": _scales(rng, (groups, rows)).half(),
        f"{module}.g_idx": torch.from_numpy(group_of),
    }


def awq(module: str, shape: tuple[int, int], rng: np.random.Generator) -> Tensors:
    rows, cols = shape
    order = np.array([0, 2, 4, 6, 1, 3, 5, 7])

    def pack(codes: np.ndarray) -> torch.Tensor:
        return _words(codes.reshape(len(codes), -1, 8)[:, :, order].reshape(codes.shape), 1)

    return {
        f"{module}.qweight": pack(rng.integers(0, 16, (cols, rows))),
        f"{module}.qzeros": pack(rng.integers(0, 16, (cols // 64, rows))),
        f"{module}.scales": _scales(rng, (cols // 64, rows)).half(),
    }


def _scales(rng: np.random.Generator, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.from_numpy(rng.uniform(0.001, 0.01, shape).astype(np.float32))


def _fp8(rng: np.random.Generator, shape: tuple[int, int]) -> torch.Tensor:
    values = torch.from_numpy(rng.normal(0, 20, shape).astype(np.float32))
    return values.to(torch.float8_e4m3fn)


def fp8_block(module: str, shape: tuple[int, int], rng: np.random.Generator) -> Tensors:
    """Blocks of 96 x 48, so that those at both edges are smaller."""
    grid = (-(-shape[0] // 96), -(-shape[1] // 48))
    return {
        f"{module}.weight": _fp8(rng, shape),
        f"{module}.weight_scale_inv": _scales(rng, grid),
        f"{module}.activation_scale": torch.tensor(1.0),
    }


def fp8_exponents(module: str, shape: tuple[int, int], rng: np.random.Generator) -> Tensors:
    tensors = fp8_block(module, shape, rng)
    name = f"{module}.weight_scale_inv"
    exponents = torch.from_numpy(rng.integers(110, 130, tensors[name].shape, dtype=np.uint8))
    return tensors | {name: exponents.view(torch.float8_e8m0fnu)}


def fbgemm(module: str, shape: tuple[int, int], rng: np.random.Generator) -> Tensors:
    return {
        f"{module}.weight": _fp8(rng, shape),
        f"{module}.weight_scale": _scales(rng, (shape[0], 1)),
        f"{module}.input_scale_ub": torch.tensor([1200.0]),
    }


def modelopt_fp8(module: str, shape: tuple[int, int], rng: np.random.Generator) -> Tensors:
    return {
        f"{module}.weight": _fp8(rng, shape),
        f"{module}.weight_scale": torch.tensor(0.003),
        f"{module}.input_scale": torch.tensor(0.1),
    }


def modelopt_nvfp4(module: str, shape: tuple[int, int], rng: np.random.Generator) -> Tensors:
    rows, cols = shape
    codes = torch.from_numpy(rng.integers(0, 256, (rows, cols // 2), dtype=np.uint8))
    return {
        f"{module}.weight": codes,
        f"{module}.weight_scale": _scales(rng, (rows, cols // 16)).mul(1e4).to(torch.float8_e4m3fn),
        f"{module}.weight_scale_2": torch.tensor(float(rng.uniform(1e-5, 1e-4))),
        f"{module}.input_scale": torch.tensor(0.1),
    }


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False, "desc_act": False}
AWQ = {
    "quant_method": "awq",
    "bits": 4,
    "group_size": 64,
    "zero_point": True,
    "version": "gemm",
    "modules_to_not_convert": None,
}
FP8 = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [96, 48],
}
FBGEMM = {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}
MODELOPT_FP8 = {"quant_method": "modelopt", "quant_algo": "FP8"}
MODELOPT_NVFP4 = {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16}
TOKENS = {
    "num_bits": 8,
    "type": "float",
    "strategy": "token",
    "dynamic": True,
    "symmetric": True,
}

INT4 = {"num_bits": 4, "type": "int", "strategy": "group"}
NVFP4 = {
    "num_bits": 4,
    "type": "float",
    "strategy": "tensor_group",
    "group_size": 16,
    "scale_dtype": torch.float8_e4m3fn,
}
MXFP4 = NVFP4 | {"strategy": "group", "group_size": 32, "scale_dtype": torch.uint8}
CT_FP8 = {"num_bits": 8, "type": "float", "act": TOKENS}

#: Folder -> how it is written, given the dense model and its own path.
FOLDERS: dict[str, Callable[[Path, Path], None]] = {}


def _bnb(name: str, **options: Any) -> None:
    FOLDERS[name] = lambda dense, path: write_bitsandbytes(dense, path, **options)


def _ct(name: str, **groups: Mapping[str, Any]) -> None:
    FOLDERS[name] = lambda dense, path: write_compressed_tensors(dense, path, groups)


def _hand(
    name: str,
    code: Callable[..., Tensors],
    config: Mapping[str, Any] | None,
    files: Mapping[str, Any] | None = None,
) -> None:
    FOLDERS[name] = lambda dense, path: write_by_hand(dense, path, code, config, files)


_bnb(
    "nf4",
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_compute_dtype=torch.bfloat16,
)
_bnb("fp4", load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)
_bnb(
    "nf4-dq",
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.bfloat16,
)
_bnb(
    "fp4-dq",
    load_in_4bit=True,
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.bfloat16,
)
_bnb(
    "nf4 stored as bfloat16",
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_quant_storage="bfloat16",
)
_bnb("int8", load_in_8bit=True)
_ct("int4", Linear=INT4 | {"group_size": 128})
_ct("int4-g32", Linear=INT4 | {"group_size": 32})
_ct("int4-g64", Linear=INT4 | {"group_size": 64})
_ct("int4-channel", Linear=INT4 | {"strategy": "channel"})
_ct("int4-asym", Linear=INT4 | {"group_size": 128, "symmetric": False})
_ct("nvfp4", Linear=NVFP4)
_ct("mxfp4", Linear=MXFP4)
_ct("fp8", Linear=CT_FP8 | {"strategy": "channel"})
_ct("fp8-tensor", Linear=CT_FP8 | {"strategy": "tensor"})
_ct("ct fp8 block", Linear=CT_FP8 | {"strategy": "block", "block_structure": [128, 128]})
_ct("ct fp8 naive", Linear={"num_bits": 8, "type": "float", "strategy": "channel"})
_ct(
    "ct mixed",
    **{"Linear": INT4 | {"group_size": 128}, "re:.*down_proj": CT_FP8 | {"strategy": "channel"}},
)
_hand("gptq", gptq, GPTQ)
_hand("gptq v2", gptq, GPTQ | {"checkpoint_format": "gptq_v2"})
_hand("gptq act-order", lambda m, s, r: gptq(m, s, r, order=True), GPTQ | {"desc_act": True})
_hand(
    "gptq side file",
    gptq,
    None,
    {"quantize_config.json": {"bits": 4, "group_size": 32, "desc_act": False}},
)
_hand("awq", awq, AWQ)
_hand(
    "awq side file",
    awq,
    None,
    {"quant_config.json": {"w_bit": 4, "q_group_size": 64, "zero_point": True, "version": "GEMM"}},
)
_hand("fp8 block", fp8_block, FP8)
_hand("fp8 exponents", fp8_exponents, FP8 | {"scale_fmt": "ue8m0"})
_hand("fbgemm", fbgemm, FBGEMM)
_hand("modelopt fp8", modelopt_fp8, MODELOPT_FP8)
_hand("modelopt nvfp4", modelopt_nvfp4, MODELOPT_NVFP4)
_hand(
    "modelopt side file",
    modelopt_nvfp4,
    None,
    {"hf_quant_config.json": {"quantization": {"quant_algo": "NVFP4", "group_size": 16}}},
)
