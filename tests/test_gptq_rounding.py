"""Rounding with Hessians: against a plain loop in numpy, what it gains, and whole merges with it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from gptq_oracle import gptq, inverse_factor, output_error
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from fastmerge import budget, gptq_rounding
from fastmerge.api import merge, plan
from fastmerge.backends import Residual
from fastmerge.checkpoint.header import read_header
from fastmerge.cli import main
from fastmerge.coded_tensors import QuantTensor, dequantize_4bit, quantize_4bit
from fastmerge.coding import Coding, Format, parts_of
from fastmerge.dtypes import BY_TORCH, DType
from fastmerge.errors import CheckpointError, RecipeError
from fastmerge.gptq_rounding import (
    Feedback,
    LastHessian,
    factored,
    pack,
    read_hessian,
    round_columns,
)
from fastmerge.ops import buffer_of
from fastmerge.quant.formats import FORMATS
from fastmerge.quant.quantize import Quantize
from fastmerge.streaming.device import HostDevice
from fastmerge.tensors import merge_tensors
from fastmerge.verify import verify

INTEGERS = [n for n, f in FORMATS.items() if f.coding(DType.F32, (128, 128)).format in
            (Format.INT4, Format.GPTQ, Format.AWQ)]  # fmt: skip
FAMILIES = {Format.INT4: "int4", Format.GPTQ: "gptq", Format.AWQ: "awq"}


def inputs(cols: int, n: int, seed: int = 0, correlated: float = 1.0) -> np.ndarray:
    """Inputs of a layer that share directions, [n, cols]."""
    rng = np.random.default_rng(seed)
    shared = rng.normal(size=(n, max(1, cols // 8))) @ rng.normal(size=(max(1, cols // 8), cols))
    return rng.normal(size=(n, cols)) + correlated * shared / np.sqrt(cols / 8)


def hessian(cols: int, seed: int = 0, correlated: float = 1.0) -> np.ndarray:
    x = inputs(cols, 2 * cols, seed, correlated)
    return x.T @ x


def weights(rows: int, cols: int, dtype: str = "float32", seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, cols, generator=generator) * 0.04).to(getattr(torch, dtype))


def coding_of(name: str, dtype: str = "float32", shape: tuple[int, int] = (32, 256)) -> Coding:
    return FORMATS[name].coding(BY_TORCH[dtype], shape)


def rounded(w: torch.Tensor, coding: Coding, h: np.ndarray | None) -> gptq_rounding.Rounded:
    u = None if h is None else factored(torch.from_numpy(h))
    return round_columns(w.double().T.contiguous(), coding, u)


def packed(
    found: gptq_rounding.Rounded, coding: Coding, shape: tuple[int, int], cuts: tuple[int, ...] = ()
) -> QuantTensor:
    """Pack rows, cut at some of them, into parts that were full of ones."""
    parts = {s.slot: torch.full((s.n_bytes,), 255, dtype=torch.uint8).view(getattr(torch, s.dtype.torch))
             .view(s.shape) for s in parts_of(coding, *shape)}  # fmt: skip
    q = QuantTensor(coding, shape, parts)
    for a, b in zip((0, *cuts), (*cuts, shape[0]), strict=True):
        part = replace(found, codes=found.codes[:, a:b], values=found.values[:, a:b],
                       scales=found.scales[:, a:b], zeros=found.zeros[:, a:b])  # fmt: skip
        pack(part, q.operand(), a)
    return q


# ---- the primitive --------------------------------------------------------------------------------


def test_factor_of_the_inverse() -> None:
    h = hessian(96)
    u = factored(torch.from_numpy(h)).numpy()
    np.testing.assert_allclose(u, inverse_factor(h), rtol=1e-9, atol=1e-12)
    assert np.array_equal(u, np.triu(u))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", INTEGERS)
@pytest.mark.parametrize("with_hessian", [True, False])
def test_codes_are_those_of_the_plain_loop(name: str, dtype: str, with_hessian: bool) -> None:
    w, h = weights(8, 256, dtype), hessian(256) if with_hessian else None
    coding = coding_of(name, dtype)
    found = rounded(w, coding, h)
    kind = FAMILIES[coding.format]
    codes, values = gptq(w.double().numpy(), h, kind, coding.symmetric, coding.group, dtype)
    shift = 8 if kind == "int4" else 0
    assert np.array_equal(found.codes.T.numpy().astype(int), codes + shift)
    assert np.array_equal(found.values.T.numpy().astype(np.float64), values)


@pytest.mark.parametrize("group", [8, 24, 96, 200, 192, 0])
def test_groups_that_blocks_do_not_end_with(group: int) -> None:
    cols = 600 if group == 200 else 384
    w, h = weights(3, cols), hessian(cols)
    coding = Coding(Format.INT4, group=group)
    codes, _ = gptq(w.double().numpy(), h, "int4", True, group, "float32")
    assert np.array_equal(rounded(w, coding, h).codes.T.numpy().astype(int), codes + 8)


@pytest.mark.parametrize("rounding", ["nearest", "mse"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", INTEGERS)
def test_without_correlation_codes_are_the_nearest(name: str, dtype: str, rounding: str) -> None:
    """Byte for byte what the kernels write, where int4 divides in float32 as here."""
    w = weights(32, 256, dtype)
    coding = replace(coding_of(name, dtype), search=rounding == "mse")
    if coding.format is Format.INT4 and dtype == "bfloat16":
        coding = replace(coding, other_rule=True)
    h = np.diag(np.random.default_rng(0).uniform(1, 2, 256))
    got = packed(rounded(w, coding, h), coding, (32, 256))
    want = _coded(w, coding)
    if rounding == "mse":  # sums of squares differ in their last bits
        error = (dequantize_4bit(got, "float32") - w.float()).norm()
        assert error <= 1.0001 * (dequantize_4bit(want, "float32") - w.float()).norm()
        return
    # The library, and so the kernels, round quotients to float16 as well: codes half way differ.
    halves = coding.format is Format.INT4 and dtype == "float16"
    for slot, part in want.parts.items():
        a, b = (p.view(torch.uint8) for p in (got.parts[slot], part))
        assert float((a != b).float().mean()) <= (0.03 if halves and slot == "codes" else 0), slot


def _coded(w: torch.Tensor, coding: Coding) -> QuantTensor:
    from fastmerge.coded_tensors import code
    from fastmerge.evaluate import Operands
    from fastmerge.ops import choose
    from fastmerge.stages import Copy

    held = Operands(None, [buffer_of(w, "w")], w.shape[1], DType.F32)
    q = code(choose(), Copy(0), held, coding, w)
    assert q is not None
    return q


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", INTEGERS)
@pytest.mark.parametrize("cuts", [(), (8, 16), (24,)], ids=str)
def test_layouts_decode_to_the_values(name: str, dtype: str, cuts: tuple[int, ...]) -> None:
    coding, w = coding_of(name, dtype), weights(32, 256, dtype)
    found = rounded(w, coding, hessian(256))
    q = packed(found, coding, (32, 256), cuts)
    assert torch.equal(dequantize_4bit(q, "float32"), found.values.T)


def test_rows_of_no_whole_word() -> None:
    coding, w = Coding(Format.INT4, group=20), weights(3, 100)
    found = rounded(w, coding, hessian(100))
    q = packed(found, coding, (3, 100), (1, 2))
    assert torch.equal(dequantize_4bit(q, "float32"), found.values.T)
    assert not (q.parts["codes"][:, -1] >> 16).any()  # what no column uses is 0


def test_zeros_and_single_values() -> None:
    w = weights(8, 256)
    w[0], w[1], w[2, :128] = 0, 1e-9, 3.0
    for name in INTEGERS:
        coding = coding_of(name, shape=(32, 256))
        found = rounded(w, coding, hessian(256))
        assert torch.isfinite(found.values).all()
        assert not found.values.T[0].any()


@pytest.mark.parametrize("name", INTEGERS)
@pytest.mark.parametrize("correlated", [0.0, 1.0, 4.0])
def test_output_error_falls(name: str, correlated: float) -> None:
    w, h = weights(32, 256).double().numpy(), hessian(256, 3, correlated)
    coding = coding_of(name)
    errors = {
        kind: output_error(
            rounded(torch.from_numpy(w), coding, with_).values.T.double().numpy(), w, h
        )
        for kind, with_ in (("gptq", h), ("nearest", None))
    }
    assert errors["gptq"] < (0.95 if correlated else 1.0) * errors["nearest"]


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([8, 32, 64]),
    st.integers(1, 8),
    st.floats(0, 8),
    st.sampled_from([True, False]),
)
def test_output_error_is_never_much_above_nearest(
    seed: int, cols: int, groups: int, correlated: float, symmetric: bool
) -> None:
    rng = np.random.default_rng(seed)
    w = rng.standard_t(5, (64, cols)) * 0.05
    h = hessian(cols, seed, correlated)
    coding = Coding(
        Format.GPTQ, group=cols if cols % groups else cols // groups, symmetric=symmetric
    )
    found, nearest = (
        rounded(torch.from_numpy(w), coding, x).values.T.double().numpy() for x in (h, None)
    )
    assert output_error(found, w, h) <= 1.05 * output_error(nearest, w, h)


# ---- results ----------------------------------------------------------------------------------------


def save_hessians(path: Path, **tensors: Any) -> Path:
    save_file({k: torch.as_tensor(np.ascontiguousarray(v)) for k, v in tensors.items()}, path)
    return path


@pytest.mark.parametrize("name", INTEGERS)
def test_tiles_and_pieces_do_not_show(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = read_header(save_hessians(tmp_path / "h", x=hessian(256))).tensors["x"]
    w, coding = weights(64, 256, "bfloat16"), coding_of(name, "bfloat16")
    found = []
    for tile, cuts in ((1 << 20, [(0, 64)]), (1, [(0, 64)]), (16 * 256, [(0, 24), (24, 64)])):
        monkeypatch.setattr(gptq_rounding, "TILE", tile)
        q = _coded(torch.zeros_like(w), coding)
        residual = Residual()
        for a, b in cuts:
            out = replace(q.operand(), start=a * 256, n=(b - a) * 256, residual=residual)
            assert Feedback(info, LastHessian()).code(out, buffer_of(w[a:b], "w"))
        found.append(
            (b"".join(p.view(torch.uint8).numpy().tobytes() for p in q.parts.values()), residual)
        )
    assert found[0][0] == found[1][0] == found[2][0]
    for _, residual in found[1:]:
        assert residual.relative_rms == pytest.approx(found[0][1].relative_rms)
        assert residual.relative_output == pytest.approx(found[0][1].relative_output, rel=1e-5)


def test_what_was_gained_is_reported(tmp_path: Path) -> None:
    h = hessian(256)
    info = read_header(save_hessians(tmp_path / "h", x=h.astype(np.float32))).tensors["x"]
    w, coding = weights(32, 256), coding_of("gptq")
    q, residual = _coded(w, coding), Residual()
    assert residual.relative_output is None
    out = replace(q.operand(), residual=residual)
    assert Feedback(info, LastHessian()).code(out, buffer_of(w, "w"))
    wide = w.double().numpy()
    want = [
        output_error(gptq(wide, x, "gptq", True, 128, "float32")[1], wide, h) for x in (h, None)
    ]
    assert residual.relative_output == pytest.approx(want, rel=1e-4)


def test_what_is_not_finite_is_not_coded(tmp_path: Path) -> None:
    info = read_header(save_hessians(tmp_path / "h", x=hessian(256))).tensors["x"]
    w = weights(32, 256)
    q = _coded(w, coding_of("int4"))
    w[3, 3] = float("inf")
    assert not Feedback(info, LastHessian()).code(q.operand(), buffer_of(w, "w"))


# ---- Hessians that are none ---------------------------------------------------------------------------


def _asymmetric(h: np.ndarray) -> np.ndarray:
    return h + np.triu(np.ones_like(h)) * h.max()


def _with(value: float) -> Callable[[np.ndarray], np.ndarray]:
    def change(h: np.ndarray) -> np.ndarray:
        h[3, 5] = h[5, 3] = value
        return h

    return change


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_with(float("nan")), "holds NaN or infinity"),
        (_with(float("inf")), "holds NaN or infinity"),
        (_asymmetric, "is not symmetric"),
        (np.zeros_like, "has no positive diagonal"),
        (np.negative, "has no positive diagonal"),
        (_with(1e6), "is not positive definite, even with 0.01 of its mean diagonal added"),
    ],
)
@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_matrices_that_are_no_hessians(
    change: Any, reason: str, kind: type, tmp_path: Path
) -> None:
    path = save_hessians(tmp_path / "h", x=change(hessian(16)).astype(kind))
    with pytest.raises(CheckpointError, match=rf"^.*h: Hessian 'x' {reason}; it must be X\^T X"):
        read_hessian(read_header(path).tensors["x"])


def test_semidefinite_and_nearly_symmetric_ones_are_taken(tmp_path: Path) -> None:
    x = inputs(64, 8)  # fewer inputs than columns
    h = (x.T @ x).astype(np.float32)
    h[0, 1] *= 1 + 1e-5
    info = read_header(save_hessians(tmp_path / "h", x=h)).tensors["x"]
    assert torch.isfinite(read_hessian(info).u).all()


# ---- whole merges -------------------------------------------------------------------------------------

HIDDEN, WIDE, LAYERS = 128, 256, 2
SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "mlp.up_proj": (WIDE, HIDDEN),
    "mlp.down_proj": (HIDDEN, WIDE),
}
UP, DOWN, Q = (f"model.layers.1.{m}" for m in ("mlp.up_proj", "mlp.down_proj", "self_attn.q_proj"))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models, a recipe and a file of Hessians."""
    root = tmp_path_factory.mktemp("models")
    for i, name in enumerate(("a", "b")):
        tensors = {"model.embed_tokens.weight": weights(64, HIDDEN, "bfloat16", 90 + i)}
        for layer in range(LAYERS):
            for j, (module, shape) in enumerate(SHAPES.items()):
                tensors[f"model.layers.{layer}.{module}.weight"] = weights(
                    *shape, "bfloat16", 10 * layer + j + i * 50
                )
        (root / name).mkdir()
        save_file(tensors, root / name / "model.safetensors", metadata={"format": "pt"})
        config = {"model_type": "llama", "num_hidden_layers": LAYERS, "torch_dtype": "bfloat16"}
        (root / name / "config.json").write_text(json.dumps(config))
    (root / "recipe.yaml").write_text(
        f"merge_method: linear\nmodels:\n- model: {root}/a\n  parameters: {{weight: 0.7}}\n"
        f"- model: {root}/b\n  parameters: {{weight: 0.5}}\nparameters: {{normalize: false}}\n"
        "dtype: bfloat16\n"
    )
    save_hessians(
        root / "hessians",
        **{f"{UP}.weight": hessian(HIDDEN, 1).astype(np.float32), DOWN: hessian(WIDE, 2)},
    )
    return root


def merged(models: Path, module: str) -> torch.Tensor:
    states = [load_file(models / m / "model.safetensors")[f"{module}.weight"] for m in "ab"]
    return merge_tensors(None, states, method="linear", weight=[0.7, 0.5], normalize=False)


def shards(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("name", ["int4", "int4-asym", "gptq", "gptq-v2", "awq"])
def test_weights_with_a_hessian_are_rounded_by_it(
    models: Path, tmp_path: Path, name: str, backend: str
) -> None:
    quantize = Quantize(name, hessians=models / "hessians")
    report = merge(models / "recipe.yaml", tmp_path / "out", quantize=quantize, backend=backend)
    stored = shards(tmp_path / "out")
    with_hessian = {
        UP: hessian(HIDDEN, 1).astype(np.float32).astype(np.float64),
        DOWN: hessian(WIDE, 2),
    }
    for module in (UP, DOWN, Q):
        w = merged(models, module)
        coding = FORMATS[name].coding(DType.BF16, tuple(w.shape))
        want = (
            packed(rounded(w, coding, with_hessian[module]), coding, tuple(w.shape))
            if module in with_hessian
            else quantize_4bit(w, name)
        )
        for part in FORMATS[name].parts(f"{module}.weight", tuple(w.shape), coding):
            assert torch.equal(stored[part.name], want.parts[part.slot]), part.name
    gains = {n: r.relative_output for n, r in report.residuals.items() if r.relative_output}
    assert set(gains) == {f"{UP}.weight", f"{DOWN}.weight"}
    assert all(written < nearest for written, nearest in gains.values())
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| tensor | output error | if rounded to nearest |" in card
    written, nearest = gains[f"{UP}.weight"]
    assert f"`{UP}.weight` | {100 * written:.2f} % | {100 * nearest:.2f} %" in card


def test_command_line(models: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["merge", str(models / "recipe.yaml"), str(out), "--quantize", "gptq"]
    done = CliRunner().invoke(main, [*arguments, "--hessians", str(models / "hessians")])
    assert done.exit_code == 0, done.output
    assert "coded 6 tensors as gptq, 4.16 bits per weight, relative RMS error " in done.output
    assert "rounded 2 of them with their Hessians: the error of what layers give is " in done.output
    assert verify(out).ok
    known = json.loads((out / "fastmerge_manifest.json").read_text())["options"]["quantize"][
        "hessians"
    ]
    assert set(known) == {"path", "size", "header"} and not os.path.isabs(known["path"])
    alone = CliRunner().invoke(
        main, ["merge", *arguments[1:3], "--hessians", str(models / "hessians")]
    )
    assert alone.exit_code == 2 and "options of coding need a format" in alone.output


@pytest.mark.parametrize("name", ["int4", "nf4", "awq"])
def test_summary_says_what_coding_cost(models: Path, tmp_path: Path, name: str) -> None:
    errors = []
    for rounding in ("nearest", "mse"):
        arguments = [str(models / "recipe.yaml"), str(tmp_path / rounding), "--quantize", name]
        done = CliRunner().invoke(main, ["merge", *arguments, "--rounding", rounding])
        assert done.exit_code == 0, done.output
        (line,) = (text for text in done.output.splitlines() if text.startswith("coded "))
        assert line.startswith(f"coded 6 tensors as {name}, 4.") and line.endswith(" %")
        errors.append(float(line.split()[-2]))
        assert "Hessian" not in done.output
    assert 8 < errors[1] < errors[0] < 12
    dense = CliRunner().invoke(main, ["merge", arguments[0], str(tmp_path / "dense")])
    assert dense.exit_code == 0 and "coded" not in dense.output


def test_a_killed_merge_is_finished(models: Path, tmp_path: Path) -> None:
    quantize = Quantize("int4", hessians=models / "hessians")
    recipe = models / "recipe.yaml"
    merge(recipe, tmp_path / "whole", quantize=quantize)

    def interrupt(name: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge(recipe, tmp_path / "out", quantize=quantize, progress=interrupt)
    merge(recipe, tmp_path / "out", quantize=quantize, resume=True)
    names = {p.name for p in (tmp_path / "whole").iterdir()}
    for name in names - {"README.md"}:  # of errors the card knows this run's alone
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), (
            name
        )


@pytest.mark.parametrize("item", [30_000, 1 << 27])
@pytest.mark.parametrize("name", ["int4", "int4-asym", "gptq", "awq"])
def test_a_device_writes_the_same(
    models: Path, tmp_path: Path, name: str, item: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, quantize = models / "recipe.yaml", Quantize(name, hessians=models / "hessians")
    merge(recipe, tmp_path / "host", quantize=quantize)
    monkeypatch.setattr(budget, "DEVICE_ITEM_BYTES", item)
    merge(recipe, tmp_path / "device", quantize=quantize, device=HostDevice(), backend="cpu")
    host, device = shards(tmp_path / "host"), shards(tmp_path / "device")
    assert all(torch.equal(device[k], v) for k, v in host.items()) and device.keys() == host.keys()


def test_other_hessians_are_another_merge(models: Path, tmp_path: Path) -> None:
    other = save_hessians(tmp_path / "hessians", **{UP: hessian(HIDDEN, 1)})

    def interrupt(name: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge(models / "recipe.yaml", tmp_path / "out", progress=interrupt,
              quantize=Quantize("int4", hessians=models / "hessians"))  # fmt: skip
    for hessians in (other, None):
        with pytest.raises(CheckpointError, match="was begun with quantize"):
            merge(models / "recipe.yaml", tmp_path / "out", resume=True,
                  quantize=Quantize("int4", hessians=hessians))  # fmt: skip


def test_options_travel(models: Path) -> None:
    quantize = Quantize("int4", hessians=models / "hessians")
    again = Quantize.from_dict(json.loads(json.dumps(quantize.as_dict())))
    assert again is not None and again.as_dict() == quantize.as_dict()


def test_memory_is_planned_for(models: Path) -> None:
    without = plan(models / "recipe.yaml", quantize="int4", max_memory="2GiB")
    with_ = plan(
        models / "recipe.yaml",
        quantize=Quantize("int4", hessians=models / "hessians"),
        max_memory="2GiB",
    )
    assert with_.peak_memory - without.peak_memory >= 36 * WIDE**2 + (280 << 20)
    with pytest.raises(RecipeError, match="max-memory of 256 MiB is too little for this merge"):
        plan(
            models / "recipe.yaml",
            quantize=Quantize("int4", hessians=models / "hessians"),
            max_memory="256MiB",
        )


@pytest.mark.parametrize("name", ["nf4", "nvfp4", "mxfp4", "fp8", "q4_0"])
def test_formats_without_integers_are_refused(models: Path, name: str) -> None:
    reason = f"hessians round codes of integers, which {name} has not; choose int4"
    with pytest.raises(RecipeError, match=reason):
        plan(models / "recipe.yaml", quantize=Quantize(name, hessians=models / "hessians"))


@pytest.mark.parametrize(
    ("tensors", "error", "reason"),
    [
        ({UP: np.eye(64)}, CheckpointError,
         r"'.*up_proj' has shape \[64, 64\], but '.*weight' has 128 columns"),
        ({UP: np.eye(HIDDEN, dtype=np.float16)}, CheckpointError,
         "has dtype F16, but a Hessian is F32 or F64"),
        ({"other": np.eye(HIDDEN)}, RecipeError, "belong to no weight that is coded as int4"),
        ({}, RecipeError, "belong to no weight"),
    ],
)  # fmt: skip
def test_hessians_that_do_not_fit(
    models: Path, tmp_path: Path, tensors: Any, error: type[Exception], reason: str
) -> None:
    path = save_hessians(tmp_path / "h", **tensors)
    with pytest.raises(error, match=reason):
        plan(models / "recipe.yaml", quantize=Quantize("int4", hessians=path))


def test_files_that_are_none(models: Path, tmp_path: Path) -> None:
    (tmp_path / "h").write_bytes(b"no header")
    for path in (tmp_path / "h", tmp_path / "missing"):
        with pytest.raises(CheckpointError):
            plan(models / "recipe.yaml", quantize=Quantize("int4", hessians=path))


def test_a_hessian_too_many_is_told(models: Path, tmp_path: Path) -> None:
    path = save_hessians(tmp_path / "h", **{UP: hessian(HIDDEN), "model.norm": np.eye(4)})
    warnings = plan(models / "recipe.yaml", quantize=Quantize("int4", hessians=path)).warnings
    assert any(
        "1 tensors belong to no weight that is coded as integers, such as 'model.norm'" in w
        for w in warnings
    )


def test_a_wrong_hessian_stops_the_merge(models: Path, tmp_path: Path) -> None:
    path = save_hessians(tmp_path / "h", **{UP: -hessian(HIDDEN)})
    with pytest.raises(CheckpointError, match=r"Hessian '.*up_proj' has no positive diagonal"):
        merge(models / "recipe.yaml", tmp_path / "out", quantize=Quantize("int4", hessians=path))
