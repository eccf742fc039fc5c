"""Saved by some processes, gone on by others: the same batches, losses, masters, moments and steps."""

from __future__ import annotations

import itertools
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

from lclm.checkpoint import StageFolder, universal_folder
from tests.distributed import many
from tests.end_to_end import small_run as small

STEPS, MOVED_AFTER = 20, 6
SIZES, ZEROS = (1, 2, 4), (1, 2, 3)
ORDER = (4, 2, 1, 2, 4)
"""Launches: each number of processes after each other one has saved."""
LORA = {"lora": {"rank": 4, "alpha": 8}, "lr": 3e-3}
OTHERS = {
    "adapter": small.stage(STEPS, learn=("adapter", "brackets")),
    "encoder": small.stage(STEPS, learn=("encoder", "adapter", "brackets")),
    "lora": {**small.stage(STEPS, learn=("adapter",)), "learn": {"adapter": {"lr": 3e-3}, "decoder": LORA}},
    "recompute": small.stage(STEPS, learn=("encoder", "adapter")),
}
RECOMPUTE = {"recompute": {"activation_checkpointing": {"encoder": True, "decoder": True}}}
TURN = 5
"""Steps at each number of processes of a run that goes from 2 to 1, to 2 and to 4."""


def joint():
    """Everything learns, each component at rates of its own."""
    stage = small.stage(STEPS)
    stage["learn"]["encoder"] |= {"lr": 1e-3, "betas": [0.8, 0.9]}
    stage["learn"]["adapter"] |= {"lr": 5e-3, "weight_decay": 0.0, "eps": 1e-7}
    stage["learn"]["brackets"] |= {"weight_decay": 0.1}
    return stage


def recipe(data, folder, name, zero, stage, **engine):
    """A recipe's file, its run to be given as an override."""
    content = small.recipe(data, folder / name, **{name: stage})
    content["data"] |= {"micro_batch": 1, "pack": {"positions": 96, "rows": 3, "latents": 30}}
    content["engine"] |= {"zero": zero, **engine}
    content["train"] |= {"validate_batches": 0, "save_every_steps": None, "log_every": 1, "peak_tflops": 1.0}
    content["probes"] = {"context_tokens": [], "reconstruct_tokens": [], "max_needle_tokens": 0}
    return str(small.write(folder, content))


def train_job(path, run, *settings, stop=None, **more):
    stopping = [f"train.stop_after_steps={stop}"] if stop else []
    return {"do": "train", "recipe": path, "settings": [f"run_dir={run}", *stopping, *settings], **more}


def launch(folder, processes, jobs):
    """Do jobs in so many processes."""
    file = folder / f"jobs-{processes}-{time.monotonic_ns()}.json"
    file.write_text(json.dumps(list(jobs)))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*launcher, f"--nproc-per-node={processes}", "-m", "tests.distributed.many", str(file)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-8000:]
    return done.stdout


def same_course(never_moved, moved, steps=STEPS, after=MOVED_AFTER):
    """The same global batches at every step; the first loss after the move to 1e-6, all of them to 1e-5."""
    first, second = small.lines(never_moved), small.lines(moved)
    assert [line["step"] for line in second] == list(range(1, steps + 1))
    for name in ("loss_tokens", "source_tokens", "task_tokens"):
        assert [line[name] for line in first] == [line[name] for line in second], name
    expected, found = small.losses(never_moved), small.losses(moved)
    assert found[after] == pytest.approx(expected[after], rel=1e-6)
    assert found == pytest.approx(expected, rel=1e-5)
    assert len(set(expected)) == steps


def launches(pairs, save, load):
    """[(size, jobs)] in ORDER: `save(a)` as soon as a is up, `load(a, b)` at b as soon as a has saved."""
    saved, left, found = set(), set(pairs), []
    for size in ORDER:
        jobs = [] if size in saved else list(save(size))
        saved.add(size)
        for pair in sorted(left):
            if pair[0] in saved and pair[1] == size:
                jobs += load(*pair)
                left.remove(pair)
        found.append((size, jobs))
    assert not left
    return found


def odd_jobs(folder):
    """An odd engine at all pairs of sizes, ZeRO stages and precisions; at one pair the stage changes, too."""

    def where(size, zero, precision):
        return {"folder": str(folder / f"{size}-{zero}-{precision}"), "precision": precision}

    kinds = list(itertools.product(ZEROS, ("fp32", "bf16")))

    def save(size):
        return [{"do": "cut", "zero": zero, **where(size, zero, kind)} for zero, kind in kinds]

    def load(a, b):
        change = 1 if (a, b) == (2, 1) else 0
        return [
            {"do": "cut_anew", "zero": (zero + change - 1) % 3 + 1, **where(a, zero, kind)}
            for zero, kind in kinds
        ]

    return launches([pair for pair in itertools.product(SIZES, SIZES) if pair[0] != pair[1]], save, load)


def joint_jobs(folder, recipes):
    """Recipes {name: path}, saved at a and gone on at b for all a and b; at a = b by the native path."""

    def save(size):
        return [
            train_job(path, folder / f"{name}-{size}", stop=MOVED_AFTER) for name, path in recipes.items()
        ]

    def load(a, b):
        for name, path in recipes.items():
            run = folder / f"{name}-{a}-{b}"
            yield {"do": "copy", "source": str(folder / f"{name}-{a}"), "target": str(run)}
            yield train_job(path, run, scramble=True)

    return launches(itertools.product(SIZES, SIZES), save, load)


def wandering_jobs(folder, recipes):
    """Recipes {name: path}: a run at 2 processes, and one that goes from 2 to 1, to 2 and to 4."""
    found = []
    for turn, size in enumerate(ORDER):
        jobs = []
        for name, path in recipes.items() if turn else ():
            stop = TURN if turn < 4 else None
            jobs.append(train_job(path, folder / f"{name}-moved", stop=stop, scramble=turn > 1))
            if turn == 1:
                jobs.append(train_job(path, folder / f"{name}-whole"))
        found.append((size, jobs))
    return found


@pytest.fixture(scope="module")
def matrix(data, tmp_path_factory):
    """All the moves: five launches. Folder of all runs."""
    folder = tmp_path_factory.mktemp("matrix")
    joints = {f"joint{zero}": recipe(data, folder, f"joint{zero}", zero, joint()) for zero in ZEROS}
    others = {
        f"{name}{zero}": recipe(data, folder, f"{name}{zero}", zero, stage, **RECOMPUTE.get(name, {}))
        for (name, stage), zero in itertools.product(OTHERS.items(), (2, 3))
    }
    plans = [
        odd_jobs(folder / "odd"),
        joint_jobs(folder, joints),
        wandering_jobs(folder, others),
    ]
    for parts in zip(*plans, strict=True):
        launch(folder, parts[0][0], itertools.chain(*(jobs for _, jobs in parts)))
    return folder


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("zero", ZEROS)
@pytest.mark.parametrize(("a", "b"), [pair for pair in itertools.product(SIZES, SIZES) if pair[0] != pair[1]])
def test_everything_learns_and_moves(matrix, a, b, zero):
    same_course(matrix / f"joint{zero}-{a}-{a}", matrix / f"joint{zero}-{a}-{b}")


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("zero", [2, 3])
@pytest.mark.parametrize("stage", OTHERS)
def test_other_stages_move(matrix, stage, zero):
    whole, moved = matrix / f"{stage}{zero}-whole", matrix / f"{stage}{zero}-moved"
    for turn in (1, 2, 3):
        same_course(whole, moved, after=turn * TURN)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("zero", ZEROS)
def test_sizes_agree_with_one_another(matrix, zero):
    for size in (2, 4):
        same_course(matrix / f"joint{zero}-1-1", matrix / f"joint{zero}-{size}-{size}")


def test_saved_by_two_gone_on_by_one(data, tmp_path):
    path, whole, moved = recipe(data, tmp_path, "short", 2, joint()), tmp_path / "whole", tmp_path / "moved"
    steps = "stages.short.steps=6"
    launch(
        tmp_path,
        2,
        [
            train_job(path, moved, steps, stop=3),
            {"do": "copy", "source": str(moved), "target": str(whole)},
            train_job(path, whole, steps),
        ],
    )
    many.train(path, [f"run_dir={moved}", steps], scramble=True)
    same_course(whole, moved, steps=6, after=3)
    assert not list((moved / "stages" / "01-short" / "checkpoints").iterdir())


class TestForms:
    """Making the universal form: in one process, by a change of the ZeRO stage."""

    @pytest.fixture
    def cut(self, tmp_path):
        many.cut(str(tmp_path), 2, "fp32")
        return StageFolder(tmp_path)

    def again(self, folder):
        """Loads the checkpoint at ZeRO 3; when its form was made."""
        many.cut_anew(str(folder.path), 3, "fp32")
        return (universal_folder(folder.checkpoint(3)) / "origin.json").stat().st_mtime_ns

    @pytest.mark.parametrize("precision", ["fp32", "bf16"])
    def test_the_optimizer_may_move_to_the_cpu(self, tmp_path, precision):
        many.cut(str(tmp_path), 2, precision)
        many.cut_anew(str(tmp_path), 3, precision, offload=True)

    def test_it_is_made_once(self, cut):
        first = self.again(cut)
        assert self.again(cut) == first

    def test_it_is_made_again_when_it_is_damaged(self, cut):
        first = self.again(cut)
        path = next(universal_folder(cut.checkpoint(3)).rglob("exp_avg.pt"))
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
        assert self.again(cut) > first

    def test_it_is_made_again_when_the_checkpoint_is_another(self, cut, tmp_path):
        first = self.again(cut)
        shutil.rmtree(cut.checkpoint(3))
        many.cut(str(tmp_path), 2, "fp32", seed=4)
        assert self.again(cut) > first

    def test_it_goes_with_its_checkpoint(self, cut):
        self.again(cut)
        cut.prune(1)
        assert universal_folder(cut.checkpoint(3)).is_dir()
        cut.prune(0)
        assert not list(cut.checkpoints.iterdir())

    def test_before_the_first_step_of_the_optimizer_there_is_nothing_to_move(self, tmp_path):
        many.cut(str(tmp_path), 1, "fp32", steps=0)
        engine = many.odd_engine(2, "fp32", seed=1)
        before = engine.learned_weights()
        said = []
        many.restore_moved(engine, StageFolder(tmp_path).checkpoint(0), said.append)
        assert all(torch.equal(value, before[name]) for name, value in engine.learned_weights().items())
        many.take_step(engine, 1)
        engine.close()

    @pytest.mark.parametrize("bytes_of_a_file", [500, 1500, 2500])
    def test_a_full_disk_is_said_and_nothing_is_left(self, cut, bytes_of_a_file):
        handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_of_a_file, limits[1]))
        try:
            with pytest.raises(ValueError, match=r"could not write .*universal.*MiB are free"):
                many.cut_anew(str(cut.path), 3, "fp32")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            signal.signal(signal.SIGXFSZ, handler)
        assert [path.name for path in cut.checkpoints.iterdir()] == ["step-00000003"]
        self.again(cut)

    @pytest.mark.slow
    def test_killed_while_it_is_made_it_is_made_again(self, cut, tmp_path):
        jobs = tmp_path / "jobs.json"
        jobs.write_text(json.dumps([{"do": "hang_in_conversion", "folder": str(tmp_path)}]))
        process = subprocess.Popen([sys.executable, "-m", "tests.distributed.many", str(jobs)])
        half = tmp_path / "checkpoints" / "step-00000003.universal.tmp" / "universal" / "zero"
        until = time.monotonic() + 120
        while not half.is_dir() and time.monotonic() < until and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert half.is_dir() and not universal_folder(cut.checkpoint(3)).exists()
        self.again(cut)
        assert not half.exists()


@pytest.mark.slow
def test_what_may_change_and_what_may_not(data, tmp_path):
    path, run = recipe(data, tmp_path, "change", 2, joint()), tmp_path / "run"
    many.train(path, [f"run_dir={run}", "train.stop_after_steps=1"])
    more = ["engine.zero=3", "data.micro_batch=2", "engine.bucket_elements=2000", "stages.change.zero=1"]
    more.append("engine.activation_checkpointing.decoder=true")
    many.train(path, [f"run_dir={run}", "train.stop_after_steps=1", *more], scramble=True)
    for change, shown in [
        ("data.lanes=8", r"-\s+lanes: 4.*\+\s+lanes: 8"),
        ("stages.change.learn.encoder.lr=0.5", r"\+\s+lr: 0.5"),
        ("engine.precision=bf16", r"-\s+precision: fp32.*\+\s+precision: bf16"),
    ]:
        with pytest.raises(ValueError, match=rf"(?s)another recipe.*{shown}"):
            many.train(path, [f"run_dir={run}", change])
    with pytest.raises(ValueError, match="not between 0 and them"):
        many.train(path, [f"run_dir={run}", "engine.zero=0"])
