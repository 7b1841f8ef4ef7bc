"""`examples/distributed.py` on real processes: losses, failures, resuming, and bad input."""

import importlib
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from tests.scripts import exits

pytestmark = pytest.mark.standard_jax

ROOT = Path(__file__).parents[1]
FLAGS = ["--epochs", "2", "--batch-size", "448", "--checkpoint-every", "2"]  # 3 steps an epoch
FAULT_STEP = 4
LIMIT = 30  # seconds after a fault within which the other process must have ended
TIMEOUT = 240  # seconds for what is to work, on a slow machine too


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
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
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
        lines = self.record.read_text().splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]

    @property
    def steps(self):
        """Loss and running statistics after each step."""
        return dict(entry for entry in self.entries() if isinstance(entry, list))

    def finish(self):
        assert self.popen.wait(timeout=TIMEOUT) == 0, self.log.read_text()

    def await_fault(self):
        """Waits for it, however slow the machine is; the time of it."""
        give_up = time.monotonic() + TIMEOUT
        while not any(isinstance(entry, str) for entry in self.entries()):
            alive = self.popen.poll() is None and time.monotonic() < give_up
            assert alive, self.log.read_text()
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
        if count > 1:
            flags += ["--num-processes", f"{count}", "--coordinator", f"localhost:{free_port()}"]
            flags += ["--heartbeat-timeout", "5", "--start-timeout", "120"]
        run = []
        for i in range(count):
            own = [*flags, "--process-id", f"{i}"] if count > 1 else flags
            fault = (faults or {}).get(i)
            process = Process(
                tmp_path, f"{name}-{i}", own, devices=devices, cache=cache, fault=fault
            )
            processes.append(process)
            run.append(process)
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
    ("index", "fault", "cause"),
    [
        (0, "terminate", r"leader task"),
        (0, "stop", r"DEADLINE_EXCEEDED[^@]*CoordinationService/Heartbeat"),
        (1, "stop", r"stopped sending heartbeats\):\s+1"),
        (1, "raise", r"first task at the barrier: 1"),
    ],
)
def test_a_failure_ends_the_others(start, tmp_path, index, fault, cause):
    run = start("run", tmp_path / "checkpoints", count=2, devices=2, faults={index: fault})
    log = run[1 - index].await_failure(since=run[index].await_fault())
    assert re.search(cause, log)
    if fault == "raise":
        assert "RuntimeError: injected" in run[index].await_failure(since=time.monotonic())
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["2"]


@pytest.fixture
def example(monkeypatch):
    """The module; it must stop before it joins other processes or trains."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    module = importlib.import_module("distributed")
    monkeypatch.setattr(jax.distributed, "initialize", None)  # calling it would be a TypeError
    monkeypatch.setattr(module, "train_step", None)
    yield module
    for name in ("distributed", "flax_linen"):
        del sys.modules[name]


def usage_error(example, capsys, *flags):
    """What main says to bad flags."""
    with exits(2):
        example.main([str(flag) for flag in flags])
    return " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("flag", ["--epochs", "--batch-size", "--checkpoint-every"])
@pytest.mark.parametrize("value", ["0", "-1", "x", "2147483648"])
def test_numbers_that_are_not_positive(example, capsys, flag, value):
    message = f"argument {flag}: must be a whole number from 1 to 2^31 - 1, not '{value}'"
    assert message in usage_error(example, capsys, flag, value)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--batch-size 66", "--batch-size must divide among 8 devices: 64 or 72, not 66"),
        ("--batch-size 3", "--batch-size must divide among 8 devices: 8, not 3"),
        ("--batch-size 1352", "--batch-size must be at most 1347, the training images, not 1352"),
        ("--seed -1", "--seed must be from 0 to 2**32 - 1, not -1"),
        ("--process-id 0", "--coordinator and --process-id need --num-processes"),
        ("--coordinator a:1", "--coordinator and --process-id need --num-processes"),
        ("--num-processes 2 --process-id 2 --coordinator a:1", "must be from 0 to 1, not 2"),
        ("--num-processes 2 --process-id -1 --coordinator a:1", "must be from 0 to 1, not -1"),
        ("--num-processes 2 --process-id 0", "--process-id needs --coordinator"),
        ("--num-processes 2 --coordinator host", "--coordinator must be HOST:PORT, not 'host'"),
        ("--num-processes 2 --coordinator a:99999", "must be HOST:PORT, not 'a:99999'"),
        ("--cluster --num-processes 2", "--cluster finds --coordinator, --num-processes and"),
    ],
)
def test_flags_that_do_not_fit(example, capsys, tmp_path, flags, message):
    folder = tmp_path / "checkpoints"
    assert message in usage_error(example, capsys, *flags.split(), "--checkpoint-dir", folder)
    assert not folder.exists()


@pytest.mark.parametrize(
    ("name", "column"), [("--seed", 0), ("--batch-size", 1), ("--epochs", 2), ("JAX_ENABLE_X64", 4)]
)
def test_processes_that_disagree(example, capsys, tmp_path, monkeypatch, name, column):
    def of_both(own):
        both = np.stack([own, own])
        both[1, column] += 1
        return both

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(example, "process_allgather", of_both)
    monkeypatch.setattr(example, "join", lambda *_: None)
    error = usage_error(example, capsys, "--checkpoint-dir", tmp_path)
    values = {"--seed": "[0, 1]", "--batch-size": "[64, 65]", "--epochs": "[10, 11]"}
    assert f"{name} must be the same for all processes, not {values.get(name, '[4, 5]')}" in error


def test_folders_that_are_not_one(example, capsys, tmp_path, monkeypatch):
    def of_both(own):
        return np.stack([own, own if own.ndim else ~own])  # flags are equal, the mark is not seen

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(example, "process_allgather", of_both)
    monkeypatch.setattr(example, "broadcast_one_to_all", lambda token: token)
    monkeypatch.setattr(example, "sync_global_devices", lambda name: None)
    error = usage_error(example, capsys, "--checkpoint-dir", tmp_path)
    assert f"--checkpoint-dir must be one folder for all processes; {tmp_path} is another" in error
    assert error.endswith("for [1]")
    assert list(tmp_path.iterdir()) == []


def test_coordinator_that_does_not_answer(example, capsys):
    address = f"localhost:{free_port()}"
    flags = ["--num-processes", "2", "--coordinator", address, "--start-timeout", "1"]
    error = usage_error(example, capsys, *flags, "--process-id", "1")
    assert f"--coordinator: nothing answered at {address} for 1 s" in error


def test_coordinator_whose_port_is_taken(example, capsys):
    with socket.create_server(("", 0)) as server:
        address = f"localhost:{server.getsockname()[1]}"
        flags = ["--num-processes", "2", "--coordinator", address, "--process-id", "0"]
        error = usage_error(example, capsys, *flags)
    assert f"--coordinator: process 0 cannot listen at {address}" in error


def test_no_cluster(example, capsys, monkeypatch):
    def initialize(*args, **kwargs):
        raise ValueError("coordinator_address should be defined.")  # as JAX's does then

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    assert "--cluster: JAX finds no cluster here" in usage_error(example, capsys, "--cluster")


def test_folder_that_cannot_be(example, capsys, tmp_path):
    taken = tmp_path / "taken"
    taken.write_text("a file")
    for folder in (taken, taken / "below"):
        error = usage_error(example, capsys, "--checkpoint-dir", folder)
        assert "--checkpoint-dir must be a folder that can be created and written" in error
    assert list(tmp_path.iterdir()) == [taken]
    assert taken.read_text() == "a file"


@pytest.mark.parametrize(
    ("metadata", "was"),
    [
        ({"order": "--batch-size 64 --seed 1 in float32"}, "--batch-size 64 --seed 1 in float32"),
        ({"order": "--batch-size 32 --seed 0 in float32"}, "--batch-size 32 --seed 0 in float32"),
        ({"order": "--batch-size 64 --seed 0 in float64"}, "--batch-size 64 --seed 0 in float64"),
        (None, None),
    ],
)
@pytest.mark.parametrize("composite", [False, True])
def test_checkpoint_of_other_data(example, capsys, tmp_path, monkeypatch, metadata, was, composite):
    items = ocp.args.StandardSave({"a": jnp.ones(1)})
    if composite:
        items, was = ocp.args.Composite(state=items), None
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(5, args=items, custom_metadata=metadata)
    monkeypatch.setattr(example, "initial_state", jnp.asarray)  # it is not reached
    error = usage_error(example, capsys, "--checkpoint-dir", tmp_path)
    if was is None:
        assert f"{tmp_path / '5'} is damaged, or not of this script" in error
    else:
        now = "--batch-size 64 --seed 0 in float32"
        assert f"{tmp_path / '5'} was saved with {was}, and {now} would" in error
    assert [path.name for path in tmp_path.iterdir()] == ["5"]


def test_help(example, capsys):
    with exits(0):
        example.main(["--help"])
    text = capsys.readouterr().out
    assert "python examples/distributed.py --num-processes 2" in text
    assert "seconds to wait for the others (default: 60)" in text


def test_commands_of_the_processes(example, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["examples/distributed.py"])
    example.main(["--num-processes", "3", "--seed", "7"])
    commands = [shlex.split(line) for line in capsys.readouterr().out.splitlines()[1:]]
    given = [sys.executable, "examples/distributed.py", "--num-processes", "3", "--seed", "7"]
    assert [command[:6] for command in commands] == 3 * [given]
    options = [dict(zip(c[6::2], c[7::2], strict=True)) for c in commands]
    assert [option["--process-id"] for option in options] == ["0", "1", "2"]
    assert re.fullmatch(r"localhost:\d+", options[0]["--coordinator"])
    assert len({option["--coordinator"] for option in options}) == 1


def test_processes_slice_one_order(example, monkeypatch):
    """Each image once an epoch, but what fills no batch; epochs, and seeds, in other orders."""
    digits = example.Digits([(i, i) for i in range(22)], ())

    def steps(processes, seed=0):
        monkeypatch.setattr(jax, "process_count", lambda: processes)
        parts = []
        for index in range(processes):
            monkeypatch.setattr(jax, "process_index", lambda index=index: index)
            batches = example.local_batches(digits, batch_size=4, seed=seed, epochs=2)
            parts.append([batches[i][0] for i in range(len(batches))])
        return np.concatenate(parts, axis=1)  # [steps, images of a batch]

    whole = steps(1)
    assert whole.shape == (10, 4)
    for epoch in (whole[:5], whole[5:]):
        assert len(set(epoch.flat)) == 20
    assert (whole[:5] != whole[5:]).any()
    assert set(whole[:5].flat) != set(whole[5:].flat)  # other ones are left out
    assert (steps(1, seed=1) != whole).any()
    for processes in (2, 4):
        np.testing.assert_array_equal(steps(processes), whole)
