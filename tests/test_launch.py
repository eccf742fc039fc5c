"""The launchers: clean scripts, commands that are refused, exit codes, the schema of the Kubernetes job.

That they launch is tested in tests/distributed, on hosts and a cluster made for it.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
LAUNCH = ROOT / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch"), ROOT / ".ci" / "run"])


def load_agent() -> ModuleType:
    """launch/agent.py, which is no part of the package."""
    spec = importlib.util.spec_from_file_location("agent", LAUNCH / "agent.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


agent = load_agent()


def run(*command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """A launcher's end, and what it said."""
    return subprocess.run(
        [str(word) for word in command],
        env=os.environ | {"PYTHON": sys.executable, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
    )


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_clean(script: Path) -> None:
    assert os.access(script, os.X_OK)
    assert run("bash", "-n", script).returncode == 0
    shellcheck = Path(sys.executable).with_name("shellcheck")
    found = run(shellcheck if shellcheck.exists() else "shellcheck", script)
    assert found.returncode == 0, found.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "required: N, RECIPE"),
        (["0", "tiny"], "argument N"),
        (["recipe.yaml", "2"], "argument N"),
        (["--nodes=2:1", "--rendezvous=node1", "2", "tiny"], "argument --nodes"),
        (["--nodes=2", "2", "tiny"], "needs --rendezvous HOST[:PORT]"),
        (["--rendezvous=node1", "2", "tiny"], "give --nodes too"),
        (["--nodes=2", "--rendezvous=node1:door", "2", "tiny"], "argument --rendezvous"),
        (["--nodes=2", "--rendezvous=no.such.name.invalid", "--names-timeout=1", "2", "tiny"], "not resolve"),
    ],
)
def test_torchrun_refuses(words: list[str], message: str) -> None:
    done = run(LAUNCH / "torchrun.sh", *words)
    assert done.returncode == 2
    assert message in done.stderr


def test_without_lclm_the_launchers_say_so() -> None:
    for name, words in (("torchrun.sh", ["1", "tiny"]), ("deepspeed.sh", ["hosts", "tiny"])):
        done = run(LAUNCH / name, *words, PYTHON="no/python")
        assert done.returncode == 2
        assert "found no lclm" in done.stderr


def test_deepspeed_refuses(tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    done = run(LAUNCH / "deepspeed.sh", hosts)
    assert done.returncode == 2
    assert "usage:" in done.stderr
    assert "names no machine" in run(LAUNCH / "deepspeed.sh", hosts, "tiny").stderr
    hosts.write_text("# ours\nno.such.name.invalid slots=8\n")
    done = run(LAUNCH / "deepspeed.sh", hosts, "tiny", NAMES_TIMEOUT="1")
    assert done.returncode == 2
    assert "the name no.such.name.invalid" in done.stderr


def test_slurm_refuses() -> None:
    assert "usage:" in run(LAUNCH / "slurm.sbatch").stderr
    done = run(LAUNCH / "slurm.sbatch", "tiny", SLURM_GPUS_ON_NODE="", PROCESSES="")
    assert done.returncode == 2
    assert "--gpus-per-node" in done.stderr


def test_an_error_of_the_user_comes_out_as_2_and_starts_nothing_again() -> None:
    done = run(LAUNCH / "torchrun.sh", "1", "no/such/recipe.yaml")
    assert done.returncode == 2
    assert done.stderr.count("no/such/recipe.yaml") == 1, done.stderr


def test_the_code_for_another_start_can_be_chosen() -> None:
    words = ["--nodes=2", "--rendezvous=192.0.2.1", "--join-timeout=1", "--again-code=138", "1", "tiny"]
    done = run(LAUNCH / "torchrun.sh", *words)
    assert done.returncode == 138
    assert "no one listens at 192.0.2.1:29400 after 1 s" in done.stderr


@pytest.mark.parametrize(
    ("final", "failed", "code"),
    [
        ([0, 0], [], 0),
        ([75, 75], [], 75),
        ([], [76, 76], 76),
        ([], [-signal.SIGKILL, 76], 76),
        ([2], [76], 2),
        ([], [76, -signal.SIGSEGV], 139),
        ([], [1, 76], 1),
        ([130], [], 130),
        ([], [], 76),
    ],
)
def test_exit_codes(tmp_path: Path, final: list[int], failed: list[int], code: int) -> None:
    for rank, value in enumerate(final):
        (tmp_path / str(rank)).write_text(str(value))
    assert agent.outcome(tmp_path, failed, agent.LOST) == code


def test_a_process_that_is_starting_is_not_killed_by_a_signal() -> None:
    listens = "import signal, sys, time; {}; sys.stdout.write('x'); sys.stdout.flush(); time.sleep(60)"
    for line, expected in (("0", False), ("signal.signal(signal.SIGUSR1, print)", True)):
        command = [sys.executable, "-c", listens.format(line)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            assert process.stdout and process.stdout.read(1)
            assert agent.handles(process.pid, signal.SIGUSR1) == expected
            process.kill()


def test_the_kubernetes_job_fits_its_schema() -> None:
    models = pytest.importorskip("kubeflow.training.models")
    job = yaml.safe_load((LAUNCH / "kubernetes.yaml").read_text())
    check(models, "KubeflowOrgV1PyTorchJob", job, "job")
    for spoil, message in (
        (lambda pod: pod["containers"][0].update(comand=["sh"]), "comand"),
        (lambda pod: pod["containers"][0].pop("name"), "name"),
        (lambda pod: pod.update(terminationGracePeriodSeconds="long"), "int"),
    ):
        spoilt = yaml.safe_load((LAUNCH / "kubernetes.yaml").read_text())
        spoil(spoilt["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"])
        with pytest.raises(ValueError, match=message):
            check(models, "KubeflowOrgV1PyTorchJob", spoilt, "job")


def test_the_kubernetes_job_names_its_own_pods() -> None:
    job = yaml.safe_load((LAUNCH / "kubernetes.yaml").read_text())
    name, replicas = job["metadata"]["name"], job["spec"]["pytorchReplicaSpecs"]
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    assert set(replicas) == {"Master", "Worker"} and replicas["Master"]["replicas"] == 1
    workers = replicas["Worker"]["replicas"]
    for replica in replicas.values():
        assert replica["restartPolicy"] == "ExitCode"
        (container,) = replica["template"]["spec"]["containers"]
        assert container["name"] == "pytorch"
        script, *words = container["command"]
        assert shutil.which(str(ROOT / script))
        options = agent.arguments(words)
        assert options.nodes == str(workers + 1)
        assert options.rendezvous == f"{name}-master-0:29400"
        assert options.hosts.split(",") == [f"{name}-worker-{number}" for number in range(workers)]
        assert options.again_code > 127, "the operator starts a pod again from 128 on"
        assert (ROOT / options.recipe).is_file()
        assert container["resources"]["limits"]["nvidia.com/gpu"] == str(options.processes)
        mounts = [mount["mountPath"] for mount in container["volumeMounts"]]
        assert any(word.startswith(f"run_dir={mounts[0]}/") for word in options.overrides)


def check(models: ModuleType, kind: str, value: Any, where: str) -> None:
    """Raise ValueError unless `value` is of an API type: only known keys, all required ones, right types."""
    inner = re.fullmatch(r"(list\[|dict\(str, )(.*)[\])]", kind)
    if inner and inner[1] == "list[":
        if not isinstance(value, list):
            raise ValueError(f"{where}: {value!r} is no list")
        for number, item in enumerate(value):
            check(models, inner[2], item, f"{where}[{number}]")
    elif inner:
        for key, item in value.items():
            check(models, inner[2], item, f"{where}.{key}")
    elif hasattr(models, kind):
        model = getattr(models, kind)
        known = {key: name for name, key in model.attribute_map.items()}
        if unknown := set(value) - set(known):
            raise ValueError(f"{where}: {kind} has no {unknown}")
        for key, item in value.items():
            check(models, model.openapi_types[known[key]], item, f"{where}.{key}")
        model(**{known[key]: item for key, item in value.items()})
    elif kind in ("str", "int", "bool") and type(value).__name__ != kind:
        raise ValueError(f"{where}: {value!r} is no {kind}")
