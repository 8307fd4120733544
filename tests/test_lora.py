"""Extraction of LoRA adapters, and merges of them: what peft makes of the folders, and what is refused."""

from __future__ import annotations

import json
import math
import os
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import adapters
import families
import pytest
import torch
from adapters import UP, UP_1, Q
from click.testing import CliRunner
from safetensors.torch import load_file
from torch import Tensor

import fastmerge
from fastmerge.checkpoint import read_adapter
from fastmerge.cli import main
from fastmerge.errors import CheckpointError, ConflictError, MergeError, NonFiniteError, RecipeError
from fastmerge.lora.combine import COMBINATIONS
from fastmerge.lora.report import LoraReport
from fastmerge.quant.opening import open_model

FACTORS = "adapter_model.safetensors"


def decaying(shape: tuple[int, ...], seed: int, decay: float = 1.0, size: float = 0.3) -> Tensor:
    """Return a matrix with singular values size i^-decay."""
    generator = torch.Generator().manual_seed(seed)
    u, s, vh = torch.linalg.svd(torch.randn(shape, generator=generator), full_matrices=False)
    return (u * size * torch.arange(1, len(s) + 1) ** -decay) @ vh


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of base and tuned, of which all tensors changed but one norm and one matrix."""
    root = tmp_path_factory.mktemp("models")
    shapes = families.llama_shapes()
    base = families.family(shapes, torch.float32, 1)["base"]
    tuned = {}
    for k, (name, old) in enumerate(base.items()):
        change = decaying(old.shape, k) if old.dim() == 2 else torch.full(old.shape, 0.01)
        tuned[name] = old + change
    for name in ("model.layers.2.input_layernorm.weight", "model.layers.1.mlp.up_proj.weight"):
        tuned[name] = base[name].clone()
    families.write_model(root / "base", base)
    families.write_model(root / "tuned", tuned, shards=2)
    return root


def extracted(models: Path, out: Path, **options: Any) -> LoraReport:
    options = options or {"rank": 8}
    return fastmerge.extract_lora(models / "base", models / "tuned", out, **options)


def product(folder: Path, module: str) -> Tensor:
    """Return B A of one module from the file alone."""
    state = load_file(folder / FACTORS)
    a, b = (state[f"{adapters.PREFIX}{module}.lora_{x}.weight"].double() for x in "AB")
    return b @ a


def change_of(models: Path, name: str) -> Tensor:
    base, tuned = families.load(models / "base"), families.load(models / "tuned")
    return tuned[name].double() - base[name].double()


# ---- extraction ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("exact", [True, False])
def test_residuals_are_those_of_the_files_and_least(
    dtype: str, exact: bool, models: Path, tmp_path: Path
) -> None:
    report = extracted(models, tmp_path / "out", rank=6, dtype=dtype, exact=exact)
    assert len(report.modules) == 20
    for found in report.modules:
        delta = change_of(models, f"{found.module}.weight")
        measured = float((delta - product(tmp_path / "out", found.module)).norm() / delta.norm())
        assert found.residual == pytest.approx(measured, rel=1e-4)
        assert found.norm == pytest.approx(float(delta.norm()), rel=1e-5)
        s = torch.linalg.svdvals(delta)
        least = float(s[6:].norm() / s.norm())
        rounding = {"float32": 1e-5, "float16": 2.0**-11, "bfloat16": 2.0**-8}[dtype]
        assert least * (1 - 1e-6) <= measured <= math.hypot(least * 1.01, rounding)
        assert found.rank == 6 and found.shape == tuple(delta.shape)
    whole = math.sqrt(sum((m.norm * m.residual) ** 2 for m in report.modules))
    norm = math.sqrt(sum(m.norm**2 for m in report.modules))
    assert report.residual == pytest.approx(whole / norm)


def test_a_change_of_that_rank_is_exact(models: Path, tmp_path: Path) -> None:
    base = families.load(models / "base")
    generator = torch.Generator().manual_seed(3)
    tuned = dict(base)
    for rank, name in enumerate(n for n in base if n.endswith("_proj.weight")):
        m, n = base[name].shape
        b = torch.randn(m, rank, generator=generator, dtype=torch.float64)
        a = torch.randn(rank, n, generator=generator, dtype=torch.float64)
        tuned[name] = (base[name].double() + b @ a).double()
    families.write_model(tmp_path / "tuned", tuned)
    report = fastmerge.extract_lora(models / "base", tmp_path / "tuned", tmp_path / "out", rank=16)
    assert len(report.modules) == 20 and report.unchanged == len(base) - 20
    for rank, module in enumerate(report.modules, 1):
        # Singular values below 4 eps64 of the largest are no triples.
        assert module.rank == min(rank, 16), module
        assert module.residual is not None
        assert module.residual < 1e-6 or rank > 16


@pytest.mark.parametrize("goal", [{"error": 0.3}, {"error": 0.05}, {"energy": 0.9}])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_targets_are_met_by_the_least_rank(
    goal: dict[str, float], dtype: str, models: Path, tmp_path: Path
) -> None:
    report = extracted(models, tmp_path / "out", **goal, exact=True, dtype=dtype)
    error = goal.get("error", math.sqrt(1 - goal.get("energy", 0.0)))
    for found in report.modules:
        s = torch.linalg.svdvals(change_of(models, f"{found.module}.weight"))
        assert found.residual is not None and found.residual <= error
        asked = math.sqrt(error**2 - (2.0**-16 if dtype == "bfloat16" else 0))
        assert float(s[found.rank - 1 :].norm() / s.norm()) > asked
        assert float(s[found.rank :].norm() / s.norm()) <= asked


def test_the_largest_rank_goes_before_the_target(models: Path, tmp_path: Path) -> None:
    report = extracted(models, tmp_path / "out", error=0.05, max_rank=3)
    assert {m.rank for m in report.modules} == {3}
    assert all("more than asked for" in m.note for m in report.modules)
    alone = extracted(models, tmp_path / "alone", max_rank=3)
    assert {m.rank for m in alone.modules} == {3} and not alone.modules[0].note


def test_small_singular_values_can_be_left_out(models: Path, tmp_path: Path) -> None:
    report = extracted(models, tmp_path / "out", rank=30, sv_epsilon=0.3 / 4.5, exact=True)
    assert {m.rank for m in report.modules} == {4}
    with pytest.raises(ConflictError, match=r"no singular value is above 9"):
        extracted(models, tmp_path / "none", rank=30, sv_epsilon=9.0)


def test_every_tensor_is_accounted_for(models: Path, tmp_path: Path) -> None:
    report = extracted(
        models, tmp_path / "out", rank=2, exclude=[r"layers\.0\.mlp"], save_modules="none"
    )
    skipped = report.skipped
    assert skipped["model.layers.0.mlp.up_proj.weight"] == r"excluded by 'layers\\.0\\.mlp'"
    assert "an embedding" in skipped["model.embed_tokens.weight"]
    assert "no matrix" in skipped["model.norm.weight"]
    assert len(skipped) + len(report.modules) + report.unchanged == len(families.llama_shapes())
    assert not report.saved
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    # "up_proj" would adapt layers 0 and 1 as well.
    assert "model.layers.2.mlp.up_proj" in config["target_modules"]
    only = extracted(models, tmp_path / "only", rank=2, include=["q_proj"], save_modules=["norm"])
    assert {m.module.rpartition(".")[2] for m in only.modules} == {"q_proj"}
    assert not only.saved  # the include expression finds no norm


def test_named_modules_are_kept_whole(models: Path, tmp_path: Path) -> None:
    report = extracted(models, tmp_path / "out", rank=2, save_modules=["norm", "o_proj"])
    assert sorted(report.saved) == [
        *(f"model.layers.{i}.self_attn.o_proj.weight" for i in range(3)),
        "model.norm.weight",
    ]


def test_other_shapes_and_types(models: Path, tmp_path: Path) -> None:
    base, tuned = families.load(models / "base"), families.load(models / "tuned")
    tuned["model.embed_tokens.weight"] = torch.randn(140, 64)
    tuned["model.steps"] = torch.tensor([4])
    base["model.steps"] = torch.tensor([3])
    base["model.extra.weight"] = torch.ones(3)
    tuned["model.new.weight"] = torch.ones(3)
    tuned["model.table"] = torch.ones(3, 3)
    base["model.table"] = torch.zeros(3, 3)
    families.write_model(tmp_path / "base", base)
    families.write_model(tmp_path / "tuned", tuned)
    report = fastmerge.extract_lora(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", rank=2)
    assert "resize_token_embeddings(140)" in report.warnings[0]
    assert report.skipped == {
        "model.steps": "of type int64",
        "model.new.weight": f"{tmp_path / 'base'} does not have it",
        "model.table": "it is no weight or bias of a module",
        "model.extra.weight": f"{tmp_path / 'tuned'} does not have it",
    }
    saved = load_file(tmp_path / "out" / FACTORS)
    assert saved[f"{adapters.PREFIX}model.embed_tokens.weight"].shape == (140, 64)
    tuned[f"{Q}.weight"] = torch.zeros(8, 8)
    families.write_model(tmp_path / "tuned", tuned)
    with pytest.raises(ConflictError, match=r"q_proj.weight' is \[64, 64\] in .* but \[8, 8\] in"):
        fastmerge.extract_lora(tmp_path / "base", tmp_path / "tuned", tmp_path / "o", rank=2)


def test_our_own_reader_adds_what_was_taken(models: Path, tmp_path: Path) -> None:
    report = extracted(models, tmp_path / "out", error=0.4)
    assert len({m.rank for m in report.modules}) > 1
    tuned = families.load(models / "tuned")
    found = open_model(models / "base", tmp_path / "out").tensors
    assert set(found) == set(tuned)
    for name, info in found.items():
        got, want = torch.from_numpy(adapters.values(info)), tuned[name].double()
        missed = float((got - want).norm() / change_of(models, name).norm().clamp_min(1e-9))
        assert missed <= 0.4001, name
        if ".self_attn." not in name and ".mlp." not in name:
            assert torch.equal(got, want), name


def test_the_same_seed_gives_the_same_bytes(models: Path, tmp_path: Path) -> None:
    for out in ("a", "b"):
        extracted(models, tmp_path / out, rank=3)
    a, b = (families.weight_bytes(tmp_path / out) for out in ("a", "b"))
    assert a == b


BAD_GOALS: list[tuple[dict[str, Any], str]] = [
    ({"rank": None}, r"say how much .*--rank 16, --error 0.1"),
    ({"rank": 2, "error": 0.1}, r"exclude each other.*max_rank"),
    ({"error": 0.2, "energy": 0.1}, r"exclude each other"),
    ({"rank": 2, "max_rank": 3}, r"rank and max_rank exclude each other"),
    ({"rank": 0}, r"rank must be at least 1, got 0"),
    ({"rank": 2.5}, r"rank must be a whole number, got 2.5"),
    ({"error": 0.1, "max_rank": -1}, r"max_rank must be at least 1, got -1"),
    ({"error": 1.0}, r"error must be in \[0, 1\), got 1.0"),
    ({"energy": 0.0}, r"energy must be in \(0, 1\], got 0.0"),
    ({"rank": 1, "sv_epsilon": -1.0}, r"sv_epsilon must be a number from 0 on, got -1.0"),
    ({"rank": 1, "dtype": "int8"}, r"dtype must be one of float32, .*, got 'int8'"),
    ({"rank": 1, "include": ["("]}, r"include '\(' is no regular expression"),
    ({"error": 0.001, "dtype": "bfloat16"}, r"cannot be met; pass --dtype float32"),
    ({"rank": 1, "device": "cuda:99"}, r"device 'cuda:99' cannot be used"),
]


@pytest.mark.parametrize(("options", "words"), BAD_GOALS)
def test_bad_options(options: dict[str, Any], words: str, models: Path, tmp_path: Path) -> None:
    with pytest.raises(MergeError, match=words) as caught:
        extracted(models, tmp_path / "out", **options)
    assert "\n" not in str(caught.value)
    assert not os.listdir(tmp_path)


def test_bad_inputs(models: Path, tmp_path: Path) -> None:
    with pytest.raises(ConflictError, match=r"no weight of .* differs .*which model is which"):
        fastmerge.extract_lora(models / "base", models / "base", tmp_path / "out", rank=1)
    with pytest.raises(CheckpointError, match="is or holds the input"):
        fastmerge.extract_lora(
            models / "base", models / "tuned", models / "base", rank=1, overwrite=True
        )
    state = families.load(models / "tuned")
    state[f"{Q}.weight"][1, 2] = torch.inf
    families.write_model(tmp_path / "bad", state)
    with pytest.raises(NonFiniteError, match=r"q_proj.weight' in .*bad .* at flat index 66"):
        fastmerge.extract_lora(models / "base", tmp_path / "bad", tmp_path / "out", rank=1)
    assert os.listdir(tmp_path) == ["bad"]


def test_what_does_not_fit_the_factors_type(models: Path, tmp_path: Path) -> None:
    state = families.load(models / "tuned")
    state[f"{Q}.weight"][1, 2] = 1e12
    families.write_model(tmp_path / "tuned", state)
    with pytest.raises(MergeError, match=r"q_proj' is beyond what float16 holds; pass --dtype"):
        fastmerge.extract_lora(
            models / "base", tmp_path / "tuned", tmp_path / "out", rank=1, dtype="float16"
        )


def test_an_interrupt_leaves_what_was_there(models: Path, tmp_path: Path) -> None:
    extracted(models, tmp_path / "out", rank=2)
    before = families.weight_bytes(tmp_path / "out")

    def stop(name: str, done: int, total: int) -> None:
        assert 0 < done <= total
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        extracted(models, tmp_path / "out", rank=3, overwrite=True, progress=stop)
    with pytest.raises(CheckpointError, match=r"holds an adapter; .*--overwrite"):
        extracted(models, tmp_path / "out", rank=3)
    assert families.weight_bytes(tmp_path / "out") == before
    assert os.listdir(tmp_path) == ["out"]
    extracted(models, tmp_path / "out", rank=3, overwrite=True)
    assert families.weight_bytes(tmp_path / "out") != before


# ---- merges --------------------------------------------------------------------------------------

SCALES = {"r": 2, "lora_alpha": 3}  # 1.5


def write_two(root: Path, ranks: tuple[int, int] = (2, 2)) -> list[Path]:
    """Write adapters of two modules each, of which they have one in common."""
    folders = []
    for k, rank in enumerate(ranks):
        other = UP if k else UP_1
        tensors = adapters.factors(Q, rank, seed=k) | adapters.factors(other, rank, seed=k + 7)
        settings = {"r": rank, "lora_alpha": 1.5 * rank}
        folders.append(adapters.write_adapter(root / f"lora{k}", tensors, **settings))
    return folders


def meant(folder: Path) -> dict[str, Tensor]:
    """Return what an adapter adds to each weight."""
    low = read_adapter(folder).low_rank
    return {
        m: x.scale * torch.from_numpy(adapters.values(x.b) @ adapters.values(x.a))
        for m, x in low.items()
    }


def truncated(a: Tensor, rank: int) -> Tensor:
    u, s, vh = torch.linalg.svd(a, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


def test_svd_is_the_truncated_sum(tmp_path: Path) -> None:
    one, two = write_two(tmp_path, (2, 3))
    report = fastmerge.merge_adapters([one, two], tmp_path / "out", weights=[0.7, -0.4], rank=3)
    parts, found = [meant(f) for f in (one, two)], meant(tmp_path / "out")
    total = 0.7 * parts[0][Q] - 0.4 * parts[1][Q]
    assert torch.allclose(found[Q], truncated(total, 3), atol=1e-5)
    # Of rank 2 and 3: exact.
    assert torch.allclose(found[UP_1], 0.7 * parts[0][UP_1], atol=1e-5)
    assert torch.allclose(found[UP], -0.4 * parts[1][UP], atol=1e-5)
    by_name = {m.module: m for m in report.modules}
    assert by_name[Q].residual == pytest.approx(
        float((total - found[Q]).norm() / total.norm()), rel=1e-5
    )
    assert {m: x.rank for m, x in by_name.items()} == {Q: 3, UP_1: 2, UP: 3}
    assert max(by_name[UP].residual, by_name[UP_1].residual) < 1e-6


def test_cat_is_exact_and_linear_is_not(tmp_path: Path) -> None:
    folders = write_two(tmp_path, (2, 3))
    report = fastmerge.merge_adapters(folders, tmp_path / "cat", weights=0.5, combination="cat")
    total = 0.5 * (meant(folders[0])[Q] + meant(folders[1])[Q])
    assert torch.allclose(meant(tmp_path / "cat")[Q], total, atol=1e-5)
    assert report.modules[0].rank == 5 and report.residual < 1e-6
    with pytest.raises(ConflictError, match=r"q_proj' has ranks 2, 3.*take svd or cat"):
        fastmerge.merge_adapters(folders, tmp_path / "o", weights=0.5, combination="linear")
    same = write_two(tmp_path / "same")
    linear = fastmerge.merge_adapters(same, tmp_path / "lin", weights=0.5, combination="linear")
    assert linear.residual > 0.1  # products of one adapter's B with the other's A


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("combination", COMBINATIONS)
def test_scales_enter_to_their_power(combination: str, power: int, tmp_path: Path) -> None:
    """A weight of 1.5 of the square root of what twice as much takes: w s^2 = (w s) s."""
    folders = write_two(tmp_path)
    options: dict[str, Any] = {"combination": combination, "seed": 3}
    if combination not in ("svd", "linear", "cat"):
        options["density"] = 0.6
    fastmerge.merge_adapters(
        folders, tmp_path / "a", weights=[0.6, -0.3], scaling_power=power, **options
    )
    more = [0.6 * 1.5 ** (power - 1), -0.3 * 1.5 ** (power - 1)]
    fastmerge.merge_adapters(folders, tmp_path / "b", weights=more, **options)
    for module, got in meant(tmp_path / "a").items():
        assert torch.allclose(got, meant(tmp_path / "b")[module], atol=1e-4)
        assert bool(got.any())


@pytest.mark.parametrize("rule", ["dare_linear_svd", "dare_ties_svd"])
def test_drops_differ_between_adapters_and_keep_the_mean(rule: str, tmp_path: Path) -> None:
    tensors = adapters.factors(Q, 2, seed=1)
    folders = [adapters.write_adapter(tmp_path / f"l{k}", tensors, r=2, lora_alpha=2) for k in "ab"]
    want = meant(folders[0])[Q]
    total = torch.zeros_like(want)
    for seed in range(200):
        fastmerge.merge_adapters(
            folders, tmp_path / "out", weights=0.5, combination=rule, density=0.5, rank=8,
            seed=seed, overwrite=True,
        )  # fmt: skip
        total += meant(tmp_path / "out")[Q] / 200
    # One is kept with 1/2, doubled: both, one or none of two masks that are drawn apart. A vote divides by
    # the count of those left: 3/4 of twice the half.
    mean = {"dare_linear_svd": 1.0, "dare_ties_svd": 0.75}[rule]
    assert float((total - mean * want).norm() / want.norm()) < 0.15


def test_whole_tensors_are_taken_from_the_one_that_has_them(tmp_path: Path) -> None:
    norm = {f"{adapters.PREFIX}model.norm.weight": torch.arange(8.0)}
    bias = {f"{adapters.PREFIX}{Q}.base_layer.bias": torch.ones(8)}
    one = adapters.write_adapter(tmp_path / "one", adapters.factors(Q) | norm | bias, **SCALES)
    two = adapters.write_adapter(tmp_path / "two", adapters.factors(Q, seed=2), **SCALES)
    report = fastmerge.merge_adapters([one, two], tmp_path / "out", weights=0.5)
    assert "taken as they are, not weighted" in report.warnings[0]
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["model.norm"] and config["bias"] == "all"
    whole = read_adapter(tmp_path / "out").whole
    assert set(whole) == {"model.norm.weight", f"{Q}.bias"}
    norm = {k: v + 1 for k, v in norm.items()}
    adapters.write_adapter(tmp_path / "two", adapters.factors(Q, seed=2) | norm, **SCALES)
    with pytest.raises(ConflictError, match=r"both replace 'model.norm.weight', by different"):
        fastmerge.merge_adapters([one, two], tmp_path / "o", weights=0.5)
    other = {f"{adapters.PREFIX}{Q}.weight": torch.ones(8, 8)}
    adapters.write_adapter(tmp_path / "two", adapters.factors(UP) | other, **SCALES)
    with pytest.raises(ConflictError, match=r"q_proj' has factors in .* and is replaced"):
        fastmerge.merge_adapters([one, two], tmp_path / "o", weights=0.5)


BAD_RULES: list[tuple[dict[str, Any], str]] = [
    ({"weights": [1.0]}, r"1 weights are given for 2 adapters"),
    ({"weights": [1.0, math.nan]}, r"weights\[1\] must be a finite number, got nan"),
    ({"weights": "12"}, r"weights must be a number or a list of numbers, got '12'"),
    ({"weights": [1.0, None]}, r"weights must be .* numbers, got \[1.0, None\]"),
    ({"weights": [0.0, 0.0]}, r"the adapters add up to nothing"),
    ({"combination": "sum"}, r"combination must be one of svd, .*, got 'sum'"),
    ({"combination": "ties_svd"}, r"needs a density.*--density 0.5"),
    ({"density": 0.5}, r"combination svd takes no density"),
    ({"combination": "ties", "density": 0.0}, r"density must be in \(0, 1\], got 0.0"),
    ({"combination": "cat", "rank": 4}, r"combination cat takes no rank"),
    ({"rank": 0}, r"rank must be at least 1, got 0"),
    ({"rank": 2.5}, r"rank must be a whole number, got 2.5"),
    ({"majority_sign": "most"}, r"majority_sign must be total or frequency, got 'most'"),
    ({"scaling_power": 3}, r"scaling_power must be 1 or 2, got 3"),
    ({"dtype": "int8"}, r"dtype must be one of .*, got 'int8'"),
]


@pytest.mark.parametrize(("options", "words"), BAD_RULES)
def test_bad_rules(options: dict[str, Any], words: str, tmp_path: Path) -> None:
    folders = write_two(tmp_path)
    with pytest.raises(MergeError, match=words) as caught:
        fastmerge.merge_adapters(folders, tmp_path / "out", **{"weights": 0.5, **options})
    assert "\n" not in str(caught.value)
    assert sorted(os.listdir(tmp_path)) == ["lora0", "lora1"]


def test_adapters_that_do_not_fit(tmp_path: Path) -> None:
    one, two = write_two(tmp_path)
    with pytest.raises(CheckpointError, match="is or holds the input"):
        fastmerge.merge_adapters([one, two], two, weights=1, overwrite=True)
    with pytest.raises(RecipeError, match="adapters must be a list of folders, got '"):
        fastmerge.merge_adapters(str(one), tmp_path / "out", weights=1)
    with pytest.raises(RecipeError, match="no adapter is given"):
        fastmerge.merge_adapters([], tmp_path / "out", weights=1)
    adapters.write_adapter(two, adapters.factors(Q, shape=(8, 4)), r=2)
    with pytest.raises(ConflictError, match=r"q_proj' is \[8, 8\] in .*lora0 but \[8, 4\] in"):
        fastmerge.merge_adapters([one, two], tmp_path / "out", weights=1)
    bad = {k: v.index_fill(0, torch.tensor([1]), torch.nan) for k, v in adapters.factors(Q).items()}
    adapters.write_adapter(two, bad, r=2)
    with pytest.raises(NonFiniteError, match=r"lora_A.weight' holds NaN .* at flat index 8"):
        fastmerge.merge_adapters([one, two], tmp_path / "out", weights=1)
    assert sorted(os.listdir(tmp_path)) == ["lora0", "lora1"]


# ---- the command line ----------------------------------------------------------------------------


def run(*arguments: Any) -> str:
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    assert result.exit_code == 0, result.output
    return result.output


def test_commands(models: Path, tmp_path: Path) -> None:
    told = run(
        "extract-lora", models / "base", models / "tuned", tmp_path / "a", "--max-rank", 4,
        "--exclude-regex", "down_proj", "--save-module", "norm",
    )  # fmt: skip
    lines = told.splitlines()
    assert lines[0].split() == ["module", "shape", "rank", "norm", "residual"]
    assert any(x.split()[:4] == ["model.layers.0.mlp.gate_proj", "96", "x", "64"] for x in lines)
    assert "left out, excluded by 'down_proj': model.layers." in told
    assert "kept whole: model.norm.weight" in told
    plain = json.loads(
        run(
            "extract-lora",
            models / "base",
            models / "tuned",
            tmp_path / "b",
            "--energy",
            0.5,
            "--json",
        )
    )
    assert plain["modules"][0]["rank"] >= 1 and plain["residual"] <= math.sqrt(0.5)
    told = run(
        "merge-adapters", tmp_path / "a", tmp_path / "b", tmp_path / "ab", "--weights", "0.5,0.25",
        "--rank", 3, "--dtype", "bfloat16",
    )  # fmt: skip
    assert "taken as they are" in told
    assert {t.dtype for n, t in load_file(tmp_path / "ab" / FACTORS).items() if "lora" in n} == {
        torch.bfloat16
    }
    result = CliRunner().invoke(
        main, ["merge-adapters", str(tmp_path / "a"), str(tmp_path / "x"), "--weights", "a,b"]
    )
    assert result.exit_code == 2
    assert result.output == "error: --weights must be numbers with commas between, got 'a,b'\n"


# ---- peft ----------------------------------------------------------------------------------------

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    try:
        import peft
        import test_peft
        import transformers
    except ImportError:
        peft = None

needs_peft = pytest.mark.skipif(peft is None, reason="needs the extra [oracle]")


def tune(base: Path, folder: Path, seed: int = 5, only: str = "") -> Path:
    """Save a model of which every tensor changed whose name an expression finds, matrices by decaying
    spectra."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype="auto")
        with torch.no_grad():
            for k, (name, parameter) in enumerate(model.named_parameters()):
                if not re.search(only, name):
                    continue
                shape = tuple(parameter.shape)
                change = decaying(shape, seed + k) if len(shape) == 2 else torch.full(shape, 0.1)
                parameter.add_(change)
        model.save_pretrained(folder)
    return folder


def loaded(base: Path, folder: Path) -> dict[str, Tensor]:
    """Return what peft makes of a base and a folder; a warning of a missing key fails."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype="auto")
        warnings.filterwarnings("error", message="Found missing adapter keys")
        adapted = peft.PeftModel.from_pretrained(model, folder)
        state: dict[str, Tensor] = adapted.merge_and_unload().state_dict()
    return state


@needs_peft
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "options", [{"rank": 3}, {"error": 0.3}, {"rank": 3, "exclude": ["s.1.mlp"]}]
)
def test_peft_loads_what_is_extracted(options: dict[str, Any], tied: bool, tmp_path: Path) -> None:
    base = test_peft.write_llama(tmp_path / "base", tie_word_embeddings=tied)
    tuned = tune(base, tmp_path / "tuned")
    report = fastmerge.extract_lora(base, tuned, tmp_path / "out", **options)
    before, after = (families.load(f) for f in (base, tuned))
    found = loaded(base, tmp_path / "out")
    adapted = {m.module for m in report.modules}
    assert len(adapted) == (11 if "exclude" in options else 14)
    for name in found:
        source = "model.embed_tokens.weight" if tied and name == "lm_head.weight" else name
        module, _, kind = name.rpartition(".")
        if kind == "weight" and module in adapted:
            want = before[name].double() + product(tmp_path / "out", module)
        else:
            want = (before if "exclude" in options and "s.1.mlp" in name else after)[
                source
            ].double()
        assert torch.allclose(found[name].double(), want, atol=1e-5), name


@needs_peft
def test_peft_loads_what_is_extracted_of_transposed_weights(tmp_path: Path) -> None:
    base = test_peft.write_gpt2(tmp_path / "base")
    tuned = tune(base, tmp_path / "tuned")
    fastmerge.extract_lora(base, tuned, tmp_path / "out", rank=16)
    found, after = loaded(base, tmp_path / "out"), families.load(tuned)
    for name, want in after.items():
        assert torch.allclose(found[name], want, atol=1e-4), name


@needs_peft
@pytest.mark.parametrize(
    ("only", "saved"),
    [
        (r"c_fc|h\.0\.attn\.c_proj\.bias", ()),  # a bias of a layer that is not adapted
        (r"c_fc\.weight|h\.0.*c_fc\.bias|ln_1\.bias", ()),  # biases of norms
        (r"c_fc\.weight|ln_1\.weight", ("ln_1",)),  # norms whose biases did not change
        (r"c_fc\.weight|c_attn\.weight", ("c_attn",)),  # linear layers kept whole; likewise
    ],
)
def test_peft_loads_modules_of_which_one_tensor_changed(
    only: str, saved: tuple[str, ...], tmp_path: Path
) -> None:
    base = test_peft.write_gpt2(tmp_path / "base")
    tuned = tune(base, tmp_path / "tuned", only=only)
    report = fastmerge.extract_lora(
        base, tuned, tmp_path / "out", rank=16, save_modules=saved or "changed"
    )
    whole = json.loads((tmp_path / "out" / "adapter_config.json").read_text())["modules_to_save"]
    assert {name.rpartition(".")[2] for name in whole or ()} == set(saved)
    found, before, after = loaded(base, tmp_path / "out"), families.load(base), families.load(tuned)
    assert any(not torch.equal(before[name], after[name]) for name in report.saved)
    for name, want in after.items():
        assert torch.allclose(found[name], want, atol=1e-4), name
    parts = len(report.modules) + len(report.saved) + len(report.skipped) + report.unchanged
    assert parts == len(after)


def combine_by_peft(base: Path, folders: list[Path], **options: Any) -> dict[str, Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype="auto")
        adapted = peft.PeftModel.from_pretrained(model, folders[0], adapter_name="0")
        adapted.load_adapter(folders[1], adapter_name="1")
        adapted.add_weighted_adapter(["0", "1"], adapter_name="both", **options)
        adapted.set_adapter("both")
        state: dict[str, Tensor] = adapted.merge_and_unload(adapter_names=["both"]).state_dict()
    return state


@needs_peft
@pytest.mark.parametrize("sign", ["total", "frequency"])
@pytest.mark.parametrize("combination", [c for c in COMBINATIONS if "dare" not in c])
def test_merges_are_those_of_peft(combination: str, sign: str, tmp_path: Path) -> None:
    base = test_peft.write_llama(tmp_path / "base")
    folders = []
    for k, modules in enumerate((["q_proj", "v_proj"], ["q_proj", "down_proj"])):
        folders.append(tmp_path / f"lora{k}")
        train: Callable[..., None] = test_peft.train
        train(base, folders[k], target_modules=modules, r=3, lora_alpha=4 + k)
        state = load_file(folders[k] / FACTORS)
        state = {n: t * (1 + 0.3 * k) + 0.1 * k for n, t in state.items()}
        families.save_file(state, folders[k] / FACTORS, metadata={"format": "pt"})
    options = {} if combination in ("svd", "linear", "cat") else {"density": 0.6}
    want = combine_by_peft(
        base, folders, weights=[0.7, -0.4], combination_type=combination,
        majority_sign_method=sign, **options,
    )  # fmt: skip
    fastmerge.merge_adapters(
        folders, tmp_path / "out", weights=[0.7, -0.4], combination=combination, majority_sign=sign,
        **options,
    )  # fmt: skip
    found, plain = loaded(base, tmp_path / "out"), families.load(base)
    changed = 0
    for name, tensor in want.items():
        assert torch.allclose(found[name], tensor, atol=2e-4), name
        changed += not torch.allclose(found[name], plain[name], atol=1e-3)
    assert changed == 6
