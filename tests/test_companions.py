"""What lies beside the weights: configuration, companion files, model card."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from damage import INDEX

from fastmerge.card import hub_id, model_card
from fastmerge.checkpoint import (
    companion_files,
    merged_config,
)
from fastmerge.dtypes import DType

# ---- companions and configuration ---------------------------------------------------------------


def test_companions(tmp_path: Path) -> None:
    wanted = {
        "tokenizer.json": "{}",
        "tokenizer_config.json": '{"auto_map": {"AutoTokenizer": ["tok_x.Tok", null]}}',
        "tokenizer.model": "",
        "vocab.json": "{}",
        "merges.txt": "",
        "spiece.model": "",
        "generation_config.json": "{}",
        "chat_template.jinja": "",
        "additional_chat_templates/tool.jinja": "",
        "preprocessor_config.json": "{}",
        "modules.json": "[]",
        "1_Pooling/config.json": "{}",
        "modeling_x.py": "from .layers_x import Layer\nfrom . import rope_x\n",
        "layers_x.py": "from .modeling_x import Model\n",
        "rope_x.py": "",
        "tok_x.py": "",
    }
    auto_map = {"AutoModel": "modeling_x.Model", "AutoConfig": "owner/repo--conf.C", "A": "../up.X"}
    others = {
        "config.json": json.dumps({"auto_map": auto_map}),
        "LICENSE": "",
        "README.md": "",
        "train.py": "",
        "conf.py": "",
        "model.safetensors": "",
        "training_args.bin": "",
        "docs/config.json": "",
        INDEX: "",
    }
    for name, text in (wanted | others).items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "vocab.txt").mkdir()
    assert companion_files(tmp_path) == {n: tmp_path / n for n in sorted(wanted)}


@pytest.mark.parametrize("text", ["", "[]", '{"auto_map": 3}', '{"auto_map": {"a": [{}]}}'])
def test_companions_of_odd_configurations(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    assert companion_files(tmp_path) == {}


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_config_keeps_the_donor_s_key(key: str) -> None:
    donor = {
        "architectures": ["X"],
        key: "float16",
        "tie_word_embeddings": True,
        "quantization_config": {"bits": 4},
        "text_config": {key: "float16", "hidden_size": 4, "quantization_config": {}},
        "vision_config": {"hidden_size": 8},
        "name": "ü",
    }
    before = json.dumps(donor)
    out = json.loads(merged_config(donor, DType.BF16, None))
    assert list(out) == [
        "architectures",
        key,
        "tie_word_embeddings",
        "text_config",
        "vision_config",
        "name",
    ]
    assert out[key] == "bfloat16" and out["tie_word_embeddings"] is True
    assert out["text_config"] == {key: "bfloat16", "hidden_size": 4}
    assert out["vision_config"] == {"hidden_size": 8}
    assert json.dumps(donor) == before


def test_config_gets_what_it_lacks() -> None:
    assert json.loads(merged_config({}, DType.F32, None)) == {"dtype": "float32"}
    donor = {"text_config": {"tie_word_embeddings": True}}
    out = json.loads(merged_config(donor, DType.F32, False))
    assert out["tie_word_embeddings"] is False
    assert out["text_config"] == {"tie_word_embeddings": False}


# ---- model card ---------------------------------------------------------------------------------


def card(**changes: object) -> str:
    fields: dict[str, object] = {
        "title": "out",
        "recipe_text": "merge_method: ties\n",
        "method_title": "TIES",
        "method_paper": "arXiv:2306.01708",
        "base_models": ["org/base", "org/math", "org/base"],
        "inputs": [("org/base", None), ("/data/secret/math", None), ("./code/", None)],
        "dtype": "bfloat16",
    }
    return model_card(**(fields | changes))  # type: ignore[arg-type]


def front_matter(text: str) -> dict[str, object]:
    _, yaml_text, _ = text.split("---\n", 2)
    return yaml.safe_load(yaml_text)


def test_card() -> None:
    text = card()
    assert front_matter(text) == {
        "base_model": ["org/base", "org/math"],
        "base_model_relation": "merge",
        "library_name": "transformers",
        "tags": ["fastmerge", "merge", "mergekit"],
    }
    assert "[TIES](https://arxiv.org/abs/2306.01708)" in text
    assert "bfloat16" in text
    assert "- [org/base](https://huggingface.co/org/base)\n- `math`\n- `code`\n" in text
    assert "secret" not in text
    assert "```yaml\nmerge_method: ties\n```\n" in text


def test_card_names_adapters() -> None:
    text = card(inputs=[("org/base", "org/lora"), ("/secret/math", "/secret/a`b")])
    assert "- [org/base](https://huggingface.co/org/base) with the adapter [org/lora](" in text
    assert "- `math` with the adapter ``a`b``\n" in text
    assert "secret" not in text


def test_card_without_hub_models() -> None:
    assert "base_model" not in front_matter(card(base_models=[]))


@pytest.mark.parametrize(
    "name",
    [
        'a"b',
        "a: b",
        "a\nb: c",
        "---",
        "#x",
        "a\\b",
        "\x00\x07\x7f\x85",
        "ü\u2028\ufeff",
        "😀",
        "- x",
        "'",
        "{a}",
        "&a",
        "*a",
        "!!python/object:os.system",
        "",
        "null",
        "1e5",
        "%",
    ],
)
def test_front_matter_survives_any_name(name: str) -> None:
    # not split by `---`: a name may hold that
    lines = card(base_models=[name]).split("\n")
    end = lines.index("---", 1)
    assert yaml.safe_load("\n".join(lines[1:end]))["base_model"] == [name]


@pytest.mark.parametrize("ticks", ["`", "```", "`````"])
def test_recipe_survives_backticks(ticks: str) -> None:
    recipe = f"a: 1\n{ticks}\n# b {ticks}x\n"
    lines = card(recipe_text=recipe).split("\n")
    opening = next(i for i, line in enumerate(lines) if line.endswith("`yaml"))
    fence = lines[opening].removesuffix("yaml")
    assert len(fence) >= 3
    closing = lines.index(fence, opening + 1)
    assert "\n".join(lines[opening + 1 : closing]) == recipe.rstrip("\n")


def test_card_escapes_markup() -> None:
    text = card(
        title="a\n# b <script>", inputs=[("./x`y\nz", None)], method_title="[x](y)", method_paper=""
    )
    assert "\n# a \\# b \\<script\\>\n" in text
    assert "- ``x`y z``\n" in text
    assert "\\[x\\](y), stored" in text


@pytest.mark.parametrize(
    ("paper", "link"),
    [
        ("2306.01708", "(https://arxiv.org/abs/2306.01708)"),
        ("https://example.org/paper", "[TIES](https://example.org/paper)"),
        ("Smith 2020", "TIES (Smith 2020)"),
        ("javascript:alert(1)", "TIES (javascript:alert(1))"),
    ],
)
def test_card_links_the_paper(paper: str, link: str) -> None:
    assert link in card(method_paper=paper)


def test_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert hub_id("org/name-7B.v1") == "org/name-7B.v1"
    for local in ("./name", "/a/b", "name", "a/b/c", "../b", "~/b", "a/", "", "a b/c", "a/b\n"):
        assert hub_id(local) is None
        assert hub_id(local, {"_name_or_path": "org/name"}) == "org/name"
        assert hub_id(local, {"_name_or_path": local}) is None
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert hub_id("org/name") is None
    assert hub_id("org/name", {"_name_or_path": "other/name"}) == "other/name"
    assert hub_id("x", {"_name_or_path": 3}) is None
