"""Merges shared among processes: the bytes of one process, whatever becomes of a worker."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import families
import pytest
import stand_ins
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

import fastmerge
from fastmerge import api
from fastmerge.checkpoint import JOURNAL, TensorInfo
from fastmerge.cli import main
from fastmerge.dtypes import DType
from fastmerge.errors import CheckpointError, DeviceError, NonFiniteError, RecipeError, WorkerError
from fastmerge.jobs import Action, Operand, TensorJob
from fastmerge.processes import Processes
from fastmerge.streaming import gpus, numa
from fastmerge.workers import Assignment, Event, deal_by_bytes, merge_assigned

SHAPES = {
    "model.embed_tokens.weight": (501, 399),
    **{f"model.layers.{i}.mlp.weight": (200 + i, 301) for i in range(6)},
    "model.norm.weight": (77,),
    "scalar": (),
    "empty": (0, 5),
}
TWO = "cuda:0,cuda:1"
RECIPES = {m: families.recipe(m) for m in families.PARAMETERS} | {
    "ties_model": families.recipe("ties", "scope: model, rescale: true")
}


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("family")
    for name, state in families.family(SHAPES, torch.bfloat16).items():
        state["model.position_ids"] = torch.arange(77)
        families.write_model(folder / name, state)
    for name, text in RECIPES.items():
        (folder / f"{name}.yaml").write_text(text)
    return folder


@pytest.fixture(autouse=True)
def faults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Two GPUs that are none; the folder of their faults."""
    folder = tmp_path / "faults"
    folder.mkdir()
    monkeypatch.setenv(stand_ins.FAULTS, str(folder))
    with patch.object(gpus, "DRIVER", stand_ins.DRIVER):
        yield folder


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "README.md"}


def merge(family: Path, recipe: str, out: Path, device: str = "cpu", **options: object) -> object:
    options = {"out_shard_size": "300k", "max_memory": "6G", **options}
    return fastmerge.merge(family / f"{recipe}.yaml", out, device=device, **options)  # type: ignore[arg-type]


def merged(
    family: Path, recipe: str, out: Path, device: str = "cpu", **options: object
) -> dict[str, bytes]:
    merge(family, recipe, out, device, **options)
    return files(out)


@pytest.mark.parametrize("recipe", RECIPES)
def test_two_processes_give_the_bytes_of_one(family: Path, tmp_path: Path, recipe: str) -> None:
    want = merged(family, recipe, tmp_path / "one" / "out")
    assert len(want) > 5
    assert merged(family, recipe, tmp_path / "two" / "out", TWO) == want


def test_what_is_reported_is_of_both(family: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace.json"
    passed: list[tuple[int, int]] = []
    report = fastmerge.merge(
        family / "ties_model.yaml", tmp_path / "out", device="cuda:all", max_memory="6G", trace=trace,
        progress=lambda name, done, total: passed.append((done, total)),
    )  # fmt: skip
    assert report.bytes_read == passed[-1][0] > 0
    assert [done for done, _ in passed] == sorted(done for done, _ in passed)
    assert report.bytes_written == sum(
        p.bytes_out for p in fastmerge.plan(family / "linear.yaml").jobs
    )
    assert report.n_tensors == len(SHAPES) + 1
    events = json.loads(trace.read_text())["traceEvents"]
    lanes = {e["args"]["name"] for e in events if e["ph"] == "M"}
    assert {"cuda:0 read", "cuda:1 read", "cuda:0 merging", "cuda:1 write"} <= lanes
    spans = [e for e in events if e["ph"] == "X"]
    assert max(e["ts"] + e["dur"] for e in spans) < 1e6 * (report.seconds + 1)


def test_differing_integers_are_told_once(family: Path, tmp_path: Path) -> None:
    for name in ("base", "e1", "e2", "e3"):
        shutil.copytree(family / name, tmp_path / name)
    state = families.load(tmp_path / "e2")
    state["model.position_ids"] += 1
    families.write_model(tmp_path / "e2", state)
    shutil.copy(family / "linear.yaml", tmp_path)
    warnings = [merge(tmp_path, "linear", tmp_path / d, d).warnings for d in ("cpu", TWO)]  # type: ignore[attr-defined]
    assert warnings[0] == warnings[1]
    assert len(warnings[0]) == 1


class TestFaults:
    def test_a_killed_worker_leaves_what_is_written_to_resume(
        self, family: Path, tmp_path: Path, faults: Path
    ) -> None:
        want = merged(family, "dare_ties", tmp_path / "one" / "out")
        out = tmp_path / "two" / "out"
        (faults / "die").write_text(f"3 {out / JOURNAL}")
        with pytest.raises(WorkerError) as error:
            merge(family, "dare_ties", out, TWO)
        assert not (faults / "die").exists()
        text = str(error.value)
        assert "was killed by signal 9; what is merged is kept, --resume goes on" in text
        assert text.startswith("the worker on cuda:") and "\n" not in text
        assert (out / JOURNAL).exists() and not list(out.glob("*.safetensors"))
        report = merge(family, "dare_ties", out, TWO, resume=True)
        assert report.resumed and report.bytes_kept > 0  # type: ignore[attr-defined]
        assert files(out) == want

    def test_one_process_resumes_what_two_began_and_the_other_way_round(
        self, family: Path, tmp_path: Path, faults: Path
    ) -> None:
        want = merged(family, "ties_model", tmp_path / "one" / "out")
        out = tmp_path / "two" / "out"
        (faults / "die").write_text(f"3 {out / JOURNAL}")
        with pytest.raises(WorkerError):
            merge(family, "ties_model", out, TWO)
        parted = tmp_path / "three" / "out"
        shutil.copytree(out, parted)
        lines = (parted / JOURNAL).read_text().splitlines()
        (parted / JOURNAL).write_text("\n".join(lines[:3]) + "\n")
        for folder, device in ((out, "cpu"), (parted, TWO)):
            report = merge(family, "ties_model", folder, device, resume=True)
            assert report.bytes_kept > 0  # type: ignore[attr-defined]
            assert files(folder) == want

    def test_nan_is_refused_in_the_words_of_one_process(self, family: Path, tmp_path: Path) -> None:
        for name in ("base", "e1", "e2", "e3"):
            shutil.copytree(family / name, tmp_path / name)
        state = families.load(tmp_path / "e2")
        state["model.layers.3.mlp.weight"][77, 12] = float("nan")
        families.write_model(tmp_path / "e2", state)
        shutil.copy(family / "ties.yaml", tmp_path)
        texts = []
        for device in ("cpu", TWO):
            with pytest.raises(NonFiniteError) as error:
                merge(tmp_path, "ties", tmp_path / "out", device)
            texts.append(str(error.value))
            assert not (tmp_path / "out").exists()
        assert texts[0] == texts[1]
        assert f"flat index {77 * 301 + 12};" in texts[0]

    def test_a_full_disk_is_told_with_what_is_needed(
        self, family: Path, tmp_path: Path, faults: Path
    ) -> None:
        (faults / "full").write_text("2")
        with pytest.raises(
            CheckpointError, match=r"out needs \d+ bytes, only \d+ free; free some space"
        ):
            merge(family, "linear", tmp_path / "out", TWO)
        assert not (tmp_path / "out").exists()

    def test_what_nobody_expects_comes_with_its_traceback(
        self, family: Path, tmp_path: Path
    ) -> None:
        with (
            patch.object(gpus, "DRIVER", "stand_ins:BrokenGpus"),
            pytest.raises(
                RuntimeError, match=r"the worker on cuda:\d failed:\n(.|\n)*nobody expects"
            ),
        ):
            merge(family, "linear", tmp_path / "out", TWO)
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL])
    def test_workers_end_with_their_coordinator(
        self, family: Path, tmp_path: Path, faults: Path, end: signal.Signals
    ) -> None:
        """Ctrl-C, or a kill: no worker stays behind, and the merge can be finished."""
        want = merged(family, "linear", tmp_path / "one" / "out")
        out = tmp_path / "two" / "out"
        (faults / "stall").write_text("3")
        code = (
            "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler);"
            f"sys.path.insert(0, {str(Path(__file__).parent)!r});"
            "from fastmerge import cli; from fastmerge.streaming import gpus;"
            f"gpus.DRIVER = {stand_ins.DRIVER!r}; cli.main()"
        )
        command = ["merge", family / "linear.yaml", out, "--device", TWO, "--max-memory", "6G"]
        process = subprocess.Popen(
            [sys.executable, "-c", code, *map(str, command), "--out-shard-size", "300k"],
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        try:
            self.wait_until(lambda: (out / JOURNAL).exists() and not (faults / "stall").exists())
            self.wait_until(lambda: len((out / JOURNAL).read_text().splitlines()) > 2)
            workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            assert len(workers) == 2
            process.send_signal(end)
            _, text = process.communicate(timeout=30)
        finally:
            process.kill()
            process.wait()
        if end is signal.SIGINT:
            assert process.returncode == 130, text
            assert "interrupted; finish" in text and "--resume" in text
        self.wait_until(lambda: not any(map(is_running, workers)))
        report = merge(family, "linear", out, TWO, resume=True)
        assert report.bytes_kept > 0  # type: ignore[attr-defined]
        assert files(out) == want

    @staticmethod
    def wait_until(condition: object) -> None:
        deadline = time.monotonic() + 30
        while not condition():  # type: ignore[operator]
            assert time.monotonic() < deadline
            time.sleep(0.01)


def is_running(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


class Here(Processes):
    """Workers that are this process, with assignments that are tampered with."""

    def __init__(self, **changes: object) -> None:
        super().__init__(["cpu"])
        self.changes = changes

    def run(
        self, assignments: Sequence[Assignment], memory: int
    ) -> Generator[tuple[int, Event], None, None]:
        for i, assignment in enumerate(assignments):
            events: list[Event] = []
            changed = replace(assignment, **self.changes)  # type: ignore[arg-type]
            events.append(merge_assigned(changed, events.append))
            yield from ((i, event) for event in events)


class TestAssignments:
    def check(self, family: Path, to: Path, /, **changes: object) -> dict[str, bytes]:
        with patch.object(api, "_workers", lambda *_: Here(**changes)):
            return merged(family, "ties", to)

    def test_a_worker_may_be_anything(self, family: Path, tmp_path: Path) -> None:
        want = merged(family, "ties", tmp_path / "one" / "out")
        assert self.check(family, tmp_path / "two" / "out", flush=True) == want

    def test_a_worker_is_bound_to_the_processors_beside_its_device(
        self, family: Path, tmp_path: Path
    ) -> None:
        bound: list[object] = []
        with (
            patch.object(
                stand_ins.HostGpus, "pci_address", lambda self, index: f"0000:0{index}:00.0"
            ),
            patch("fastmerge.workers.near_cpus", {"0000:01:00.0": {4, 5}}.get),
            patch("fastmerge.workers.bind", bound.append),
        ):
            self.check(family, tmp_path / "out", device="cuda:1", max_memory=6 << 30)
        assert bound == [{4, 5}]

    def test_another_merge_is_refused(self, family: Path, tmp_path: Path) -> None:
        out = tmp_path / "out"
        plan = fastmerge.plan(family / "ties.yaml")
        bound = api.binding(plan, "error", 300_000)
        for key, value, words in (
            ("fastmerge", "0.0", "was begun by fastmerge 0.0, this is"),
            ("inputs", [{**f, "size": 1} for f in bound["inputs"]], "of other inputs: the size of"),
            ("layout", "", "lays its output out otherwise"),
        ):
            with pytest.raises(CheckpointError, match=words) as error:
                self.check(family, out, bound={**bound, key: value})
            assert "all workers must have the same fastmerge and see the same files" in str(
                error.value
            )
            assert not out.exists()

    def test_folders_that_are_not_there_are_named(self, family: Path, tmp_path: Path) -> None:
        gone = tmp_path / "gone"
        with pytest.raises(
            CheckpointError, match=f"output {gone} is not there on .*all workers must see"
        ):
            self.check(family, tmp_path / "out", out=gone)
        plan = fastmerge.plan(family / "ties.yaml")
        with pytest.raises(CheckpointError, match=f"input {gone} is not there on"):
            self.check(family, tmp_path / "out", recipe=replace(plan.recipe, found=(gone,) * 4))
        with pytest.raises(CheckpointError, match=f"adapter {gone} is not there on"):
            adapted = replace(plan.recipe, adapters=(None, gone, None, None))
            self.check(family, tmp_path / "out", recipe=adapted)
        gone.mkdir()
        with pytest.raises(CheckpointError, match=r"gone/model-00001.*partial is not there"):
            self.check(family, tmp_path / "out", out=gone)

    def test_a_folder_of_the_same_name_elsewhere_is_noticed(
        self, family: Path, tmp_path: Path
    ) -> None:
        """A machine sees another disk under the path: its shards are there, what is written is not."""
        elsewhere = tmp_path / "elsewhere"

        class Elsewhere(Here):
            def run(
                self, assignments: Sequence[Assignment], memory: int
            ) -> Generator[tuple[int, Event], None, None]:
                shutil.copytree(assignments[0].out, elsewhere)
                yield from super().run(assignments, memory)

            def adapt(self, assignment: Assignment) -> Assignment:
                return replace(super().adapt(assignment), flush=True)

        with (
            patch.object(api, "_workers", lambda *_: Elsewhere(out=elsewhere)),
            pytest.raises(CheckpointError, match="must be on storage that all machines share"),
        ):
            merge(family, "ties", tmp_path / "out")
        assert not (tmp_path / "out").exists()


# ---- sharing out -----------------------------------------------------------------------------------


def job(i: int, n: int) -> TensorJob:
    info = TensorInfo(f"t{i}", DType.BF16, (n,), Path("f"), 0, 2 * n)
    return TensorJob(
        f"t{i}", (n,), Action.MERGE, DType.BF16, DType.F32, None, (Operand("m", info),) * 2
    )


@given(
    sizes=st.lists(st.integers(0, 10**9) | st.integers(0, 1000), max_size=60),
    n=st.integers(1, 9),
)
def test_shares_are_balanced_whole_and_in_order(sizes: list[int], n: int) -> None:
    jobs = [job(i, size) for i, size in enumerate(sizes)]
    weight = {j.name: j.bytes_in + j.bytes_out for j in jobs}
    shares = deal_by_bytes(jobs, n)
    assert len(shares) == n
    order = [j.name for j in jobs]
    assert sorted(name for share in shares for name in share) == sorted(order)
    assert all(share == sorted(share, key=order.index) for share in shares)
    loads = [sum(weight[name] for name in share) for share in shares]
    assert max(loads) - min(loads) <= max(weight.values(), default=0)
    assert deal_by_bytes(list(jobs), n) == shares


@pytest.mark.parametrize(
    ("device", "words"),
    [
        ("cuda:0,cuda:2", "cuda:2 does not exist; this machine has 2 GPUs"),
        ("cuda:0,cpu", "'cpu' is not a GPU of this machine; give cuda:0,cuda:1 or cuda:all"),
        ("cuda:1,cuda:1", "names cuda:1 twice; give each GPU once"),
        ("cuda:H100,cuda:0", "'cuda:H100' is not a GPU of this machine"),
    ],
)
def test_devices_that_cannot_be_are_refused(
    family: Path, tmp_path: Path, device: str, words: str
) -> None:
    with pytest.raises(DeviceError, match=words):
        merge(family, "linear", tmp_path / "out", device)
    assert not (tmp_path / "out").exists()


def test_no_gpus_at_all(family: Path, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with patch.object(gpus, "DRIVER", "fastmerge.streaming.gpus:TorchGpus"):
        for device in ("cuda:all", TWO):
            with pytest.raises(DeviceError, match="torch finds no GPU"):
                merge(family, "linear", tmp_path / "out", device)


def test_memory_is_divided(family: Path) -> None:
    one = fastmerge.plan(family / "ties.yaml", device="cuda:H100", max_memory="6G")
    two = fastmerge.plan(family / "ties.yaml", device=TWO, max_memory="6G", max_vram="1G")
    assert two.max_memory == one.max_memory // 2
    assert two.device is not None and two.device.name == TWO
    assert two.device.limit == 10**9


def test_kernels_do_not_travel(family: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="backend must be a name"):
        merge(family, "linear", tmp_path / "out", TWO, backend=fastmerge.ops.choose("cpu", "cpu"))


# ---- processors beside a device --------------------------------------------------------------------


@pytest.fixture
def sysfs(tmp_path: Path) -> Path:
    """A machine of two sockets, a GPU on each; a third GPU says nothing."""
    root = tmp_path / "sys"
    for address, node in (("0000:3b:00.0", "0"), ("0000:af:00.0", "1"), ("0001:00:00.0", "-1")):
        device = root / "bus" / "pci" / "devices" / address
        device.mkdir(parents=True)
        (device / "numa_node").write_text(f"{node}\n")
    for node, cpus in (("0", "0-3,8-11"), ("1", "4-7,12-15")):
        folder = root / "devices" / "system" / "node" / f"node{node}"
        folder.mkdir(parents=True)
        (folder / "cpulist").write_text(f"{cpus}\n")
    return root


def test_processors_beside_a_device(sysfs: Path) -> None:
    assert numa.near_cpus("0000:3B:00.0", sysfs) == {0, 1, 2, 3, 8, 9, 10, 11}
    assert numa.near_cpus("0000:af:00.0", sysfs) == {4, 5, 6, 7, 12, 13, 14, 15}
    assert numa.near_cpus("0001:00:00.0", sysfs) == set()  # -1: unknown
    assert numa.near_cpus("0000:5e:00.0", sysfs) == set()  # not there
    (sysfs / "bus" / "pci" / "devices" / "0000:3b:00.0" / "numa_node").write_text("7")
    assert numa.near_cpus("0000:3b:00.0", sysfs) == set()
    (sysfs / "devices" / "system" / "node" / "node1" / "cpulist").write_text("rubbish")
    assert numa.near_cpus("0000:af:00.0", sysfs) == set()


@pytest.mark.parametrize(
    ("text", "cpus"),
    [("0", {0}), ("0-2\n", {0, 1, 2}), ("1,4-5,9", {1, 4, 5, 9}), ("", set()), ("\n", set())],
)
def test_lists_of_processors(text: str, cpus: set[int]) -> None:
    assert numa.parse_cpu_list(text) == cpus


def test_where_torch_says_that_a_device_hangs() -> None:
    found = gpus.TorchGpus()
    found._cuda = SimpleNamespace(
        get_device_properties=lambda index: SimpleNamespace(
            pci_domain_id=1, pci_bus_id=0x3B + index, pci_device_id=0
        )
    )
    assert found.pci_address(1) == "0001:3c:00.0"
    found._cuda = SimpleNamespace(get_device_properties=lambda index: SimpleNamespace())
    assert found.pci_address(0) is None


def test_binding_holds_for_threads_that_run_already() -> None:
    code = (
        "import os, threading; from fastmerge.streaming import numa; stop = threading.Event();"
        "thread = threading.Thread(target=stop.wait); thread.start();"
        "before = os.sched_getaffinity(0); one = {min(before)};"
        "assert numa.bind({10**6}) == set() and os.sched_getaffinity(0) == before;"
        "assert numa.bind({*one, 10**6}) == one;"
        "assert all(os.sched_getaffinity(int(t)) == one for t in os.listdir('/proc/self/task'));"
        "stop.set()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=dict(os.environ))


def test_a_forecast_of_several_devices_has_their_links_together(family: Path) -> None:
    recipe = family / "ties.yaml"
    told = api.forecast(fastmerge.plan(recipe, device=TWO), "cuda:all", read_rate="1G")
    run = CliRunner().invoke(main, ["plan", str(recipe), "--device", "cuda:all"])
    stages = {s.name: s for s in told.stages}
    assert stages["read"].rate == 1e9
    assert stages["copy in"].origin == "2 times: measured on cpu, pinned"
    assert run.exit_code == 0, run.output
    assert "limits it" in run.output
