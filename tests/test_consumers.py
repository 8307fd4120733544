"""What a merge stores in a few bits is what its readers take it for, and what their libraries would write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import quant_folders as by_library
import torch
from consumers import (
    BITSANDBYTES,
    COMPRESSED,
    ERROR,
    GGUF,
    UNREAD,
    Merges,
    Model,
    apart,
    coded,
    dequantised,
    loaded,
    logits,
    needs,
    of_state,
    passthrough,
    tiny_model,
)
from families import load, same_bits

import fastmerge
from fastmerge.quant.policy import Rules
from fastmerge.quant.quantize import Quantize

READ = [*BITSANDBYTES, *COMPRESSED, *GGUF]

pytestmark = [
    # bitsandbytes' import compiles functions in a way that torch no longer recommends.
    pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning"),
    # That one attribute of the folder's quantization_config is replaced.
    pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning"),
]


@pytest.fixture(scope="module")
def merges(tmp_path_factory: pytest.TempPathFactory) -> Merges:
    return Merges(tmp_path_factory.mktemp("consumed"))


# ---- what is loaded -----------------------------------------------------------------------------


@pytest.mark.parametrize("format", READ)
def test_parameters_are_those_that_fastmerge_reads(merges: Merges, format: str) -> None:
    model = dequantised(merges.stored(format), format)
    want = merges.decoded(format, "float32" if format in GGUF else "bfloat16")
    found = model.state_dict()
    assert found.keys() == want.keys()
    for name, tensor in want.items():
        # bitsandbytes' decoder gives FP4's second zero a sign that its table has not.
        assert same_bits(found[name] + 0, tensor + 0), name


@pytest.mark.parametrize("format", [*READ, *UNREAD])
def test_parameters_are_near_the_merge(merges: Merges, format: str) -> None:
    dense = load(merges.dense())
    for name, tensor in merges.decoded(format, "bfloat16").items():
        if name in coded(dense):
            error = apart(tensor, dense[name])
            assert error < ERROR[format], name
            assert error > 0 or format == "gguf-bf16", name
        elif format not in GGUF or tensor.ndim == 1:
            assert same_bits(tensor, dense[name]), name


#: Distance of logits from those of the dense model of the same values. bitsandbytes computes in its own
#: kernel and order; the readers of FP8 code activations too; all others compute as dense models do.
KERNELS = dict.fromkeys(READ, 1e-6) | dict.fromkeys(BITSANDBYTES, 0.02)
KERNELS |= {"fp8": 0.08, "fp8-tensor": 0.08}


@pytest.mark.parametrize("format", READ)
def test_logits_are_those_of_the_values(merges: Merges, format: str) -> None:
    dtype = torch.float32 if format in GGUF else torch.bfloat16
    model = _as_users_load(merges.stored(format), format)
    found = logits(model)
    values = merges.decoded(format, str(dtype).removeprefix("torch."))
    want = logits(of_state(values, merges.dense(), dtype))
    assert torch.isfinite(found).all()
    assert apart(found, want) < KERNELS[format]
    assert apart(found, logits(loaded(merges.dense()))) < 3 * ERROR[format] + 0.02


def _as_users_load(folder: Path, format: str) -> Model:
    # The default route wants zero points that are not packed.
    if format == "int4-asym" or format in GGUF:
        return dequantised(folder, format)
    needs(format)
    return loaded(folder)


Q = Quantize
DOWN = "*.down_proj"
RULES = [
    *(
        Q("nf4", Rules(keep=[DOWN])),
        Q("nf4", Rules(head="same")),
        Q("fp4-dq", Rules(keep=["model.layers.0.*"])),
    ),
    *(Q("int4", Rules(keep=[DOWN])), Q("int4", Rules(head="q8")), Q("int4", Rules(head="same"))),
    *(Q("int4", Rules(overrides={DOWN: "fp8"})), Q("nvfp4", Rules(overrides={DOWN: "mxfp4"}))),
    *(Q("mxfp4", Rules(quantize=["lm_head"])), Q("fp8", Rules(keep=["model.layers.0.*"]))),
    *(Q("nf4", rounding="mse"), Q("int4", rounding="mse"), Q("nvfp4", rounding="mse")),
]


@pytest.mark.parametrize("quantize", RULES, ids=[f"{q.format}-{i}" for i, q in enumerate(RULES)])
def test_rules_are_what_readers_are_told(
    merges: Merges, tmp_path: Path, quantize: Quantize
) -> None:
    fastmerge.merge(merges.root / "ties.yaml", tmp_path / "out", quantize=quantize)
    check_loads(tmp_path, quantize.format)


F16, F32 = torch.float16, torch.float32
#: Of Qwen 3 transformers takes heads to be of 128 rows, whatever a GGUF file says; FP4 it decodes to BF16.
VARIANTS = [
    *(("llama", f, {"tie_word_embeddings": True}) for f in ("nf4", "int4", "q4_0")),
    *(("qwen2", f, {}) for f in ("nf4-dq", "int4-g32", "nvfp4", "q4_k")),
    *(
        ("qwen3", f, {"head_dim": 128, "tie_word_embeddings": True})
        for f in ("fp4", "mxfp4", "q8_0")
    ),
    *(("llama", f, {"dtype": F16}) for f in ("nf4", "int4", "fp8", "q4_1")),
    *(("llama", f, {"dtype": F32}) for f in ("fp4-dq", "int4-asym", "fp8-tensor", "gguf-f16")),
]


@pytest.mark.parametrize(("kind", "format", "options"), VARIANTS, ids=str)
def test_other_models_are_loaded(
    tmp_path: Path, kind: str, format: str, options: dict[str, Any]
) -> None:
    for seed, name in enumerate("ab"):
        tiny_model(seed, kind, **options).save_pretrained(tmp_path / name)
    models = [{"model": f"{tmp_path}/{n}", "parameters": {"weight": 0.5}} for n in "ab"]
    recipe = {"merge_method": "linear", "models": models}
    fastmerge.merge(recipe, tmp_path / "out", quantize=format)
    check_loads(tmp_path, format)


def check_loads(root: Path, format: str) -> None:
    """The library's parameters are fastmerge's, and the model computes with them."""
    model = dequantised(root / "out", format)
    dtype = model.dtype
    fastmerge.merge(passthrough(root / "out", str(dtype).removeprefix("torch.")), root / "read")
    values, found = load(root / "read"), model.state_dict()
    left = {
        n for n in found.keys() - values.keys() if "_proj.weight_" not in n
    }  # beside the values
    assert left <= {"lm_head.weight", "lm_head.weight_scale"} and found.keys() >= values.keys()
    for name, tensor in values.items():
        assert same_bits(found[name] + 0, tensor + 0), name
    assert torch.isfinite(logits(model)).all()
    if format not in GGUF and format != "int4-asym":
        assert apart(logits(loaded(root / "out")), logits(model)) < KERNELS[format]


@pytest.mark.huge
@pytest.mark.parametrize("format", GGUF)
def test_llama_cpp_computes_with_the_values(tmp_path: Path, format: str) -> None:
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is the reader here")
    from gguf_models import byte_level, save_tokenizer

    for seed, name in enumerate("ab"):
        tiny_model(seed, vocab_size=320).save_pretrained(tmp_path / name)
        save_tokenizer(byte_level("gpt-2"), tmp_path / name)
    models = [{"model": f"{tmp_path}/{n}", "parameters": {"weight": 0.5}} for n in "ab"]
    fastmerge.merge({"merge_method": "linear", "models": models}, tmp_path / "out", quantize=format)
    fastmerge.merge(passthrough(tmp_path / "out", "float32"), tmp_path / "read")
    model = of_state(load(tmp_path / "read"), tmp_path / "a", torch.float32)
    file = str(tmp_path / "out" / "model.gguf")
    runtime = llama_cpp.Llama(file, n_ctx=64, logits_all=True, verbose=False)
    runtime.eval(list(range(60)))
    with torch.no_grad():
        want = model(torch.arange(60)[None]).logits[0]
    # It codes activations in 8 bits.
    assert apart(torch.from_numpy(runtime.scores[:60]), want) < 0.05


# ---- what is written ----------------------------------------------------------------------------


def written(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    config = json.loads((folder / "config.json").read_text())
    return load(folder), config["quantization_config"]


@pytest.mark.parametrize("format", BITSANDBYTES)
def test_bitsandbytes_would_write_the_same(merges: Merges, tmp_path: Path, format: str) -> None:
    needs(format)
    by_library.write_bitsandbytes(
        merges.dense(),
        tmp_path,
        load_in_4bit=True,
        bnb_4bit_quant_type=format[:3],
        bnb_4bit_use_double_quant=format.endswith("dq"),
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    (found, config), (want, wanted) = written(merges.stored(format)), written(tmp_path)
    assert found.keys() == want.keys()
    for name, tensor in want.items():
        if (
            ".quant_state." in name
        ):  # ours is followed by spaces where its length is not known before
            assert _text(found[name]).rstrip() == _text(tensor), name
        else:
            assert same_bits(found[name], tensor), name
    assert config == {k: v for k, v in wanted.items() if not k.startswith("_load_in")}


def _text(tensor: torch.Tensor) -> bytes:
    return tensor.numpy().tobytes()


_CT: dict[str, dict[str, Any]] = {
    "int4": by_library.INT4 | {"group_size": 128},
    "int4-g32": by_library.INT4 | {"group_size": 32},
    "int4-g64": by_library.INT4 | {"group_size": 64},
    "int4-channel": by_library.INT4 | {"strategy": "channel"},
    "int4-asym": by_library.INT4 | {"group_size": 128, "symmetric": False},
    "nvfp4": by_library.NVFP4,
    "mxfp4": by_library.MXFP4,
    "fp8": by_library.CT_FP8 | {"strategy": "channel"},
    "fp8-tensor": by_library.CT_FP8 | {"strategy": "tensor"},
}


@pytest.mark.parametrize("format", COMPRESSED)
def test_compressed_tensors_would_write_the_same(
    merges: Merges, tmp_path: Path, format: str
) -> None:
    needs(format)
    groups = {"Linear": _CT[format]}
    by_library.write_compressed_tensors(merges.dense(), tmp_path, groups, fused=True)
    (found, config), (want, wanted) = written(merges.stored(format)), written(tmp_path)
    dense = load(merges.dense())
    assert found.keys() == want.keys()
    for name, tensor in want.items():
        if tensor.dtype is torch.float8_e4m3fn and format.startswith("fp8"):
            # The library rounds quotients to bfloat16 before it rounds them to codes.
            quotients = dense[name].float() / found[f"{name}_scale"].float()
            assert same_bits(quotients.clamp(-448, 448).to(tensor.dtype), found[name]), name
            assert same_bits(quotients.bfloat16().clamp(-448, 448).to(tensor.dtype), tensor), name
        else:
            assert same_bits(found[name], tensor), name
    assert _said(config) == _said(wanted)


def _said(config: Any) -> Any:
    """A quantization_config without what says nothing: keys that are null, and how scales were found."""
    if not isinstance(config, dict):
        return config
    config = {k: _said(v) for k, v in config.items() if k not in ("observer", "version")}
    for group in config.get("config_groups", {}).values():
        group.setdefault("format", config["format"])
    return {k: v for k, v in config.items() if v is not None and v != {}}


#: Format -> what matrices are in the file, and what the embedding and the head are.
_TYPES = {
    **{"q4_0": ("Q4_0", "Q8_0"), "q4_1": ("Q4_1", "Q8_0"), "q4_k": ("Q4_K", "Q8_0")},
    **{"q8_0": ("Q8_0", "Q8_0"), "gguf-mxfp4": ("MXFP4", "Q8_0")},
    **{"gguf-f16": ("F16", "F16"), "gguf-bf16": ("BF16", "BF16")},
}


@pytest.mark.parametrize("format", GGUF)
def test_gguf_would_write_the_same(merges: Merges, format: str) -> None:
    """Blocks are of values in bfloat16; what is not coded was rounded once, to its type in the file."""
    gguf = needs(format)
    rounded = {n: t.float().numpy() for n, t in load(merges.dense()).items()}
    exact = {n: t.numpy() for n, t in merges.exact().items()}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    sources = {names.get_name(n, try_suffixes=(".weight",)): n for n in rounded}
    tensors = gguf.GGUFReader(merges.stored(format) / "model.gguf").tensors
    assert {t.name for t in tensors} == set(sources)
    of_matrices, of_ends = _TYPES[format]
    for tensor in tensors:
        name, kind = sources[tensor.name], tensor.tensor_type
        values = (exact if kind.name in ("F32", "F16", "BF16") else rounded)[name]
        if heads := {"q_proj": 4, "k_proj": 2}.get(name.split(".")[-2]):
            halves = values.reshape(heads, 2, -1, values.shape[1])
            values = halves.swapaxes(1, 2).reshape(values.shape)
        if name in coded(rounded):
            assert kind.name == of_matrices
        else:
            assert kind.name == ("F32" if values.ndim == 1 else of_ends)
        if kind.name == "Q4_K":  # the package decodes it alone
            found = gguf.dequantize(tensor.data, kind)
            assert apart(torch.from_numpy(found), torch.from_numpy(values)) < ERROR[format]
        else:
            assert tensor.data.tobytes() == gguf.quantize(values, kind).tobytes(), name


# ---- formats that nothing here reads: from their description ------------------------------------


@pytest.mark.parametrize("format", UNREAD)
def test_layout_is_that_of_the_description(merges: Merges, format: str) -> None:
    tensors, config = written(merges.stored(format))
    dense = load(merges.dense())
    values = merges.decoded(format, "float32")
    left = set(tensors)
    for name in coded(dense):
        parts = Parts(tensors, name.removesuffix(".weight"))
        found = _block_values(parts) if format == "fp8-block" else _integer_values(parts, format)
        assert same_bits(torch.from_numpy(found), values[name]), name
        w = dense[name].float().numpy()
        if format == "fp8-block":
            _check_blocks(parts, w)
        else:
            codes, zeros, scales = _integers(w, symmetric=format in ("gptq", "gptq-v2"))
            assert np.array_equal(parts.codes(format), codes), name
            assert np.array_equal(parts.zeros(format), zeros), name
            assert np.array_equal(parts["scales"], scales), name
        left -= parts.names
    assert left == set(dense) - set(coded(dense))
    assert config.items() >= _DESCRIBED[format].items()
    if format.startswith("gptq"):
        assert json.loads((merges.stored(format) / "quantize_config.json").read_text()) == config


_GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "lm_head": False}
_DESCRIBED: dict[str, dict[str, Any]] = {
    "gptq": _GPTQ | {"sym": True, "checkpoint_format": "gptq"},
    "gptq-v2": _GPTQ | {"sym": True, "checkpoint_format": "gptq_v2"},
    "gptq-asym": _GPTQ | {"sym": False, "checkpoint_format": "gptq"},
    "awq": {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 128,
        "zero_point": True,
        "version": "gemm",
    },
    "fp8-block": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]},
}


class Parts:
    """The stored tensors of one module, as numpy has them."""

    def __init__(self, tensors: dict[str, torch.Tensor], module: str) -> None:
        self.tensors, self.module, self.names = tensors, module, set[str]()

    def __getitem__(self, word: str) -> np.ndarray:
        self.names.add(f"{self.module}.{word}")
        tensor = self.tensors[f"{self.module}.{word}"]
        return (tensor.float() if tensor.dtype is torch.float8_e4m3fn else tensor).numpy()

    def codes(self, format: str) -> np.ndarray:
        """0..15 as [input, output]."""
        return _nibbles(self["qweight"], 0) if format != "awq" else _interleaved(self["qweight"])

    def zeros(self, format: str) -> np.ndarray:
        """As [group, output]."""
        if format == "awq":
            return _interleaved(self["qzeros"])
        return _nibbles(self["qzeros"], 1) + (format != "gptq-v2")


def _nibbles(words: np.ndarray, axis: int) -> np.ndarray:
    """Eight numbers of each word along an axis, the lowest first."""
    parts = [words.view(np.uint32) >> (4 * i) & 15 for i in range(8)]
    shape = [n * (8 if i == axis else 1) for i, n in enumerate(words.shape)]
    return np.stack(parts, axis + 1).reshape(shape).astype(np.int64)


def _interleaved(words: np.ndarray) -> np.ndarray:
    """Outputs t of each eight, which lie in nibbles 0 4 1 5 2 6 3 7."""
    eights = _nibbles(words, 1).reshape(len(words), -1, 8)
    return eights[:, :, [0, 4, 1, 5, 2, 6, 3, 7]].reshape(len(words), -1)


def _integer_values(parts: Parts, format: str) -> np.ndarray:
    codes = parts.codes(format)
    group = np.arange(len(codes)) // 128
    if format != "awq":
        assert np.array_equal(parts["g_idx"], group)
    steps = (codes - parts.zeros(format)[group]).astype(np.float32)
    return np.ascontiguousarray((steps * parts["scales"].astype(np.float32)[group]).T)


def _integers(w: np.ndarray, *, symmetric: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes [input, output], zeros and scales [group, output] of a matrix, by least and largest.

    As AutoAWQ has it, what is added is of the scale in float32, what is divided by is its float16.
    """
    groups = w.reshape(len(w), -1, 128)
    low, high = np.minimum(groups.min(-1), 0), np.maximum(groups.max(-1), 0)
    span = 2 * np.maximum(-low, high) if symmetric else high - low
    exact = np.maximum(span, np.float32(1e-5)) / np.float32(15)
    zeros = np.full(exact.shape, 8)
    if not symmetric:  # no group here is of one sign, where version 1 of GPTQ would begin at 1
        assert (low < 0).all() and (high > 0).all()
        zeros = np.clip(np.rint(-low / exact), 0, 15).astype(np.int64)
    scales = exact.astype(np.float16)
    added = (zeros.astype(np.float32) * exact)[..., None]
    quotients = (groups + added) / scales.astype(np.float32)[..., None]
    codes = np.clip(np.rint(quotients), 0, 15).astype(np.int64)
    return codes.reshape(w.shape).T, zeros.T, scales.T


def _block_values(parts: Parts) -> np.ndarray:
    codes, scales = parts["weight"], parts["weight_scale_inv"]
    rows, cols = (np.arange(n) // 128 for n in codes.shape)
    return codes * scales[rows][:, cols]


def _check_blocks(parts: Parts, w: np.ndarray) -> None:
    rows, cols = w.shape
    blocks = w.reshape(rows // 128, 128, cols // 128, 128)
    scales = np.abs(blocks).max((1, 3)) / np.float32(448)
    assert np.array_equal(parts["weight_scale_inv"], scales)
    quotients = torch.from_numpy((blocks / scales[:, None, :, None]).reshape(w.shape))
    assert np.array_equal(parts["weight"], quotients.to(torch.float8_e4m3fn).float().numpy())
