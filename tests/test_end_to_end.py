"""Whole merges through API and command line: what may not show, and what goes wrong well."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import damage
import families
import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import save_file

import fastmerge
from fastmerge import _cpu, registry
from fastmerge.cli import main
from fastmerge.errors import CheckpointError, ConflictError, NonFiniteError, RecipeError
from fastmerge.stages import Combine, Walk

#: Odd shapes around rows, blocks and scalars; small enough for chunks of one element.
ODD = {
    "a.0.w": (5, 7),
    "a.1.w": (33,),
    "b": (),
    "c.weight": (3, 2, 11),
    "d": (70, 3),
    "e": (0, 4),
    "f": (1, 1),
}
METHODS = list(families.PARAMETERS)
TIES_MODEL = families.recipe("ties", "scope: model, zero_sign: global_majority, rescale: true")


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("odd")
    families.write_family(root, ODD, torch.bfloat16, config={"model_type": "odd"})
    return root


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments], catch_exceptions=False)


def recipes() -> list[tuple[str, str]]:
    return [(m, families.recipe(m)) for m in METHODS] + [("ties-model", TIES_MODEL)]


def merged(root: Path, text: str, out: Path, **options: object) -> bytes:
    (root / "recipe.yaml").write_text(text)
    fastmerge.merge(root / "recipe.yaml", out, force=True, **options)  # type: ignore[arg-type]
    return families.weight_bytes(out)


@pytest.mark.parametrize(("method", "text"), recipes(), ids=lambda x: x if len(x) < 20 else "")
class TestNothingShows:
    """One recipe, one result: however it is cut, dealt out or computed."""

    def test_chunks_threads_and_instruction_sets(
        self, method: str, text: str, odd: Path, tmp_path: Path
    ) -> None:
        want = merged(odd, text, tmp_path / "whole")
        for chunk in (1, 7, 4096):
            got = merged(odd, text, tmp_path / "chunks", chunk_elements=chunk)
            assert got == want, f"chunks of {chunk} elements show"
        for threads in (1, 2, 5):
            got = merged(odd, text, tmp_path / "threads", threads=threads)
            assert got == want, f"{threads} threads show"
        best = _cpu.isa()
        for isa in _cpu.available_isas().split():
            assert _cpu.set_isa(isa)
            assert merged(odd, text, tmp_path / "isa") == want, f"{isa} shows"
        _cpu.set_isa(best)

    def test_reference_backend(self, method: str, text: str, odd: Path, tmp_path: Path) -> None:
        want = merged(odd, text, tmp_path / "cpu")
        assert merged(odd, text, tmp_path / "reference", backend="reference") == want

    def test_shards(self, method: str, text: str, odd: Path, tmp_path: Path) -> None:
        """Inputs cut into shards at odd places, with and without an index, give the same tensors."""
        want = merged(odd, text, tmp_path / "whole")
        names = sorted(ODD)
        for cuts, with_index in (((2, 3), True), ((1, 5), False)):
            root = tmp_path / f"shards{cuts[0]}"
            for folder in ("base", "e1", "e2", "e3"):
                state = families.load(odd / folder)
                target = root / folder
                target.mkdir(parents=True)
                weight_map = {}
                edges = [0, *cuts, len(names)]
                for s, (a, b) in enumerate(itertools.pairwise(edges)):
                    file = f"model-{s + 1:05}-of-00003.safetensors"
                    part = {n: state[n] for n in reversed(names[a:b])}
                    save_file(part, target / file)
                    weight_map |= dict.fromkeys(part, file)
                if with_index:
                    index = {"metadata": {}, "weight_map": weight_map}
                    (target / "model.safetensors.index.json").write_text(json.dumps(index))
            merged(root, text, root / "out")
            a, b = families.load(tmp_path / "whole"), families.load(root / "out")
            assert a.keys() == b.keys()
            for name in a:
                assert families.same_bits(a[name], b[name]), name
        assert want  # the whole merge wrote something to compare with

    def test_output_shards(self, method: str, text: str, odd: Path, tmp_path: Path) -> None:
        merged(odd, text, tmp_path / "one")
        merged(odd, text, tmp_path / "many", out_shard_size=300)
        assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
        a, b = families.load(tmp_path / "one"), families.load(tmp_path / "many")
        for name in a:
            assert families.same_bits(a[name], b[name]), name


@pytest.mark.parametrize(
    "method", ["ties", "sce", "dare_ties", "model_stock", "breadcrumbs", "della"]
)
def test_a_tensor_too_large_for_memory_is_streamed(method: str, tmp_path: Path) -> None:
    """Statistics by several reads in little memory give the bytes of one read in much."""
    families.write_family(tmp_path, {"w": (4000, 2500)}, torch.bfloat16)
    text = families.recipe(method)
    want = merged(tmp_path, text, tmp_path / "whole")
    little = (
        "320MB" if method == "della" else "150MB"
    )  # ranks of rows of 2500 take memory of their own
    plan = fastmerge.plan(tmp_path / "recipe.yaml", max_memory=little)
    assert plan.streamed
    for io in ("mmap", "direct"):
        assert merged(tmp_path, text, tmp_path / io, max_memory=little, io=io) == want
    with pytest.raises(RecipeError, match="max-memory of 95 MiB is too little"):
        fastmerge.plan(tmp_path / "recipe.yaml", max_memory="100MB")


@pytest.mark.parametrize("method", METHODS)
def test_memory_and_files_agree(method: str, odd: Path, tmp_path: Path) -> None:
    """merge_state_dicts on the loaded tensors gives the tensors that the file merge writes."""
    merged(odd, families.recipe(method), tmp_path / "out")
    base, *experts = (families.load(odd / f) for f in ("base", "e1", "e2", "e3"))
    import yaml

    params = yaml.safe_load(families.PARAMETERS[method] or "{}")
    params |= yaml.safe_load(families.GLOBAL.get(method, "{}"))
    got = fastmerge.merge_state_dicts(
        None if method in ("linear", "passthrough") else base,
        experts[: families.N_EXPERTS.get(method, 3)],
        method=method,
        **params,
    )
    for name, x in families.load(tmp_path / "out").items():
        assert families.same_bits(x, got[name]), name


def test_numpy_and_torch_agree() -> None:
    rng = np.random.default_rng(0)
    base, a, b = (rng.standard_normal((9, 5)).astype(np.float32) for _ in range(3))
    options = {"method": "ties", "weight": [1.0, 0.5], "density": 0.4}
    got = fastmerge.merge_tensors(base, [a, b], **options)
    assert isinstance(got, np.ndarray)
    tensors = [torch.from_numpy(x) for x in (base, a, b)]
    same = fastmerge.merge_tensors(tensors[0], tensors[1:], **options)
    assert torch.equal(same, torch.from_numpy(got))
    strided = fastmerge.merge_tensors(
        tensors[0].T.contiguous().T, [t.T.contiguous().T for t in tensors[1:]], **options
    )
    assert torch.equal(strided, same)


# ---- the command line ------------------------------------------------------------------------------


def test_merge_command_writes_a_whole_model(tmp_path: Path) -> None:
    families.write_family(tmp_path, families.llama_shapes(), torch.bfloat16)
    (tmp_path / "base" / "tokenizer.json").write_text("{}")
    (tmp_path / "base" / "generation_config.json").write_text('{"eos_token_id": 2}')
    (tmp_path / "r.yaml").write_text(families.recipe("ties", dtype="float16"))
    result = run("merge", tmp_path / "r.yaml", tmp_path / "out")
    assert result.exit_code == 0
    assert "ties: 30 tensors of 4 models" in result.stderr
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert names == {
        "model.safetensors", "config.json", "README.md", "mergekit_config.yml", "tokenizer.json",
        "generation_config.json", "fastmerge_manifest.json",
    }  # fmt: skip
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == "float16"
    assert {x.dtype for x in families.load(tmp_path / "out").values()} == {torch.float16}
    assert (tmp_path / "out" / "mergekit_config.yml").read_text() == (
        tmp_path / "r.yaml"
    ).read_text()
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\n")
    assert "merge_method: ties" in card
    transformers = pytest.importorskip("transformers", reason="the extra [demo] is not installed")
    _, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]


def test_quiet_prints_nothing_and_existing_output_needs_force(odd: Path, tmp_path: Path) -> None:
    (odd / "r.yaml").write_text(families.recipe("linear"))
    first = run(
        "merge", odd / "r.yaml", tmp_path / "out", "-q", "--lazy-unpickle", "--copy-tokenizer"
    )
    assert (first.exit_code, first.output) == (0, "")
    again = run("merge", odd / "r.yaml", tmp_path / "out", "-q")
    assert again.exit_code == 2
    assert "--force" in again.stderr
    before = families.weight_bytes(tmp_path / "out")
    assert run("merge", odd / "r.yaml", tmp_path / "out", "-q", "--force").exit_code == 0
    assert families.weight_bytes(tmp_path / "out") == before


def test_plan_command(odd: Path) -> None:
    (odd / "r.yaml").write_text(families.recipe("ties"))
    result = run("plan", odd / "r.yaml")
    assert result.exit_code == 0
    assert "no conflicts" in result.stdout
    data = json.loads(run("plan", odd / "r.yaml", "--json").stdout)
    n = sum(int(np.prod(s)) for s in ODD.values())
    assert (data["parameters"], data["bytes_written"], data["bytes_read"]) == (n, 2 * n, 8 * n)


def test_conflicts_are_listed_and_stop_a_merge(tmp_path: Path) -> None:
    families.write_family(tmp_path, {"w": (4, 4), "v": (3,), "u": (2,)}, n_experts=2)
    state = families.load(tmp_path / "e2")
    families.write_model(
        tmp_path / "e2", {"w": torch.zeros(4, 5), "v": state["v"], "x": torch.ones(1)}
    )
    (tmp_path / "r.yaml").write_text(
        "merge_method: ties\nbase_model: ./base\nmodels:\n- {model: ./e1, parameters: {weight: 1}}\n"
        "- {model: ./e2, parameters: {weight: 1}}\n"
    )
    result = run("plan", tmp_path / "r.yaml")
    assert result.exit_code == 2
    assert "conflict: 'w' is [4, 4] in './base' but [4, 5] in './e2'" in result.stdout
    assert "conflict: 'u' is missing in './e2'" in result.stdout
    assert "conflict: 'x' is missing in './e1', './base'" in result.stdout
    merge = run("merge", tmp_path / "r.yaml", tmp_path / "out")
    assert merge.exit_code == 2
    assert merge.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_missing_tensors_are_merged_over_those_who_have_them_when_asked(tmp_path: Path) -> None:
    families.write_family(tmp_path, {"w": (4, 4), "u": (2,)}, n_experts=2)
    state = families.load(tmp_path / "e2")
    families.write_model(tmp_path / "e2", {"w": state["w"]})
    text = (
        "merge_method: task_arithmetic\nbase_model: ./base\nmodels:\n"
        "- {model: ./e1, parameters: {weight: 1}}\n- {model: ./e2, parameters: {weight: 3}}\n"
    )
    with pytest.raises(ConflictError, match="--allow-missing"):
        merged(tmp_path, text, tmp_path / "out")
    merged(tmp_path, text, tmp_path / "out", allow_missing=True)
    expert = families.load(tmp_path / "e1")["u"]
    torch.testing.assert_close(families.load(tmp_path / "out")["u"], expert)


def test_integer_tensors_are_copied_with_a_warning_when_they_differ(tmp_path: Path) -> None:
    families.write_family(tmp_path, {"w": (4,)}, n_experts=2)
    for m, ids in (("base", [0, 1]), ("e1", [0, 1]), ("e2", [0, 2])):
        state = families.load(tmp_path / m) | {"ids": torch.tensor(ids), "on": torch.tensor([True])}
        families.write_model(tmp_path / m, state)
    text = "merge_method: linear\nmodels:\n" + "".join(
        f"- {{model: ./{m}, parameters: {{weight: 1}}}}\n" for m in ("e1", "e2")
    )
    (tmp_path / "r.yaml").write_text(text)
    report = fastmerge.merge(tmp_path / "r.yaml", tmp_path / "out")
    assert report.warnings == ["'ids' (int64) differs between './e1' and './e2'; './e1''s is taken"]
    assert families.load(tmp_path / "out")["ids"].tolist() == [0, 1]
    strict = run("merge", tmp_path / "r.yaml", tmp_path / "strict", "--strict")
    assert strict.exit_code == 2
    assert not (tmp_path / "strict").exists()


def test_nonfinite_inputs_are_named_or_carried(tmp_path: Path) -> None:
    families.write_family(tmp_path, {"a": (50,), "w": (9, 100)}, torch.bfloat16)
    state = families.load(tmp_path / "e2")
    state["w"][3, 21] = float("nan")
    state["w"][3, 22] = float("inf")
    families.write_model(tmp_path / "e2", state)
    for method in ("ties", "linear", "dare_ties", "model_stock"):
        with pytest.raises(
            NonFiniteError, match=r"'w' of './e2' holds NaN or infinity at flat index 321;"
        ):
            merged(tmp_path, families.recipe(method), tmp_path / "out")
        assert not (tmp_path / "out").exists()
    merged(tmp_path, families.recipe("linear"), tmp_path / "out", nan_policy="propagate")
    w = families.load(tmp_path / "out")["w"]
    assert not torch.isfinite(w[3, 21:23]).any()
    assert torch.isfinite(w).sum() == w.numel() - 2


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_nonfinite_values_are_refused_in_copies_too(dtype: str, tmp_path: Path) -> None:
    """A tensor that is only copied, converted or not, is an input like any other."""
    families.write_family(tmp_path, {"w": (9, 100), "only": (40,)}, torch.bfloat16, n_experts=2)
    state = families.load(tmp_path / "e1")
    state["only"][7] = float("inf")
    families.write_model(tmp_path / "e1", state)
    for m in ("base", "e2"):
        rest = families.load(tmp_path / m)
        families.write_model(tmp_path / m, {"w": rest["w"]})
    passthrough = f"merge_method: passthrough\nmodels: [{{model: ./e1}}]\ndtype: {dtype}\n"
    single = families.recipe("nuslerp", dtype=dtype)
    for text in (passthrough, single):
        options = {"allow_missing": True}
        with pytest.raises(
            NonFiniteError, match=r"'only' of './e1' holds NaN or infinity at flat index 7;"
        ):
            merged(tmp_path, text, tmp_path / "out", **options)
        assert not (tmp_path / "out").exists()
        merged(tmp_path, text, tmp_path / "out", nan_policy="propagate", **options)
        assert torch.isinf(families.load(tmp_path / "out")["only"][7])
        shutil.rmtree(tmp_path / "out")


@pytest.mark.parametrize("method", ["linear", "ties", "passthrough"])
def test_nonfinite_tensors_are_refused_in_memory(method: str) -> None:
    base, expert = torch.ones(5), torch.tensor([1.0, 2.0, float("nan"), 4.0, 5.0])
    origin = base if method == "ties" else None
    params = {} if method == "passthrough" else {"weight": 1.0}
    with pytest.raises(
        NonFiniteError, match=r"experts\[0\] holds NaN or infinity at flat index 2;"
    ):
        fastmerge.merge_tensors(origin, [expert], method=method, **params)
    got = fastmerge.merge_tensors(origin, [expert], method=method, nan_policy="propagate", **params)
    assert torch.isnan(got).tolist() == [False, False, True, False, False]


def test_strided_output_is_refused_in_one_line() -> None:
    with pytest.raises(ConflictError, match="out is strided"):
        fastmerge.ops.fused_walk(
            None, [torch.ones(4, 6)], Walk(np.ones((1, 1)), add_base=False), out=torch.empty(6, 4).T
        )


def test_a_head_that_differs_unties_the_config(tmp_path: Path) -> None:
    shapes = {"model.embed_tokens.weight": (10, 4), "lm_head.weight": (10, 4)}
    families.write_family(
        tmp_path, shapes, n_experts=2, config={**families.LLAMA, "tie_word_embeddings": True}
    )
    tied = families.load(tmp_path / "e1")
    del tied["lm_head.weight"]
    families.write_model(tmp_path / "e1", tied, {**families.LLAMA, "tie_word_embeddings": True})
    text = "merge_method: linear\nmodels:\n" + "".join(
        f"- {{model: ./{m}, parameters: {{weight: 1}}}}\n" for m in ("e1", "e2")
    )
    merged(tmp_path, text, tmp_path / "out")
    got, other = families.load(tmp_path / "out"), families.load(tmp_path / "e2")
    want = (tied["model.embed_tokens.weight"] + other["lm_head.weight"]) / 2
    torch.testing.assert_close(got["lm_head.weight"], want)
    assert (
        json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    )


def test_a_file_replaced_during_the_merge_is_an_error(odd: Path, tmp_path: Path) -> None:
    """The engine compares inputs with what was planned when it is done; nothing keeps a final name."""
    root = tmp_path / "models"
    families.write_family(root, {"w": (100,)}, n_experts=3)
    (root / "r.yaml").write_text(families.recipe("linear"))

    def replace(*_: object) -> None:
        os.utime(root / "e2" / "model.safetensors", ns=(1, 1))

    with pytest.raises(CheckpointError, match="e2"):
        fastmerge.merge(root / "r.yaml", tmp_path / "out", progress=replace)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("case", damage.DAMAGES, ids=lambda d: d.name)
def test_damaged_inputs_exit_with_2_and_one_line(case: damage.Damage, tmp_path: Path) -> None:
    good, bad = tmp_path / "good", tmp_path / "bad"
    damage.make_good_folder(good)
    damage.make_good_folder(bad)
    case.apply(bad)
    (tmp_path / "r.yaml").write_text(
        "merge_method: linear\nmodels:\n- {model: good, parameters: {weight: 1}}\n"
        "- {model: bad, parameters: {weight: 1}}\n"
    )
    result = run("merge", tmp_path / "r.yaml", tmp_path / "out")
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1, result.stderr
    # A folder that is not there is refused where the recipe's references are resolved.
    elsewhere = ("was not found", "is a file")
    # A folder with a GGUF file alone is opened as one.
    expected = ["too short for a GGUF file"] if case.name == "gguf weights" else [case.expect]
    assert any(text in result.stderr for text in (expected if bad.is_dir() else elsewhere))
    assert not (tmp_path / "out").exists()


def test_there_are_two_hundred_damages() -> None:
    assert len({d.name for d in damage.DAMAGES}) >= 200


# ---- methods from outside --------------------------------------------------------------------------


@pytest.fixture
def toy() -> Iterator[str]:
    """A method registered by someone else's code: the mean of signs, scaled."""
    registry.methods()

    @registry.method(
        "toy_first",
        title="Toy",
        summary="takes the first expert, scaled",
        paper="",
        base="ignored",
        params=[registry.Param("gain", 2.0, "factor")],
    )
    def toy_first(params: registry.Params, context: registry.TensorContext) -> registry.Recipe:
        yield from ()
        coefficient = np.zeros((context.n_experts, 1))
        coefficient[0] = params.gain
        return Walk(coefficient, combine=Combine(), add_base=False)

    @toy_first.oracle
    def oracle(
        base: object, experts: list[torch.Tensor], params: registry.Params, _: object
    ) -> torch.Tensor:
        return experts[0] * params.gain

    yield "toy_first"
    registry.unregister("toy_first")


def test_toy_method_runs_through_yaml_and_is_listed(toy: str, odd: Path, tmp_path: Path) -> None:
    text = f"merge_method: {toy}\nmodels: [{{model: ./e2}}, {{model: ./e1}}]\nparameters: {{gain: 4}}\n"
    merged(odd, text, tmp_path / "out")
    want = families.load(odd / "e2")
    for name, x in families.load(tmp_path / "out").items():
        assert torch.equal(x, want[name] * 4)
    assert toy in run("methods").stdout
    assert f"| `{toy}` |" in run("methods", "--markdown").stdout


def test_method_of_an_installed_package_is_found_by_entry_point(tmp_path: Path) -> None:
    (tmp_path / "outsider.py").write_text(
        textwrap.dedent(
            """
            from fastmerge.registry import method
            from fastmerge.stages import Copy

            @method("outside", title="Outside", summary="copies", paper="", base="ignored")
            def outside(params, context):
                yield from ()
                return Copy(0)

            @outside.oracle
            def oracle(base, experts, params, context):
                return experts[0]
            """
        )
    )
    info = tmp_path / "outsider-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: outsider\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[fastmerge.methods]\noutside = outsider\n")
    listing = subprocess.run(
        [sys.executable, "-m", "fastmerge.cli", "methods"],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]),
        },
        capture_output=True,
        text=True,
        check=True,
    )
    assert "outside  (Outside;" in listing.stdout


def test_the_cpu_path_does_not_import_torch(odd: Path, tmp_path: Path) -> None:
    """Start-up would otherwise cost more than the merge of a small model."""
    (odd / "r.yaml").write_text(families.recipe("ties"))
    code = (
        "import sys; from fastmerge.cli import main\n"
        f"main(['merge', {str(odd / 'r.yaml')!r}, {str(tmp_path / 'out')!r}, '-q'], standalone_mode=False)\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    code = "import sys, fastmerge; sys.exit(bool({'torch', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_model_scope_refuses_values_that_differ_between_tensors(
    odd: Path, tmp_path: Path
) -> None:
    text = TIES_MODEL.replace("density: 0.4", "density: [{filter: a.0, value: 0.2}, {value: 0.4}]")
    with pytest.raises(RecipeError, match="ties over the whole model needs one value"):
        merged(odd, text, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_unknown_names_get_the_nearest_known_one(odd: Path, tmp_path: Path) -> None:
    (odd / "r.yaml").write_text("merge_method: tise\nmodels: [{model: ./e1}]\n")
    assert "did you mean 'ties'?" in run("plan", odd / "r.yaml").stderr
    with pytest.raises(RecipeError, match="did you mean 'density'"):
        fastmerge.merge_tensors(torch.ones(3), [torch.ones(3)], method="ties", weight=1, densty=0.5)
    backend = run("merge", odd / "r.yaml", tmp_path / "out", "--backend", "cpp")
    assert backend.exit_code == 2
