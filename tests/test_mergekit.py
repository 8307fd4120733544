"""Whole merges against mergekit 0.1.5: equal in float32, nearer the truth in bfloat16."""

from __future__ import annotations

from pathlib import Path

import families
import pytest
import torch

import fastmerge
from fastmerge.recipe import load_recipe
from fastmerge.registry import TensorContext

pytest.importorskip("mergekit", reason="the extra [oracle] is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")


def run_mergekit(root: Path, text: str, out: Path) -> dict[str, torch.Tensor]:
    import yaml
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    config = MergeConfiguration.model_validate(yaml.safe_load(text.replace("./", f"{root}/")))
    options = MergeOptions(copy_tokenizer=False, write_model_card=False, quiet=True)
    run_merge(config, str(out), options)
    return families.load(out)


@pytest.fixture(scope="module")
def fp32(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("fp32")
    families.write_family(root, families.llama_shapes(), torch.float32)
    return root


@pytest.fixture(scope="module")
def bf16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("bf16")
    families.write_family(root, families.llama_shapes(), torch.bfloat16)
    return root


def run_both(
    root: Path, text: str, tmp_path: Path
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    recipe = root / "recipe.yaml"
    recipe.write_text(text)
    fastmerge.merge(recipe, tmp_path / "ours")
    theirs = run_mergekit(root, text, tmp_path / "theirs")
    ours = families.load(tmp_path / "ours")
    assert ours.keys() == theirs.keys()
    return ours, theirs


def oracle(root: Path, text: str, name: str) -> torch.Tensor:
    """Return the method's float64 oracle on the stored values."""
    recipe = load_recipe(text)
    spec = recipe.spec()
    states = [families.load(root / str(i.ref)) for i in recipe.inputs]
    operands = [states[i][name].double() for i in recipe.operands()]
    base = None if recipe.base is None or spec.base_is_operand else states[recipe.base][name]
    params = recipe.params_for(name, lambda: 0.0)
    context = TensorContext(name, tuple(operands[0].shape), len(operands), base is not None)
    result: torch.Tensor = spec.oracle(
        None if base is None else base.double(), operands, params, context
    )
    return result


@pytest.mark.parametrize("method", families.DETERMINISTIC)
def test_float32_agrees(method: str, fp32: Path, tmp_path: Path) -> None:
    ours, theirs = run_both(fp32, families.recipe(method), tmp_path)
    for name, x in ours.items():
        difference = (x.double() - theirs[name].double()).abs().max()
        assert difference <= 1e-6 * theirs[name].abs().max(), f"{name}: {difference}"


@pytest.mark.parametrize("method", families.DETERMINISTIC)
def test_bfloat16_is_no_further_from_the_truth(method: str, bf16: Path, tmp_path: Path) -> None:
    text = families.recipe(method)
    ours, theirs = run_both(bf16, text, tmp_path)
    errors = []
    for states in (ours, theirs):
        assert {x.dtype for x in states.values()} == {torch.bfloat16}
        errors.append(
            sum(
                float((x.double() - oracle(bf16, text, name)).abs().sum())
                for name, x in states.items()
            )
        )
    assert errors[0] <= errors[1], f"sum of |error|: ours {errors[0]}, mergekit's {errors[1]}"


@pytest.mark.parametrize(
    "text",
    [
        "merge_method: slerp\nbase_model: ./base\nmodels:\n- model: ./base\n- model: ./e1\n"
        "parameters:\n  t:\n  - filter: self_attn\n    value: [0, 0.5, 1]\n"
        "  - filter: mlp\n    value: [1, 0.2]\n  - value: 0.4\n",
        "merge_method: ties\nbase_model: ./base\nmodels:\n- model: ./e1\n  parameters:\n"
        "    density: [1, 0.3, 0.1]\n    weight: 1\n- model: ./e2\n  parameters:\n    density: 0.5\n"
        "    weight:\n    - {filter: mlp, value: 0.5}\n    - {filter: layers.1, value: [0.1, 0.9]}\n"
        "parameters: {normalize: false, lambda: 0.7, weight: 0.25}\n",
        "merge_method: linear\nmodels:\n- model: ./e1\n  parameters: {weight: 0.3}\n- model: ./base\n"
        "  parameters: {weight: 0.9}\nparameters: {normalize: false}\ndtype: float16\nout_dtype: float32\n",
        "merge_method: task_arithmetic\nbase_model: ./base\nmodels:\n- model: ./base\n- model: ./e2\n"
        "  parameters: {weight: 1e-1}\nparameters: {normalize: true}\n",
    ],
    ids=["slerp-gradient-filters", "ties-gradient-fallthrough", "linear-dtypes", "base-listed"],
)
def test_recipes_resolve_alike(text: str, fp32: Path, tmp_path: Path) -> None:
    ours, theirs = run_both(fp32, text, tmp_path)
    for name, x in ours.items():
        assert x.dtype == theirs[name].dtype
        # `dtype: float16` makes mergekit round its inputs first, which costs it half a unit of float16 each.
        tolerance = 2e-3 if "float16" in text else 1e-6
        difference = (x.double() - theirs[name].double()).abs().max()
        assert difference <= tolerance * theirs[name].abs().max(), f"{name}: {difference}"


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties", "della", "della_linear"])
def test_random_methods_agree_in_distribution(method: str, fp32: Path, tmp_path: Path) -> None:
    """Masks differ by design; what a mask leaves must not: kept share and L1 norm of one expert's delta."""
    text = "\n".join(
        [f"merge_method: {method}", "base_model: ./base", "models:", "- model: ./e1",
         "  parameters: {weight: 1.0, density: 0.4}", "parameters: {normalize: false}", ""]
    )  # fmt: skip
    ours, theirs = run_both(fp32, text, tmp_path)
    base = families.load(fp32 / "base")
    for name in ("model.layers.1.mlp.up_proj.weight", "lm_head.weight"):
        n = base[name].numel()
        kept = [float((s[name] != base[name]).double().mean()) for s in (ours, theirs)]
        norm = [float((s[name] - base[name]).double().abs().sum()) for s in (ours, theirs)]
        sigma = (0.4 * 0.6 / n) ** 0.5
        assert abs(kept[0] - 0.4) < 5 * sigma
        assert abs(kept[1] - 0.4) < 5 * sigma
        assert norm[0] == pytest.approx(norm[1], rel=1e-3)
