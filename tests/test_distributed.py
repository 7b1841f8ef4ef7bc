"""`examples/distributed.py` on real processes: losses, failures, resuming, and bad input."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.standard_jax

ROOT = Path(__file__).parents[1]
FLAGS = ["--epochs", "2", "--batch-size", "448", "--checkpoint-every", "2"]  # 3 steps an epoch
FAULT_STEP = 4
LIMIT = 30  # seconds after a fault within which the other process must have ended


class Process:
    """A running process of the example: what it recorded and printed, and how it ended."""

    def __init__(self, folder, name, flags, *, devices, cache, fault=None):
        self.record, self.log = folder / f"{name}.record", folder / f"{name}.log"
        self.record.touch()
        env = {
            "JAX_PLATFORMS": "cpu",
            "JAX_ENABLE_X64": "1",
            "JAX_NUM_CPU_DEVICES": f"{devices}",
            "JAX_COMPILATION_CACHE_DIR": f"{cache}",
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        command = [sys.executable, "-m", "tests.faulty_process", str(self.record)]
        with self.log.open("w") as log:
            self.popen = subprocess.Popen(
                [*command, f"{fault}", f"{FAULT_STEP}", *flags],
                cwd=ROOT,
                env=os.environ | env,
                stdout=log,
                stderr=log,
            )

    def entries(self):
        return [json.loads(line) for line in self.record.read_text().splitlines()]

    @property
    def steps(self):
        """Loss and running statistics after each step."""
        return dict(entry for entry in self.entries() if isinstance(entry, list))

    def finish(self):
        assert self.popen.wait(timeout=240) == 0, self.log.read_text()

    def await_fault(self):
        """Waits for it, however long the machine takes to get there; the time of it."""
        while not any(isinstance(entry, str) for entry in self.entries()):
            assert self.popen.poll() is None, self.log.read_text()
            time.sleep(0.05)
        return time.monotonic()

    def await_failure(self, since):
        """Waits for the process to end, within the limit since a time; what it printed."""
        code = self.popen.wait(timeout=since + LIMIT - time.monotonic())
        assert code != 0
        return self.log.read_text()


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A folder for what is compiled, once for all processes and all workers of the tests."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        return tmp_path_factory.getbasetemp().parent / "compiled"
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture
def start(tmp_path, cache):
    """A function that starts the processes of a run; none is left afterwards."""
    processes = []

    def start_run(name, checkpoints, count, devices, faults=None):
        flags = [*FLAGS, "--checkpoint-dir", str(checkpoints)]
        run = []
        for i in range(count):
            if count > 1 and i == 0:
                flags += [
                    "--num-processes",
                    f"{count}",
                    "--coordinator",
                    f"localhost:{free_port()}",
                ]
                flags += ["--heartbeat-timeout", "5", "--start-timeout", "120"]
            own = [*flags, "--process-id", f"{i}"] if count > 1 else flags
            fault = (faults or {}).get(i)
            run.append(
                Process(tmp_path, f"{name}-{i}", own, devices=devices, cache=cache, fault=fault)
            )
            processes.append(run[-1])
        return run

    yield start_run
    for process in processes:
        process.popen.kill()
        process.popen.wait()


def free_port():
    with socket.create_server(("localhost", 0)) as server:
        return server.getsockname()[1]


def test_resumes_on_any_number_of_processes(start, tmp_path):
    """Two processes, of which one is killed amid a save, then two or one: all as on one device."""
    folder = tmp_path / "killed"
    [one] = start("one", tmp_path / "one", count=1, devices=1)
    run = start("killed", folder, count=2, devices=2, faults={1: "kill during save"})
    log = run[0].await_failure(since=run[1].await_fault())
    assert re.search(r"Task 1 heartbeat timeout|stopped sending heartbeats\):\s+1", log)
    left = {path.name for path in folder.iterdir()}
    assert len(left) == 2  # the first checkpoint, and what there is of the second
    assert "2" in left
    assert "4" not in left

    copy = shutil.copytree(folder, tmp_path / "copy")
    again = start("two", folder, count=2, devices=2) + start("copy", copy, count=1, devices=1)
    for process in (one, *again):
        process.finish()
    assert list(one.steps) == [1, 2, 3, 4, 5, 6]
    for process, steps in [(p, [1, 2, 3, 4]) for p in run] + [(p, [3, 4, 5, 6]) for p in again]:
        assert list(process.steps) == steps
        for step, values in process.steps.items():
            np.testing.assert_allclose(values, one.steps[step], rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize(
    ("index", "fault", "causes"),
    [
        (0, "kill", r"leader task"),
        (1, "stop", r"stopped sending heartbeats\):\s+1"),
        (1, "raise", r"first task at the barrier: 1"),
    ],
)
def test_a_failure_ends_the_others(start, tmp_path, index, fault, causes):
    run = start("run", tmp_path / "checkpoints", count=2, devices=2, faults={index: fault})
    log = run[1 - index].await_failure(since=run[index].await_fault())
    assert re.search(causes, log)
    if fault == "raise":
        assert "RuntimeError: injected" in run[index].await_failure(since=time.monotonic())
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["2"]
