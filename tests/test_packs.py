"""Packs: what is stored, what applying gives, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

import fastmerge
from fastmerge.cli import main
from fastmerge.dtypes import DType
from fastmerge.errors import CheckpointError, ConflictError, MergeError, NonFiniteError, RecipeError
from fastmerge.packs.few_bits import GROUP, NAMES, decode, encode, specs
from fastmerge.packs.format import Manifest, Module, StoredTerm, parse_manifest
from fastmerge.packs.smile import SmileLinear, smile_layer
from fastmerge.packs.strategies import STRATEGIES, parse_bits, role_of
from fastmerge.packs.terms import KINDS, TermInfo, part_specs, sparse

Q = "model.layers.0.self_attn.q_proj.weight"
GATE = "model.layers.1.mlp.gate_proj.weight"
EMBEDDING = "model.embed_tokens.weight"
NORM = "model.norm.weight"

#: strategy, options
SMALL: list[tuple[str, dict[str, Any]]] = [
    ("tsv_c", {"rank_fraction": 0.25}),
    ("tsv_c", {"rank_fraction": 0.1, "dtype": "float32", "tables": "matrix"}),
    ("twin", {"mask_rate": 0.8, "weight": 0.5}),
    ("graft", {"attention_rank": 20, "mlp_rank": 30, "bits": "int8:4,int4:10,nf4:16,int2"}),
    ("mcsmoe", {"ratio": 0.2, "keep_rows": 0.1, "tables": "skip"}),
    ("mcsmoe", {"ratio": 0.1, "exclude": "mlp", "tables": "prune", "table_density": 0.05}),
]
IDS = [f"{name}-{i}" for i, (name, _) in enumerate(SMALL)]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of base, e1 and e2, whose matrices change by decaying spectra."""
    root = tmp_path_factory.mktemp("models")
    states = families.family(families.llama_shapes(), torch.float32, 2)
    base = {k: v.bfloat16() for k, v in states["base"].items()}
    families.write_model(root / "base", base)
    for k, name in enumerate(("e1", "e2")):
        state = {}
        for tensor, old in base.items():
            change = states[name][tensor] - states["base"][tensor]
            if change.dim() == 2:
                u, s, vh = torch.linalg.svd(change, full_matrices=False)
                change = (u * s[0] * torch.arange(1, len(s) + 1) ** -1.0) @ vh
            state[tensor] = (old.float() + change).bfloat16()
        state["model.layers.2.input_layernorm.weight"] = base[
            "model.layers.2.input_layernorm.weight"
        ]
        families.write_model(root / name, state, shards=k + 1)
    return root


def packed(models: Path, out: Path, strategy: str = "tsv_c", **options: Any) -> Path:
    expert = [models / "e1", models / "e2"] if strategy == "smile" else models / "e1"
    fastmerge.pack(expert, models / "base", out, strategy=strategy, **options)
    return out


def change(models: Path, name: str, expert: str = "e1") -> Tensor:
    return (
        families.load(models / expert)[name].float() - families.load(models / "base")[name].float()
    )


def reconstructed(pack: Path, name: str) -> Tensor:
    """Return a module's change from the files alone: an independent reading of dense formats."""
    entry = json.loads((pack / "pack.json").read_text())["modules"][name]
    files = [load_file(f) for f in sorted(pack.glob("*.safetensors"))]
    stored = {k: v for file in files for k, v in file.items()}
    total = torch.zeros(entry["shape"], dtype=torch.float64)
    for i, term in enumerate(entry["terms"]):
        part = {
            k.rpartition(f":{i}.")[2]: v for k, v in stored.items() if k.startswith(f"{name}:{i}.")
        }
        if term["kind"] == "low_rank":
            left, right = (dense(part, side, term["format"]) for side in ("left", "right"))
            total += left[:, : total.shape[0]].mT @ right[:, : total.shape[1]]
        elif term["kind"] == "rows":
            total[part["index"].long()] += part["values"].double()
        elif term["kind"] == "sparse":
            total.view(-1)[part["index"].long()] += part["values"][0].double()
        else:
            total += part["values"].double().reshape(total.shape)
    return total


def dense(part: dict[str, Tensor], slot: str, format: str) -> Tensor:
    if slot in part:
        return part[slot].double()
    codes, scales = part[f"{slot}.codes"], part[f"{slot}.scales"].double()
    if format == "int8":
        return codes.double() * scales[:, None] / 127
    if format == "int2":
        levels = torch.stack([(codes >> s) & 3 for s in (0, 2, 4, 6)], -1).flatten(1)
        return (levels.double() - 1.5) * scales.repeat_interleave(GROUP, 1)[:, : levels.shape[1]]
    if format == "int4":
        nibbles = torch.stack([(codes >> s) & 15 for s in range(0, 32, 4)], -1).flatten(1)
        return (nibbles.double() - 8) * scales.repeat_interleave(GROUP, 1)[:, : nibbles.shape[1]]
    pytest.skip("nf4's table is the shared codec's")


# ---- what is stored, and what applying gives -----------------------------------------------------


@pytest.mark.parametrize(("strategy", "options"), SMALL, ids=IDS)
def test_applying_gives_base_plus_what_is_stored(
    strategy: str, options: dict[str, Any], models: Path, tmp_path: Path
) -> None:
    if strategy == "graft":
        options = {**options, "bits": "int8:4,int4:10,int2"}
    pack = packed(models, tmp_path / "pack", strategy, **options)
    fastmerge.apply_packs(models / "base", pack, tmp_path / "out", [0.7])
    base, out = families.load(models / "base"), families.load(tmp_path / "out")
    listed = json.loads((pack / "pack.json").read_text())["modules"]
    for name in base:
        want = base[name].double()
        if name in listed:
            want = want + 0.7 * reconstructed(pack, name)
        # One rounding to bfloat16 of what float32 adds up.
        assert torch.allclose(out[name].double(), want, rtol=2**-8, atol=1e-6), name
    assert (tmp_path / "out" / "config.json").read_text() == (
        models / "base" / "config.json"
    ).read_text()


@pytest.mark.parametrize(("strategy", "options"), SMALL, ids=IDS)
def test_residuals_are_those_of_what_is_stored(
    strategy: str, options: dict[str, Any], models: Path, tmp_path: Path
) -> None:
    report = fastmerge.pack(
        models / "e1", models / "base", tmp_path / "pack", strategy=strategy, **options
    )
    pack = fastmerge.open_pack(tmp_path / "pack")
    for row in report.modules:
        delta = change(models, row.name)
        if row.terms == "left out":
            assert row.residual == 1 and row.name not in pack.manifest.modules
            continue
        found = torch.zeros_like(delta)
        for term in pack.terms(row.name):
            add = KINDS[term.info.kind].add
            assert add is not None
            add(term, found, 0, 1.0)
        assert row.residual == pytest.approx(
            float((found - delta).norm() / delta.norm()), rel=1e-4, abs=1e-6
        )
        assert row.residual == pack.manifest.modules[row.name].residual
        assert row.n_bytes == sum(t.n_bytes for t in pack.terms(row.name))
    assert report.unchanged == 1


def test_low_rank_parts_are_the_best_of_their_rank(models: Path, tmp_path: Path) -> None:
    report = fastmerge.pack(
        models / "e1",
        models / "base",
        tmp_path / "pack",
        strategy="tsv_c",
        rank_fraction=0.125,
        dtype="float32",
    )
    rows = {row.name: row for row in report.modules}
    for name in (Q, GATE):
        s = torch.linalg.svdvals(change(models, name).double())
        best = float((s[8:] ** 2).sum().sqrt() / s.norm())
        assert rows[name].residual == pytest.approx(best, rel=1e-4)
        assert rows[name].terms == "low_rank 8 float32"
        assert rows[name].n_bytes == 4 * 8 * sum(rows[name].shape)


def test_graft_takes_as_many_bytes_as_its_bits(models: Path, tmp_path: Path) -> None:
    """bits * (m + n) * k / (16 m n) of each group, and the scales."""
    report = fastmerge.pack(
        models / "e1",
        models / "base",
        tmp_path / "pack",
        strategy="graft",
        mlp_rank=50,
        bits="int8:4,int4:10,int2",
        tables="skip",
    )
    (row,) = (r for r in report.modules if r.name == GATE)
    m, n = row.shape
    assert row.terms == "low_rank 4 int8, low_rank 6 int4, low_rank 40 int2"
    values = 8 * 4 * (m + n) + 4 * 6 * (128 + 128) + 2 * 40 * (m + n)
    scales = 32 * 4 * 2 + 32 * 6 * 2 + 16 * 40 * 2
    assert row.n_bytes == (values + scales) / 8
    assert row.residual < 0.25
    q = next(r for r in report.modules if r.name == Q)
    assert q.terms == "low_rank 4 int8, low_rank 6 int4, low_rank 54 int2"  # 1000, capped


def test_vectors_of_16_bit_models_are_restored_to_the_bit(models: Path, tmp_path: Path) -> None:
    pack = packed(models, tmp_path / "pack", rank_fraction=0.1)
    fastmerge.apply_packs(models / "base", pack, tmp_path / "out")
    out, expert = families.load(tmp_path / "out"), families.load(models / "e1")
    for name, tensor in expert.items():
        if tensor.dim() == 1:
            assert torch.equal(out[name], tensor), name


def test_what_takes_fewer_bytes_raw_is_raw(models: Path, tmp_path: Path) -> None:
    report = fastmerge.pack(
        models / "e1", models / "base", tmp_path / "pack", strategy="tsv_c", rank_fraction=0.7
    )
    assert {r.terms for r in report.modules if len(r.shape) == 2} == {"raw bfloat16"}


def test_weights_of_packs_add_up(models: Path, tmp_path: Path) -> None:
    one = packed(models, tmp_path / "one", rank_fraction=0.2)
    two = packed(models, tmp_path / "two", "mcsmoe", ratio=0.2)
    fastmerge.apply_packs(models / "base", [one, two], tmp_path / "both", [0.5, -0.25])
    fastmerge.sum_packs([one, two], tmp_path / "sum", [0.5, -0.25])
    fastmerge.apply_packs(models / "base", tmp_path / "sum", tmp_path / "summed")
    both, summed = families.load(tmp_path / "both"), families.load(tmp_path / "summed")
    base = families.load(models / "base")
    for name in both:
        assert torch.equal(both[name], summed[name])
    delta = 0.5 * reconstructed(one, Q) - 0.25 * reconstructed(two, Q)
    assert torch.allclose(both[Q].double(), base[Q].double() + delta, rtol=2**-8, atol=1e-6)
    assert fastmerge.open_pack(tmp_path / "sum").manifest.modules[Q].residual > 0


def test_a_pack_has_the_weight_that_twin_merging_gave_it(models: Path, tmp_path: Path) -> None:
    pack = packed(models, tmp_path / "pack", "twin", weight=0.25)
    fastmerge.apply_packs(models / "base", pack, tmp_path / "own")
    fastmerge.apply_packs(models / "base", pack, tmp_path / "given", [0.25])
    assert families.weight_bytes(tmp_path / "own") == families.weight_bytes(tmp_path / "given")


def test_shards_do_not_change_what_is_stored(models: Path, tmp_path: Path) -> None:
    one = packed(models, tmp_path / "one")
    many = packed(models, tmp_path / "many", shard_size="4k")
    assert len(list(many.glob("*.safetensors"))) > 5
    a, b = fastmerge.open_pack(one), fastmerge.open_pack(many)
    assert a.manifest.modules == b.manifest.modules
    fastmerge.apply_packs(models / "base", many, tmp_path / "out", out_shard_size="20k")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 5
    fastmerge.apply_packs(models / "base", one, tmp_path / "whole")
    assert families.load(tmp_path / "out").keys() == families.load(tmp_path / "whole").keys()


def test_a_model_that_changes_nothing_is_an_empty_pack(models: Path, tmp_path: Path) -> None:
    report = fastmerge.pack(models / "base", models / "base", tmp_path / "pack", strategy="graft")
    assert not report.modules
    fastmerge.apply_packs(models / "base", tmp_path / "pack", tmp_path / "out")
    base, out = families.load(models / "base"), families.load(tmp_path / "out")
    assert all(torch.equal(base[name], out[name]) for name in base)


def test_float64_stays_float64(tmp_path: Path) -> None:
    states = families.family({"a.mlp.w": (40, 30), "b": (7,)}, torch.float64, 1)
    for name, state in states.items():
        families.write_model(tmp_path / name, state)
    fastmerge.pack(
        tmp_path / "e1", tmp_path / "base", tmp_path / "pack", strategy="mcsmoe", keep_rows=1.0
    )
    fastmerge.apply_packs(tmp_path / "base", tmp_path / "pack", tmp_path / "out")
    out = families.load(tmp_path / "out")
    for name, tensor in states["e1"].items():
        assert torch.allclose(out[name], tensor, rtol=0, atol=1e-14)


def test_roles_follow_from_names_and_shapes() -> None:
    assert role_of(Q, (4, 4)) == role_of("h.0.attn.c_attn.weight", (4, 4)) == "attention"
    assert (
        role_of(GATE, (4, 4)) == role_of("model.layers.3.mlp.experts.7.w1.weight", (4, 4)) == "mlp"
    )
    assert role_of(EMBEDDING, (4, 4)) == role_of("lm_head.weight", (4, 4)) == "table"
    assert role_of("vision.proj.weight", (4, 4)) == "matrix"
    assert role_of("conv.weight", (4, 4, 3, 3)) == "block" and role_of(NORM, (4,)) == "vector"


@pytest.mark.parametrize("count", [1, 7, 20])
def test_the_largest_values_stay_the_first_of_equal_ones(count: int) -> None:
    delta = torch.tensor([[1.0, -3.0, 2.0, -2.0, 0.0], [2.0, 2.0, 0.5, -0.5, 3.0]]).repeat(2, 1)
    term = sparse(delta, count, "float32")
    order = sorted(range(20), key=lambda i: (-abs(float(delta.view(-1)[i])), i))[:count]
    assert term.parts["index"].tolist() == sorted(order)
    assert torch.equal(term.parts["values"][0], delta.view(-1)[sorted(order)])


# ---- SMILE ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("rank", [6, -1])
def test_smile_layers_route_by_lengths(rank: int, top_k: int, models: Path, tmp_path: Path) -> None:
    path = packed(models, tmp_path / "pack", "smile", rank=rank, gate_k=3, dtype="float32")
    weight = families.load(models / "base")[Q].double()
    layer = smile_layer(fastmerge.open_pack(path), Q.removesuffix(".weight"), weight, None, top_k)
    assert isinstance(layer, SmileLinear)
    x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = layer(x)
    logits, outputs = [], []
    for expert in ("e1", "e2"):
        u, s, vh = torch.linalg.svd(change(models, Q, expert).double())
        k = 64 if rank < 0 else rank
        logits.append((x @ vh[:3].mT).norm(dim=-1))
        outputs.append(x @ ((u[:, :k] * s[:k]) @ vh[:k]).mT)
    share = torch.stack(logits).softmax(0)
    if top_k == 1:
        share = (share == share.max(0).values).double()
    want = x @ weight.mT + (share[..., None] * torch.stack(outputs)).sum(0)
    assert torch.allclose(found, want, rtol=1e-5, atol=1e-5)
    assert layer.state_dict().keys() >= {"weight", "right_0", "router_1"}
    assert torch.allclose(layer.router_logits(x), torch.stack(logits, -1), rtol=1e-4, atol=1e-5)


def test_smile_packs_restore_each_model(models: Path, tmp_path: Path) -> None:
    path = packed(models, tmp_path / "pack", "smile", rank=64)
    with pytest.raises(ConflictError, match=r"holds 2 models.*revert"):
        fastmerge.apply_packs(models / "base", path, tmp_path / "out")
    for model in ("e2", 1):
        fastmerge.revert(path, model, models / "base", tmp_path / "out", overwrite=True)
        out, expert = families.load(tmp_path / "out"), families.load(models / "e2")
        assert all(torch.allclose(out[n], expert[n], rtol=2**-7, atol=1e-3) for n in expert)
    assert smile_layer(fastmerge.open_pack(path), "no.such", torch.zeros(2, 2)) is None
    with pytest.raises(RecipeError, match=r"top_k must be in \[1, 2\]"):
        smile_layer(
            fastmerge.open_pack(path), Q.removesuffix(".weight"), torch.zeros(64, 64), top_k=3
        )


@pytest.mark.parametrize("tables", ["prune", "raw", "skip"])
def test_tables_of_several_models_stay_apart(tables: str, models: Path, tmp_path: Path) -> None:
    path = packed(models, tmp_path / "pack", "smile", tables=tables, table_density=0.1)
    for expert in ("e1", "e2"):
        fastmerge.revert(path, expert, models / "base", tmp_path / expert)
        moved = families.load(tmp_path / expert)[EMBEDDING].float()
        moved -= families.load(models / "base")[EMBEDDING].float()
        delta = change(models, EMBEDDING, expert)
        kept = moved != 0
        assert torch.allclose(moved[kept], delta[kept], atol=2e-3)
        changed = float((delta != 0).float().mean())
        share = {"raw": changed, "prune": 0.1, "skip": 0.0}[tables]
        assert float(kept.float().mean()) == pytest.approx(share, abs=0.02)
        if tables == "prune":
            # Equal changes are many in bfloat16: the lower index is kept.
            assert float(delta[kept].abs().min()) >= float(delta[~kept].abs().max())


# ---- few bits ------------------------------------------------------------------------------------

sizes = st.tuples(st.integers(1, 5), st.integers(1, 300))


@given(sizes, st.integers(0, 1000), st.sampled_from(NAMES), st.sampled_from([1e-6, 1.0, 1e4]))
def test_every_format_stores_what_it_says(
    size: tuple[int, int], seed: int, format: str, scale: float
) -> None:
    if format == "float16" and scale != 1.0:
        return  # beyond what it holds
    x = scale * torch.randn(size, generator=torch.Generator().manual_seed(seed))
    parts = encode("s", format, x)
    for slot, spec in specs("s", format, *size).items():
        assert tuple(parts[slot].shape) == spec.shape
        assert str(parts[slot].dtype) == f"torch.{spec.dtype.torch}"
    found = decode("s", format, parts, *size)
    assert tuple(found.shape) == size
    # The largest of a row or group is met by 8 and 4 bits; two bits keep most of the energy.
    most = {"int8": 0.5 / 127, "int4": 0.5 / 7, "nf4": 0.16, "int2": 1.0}.get(format, 2**-8)
    assert float((found - x).abs().max()) <= 1.02 * most * float(x.abs().max())
    if format == "int2":
        assert float((found - x).norm()) <= 0.75 * float(x.norm())


@given(st.integers(1, 300), st.integers(0, 1000))
def test_int2_codes_rows_alone_and_packs_them_in_order(cols: int, seed: int) -> None:
    x = torch.randn(3, cols, generator=torch.Generator().manual_seed(seed))
    parts = encode("s", "int2", x)
    for i in range(3):
        alone = encode("s", "int2", x[i : i + 1])
        assert all(torch.equal(alone[slot], parts[slot][i : i + 1]) for slot in parts)
    for j in {0, cols // 2, cols - 1}:
        code = int(parts["s.codes"][1, j // 4]) >> 2 * (j % 4) & 3
        value = float(parts["s.scales"][1, j // GROUP]) * (code - 1.5)
        assert float(decode("s", "int2", parts, 3, cols)[1, j]) == value


def test_int2_of_zeros_and_of_its_own_levels() -> None:
    assert not decode("s", "int2", encode("s", "int2", torch.zeros(2, 130)), 2, 130).any()
    levels = torch.tensor([-1.5, -0.5, 0.5, 1.5]).repeat(1, 40)
    assert torch.equal(decode("s", "int2", encode("s", "int2", levels), 1, 160), levels)


# ---- the parser ----------------------------------------------------------------------------------

names = st.text(st.characters(codec="utf-8", exclude_categories=["C", "Zl", "Zp"]), min_size=1)


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    n_experts = draw(st.integers(1, 3))
    modules = {}
    for name in draw(st.lists(names, max_size=3, unique=True)):
        shape = tuple(draw(st.lists(st.integers(1, 9), min_size=2, max_size=2)))
        terms = []
        for kind in draw(st.lists(st.sampled_from(sorted(KINDS)), max_size=3)):
            numbers = {n: draw(st.integers(n != "basis", 4)) for n in KINDS[kind].numbers}
            if "experts" in numbers:
                numbers["experts"] = n_experts
            info = TermInfo(
                kind,
                draw(st.sampled_from(NAMES)),
                numbers,
                draw(st.none() | st.integers(0, n_experts - 1)),
                draw(st.floats(-5, 5)),
            )
            sums = {slot: draw(st.integers(0, 2**64 - 1)) for slot in part_specs(info, shape)}
            terms.append(StoredTerm(info, sums))
        modules[name] = Module(shape, DType.BF16, draw(st.integers(0, 9)), 0.5, terms)
    return Manifest(
        "x", {"a": 1}, "base", [f"m{i}" for i in range(n_experts)], 1.0, ["a.safetensors"], modules
    )


@given(manifests())
def test_what_is_written_is_what_is_read(manifest: Manifest) -> None:
    assert parse_manifest(json.loads(manifest.text()), "here") == manifest


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=4), v, max_size=3),
    max_leaves=5,
)


@given(manifests(), st.data())
def test_a_changed_manifest_is_read_or_refused_in_one_line(
    manifest: Manifest, data: st.DataObject
) -> None:
    content = json.loads(manifest.text())
    place: Any = content
    while True:
        keys = list(range(len(place))) if isinstance(place, list) else sorted(place)
        if not keys:
            break
        key = data.draw(st.sampled_from(keys))
        if isinstance(place[key], dict | list) and data.draw(st.booleans()):
            place = place[key]
            continue
        if isinstance(place, dict) and data.draw(st.booleans()):
            del place[key]
        else:
            place[key] = data.draw(values)
        break
    try:
        parse_manifest(content, "here")
    except CheckpointError as error:
        assert str(error).startswith("here") and "\n" not in str(error)


def test_the_format_is_documented() -> None:
    text = (Path(__file__).parents[1] / "docs" / "packs.md").read_text()
    for word in (*NAMES, *KINDS, *STRATEGIES, *(n for k in KINDS.values() for n in k.numbers)):
        assert f"`{word}`" in text, word
    for kind in STRATEGIES.values():
        for option in dataclasses.fields(kind):
            if option.init:
                assert f"`{option.name}`" in text, option.name


# ---- damage --------------------------------------------------------------------------------------


def _edit(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def damage(pack: Path) -> None:
        content = json.loads((pack / "pack.json").read_text())
        change(content)
        (pack / "pack.json").write_text(json.dumps(content))

    return damage


def _flip(pack: Path) -> None:
    file = pack / "pack-00001.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)


def _cut(pack: Path) -> None:
    file = pack / "pack-00001.safetensors"
    file.write_bytes(file.read_bytes()[:-8])


def _restore(pack: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    file = pack / "pack-00001.safetensors"
    stored = load_file(file)
    change(stored)
    save_file(stored, file)


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no manifest": (lambda p: (p / "pack.json").unlink(), "is not a pack: it has no pack.json"),
    "no JSON": (lambda p: (p / "pack.json").write_text("{"), "pack.json is not valid JSON"),
    "twice": (
        lambda p: (p / "pack.json").write_text('{"format": 1, "format": 2}'),
        "names 'format' twice",
    ),
    "another format": (_edit(lambda c: c.update(format="x")), "format must be 'fastmerge-pack'"),
    "another version": (_edit(lambda c: c.update(version=2)), "version 2 is unknown"),
    "no modules": (_edit(lambda c: c.pop("modules")), "has no modules"),
    "an unknown key": (_edit(lambda c: c.update(novel=1)), "unknown key 'novel'"),
    "a path": (_edit(lambda c: c["files"].append("../a.safetensors")), "files must be names"),
    "a weight": (_edit(lambda c: c.update(weight="1")), "weight must be a finite number"),
    "a shape": (
        _edit(lambda c: c["modules"][Q].update(shape=[64, -1])),
        r"shape must be a whole number in \[1, 2147483647\], got -1",
    ),
    "a rank": (
        _edit(lambda c: c["modules"][Q]["terms"][0].update(rank=2**31 - 1)),
        r"is bfloat16 \[8, 64\] but pack.json makes it bfloat16 \[2147483647, 64\]",
    ),
    "a kind": (
        _edit(lambda c: c["modules"][Q]["terms"][0].update(kind="x")),
        r"terms\[0\]: kind must be one of low_rank",
    ),
    "a file": (lambda p: (p / "pack-00001.safetensors").unlink(), "cannot be read: no such file"),
    "a flipped bit": (_flip, "is not what pack.json has the checksum of"),
    "a cut file": (_cut, "past the end of the data"),
    "a tensor too few": (
        lambda p: _restore(p, lambda s: s.pop(f"{Q}:0.left")),
        "lacks the tensor .*:0.left",
    ),
    "a tensor too many": (
        lambda p: _restore(p, lambda s: s.update(novel=torch.zeros(1))),
        "holds 'novel', which pack.json does not list",
    ),
    "a module of its own": (
        _edit(lambda c: c["modules"].update({"x": {**c["modules"][Q], "terms": []}})),
        "changes 'x', which .* does not have",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_pack_is_refused_in_one_line(damage: str, models: Path, tmp_path: Path) -> None:
    pack = packed(models, tmp_path / "pack")
    DAMAGE[damage][0](pack)
    with pytest.raises(MergeError, match=DAMAGE[damage][1]) as error:
        fastmerge.apply_packs(models / "base", pack, tmp_path / "out")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("index", [[5, 4], [0, 64], [-1, 3]])
def test_an_index_outside_the_tensor_is_refused(
    index: list[int], models: Path, tmp_path: Path
) -> None:
    pack = packed(models, tmp_path / "pack", "mcsmoe", keep_rows=0.04)
    rows = torch.tensor(index, dtype=torch.int32)
    _restore(pack, lambda s: s.update({f"{Q}:1.index": rows}))
    from fastmerge.stored_tensors import checksum_of

    total = f"{checksum_of(rows):016x}"
    _edit(lambda c: c["modules"][Q]["terms"][1]["checksums"].update(index=total))(pack)
    with pytest.raises(CheckpointError, match=r"is not ascending in \[0, 64\)"):
        fastmerge.apply_packs(models / "base", pack, tmp_path / "out")


# ---- what is refused -----------------------------------------------------------------------------


def test_another_base_is_refused_unless_asked_for(models: Path, tmp_path: Path) -> None:
    pack = packed(models, tmp_path / "pack")
    with pytest.raises(
        CheckpointError, match=r"was made against other values of .* 'base'.*--any-base"
    ):
        fastmerge.apply_packs(models / "e2", pack, tmp_path / "out")
    fastmerge.apply_packs(models / "e2", pack, tmp_path / "out", any_base=True)


def test_outputs_are_not_overwritten_unasked(models: Path, tmp_path: Path) -> None:
    pack = packed(models, tmp_path / "pack")
    before = (pack / "pack.json").read_bytes()
    with pytest.raises(CheckpointError, match=r"holds a pack; .*--overwrite"):
        packed(models, pack)
    packed(models, pack, "mcsmoe", overwrite=True)
    assert (pack / "pack.json").read_bytes() != before
    fastmerge.apply_packs(models / "base", pack, tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"is not empty.*--overwrite"):
        fastmerge.apply_packs(models / "base", pack, tmp_path / "out")
    fastmerge.apply_packs(models / "base", pack, tmp_path / "out", overwrite=True)
    with pytest.raises(CheckpointError, match=r"something that is not a pack"):
        packed(models, tmp_path / "out", overwrite=True)
    with pytest.raises(CheckpointError, match=r"is or holds the input"):
        packed(models, models / "base", overwrite=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"is no folder"):
        packed(models, tmp_path / "file")
    with pytest.raises(CheckpointError, match=r"cannot be created: .* is a file"):
        packed(models, tmp_path / "file" / "pack")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "out", "pack"]


def test_a_failure_leaves_the_earlier_pack(models: Path, tmp_path: Path) -> None:
    pack = packed(models, tmp_path / "pack")
    before = (pack / "pack.json").read_bytes()
    state = families.load(models / "e1")
    state[NORM][3] = torch.nan
    families.write_model(tmp_path / "bad", state)
    with pytest.raises(NonFiniteError, match=rf"'{NORM}' in .*bad .* at flat index 3"):
        fastmerge.pack(
            tmp_path / "bad", models / "base", pack, strategy="tsv_c", overwrite=True, shard_size=1
        )
    assert (pack / "pack.json").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad", "pack"]


def test_an_interrupt_leaves_nothing(models: Path, tmp_path: Path) -> None:
    def stop(name: str, done: int, total: int) -> None:
        assert 0 < done <= total
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        packed(models, tmp_path / "pack", shard_size="4k", progress=stop)
    assert not list(tmp_path.iterdir())


def test_models_of_another_kind_are_refused(models: Path, tmp_path: Path) -> None:
    state = families.load(models / "e1")
    cases = {
        "fewer": ({k: v for k, v in state.items() if k != Q}, "has .* but .*fewer does not"),
        "wider": ({**state, EMBEDDING: torch.zeros(131, 64)}, r"\[130, 64\] in .* \[131, 64\] in"),
        "ints": ({**state, NORM: torch.zeros(64, dtype=torch.int32)}, "int32 in .*; store both"),
    }
    for name, (content, words) in cases.items():
        families.write_model(tmp_path / name, content)
        with pytest.raises(ConflictError, match=words):
            fastmerge.pack(tmp_path / name, models / "base", tmp_path / "p", strategy="tsv_c")


def test_whole_numbers_must_be_the_bases(models: Path, tmp_path: Path) -> None:
    counts = {
        "n": torch.arange(4),
        "steps": torch.tensor(3),
        "flags": torch.ones(3, dtype=torch.bool),
    }
    base, other = ({**families.load(models / m), **counts} for m in ("base", "e1"))
    base["scale"], other["scale"] = torch.tensor(2.0), torch.tensor(2.5)
    families.write_model(tmp_path / "base", base)
    families.write_model(tmp_path / "same", other)
    families.write_model(tmp_path / "other", {**other, "n": torch.arange(4) + 1})
    packed_ok = fastmerge.pack(
        tmp_path / "same", tmp_path / "base", tmp_path / "p", strategy="tsv_c"
    )
    assert packed_ok.unchanged == 4
    fastmerge.apply_packs(tmp_path / "base", tmp_path / "p", tmp_path / "out")
    out = families.load(tmp_path / "out")
    assert out["scale"] == 2.5 and all(torch.equal(out[name], counts[name]) for name in counts)
    with pytest.raises(ConflictError, match=r"'n' is torch.int64 and differs in"):
        fastmerge.pack(tmp_path / "other", tmp_path / "base", tmp_path / "q", strategy="tsv_c")


@pytest.mark.parametrize(
    ("strategy", "options", "words"),
    [
        ("tsvc", {}, "strategy 'tsvc' is unknown; did you mean 'tsv_c'"),
        ("tsv_c", {"rank_fracton": 1}, "no option 'rank_fracton'; did you mean 'rank_fraction'"),
        ("tsv_c", {"rank_fraction": "x"}, "option rank_fraction must be a number, got 'x'"),
        ("tsv_c", {"rank_fraction": math.nan}, r"rank_fraction must be in \[0, 1\]"),
        ("tsv_c", {"dtype": "int4"}, "dtype must be one of model"),
        ("tsv_c", {"tables": "x"}, "tables must be raw"),
        ("tsv_c", {"exclude": "("}, "exclude is not a regular expression"),
        ("twin", {"mask_rate": 2}, "mask_rate must be"),
        ("graft", {"mlp_rank": 1.5}, "mlp_rank must be a whole number"),
        ("graft", {"attention_rank": 0}, "attention_rank must be at least 1"),
        ("graft", {"bits": "int8:20"}, "the last without an end"),
        ("graft", {"bits": "int3"}, "a format of bits must be one of"),
        ("graft", {"bits": "int8:20,int4:20,int2"}, "whole numbers that rise, got '20'"),
        ("mcsmoe", {"keep_rows": -1}, "keep_rows must be"),
        ("mcsmoe", {"ratio": -1}, "ratio must be"),
        ("smile", {"gate_k": 0}, "gate_k must be"),
    ],
)
def test_bad_options_are_refused(
    strategy: str, options: dict[str, Any], words: str, models: Path, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=words):
        packed(models, tmp_path / "pack", strategy, **options)


def test_counts_of_models_and_weights_are_checked(models: Path, tmp_path: Path) -> None:
    both = [models / "e1", models / "e2"]
    with pytest.raises(ConflictError, match=r"packs one model, got 2"):
        fastmerge.pack(both, models / "base", tmp_path / "p", strategy="tsv_c")
    pack = packed(models, tmp_path / "pack")
    with pytest.raises(RecipeError, match=r"2 weights are given for 1 packs"):
        fastmerge.apply_packs(models / "base", pack, tmp_path / "out", [1, 2])
    with pytest.raises(RecipeError, match=r"no pack is given"):
        fastmerge.apply_packs(models / "base", [], tmp_path / "out")
    with pytest.raises(NonFiniteError, match=r"is not finite.*check the weights"):
        fastmerge.apply_packs(models / "base", pack, tmp_path / "out", [math.inf])
    assert not (tmp_path / "out").exists()
    other = tmp_path / "other"
    fastmerge.pack(models / "e1", models / "e2", other, strategy="tsv_c")
    with pytest.raises(ConflictError, match=r"against another base"):
        fastmerge.sum_packs([pack, other], tmp_path / "sum")
    assert parse_bits("int8:2, int2") == [("int8", 2), ("int2", None)]


def test_models_in_few_bits_are_refused(models: Path, tmp_path: Path) -> None:
    runner = CliRunner()
    coded = str(tmp_path / "coded")
    done = runner.invoke(main, ["quantize", str(models / "base"), coded, "--quantize", "nf4"])
    assert done.exit_code == 0, done.output
    with pytest.raises(CheckpointError, match=r"in few bits; .*fastmerge dequantize"):
        fastmerge.pack(models / "e1", coded, tmp_path / "pack", strategy="tsv_c")


# ---- the command line ----------------------------------------------------------------------------


def test_commands_pack_and_apply(models: Path, tmp_path: Path) -> None:
    runner = CliRunner()
    pack, out = str(tmp_path / "pack"), str(tmp_path / "out")
    base, e1, e2 = (str(models / m) for m in ("base", "e1", "e2"))
    words = ["pack", e1, base, "--out", pack, "--strategy", "tsv_c", "-o", "rank_fraction=0.2"]
    done = runner.invoke(main, words)
    assert done.exit_code == 0, done.output
    assert "low_rank 12 bfloat16" in done.output and "29 tensors changed" in done.output
    done = runner.invoke(main, ["apply", base, f"{pack}:0.5", pack, "--out", out])
    assert done.exit_code == 0 and "29 of them changed" in done.output, done.output
    fastmerge.apply_packs(base, [pack, pack], tmp_path / "same", [0.5, 1.0])
    assert families.weight_bytes(tmp_path / "out") == families.weight_bytes(tmp_path / "same")
    smile = str(tmp_path / "smile")
    assert (
        runner.invoke(
            main, ["pack", e1, e2, base, "--out", smile, "--strategy", "smile", "-q"]
        ).output
        == ""
    )
    done = runner.invoke(
        main, ["revert", smile, "--model", "3", "--base", base, "--out", out, "--overwrite"]
    )
    assert done.exit_code == 2 and "holds no model '3'; it holds e1, e2, or 0 to 1" in done.output
    done = runner.invoke(
        main, ["revert", smile, "--model", "e1", "--base", base, "--out", out, "--overwrite"]
    )
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-o", "x"], "error: --option must be NAME=VALUE, got 'x'"),
        (["-o", "device=cpu"], "error: device is no option of a strategy; pass --device"),
        (["-o", "rank=3"], "error: strategy tsv_c has no option 'rank'"),
        (["--device", "abacus"], "error: device 'abacus' cannot be used"),
        (["--shard-size", "x"], "error: size must look like"),
    ],
)
def test_bad_commands_get_one_line(
    words: list[str], message: str, models: Path, tmp_path: Path
) -> None:
    command = ["pack", str(models / "e1"), str(models / "base"), "--strategy", "tsv_c"]
    done = CliRunner().invoke(main, [*command, "--out", str(tmp_path / "p"), *words])
    assert done.exit_code == 2
    assert done.output.startswith(message) and done.output.count("\n") == 1


def test_a_weight_is_a_number(models: Path, tmp_path: Path) -> None:
    pack = packed(models, tmp_path / "pack")
    done = CliRunner().invoke(
        main, ["apply", str(models / "base"), f"{pack}:x", "--out", str(tmp_path / "o")]
    )
    assert done.exit_code == 2 and "must be a number, got 'x'" in done.output
    named = tmp_path / "pack:2"
    shutil.copytree(pack, named)
    done = CliRunner().invoke(
        main, ["apply", str(models / "base"), str(named), "--out", str(tmp_path / "o")]
    )
    assert done.exit_code == 0, done.output
