"""Kills, full disks, failing reads and writes: never a wrong file, always a way on or one clear line."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from enum import IntEnum
from pathlib import Path

import families
import pytest
import torch

from fastmerge import _cpu
from fastmerge.checkpoint import TensorInfo, word_bytes
from fastmerge.dtypes import DType
from fastmerge.jobs import Action, Operand, TensorJob, split

HERE = Path(__file__).parent
TIES_MODEL = families.recipe("ties", "scope: model, zero_sign: global_majority, rescale: true")
RECIPES = {
    "linear": families.recipe("linear"),  # cut into pieces
    "dare_ties": families.recipe("dare_ties"),  # statistics and draws of a tensor
    "ties_model": TIES_MODEL,  # statistics of the model
}
SHAPES = {
    "model.embed_tokens.weight": (1500, 2000),  # more than one work item
    **{f"model.layers.{i}.mlp.weight": (400, 501) for i in range(4)},
    "model.norm.weight": (2000,),
    "odd": (3, 7),
}
#: For the reference backend, which takes its time.
SMALL = {"model.embed_tokens.weight": (90, 110), "model.norm.weight": (1000,), "odd": (3, 7)}
SHARDS = ("--out-shard-size", "3M")


class Fault(IntEnum):
    """The kinds of faults.c."""

    NONE = 0
    KILL = 1
    KILL_TORN = 2
    INTERRUPT = 3
    WRITE_EIO = 4
    WRITE_ENOSPC = 5
    SHORT = 6
    READ_EIO = 7
    TRUNCATE = 8
    REPLACE = 9
    FSYNC_EIO = 10
    SLOW = 11


class Runs:
    """A server of merges under faults, and the models they merge."""

    def __init__(self, root: Path) -> None:
        self.root = root
        compiler = shutil.which("gcc") or shutil.which("cc")
        if compiler is None:
            pytest.skip("no C compiler")
        library = root / "faults.so"
        source = str(HERE / "faults.c")
        command = [compiler, "-O1", "-shared", "-fPIC", source, "-o", str(library), "-ldl"]
        subprocess.run(command, check=True)
        paths = os.pathsep.join(filter(None, [str(HERE.parent), os.environ.get("PYTHONPATH", "")]))
        self.env = {**os.environ, "LD_PRELOAD": str(library), "PYTHONPATH": paths}
        self.server = subprocess.Popen(
            [sys.executable, str(HERE / "fault_server.py")],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=self.env, text=True,
        )  # fmt: skip
        for folder, shapes in (("in", SHAPES), ("small", SMALL)):
            families.write_family(root / folder, shapes, torch.bfloat16)
            for name, text in RECIPES.items():
                (root / folder / f"{name}.yaml").write_text(text)
        self.count = 0

    def close(self) -> None:
        assert self.server.stdin is not None and self.server.stdout is not None
        self.server.stdin.close()
        self.server.stdout.close()
        self.server.wait()

    def run(
        self, *arguments: object, fault: Fault = Fault.NONE, at: int = 0, below: Path | None = None
    ) -> tuple[int, str]:
        """Run fastmerge with a fault; return its exit status (negative: signal) and what it printed."""
        assert self.server.stdin is not None and self.server.stdout is not None
        log = self.root / "log"
        request = {
            "arguments": [str(a) for a in arguments],
            "kind": int(fault),
            "at": at,
            "below": str(below or self.root),
            "log": str(log),
        }
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        code = int(self.server.stdout.readline())
        if code >= 0:
            self.count = int(Path(f"{log}.count").read_text())
        text = log.read_text()
        assert "Traceback" not in text and "traceback" not in text, text
        return code, text

    def merge(
        self, recipe: str, out: Path, *options: str, fault: Fault = Fault.NONE, at: int = 0,
        below: Path | None = None, io: str = "auto",
    ) -> tuple[int, str]:  # fmt: skip
        arguments = (self.root / "in" / f"{recipe}.yaml", out, *SHARDS, "--io", io, *options)
        return self.run("merge", *arguments, fault=fault, at=at, below=below or out)


@pytest.fixture(scope="module")
def runs() -> Iterator[Runs]:
    shared = Path("/dev/shm")
    usable = shared.is_dir() and shutil.disk_usage(shared).free > 1 << 30
    with tempfile.TemporaryDirectory(dir=shared if usable else None) as folder:
        held = Runs(Path(folder))
        yield held
        held.close()


@pytest.fixture(scope="module")
def whole(runs: Runs) -> dict[str, dict[str, bytes]]:
    """The files of undisturbed merges, by recipe."""
    found = {}
    for recipe in RECIPES:
        out = runs.root / "whole" / recipe / "out"
        code, text = runs.merge(recipe, out)
        assert code == 0, text
        found[recipe] = contents(out)
    assert len([n for n in found["linear"] if n.endswith(".safetensors")]) > 1
    return found


@pytest.fixture
def out(runs: Runs) -> Iterator[Path]:
    folder = runs.root / "test" / "one" / "out"
    folder.parent.mkdir(parents=True)
    yield folder
    shutil.rmtree(runs.root / "test")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def is_weight(name: str) -> bool:
    return name.endswith((".safetensors", ".index.json"))


def check_no_mix(found: dict[str, bytes], *models: dict[str, bytes]) -> None:
    """Weights under final names are all of one model, and whole where an index says so."""
    weights = {n: b for n, b in found.items() if is_weight(n)}
    assert any(all(m.get(n) == b for n, b in weights.items()) for m in models), sorted(weights)
    if "model.safetensors.index.json" in weights:
        complete = [{n: b for n, b in m.items() if is_weight(n)} for m in models]
        assert weights in complete


def clear(out: Path) -> None:
    shutil.rmtree(out, ignore_errors=True)


def checksum_of(data: bytes, word: int, start: int = 0) -> int:
    """The definition of csrc/io/checksum.cpp once more."""
    mask = (1 << 64) - 1
    total = 0
    for i in range(len(data) // word):
        x = int.from_bytes(data[word * i : word * (i + 1)], "little")
        x ^= (start // word + i + 1) * 0x9E3779B97F4A7C15 & mask
        x ^= x >> 32
        x = x * 0xD6E8FEB86659FD93 & mask
        x ^= x >> 32
        x = x * 0xFF51AFD7ED558CCD & mask
        total += x ^ (x >> 29)
    return total & mask


@pytest.mark.parametrize("word", [1, 2, 4, 8])
def test_checksum(word: int) -> None:
    data = random.Random(word).randbytes(4800)
    whole = _cpu.checksum(data, word, 0)
    assert whole == checksum_of(data, word)
    for cut in (word, 8, 1000, 4792):
        parts = _cpu.checksum(data[:cut], word, 0) + _cpu.checksum(data[cut:], word, cut)
        assert parts % (1 << 64) == whole
    swapped = data[word : 2 * word] + data[:word] + data[2 * word :]
    assert _cpu.checksum(swapped, word, 0) != whole
    for bit in range(8 * word):
        changed = bytearray(data)
        changed[80 + bit // 8] ^= 1 << bit % 8
        assert _cpu.checksum(changed, word, 0) != whole


#: Scalar, small, one long row, short and long rows of odd length, rows of 16 bytes and more.
CUT = [(), (3,), (9_000_001,), (3_000_000, 3), (7, 1_300_001), (2, 8, 800_004)]


@pytest.mark.parametrize("shape", CUT)
@pytest.mark.parametrize("itemsize", [1, 2, 4, 8])
def test_no_piece_cuts_a_word(shape: tuple[int, ...], itemsize: int) -> None:
    dtype = {1: DType.U8, 2: DType.BF16, 4: DType.F32, 8: DType.F64}[itemsize]
    info = TensorInfo("w", dtype, shape, Path("f"), 0, itemsize * math.prod(shape))
    operands = (Operand("m", info),) * 3
    job = TensorJob("w", shape, Action.MERGE, dtype, DType.F32, None, operands)
    word = word_bytes(shape, itemsize)
    assert info.n_bytes % word == 0
    for piece in split(job):
        assert piece.start * itemsize % word == 0 and piece.bytes_out % word == 0


class TestKilled:
    @pytest.mark.parametrize("recipe", RECIPES)
    @pytest.mark.parametrize("replacing", [False, True], ids=["fresh", "replacing"])
    def test_resume_after_kill(
        self,
        runs: Runs,
        whole: dict[str, dict[str, bytes]],
        out: Path,
        recipe: str,
        replacing: bool,
    ) -> None:
        """SIGKILL at random calls to the file system, writes torn in half: 60 moments over all cases."""
        options = ("--force",) if replacing else ()
        old = whole["linear" if recipe != "linear" else "dare_ties"]

        def begin() -> None:
            clear(out)
            if replacing:
                out.mkdir()
                for name, data in old.items():
                    (out / name).write_bytes(data)

        io = ("mmap", "direct", "buffered")[(list(RECIPES).index(recipe) + replacing) % 3]
        begin()
        code, text = runs.merge(recipe, out, *options, fault=Fault.KILL, at=-1, io=io)
        assert code == 0, text
        n_calls = runs.count
        assert n_calls > 20
        assert contents(out) == whole[recipe]
        generator = random.Random(f"{recipe} {replacing}")
        for at in sorted(generator.sample(range(n_calls), 10)):
            begin()
            fault = generator.choice([Fault.KILL, Fault.KILL_TORN])
            where = f"{fault.name} at call {at} of {n_calls}"
            code, text = runs.merge(recipe, out, *options, fault=fault, at=at, io=io)
            assert code == -signal.SIGKILL, where
            found = contents(out)
            check_no_mix(found, whole[recipe], old if replacing else {})
            if "fastmerge.journal" in found and found["fastmerge.journal"].endswith(b"\n"):
                code, text = runs.merge(recipe, out, "-q")
                assert code == 2 and "--resume" in text and text.count("\n") == 1, (where, text)
                assert contents(out) == found
            # A journal that was not begun binds nothing: the folder is as it was.
            again = () if b"\n" in found.get("fastmerge.journal", b"") else options
            if (
                found != whole[recipe] and generator.random() < 0.4
            ):  # a second kill, in the resumed run
                code, text = runs.merge(
                    recipe, out, "--resume", *again, fault=Fault.KILL, at=generator.randrange(20)
                )
                assert code in (0, -signal.SIGKILL), (where, text)
                check_no_mix(contents(out), whole[recipe], old if replacing else {})
            if contents(out) != whole[recipe]:
                code, text = runs.merge(recipe, out, "--resume", *options)
                assert code == 0, (where, text)
            assert contents(out) == whole[recipe], where

    def test_done_work_is_kept(
        self, runs: Runs, whole: dict[str, dict[str, bytes]], out: Path
    ) -> None:
        """What was written before the kill is not merged again, but for what no longer is as written."""
        for at in range(20, 50, 3):  # until the first part is noted
            clear(out)
            code, _ = runs.merge("linear", out, fault=Fault.KILL, at=at)
            assert code == -signal.SIGKILL
            lines = (out / "fastmerge.journal").read_text().splitlines()[1:]
            if any(isinstance(json.loads(line), list) for line in lines):
                break
        else:
            pytest.fail("nothing was noted before the kill")
        with open(out / "fastmerge.journal", "a") as file:
            file.write('["odd", 0, 42, "0000000000000000"]\n["gone", 0, 8, "00"]\nrubbish\n[1, ')
        code, text = runs.merge("linear", out, "--resume")
        assert code == 0 and "were there already" in text and "resumed: 0 B" not in text
        assert contents(out) == whole["linear"]

    def test_damaged_partials_are_merged_again(
        self, runs: Runs, whole: dict[str, dict[str, bytes]], out: Path
    ) -> None:
        for damage in ("zeros", "shorter", "longer", "gone"):
            clear(out)
            runs.merge("linear", out, fault=Fault.KILL, at=24)
            for path in out.glob("*.safetensors.partial"):
                size = path.stat().st_size
                if damage == "gone":
                    path.unlink()
                elif damage == "zeros":
                    path.write_bytes(bytes(size))
                else:
                    os.truncate(path, size // 2 if damage == "shorter" else size * 2)
            code, text = runs.merge("linear", out, "--resume")
            assert code == 0, (damage, text)
            assert contents(out) == whole["linear"], damage

    def test_real_sigkill_from_outside(
        self, runs: Runs, whole: dict[str, dict[str, bytes]], out: Path
    ) -> None:
        recipe = str(runs.root / "in" / "linear.yaml")
        command = [sys.executable, "-m", "fastmerge.cli", "merge", recipe, str(out), *SHARDS]
        env = {k: v for k, v in runs.env.items() if k != "LD_PRELOAD"}
        process = subprocess.Popen(command, env=env, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 30
        while not (out / "fastmerge.journal").exists() and process.poll() is None:
            assert time.monotonic() < deadline
        process.kill()
        process.wait()
        code, text = runs.merge("linear", out, "--resume")
        assert code in (0, 2), text  # 2: it had finished before the signal came
        assert contents(out) == whole["linear"]


class TestBinding:
    def test_other_merges_are_refused(self, runs: Runs, out: Path) -> None:
        runs.merge("linear", out, fault=Fault.KILL, at=24)
        before = contents(out)
        assert "fastmerge.journal" in before
        cases = [
            ("dare_ties", ("--resume",), "another recipe"),
            ("linear", ("--resume", "--seed", "7"), "with seed 0, not 7"),
            ("linear", ("--resume", "--out-shard-size", "1M"), "out_shard_size"),
            ("linear", ("--resume", "--nan-policy", "propagate"), "nan_policy"),
            ("linear", ("--resume", "--allow-missing"), "allow_missing"),
        ]
        for recipe, options, words in cases:
            code, text = runs.merge(recipe, out, *options)
            assert code == 2 and words in text and text.rstrip("\n").count("\n") <= 1, text
            assert contents(out) == before
        model = runs.root / "in" / "e1" / "model.safetensors"
        status = model.stat()
        os.utime(model, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
        code, text = runs.merge("linear", out, "--resume")
        assert code == 2 and "e1/model.safetensors" in text and "changed" in text
        os.utime(model, ns=(status.st_atime_ns, status.st_mtime_ns))
        assert contents(out) == before

    def test_force_starts_again(
        self, runs: Runs, whole: dict[str, dict[str, bytes]], out: Path
    ) -> None:
        runs.merge("dare_ties", out, fault=Fault.KILL, at=24)
        code, text = runs.merge("linear", out, "--force")
        assert code == 0, text
        assert contents(out) == whole["linear"]

    def test_nothing_to_resume(
        self, runs: Runs, whole: dict[str, dict[str, bytes]], out: Path
    ) -> None:
        code, text = runs.merge("linear", out, "--resume")
        assert code == 0 and "no killed merge to resume" in text
        assert contents(out) == whole["linear"]


class TestDevices:
    """Errors of disks and file systems: exit 2, one line, nothing left but what --resume can use."""

    @pytest.mark.parametrize("fault", [Fault.WRITE_EIO, Fault.WRITE_ENOSPC, Fault.FSYNC_EIO])
    def test_output_fails(self, runs: Runs, out: Path, fault: Fault) -> None:
        words = "bytes, only" if fault is Fault.WRITE_ENOSPC else "nput/output error"
        runs.merge("linear", out, fault=fault, at=-1)
        for at in range(0, runs.count, 4):
            clear(out)
            code, text = runs.merge("linear", out, fault=fault, at=at)
            if code == 0:  # the last syncs come when all is named: the journal's own end
                continue
            assert code == 2 and "error: " in text and words.lower() in text.lower(), (at, text)
            assert not out.exists(), (at, contents(out))

    @pytest.mark.parametrize("io", ["direct", "buffered"])
    def test_input_fails_and_is_resumed(
        self, runs: Runs, whole: dict[str, dict[str, bytes]], out: Path, io: str
    ) -> None:
        model = runs.root / "in" / "e2" / "model.safetensors"
        code, text = runs.merge("linear", out, fault=Fault.READ_EIO, at=4, below=model, io=io)
        assert code == 2 and "e2/model.safetensors" in text and "--resume" in text, text
        assert not any(map(is_weight, contents(out)))
        code, text = runs.merge("linear", out, "--resume")
        assert code == 0, text
        assert contents(out) == whole["linear"]

    @pytest.mark.parametrize("io", ["direct", "buffered"])
    def test_short_reads_and_writes(
        self, runs: Runs, whole: dict[str, dict[str, bytes]], out: Path, io: str
    ) -> None:
        code, text = runs.merge("dare_ties", out, fault=Fault.SHORT, below=runs.root, io=io)
        assert code == 0, text
        assert contents(out) == whole["dare_ties"]

    def test_full_disk(self, runs: Runs, tmp_path: Path) -> None:
        disk = tmp_path / "disk"
        disk.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(disk)]
        try:
            mounted = subprocess.run(command, capture_output=True).returncode == 0
        except OSError:
            mounted = False
        if not mounted:
            pytest.skip("mounting is not permitted")
        try:
            code, text = runs.merge("linear", disk / "out")
            assert code == 2 and "bytes, only" in text
            assert os.listdir(disk) == []
        finally:
            subprocess.run(["umount", str(disk)], check=True)

    def test_read_only_output(self, runs: Runs, tmp_path: Path) -> None:
        disk = tmp_path / "disk"
        disk.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", "ro,size=1m", "none", str(disk)]
        try:
            mounted = subprocess.run(command, capture_output=True).returncode == 0
        except OSError:
            mounted = False
        if not mounted:
            pytest.skip("mounting is not permitted")
        try:
            code, text = runs.merge("linear", disk / "out")
            assert code == 2 and "read-only file system" in text
        finally:
            subprocess.run(["umount", str(disk)], check=True)

    @pytest.mark.parametrize("io", ["direct", "buffered"])
    @pytest.mark.parametrize("fault", [Fault.TRUNCATE, Fault.REPLACE])
    def test_input_changes_meanwhile(self, runs: Runs, out: Path, fault: Fault, io: str) -> None:
        model = runs.root / "in" / "e3" / "model.safetensors"
        kept = model.with_name("kept")
        shutil.copy2(model, kept)
        shutil.copy2(model, f"{model}.other")
        try:
            code, text = runs.merge("linear", out, fault=fault, at=4, below=model, io=io)
        finally:
            os.replace(kept, model)
            Path(f"{model}.other").unlink(missing_ok=True)
        words = "truncated" if fault is Fault.TRUNCATE else "replaced by another file"
        assert code == 2 and words in text and "e3/model.safetensors" in text, text
        assert not out.exists()


def test_interrupt_keeps_what_is_done(
    runs: Runs, whole: dict[str, dict[str, bytes]], out: Path
) -> None:
    for at in (12, 20, 28, 40):
        clear(out)
        code, text = runs.merge("linear", out, fault=Fault.INTERRUPT, at=at)
        assert code == 130, (at, code, text)
        assert "interrupted; finish" in text and "--resume" in text
        found = contents(out)
        assert "fastmerge.journal" in found and not any(map(is_weight, found))
        code, text = runs.merge("linear", out, "--resume")
        assert code == 0, text
        assert contents(out) == whole["linear"]


class TestVerify:
    @pytest.fixture
    def model(self, runs: Runs, out: Path) -> Path:
        code, text = runs.run("merge", runs.root / "small" / "dare_ties.yaml", out)
        assert code == 0, text
        return out

    @pytest.mark.parametrize("recipe", RECIPES)
    def test_whole(self, runs: Runs, out: Path, recipe: str) -> None:
        code, text = runs.run(
            "merge", runs.root / "small" / f"{recipe}.yaml", out, "--out-shard-size", 3000
        )
        assert code == 0, text
        code, text = runs.run("verify", out)
        assert code == 0, text
        assert "3 of 3 tensors" in text and text.endswith("\nwhole\n") and "skipped" not in text

    def test_flipped_bit(self, runs: Runs, model: Path) -> None:
        shard = max(model.glob("*.safetensors"), key=lambda p: p.stat().st_size)
        data = bytearray(shard.read_bytes())
        data[-5] ^= 1
        shard.write_bytes(data)
        code, text = runs.run("verify", model)
        assert code == 2 and "checksum" in text and "differs from its merge at byte" in text
        assert text.endswith("not whole\n")

    def test_inputs_changed(self, runs: Runs, model: Path) -> None:
        manifest = json.loads((model / "fastmerge_manifest.json").read_text())
        manifest["inputs"][1]["header"] = "0" * 32
        (model / "fastmerge_manifest.json").write_text(json.dumps(manifest))
        code, text = runs.run("verify", model)
        assert code == 0 and "skipped" in text and "changed" in text

    def test_a_wrong_merge_with_right_checksums(self, runs: Runs, model: Path) -> None:
        manifest = json.loads((model / "fastmerge_manifest.json").read_text())
        manifest["options"]["seed"] = 1
        (model / "fastmerge_manifest.json").write_text(json.dumps(manifest))
        code, text = runs.run("verify", model, "--sample", "7")
        assert code == 2 and "differs from its merge" in text

    def test_no_manifest(self, runs: Runs, model: Path) -> None:
        (model / "fastmerge_manifest.json").unlink()
        code, text = runs.run("verify", model)
        assert code == 2 and "has no fastmerge_manifest.json" in text
        (model / "fastmerge_manifest.json").write_text("[]")
        assert runs.run("verify", model)[0] == 2
        (model / "fastmerge_manifest.json").write_text('{"tensors": {}}')
        code, text = runs.run("verify", model)
        assert code == 2 and ("WRONG" in text or "not a manifest" in text)
