"""Merges by way of a device: the same bytes as on the host, in its memory budget, whatever goes wrong."""

from __future__ import annotations

import json
import os
import shutil
from itertools import pairwise
from pathlib import Path
from unittest.mock import patch

import families
import pytest
import torch
from click.testing import CliRunner

import fastmerge
from fastmerge import api, budget, ops, summaries
from fastmerge.backends import Kernels
from fastmerge.cli import main
from fastmerge.errors import CheckpointError, DeviceError, DeviceMemoryError, NonFiniteError
from fastmerge.streaming.device import HostDevice, Memory, Stream

MIB = 1 << 20
SHAPES = {
    "model.embed_tokens.weight": (1501, 1999),
    "a": (640, 515),
    "norm": (77,),
    "b": (300, 512),
    "c": (),
    "empty": (0, 5),
    "d": (1600, 3000),
}


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("family")
    families.write_family(folder, SHAPES, torch.bfloat16)
    return folder


def files(folder: Path) -> dict[str, bytes]:
    found = {p.name: p.read_bytes() for p in folder.iterdir() if p.name.endswith(".safetensors")}
    assert found
    return found


def merged(
    family: Path, method: str, out: str, backend: str | Kernels = "cpu", **options: object
) -> dict[str, bytes]:
    recipe = family / f"{method}.yaml"
    recipe.write_text(families.recipe(method))
    options = {"out_shard_size": "9M", "force": True, **options}
    fastmerge.merge(recipe, family / out, backend=backend, **options)  # type: ignore[arg-type]
    return files(family / out)


@pytest.mark.parametrize("method", families.PARAMETERS)
def test_every_method_gives_the_hosts_bytes_by_way_of_a_device(family: Path, method: str) -> None:
    want = merged(family, method, "host")
    assert merged(family, method, "device", device=HostDevice()) == want


def test_a_tensor_that_does_not_fit_is_streamed_to_the_same_bytes(family: Path) -> None:
    want = merged(family, "ties", "host")
    plan = fastmerge.plan(family / "ties.yaml", device=HostDevice(), max_vram="96MiB")
    assert plan.device is not None
    assert len(plan.streamed) == 2
    assert plan.device.total <= 96 * MIB
    assert merged(family, "ties", "device", device=HostDevice(), max_vram="96MiB") == want


def test_model_scope_is_swept_by_way_of_a_device(family: Path) -> None:
    recipe = family / "model.yaml"
    recipe.write_text(families.recipe("ties", extra="scope: model"))
    fastmerge.merge(recipe, family / "host", force=True)
    want = files(family / "host")
    fastmerge.merge(recipe, family / "device", force=True, device=HostDevice(), backend="cpu")
    assert files(family / "device") == want


def test_small_tensors_share_a_launch(family: Path) -> None:
    launches = []

    class Counting(type(ops.choose("cpu", "cpu"))):  # type: ignore[misc]
        def start_walks(self, jobs):  # type: ignore[no-untyped-def]
            launches.append(len(jobs))
            return super().start_walks(jobs)

    merged(family, "linear", "device", backend=Counting(), device=HostDevice())
    assert max(launches) >= len(SHAPES) - 1
    assert len(launches) < len(SHAPES)


def test_nan_is_refused_by_name_although_the_device_is_past_it(tmp_path: Path) -> None:
    state = families.family({"a": (64, 64), "b": (500, 700)}, torch.bfloat16)
    state["e2"]["b"][321, 123] = float("nan")
    for name, tensors in state.items():
        families.write_model(tmp_path / name, tensors)
    texts = []
    for device in ("cpu", HostDevice()):
        with pytest.raises(NonFiniteError) as error:
            merged(tmp_path, "ties", "out", device=device)
        texts.append(str(error.value))
    assert texts[0] == texts[1]
    assert f"flat index {321 * 700 + 123};" in texts[0]
    assert merged(tmp_path, "ties", "out", device=HostDevice(), nan_policy="propagate") == merged(
        tmp_path, "ties", "host", nan_policy="propagate"
    )


def test_a_truncated_input_stops_the_merge(family: Path, tmp_path: Path) -> None:
    for name in ("base", "e1", "e2", "e3"):
        shutil.copytree(family / name, tmp_path / name)
    file = tmp_path / "e3" / "model.safetensors"

    def cut(plan: object) -> None:
        os.truncate(file, file.stat().st_size // 2)

    with pytest.raises(CheckpointError, match=r"e3.*truncated while being read"):
        merged(tmp_path, "ties", "out", device=HostDevice(), on_plan=cut)
    assert not (tmp_path / "out").exists()


class Broken(HostDevice):
    """Fails at the nth copy in a direction, as a device that is lost does: from then on."""

    def __init__(self, stream: Stream, nth: int) -> None:
        super().__init__()
        self._stream, self._left = stream, nth

    def copy(self, stream: Stream, target: int, source: int, n: int) -> None:
        self._left -= stream is self._stream
        if self._left < 0:
            raise DeviceError("the copy failed on cpu: unspecified launch failure")
        super().copy(stream, target, source, n)


@pytest.mark.parametrize("stream", [Stream.COPY_IN, Stream.COPY_OUT])
def test_a_lost_device_leaves_what_is_written_to_resume(family: Path, stream: Stream) -> None:
    want = merged(family, "ties", "host")
    with patch.object(budget, "DEVICE_ITEM_BYTES", MIB), pytest.raises(DeviceError) as error:
        merged(family, "ties", "lost", device=Broken(stream, 9))
    assert "unspecified launch failure; what is merged is kept, --resume goes on" in str(
        error.value
    )
    assert merged(family, "ties", "lost", device=HostDevice(), force=False, resume=True) == want


class Small(HostDevice):
    """Has less memory than it says."""

    name = "small"

    def __init__(self, n_bytes: int) -> None:
        super().__init__()
        self._n_bytes, self.asked = n_bytes, 0

    def free_bytes(self) -> int:
        return 1 << 33

    def allocate(self, n_bytes: int) -> Memory:
        self.asked += 1
        if n_bytes > self._n_bytes:
            raise DeviceMemoryError(
                "taking memory: small ran out of memory; give a smaller --max-vram"
            )
        return super().allocate(n_bytes)


def test_less_memory_than_was_free_is_made_do_with(family: Path) -> None:
    want = merged(family, "ties", "host")
    device = Small(48 * MIB)
    report = fastmerge.merge(
        family / "ties.yaml", family / "out", device=device, backend=ops.choose("cpu", "cpu"),
        force=True, out_shard_size="9M",
    )  # fmt: skip
    assert files(family / "out") == want
    assert device.asked > 2
    assert any("going on with" in w for w in report.warnings)
    with pytest.raises(DeviceMemoryError, match="ran out of memory"):
        merged(family, "ties", "out", ops.choose("cpu", "cpu"), device=Small(1000))


def test_pages_that_cannot_be_locked_are_a_warning(family: Path) -> None:
    class Unlockable(HostDevice):
        def pin(self, address: int, n_bytes: int) -> bool:
            return False

    recipe = family / "linear.yaml"
    recipe.write_text(families.recipe("linear"))
    report = fastmerge.merge(recipe, family / "out", device=Unlockable(), backend="cpu", force=True)
    assert any("could not be locked" in w for w in report.warnings)


# ---- the command line ------------------------------------------------------------------------------


def run(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    return result.exit_code, result.output


def test_plan_for_a_card_says_what_limits_the_merge(family: Path) -> None:
    recipe = family / "ties.yaml"
    recipe.write_text(families.recipe("ties"))
    code, text = run("plan", recipe, "--device", "cuda:H100", "--read-rate", "7G")
    assert code == 0, text
    assert "read limits it" in text
    assert "PCIe 5.0 x16" in text
    code, text = run("plan", recipe, "--device", "cuda:RTX4090", "--read-rate", "50G", "--json")
    forecast = json.loads(text)["forecast"]
    assert forecast["limit"] == "copy in"
    moved = sum(
        (family / e / "model.safetensors").stat().st_size for e in ("base", "e1", "e2", "e3")
    )
    (copying,) = (s for s in forecast["stages"] if s["name"] == "copy in")
    assert copying["seconds"] == pytest.approx(moved / 25e9, rel=1e-3)
    options = ("--device", "cuda:H100", "--read-rate", "7G", "--one-disk", "--json")
    shared = json.loads(run("plan", recipe, *options)[1])["forecast"]
    assert shared["limit"] == "disk"
    assert shared["stages"][0]["seconds"] == pytest.approx(moved * 1.25 / 7e9, rel=1e-3)


def test_what_a_merge_takes_is_said_before_it_starts(family: Path) -> None:
    recipe = family / "ties.yaml"
    recipe.write_text(families.recipe("ties"))
    plan = fastmerge.plan(recipe, device=HostDevice(), max_vram="96MiB")
    assert plan.device is not None
    assert summaries.headline(plan).endswith(" on cpu, 2 tensors streamed")
    assert f"{plan.device.total / 1e6:.3g} MB on cpu" in summaries.headline(plan)
    assert "streamed" not in summaries.headline(fastmerge.plan(recipe))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--device", "cuda"], "torch finds no GPU; merge with --device cpu"),
        (["--cuda"], "torch finds no GPU"),
        (
            ["--device", "cuda:H1000"],
            "give cpu, cuda, cuda:0, or to plan for a card one of cuda:V100",
        ),
        (["--device", "cuda:H100"], "is a card to plan for; merge on cuda or cuda:0"),
        (["--device", "tpu"], "device 'tpu' is unknown"),
        (["--max-vram", "1G"], "max-vram is for merges on a device"),
    ],
)
def test_devices_that_cannot_be_are_refused_in_one_line(
    family: Path, options: list[str], words: str
) -> None:
    if torch.cuda.is_available() and "no GPU" in words:
        pytest.skip("there is a GPU")
    recipe = family / "ties.yaml"
    recipe.write_text(families.recipe("ties"))
    code, text = run("merge", recipe, family / "refused", *options)
    assert code == 2
    assert words in text
    assert len(text.strip().splitlines()) == 1
    assert not (family / "refused").exists()


def test_auto_takes_the_host_where_there_is_no_gpu(family: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    recipe = family / "linear.yaml"
    recipe.write_text(families.recipe("linear"))
    code, text = run("merge", recipe, family / "auto", "--device", "auto", "--force")
    assert code == 0, text
    assert "cpu backend" in text


def test_too_little_memory_is_told_with_what_is_needed(family: Path) -> None:
    recipe = family / "ties.yaml"
    recipe.write_text(families.recipe("ties"))
    code, text = run("plan", recipe, "--device", "cuda:H100", "--max-vram", "66MiB")
    assert code == 2
    assert "max-vram of 66 MiB is too little for this merge; give at least" in text
    needed = int(text.split("at least ")[1].split()[0])
    code, text = run("plan", recipe, "--device", "cuda:H100", "--max-vram", f"{needed}MiB")
    assert code == 0, text
    code, text = run("plan", recipe, "--device", "cuda:H100", "--max-memory", "1100MiB")
    assert code == 2
    assert "give a max-memory of at least" in text


def test_profile_writes_a_trace_that_chrome_reads(family: Path) -> None:
    recipe = family / "ties.yaml"
    recipe.write_text(families.recipe("ties"))
    code, text = run("merge", recipe, family / "profiled", "--profile", "--force")
    assert code == 0, text
    trace = json.loads((family / "profiled.trace.json").read_text())
    lanes = {e["args"]["name"] for e in trace["traceEvents"] if e["ph"] == "M"}
    assert lanes == {"read", "write", "merging"}
    spans = [e for e in trace["traceEvents"] if e["ph"] == "X"]
    assert {s["name"] for s in spans} >= {"read", "write", "walk", "statistics"}
    written = sum(s["args"]["bytes"] for s in spans if s["name"] == "write")
    assert written == sum(len(b) for b in files(family / "profiled").values()) - _headers(family)
    for lane in {s["tid"] for s in spans}:
        own = sorted((s["ts"], s["ts"] + s["dur"]) for s in spans if s["tid"] == lane)
        assert all(end <= start + 1 for (_, end), (start, _) in pairwise(own))


def _headers(family: Path) -> int:
    total = 0
    for file in (family / "profiled").glob("*.safetensors"):
        total += 8 + int.from_bytes(file.read_bytes()[:8], "little")
    return total


def test_a_device_at_hand_is_measured(family: Path) -> None:
    recipe = family / "ties.yaml"
    recipe.write_text(families.recipe("ties"))
    device = HostDevice()
    plan = fastmerge.plan(recipe, device=device)
    told = api.forecast(plan, device)
    assert [s.name for s in told.stages] == ["read", "copy in", "kernels", "copy out", "write"]
    assert all(1e8 < s.rate < 1e13 and s.seconds > 0 for s in told.stages)
    assert told.seconds == max(s.seconds for s in told.stages) + told.fill
    assert {s.origin for s in told.stages} == {
        "measured here", "measured on cpu, pinned", "measured on cpu", "taken to be as reading",
    }  # fmt: skip
