"""`examples/cifar_resnet.py` on the real digits: training, resuming, divergence, and bad input."""

import argparse
import contextlib
import functools
import io
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import cifar_resnet
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from common import load_dataset
from flax import linen as nn
from jax.experimental.compilation_cache import compilation_cache
from matplotlib.figure import Figure
from tensorboardX.proto.event_pb2 import Event, SessionLog

from tests.scripts import exits, unwrapped

pytestmark = [pytest.mark.standard_jax, pytest.mark.quick_compile]

ROOT = Path(__file__).parents[1]
TINY = functools.partial(cifar_resnet.ResNet, (1,), 8)
SETTINGS = {  # none is the default, but for bfloat16
    "dataset": "digits",
    "network": "resnet18",
    "epochs": (EPOCHS := 2),
    "batch_size": (BATCH_SIZE := 64),
    "learning_rate": (RATE := 0.3),
    "warmup": (WARMUP := 0.1),
    "weight_decay": 1e-3,
    "label_smoothing": (SMOOTHING := 0.1),
    "bfloat16": False,
    "seed": 4,
}
EPOCH_STEPS = 1347 // BATCH_SIZE
STEPS = EPOCHS * EPOCH_STEPS
LOG_EVERY, SAVE_EVERY, KILLED_AT = 6, 13, 39
FLAGS = ["--checkpoint-every", f"{SAVE_EVERY}"]
for name, value in SETTINGS.items():
    FLAGS += [f"--{name.replace('_', '-')}", f"{value}"] if name != "bfloat16" else []
KILLED = """
import os, signal, sys
sys.path.insert(0, "examples")
import orbax.checkpoint as ocp
from tests import test_cifar_resnet as test

save = ocp.CheckpointManager.save

def save_and_die(self, step, *args, **kwargs):
    save(self, step, *args, **kwargs)  # in the background
    if step == test.KILLED_AT:
        os.kill(os.getpid(), signal.SIGKILL)

ocp.CheckpointManager.save = save_and_die
test.run(test.Path(sys.argv[1]))
"""


def run(folder, *flags):
    """Runs the example with a tiny network; what it printed, and the arguments of its steps."""
    stdout, steps = io.StringIO(), []
    train_step = cifar_resnet.train_step

    def recorded(*args):
        steps.append((args, train_step(*args)))
        return steps[-1][1]

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(stdout):
        patch.setitem(cifar_resnet.NETWORKS, SETTINGS["network"], TINY)
        patch.setattr(cifar_resnet, "LOG_EVERY", LOG_EVERY)
        patch.setattr(cifar_resnet, "train_step", recorded)
        cifar_resnet.main([*FLAGS, *flags, "--output", str(folder)])
    return SimpleNamespace(folder=folder, stdout=stdout.getvalue(), steps=steps)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A folder of compiled programs, which are the same in each run; as environment variables."""
    settings = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("cache")),
        "jax_persistent_cache_min_compile_time_secs": 0,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield {name.upper(): f"{value}" for name, value in settings.items()}
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def whole_run(cache, tmp_path_factory):
    """One run that nothing interrupts."""
    return run(tmp_path_factory.mktemp("whole") / "new" / "folder")


def results(folder):
    return json.loads((folder / "cifar_resnet.json").read_text())


def checkpoint(folder, step):
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(folder / "checkpoints" / f"{step}" / "default")


def saved_steps(folder):
    return sorted(int(path.name) for path in (folder / "checkpoints").iterdir())


def events(folder):
    """The records of each event file, in the order of their names, which begin with the time."""
    found = []
    for path in sorted((folder / "tensorboard").iterdir()):
        content, at = path.read_bytes(), 0
        while at < len(content):
            (length,) = struct.unpack_from("<Q", content, at)  # then 4 bytes of checksum
            found.append(Event.FromString(content[at + 12 : at + 12 + length]))
            at += 12 + length + 4
    return found


def values(found, tag):
    """Step and summary value of each event with a tag."""
    return [
        (event.step, value) for event in found for value in event.summary.value if value.tag == tag
    ]


def schedule_oracle(peak, warmup, steps):
    rise = int(warmup * steps)
    fall = 0.5 * (1 + np.cos(np.pi * (np.arange(steps) - rise) / (steps - rise)))
    return peak * np.where(np.arange(steps) < rise, np.arange(steps) / max(rise, 1), fall)


def test_results(whole_run):
    found = results(whole_run.folder)
    assert found["settings"] == SETTINGS
    assert found["steps_per_epoch"] == EPOCH_STEPS
    assert found["diverged_at_step"] is None
    assert [epoch["epoch"] for epoch in found["epochs"]] == [1, 2]
    metrics = [metrics for _, (_, metrics) in whole_run.steps]
    for name in ("loss", "accuracy"):
        means = np.reshape([m[name] for m in metrics], (EPOCHS, EPOCH_STEPS)).mean(1)
        np.testing.assert_allclose([e[f"train_{name}"] for e in found["epochs"]], means, rtol=1e-6)
    rates = schedule_oracle(RATE, WARMUP, STEPS)[EPOCH_STEPS - 1 :: EPOCH_STEPS]
    found_rates = [epoch["learning_rate"] for epoch in found["epochs"]]
    np.testing.assert_allclose(found_rates, rates, rtol=1e-5, atol=1e-7)
    for epoch in found["epochs"]:
        line = f"epoch {epoch['epoch']}: loss {epoch['train_loss']:.3f}, "
        assert line + f"test loss {epoch['test_loss']:.3f}" in whole_run.stdout


def test_learns(whole_run):
    first, last = results(whole_run.folder)["epochs"]
    assert last["train_loss"] < 0.9 * first["train_loss"]
    assert last["train_accuracy"] > max(0.3, 1.3 * first["train_accuracy"])


def test_figure_is_whole(whole_run):
    png = (whole_run.folder / "cifar_resnet.png").read_bytes()
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    assert png.endswith(b"IEND\xaeB`\x82")
    names = sorted(path.name for path in whole_run.folder.iterdir())
    assert names == ["checkpoints", "cifar_resnet.json", "cifar_resnet.png", "tensorboard"]


def test_weights_and_batches_follow_from_the_seed(whole_run):
    digits = load_dataset("digits", Path())
    standardize = cifar_resnet.standardizer(digits.train_images)
    batches = cifar_resnet.train_batches(SETTINGS, digits, standardize)
    for step in (0, EPOCH_STEPS, STEPS - 1):
        _, *batch, _ = whole_run.steps[step][0]
        jax.tree.map(np.testing.assert_array_equal, tuple(batch), batches[step])
    (state, *_), _ = whole_run.steps[0]
    init = jax.jit(functools.partial(TINY().init, train=False))
    expected = init(jax.random.key(SETTINGS["seed"]), batches[0][0])["params"]
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), state.params, expected)


def test_test_results_are_of_the_saved_network(whole_run):
    """All images in one batch, the last that training saved."""
    digits = load_dataset("digits", Path())
    state = checkpoint(whole_run.folder, STEPS)
    pixels = digits.train_images.astype(np.float64)
    images = ((digits.test_images - pixels.mean()) / pixels.std()).astype(np.float32)
    variables = {"params": state["params"], "batch_stats": state["batch_stats"]}
    logits = np.asarray(jax.jit(functools.partial(TINY().apply, train=False))(variables, images))
    chosen = np.take_along_axis(logits, digits.test_labels[:, None], -1)[:, 0]
    loss = np.mean(np.log(np.exp(logits).sum(-1)) - chosen)
    last = results(whole_run.folder)["epochs"][-1]
    assert last["test_accuracy"] == np.mean(logits.argmax(-1) == digits.test_labels)
    np.testing.assert_allclose(last["test_loss"], loss, rtol=1e-5)


def test_train_step(whole_run):
    """Loss, smoothed, and accuracy of the first step, and how it counts in what is averaged."""
    (state, images, labels, _), (after, metrics) = whole_run.steps[0]
    assert images.dtype == jnp.float32
    devices = jax.device_count()
    for array in (images, labels):  # each device has its own part
        shard = array.sharding.shard_shape(array.shape)
        assert shard == (BATCH_SIZE // devices, *array.shape[1:]) != array.shape
    apply = functools.partial(
        TINY().apply,
        train=True,
        mutable=["batch_stats", "intermediates"],
        capture_intermediates=lambda module, _: isinstance(module, nn.Conv),
    )
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    logits, updated = jax.jit(apply)(*jax.device_get((variables, images)))  # on one device
    log_softmax = np.asarray(logits) - np.log(np.exp(logits).sum(-1, keepdims=True))
    targets = (1 - SMOOTHING) * np.eye(10)[np.asarray(labels)] + SMOOTHING / 10
    np.testing.assert_allclose(metrics["loss"], -(targets * log_softmax).sum(-1).mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["accuracy"], np.mean(logits.argmax(-1) == labels))
    for name, value in metrics.items():
        assert after.totals[name] == value
    for path, stats in jax.tree.leaves_with_path(
        after.batch_stats, is_leaf=lambda node: "mean" in node
    ):
        *outer, name = (key.key for key in path)
        convs = functools.reduce(lambda tree, key: tree[key], outer, updated["intermediates"])
        (x,) = convs[name.replace("BatchNorm", "Conv")]["__call__"]
        for moment, old in ((np.mean, 0.0), (np.var, 1.0)):  # a tenth is of this batch
            expected = 0.9 * old + 0.1 * moment(x, (0, 1, 2))
            np.testing.assert_allclose(stats[moment.__name__], expected, rtol=1e-4, atol=1e-6)


def test_tensorboard(whole_run):
    found = events(whole_run.folder)
    for split, steps in (
        ("train", range(LOG_EVERY, STEPS + 1, LOG_EVERY)),
        ("test", (EPOCH_STEPS, STEPS)),
    ):
        for name in ("loss", "accuracy"):
            logged = values(found, f"{split}/{name}")
            assert [step for step, _ in logged] == [*steps]
            for step, value in logged:
                expected = (
                    whole_run.steps[step - 1][1][1][name]
                    if split == "train"
                    else results(whole_run.folder)["epochs"][step // EPOCH_STEPS - 1][
                        f"test_{name}"
                    ]
                )
                np.testing.assert_allclose(value.simple_value, expected, rtol=1e-6)
    rates = [value.simple_value for _, value in values(found, "train/learning_rate")]
    expected = schedule_oracle(RATE, WARMUP, STEPS)[LOG_EVERY - 1 :: LOG_EVERY]
    np.testing.assert_allclose(rates, expected, rtol=1e-5, atol=1e-7)

    stats = checkpoint(whole_run.folder, STEPS)["batch_stats"]
    for path in ("BatchNorm_0/mean", "Block_0/BatchNorm_1/var"):
        (_, first), (step, last) = values(found, f"batch_stats/{path}")
        array = functools.reduce(lambda tree, key: tree[key], path.split("/"), stats)
        assert (step, first.histo.num, last.histo.num) == (STEPS, array.size, array.size)
        bounds = (last.histo.min, last.histo.max, last.histo.sum)
        np.testing.assert_allclose(bounds, (array.min(), array.max(), array.sum()), rtol=1e-5)
    tags = {value.tag for event in found for value in event.summary.value}
    assert sum(tag.startswith("batch_stats/") for tag in tags) == 2 * 3  # two of each layer


def test_resumes_after_a_kill(whole_run, cache, tmp_path):
    """In the midst of a save: bit by bit what came out without it."""
    folder = tmp_path / "run"
    process = subprocess.run(
        [sys.executable, "-c", KILLED, str(folder)],
        cwd=ROOT,
        env=os.environ
        | cache
        | {
            "JAX_NUM_CPU_DEVICES": f"{jax.device_count()}",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # as here
        },
        capture_output=True,
        text=True,
    )
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert not (folder / "cifar_resnet.json").exists()
    resumed = run(folder)
    start = int(re.search(rf"Restored step (\d+) of {STEPS} ", resumed.stdout)[1])
    assert start in (KILLED_AT - SAVE_EVERY, KILLED_AT)  # both after the first epoch
    assert len(resumed.steps) == STEPS - start
    assert results(folder) == results(whole_run.folder)
    before, after = (checkpoint(f, STEPS) for f in (whole_run.folder, folder))
    jax.tree.map(np.testing.assert_array_equal, before, after)
    found = events(folder)
    purges = [event.step for event in found if event.session_log.status == SessionLog.START]
    assert purges == [1, start + 1]
    logged = {step for step, _ in values(found, "train/loss")}
    assert logged == {*range(LOG_EVERY, STEPS + 1, LOG_EVERY)}


def test_logs_are_on_the_disk_before_a_checkpoint(cache, tmp_path, monkeypatch):
    """After that checkpoint a killed run does not log them again."""

    def points():
        return {(event.step, v.tag) for event in events(tmp_path) for v in event.summary.value}

    seen = {}
    monkeypatch.setattr(cifar_resnet, "save", lambda _, step, *args: seen.update({step: points()}))
    run(tmp_path, "--checkpoint-every", f"{LOG_EVERY}")
    assert seen.keys() == {*range(LOG_EVERY, STEPS + 1, LOG_EVERY)}
    for step, on_disk in seen.items():
        assert on_disk == {point for point in points() if point[0] <= step}


def test_goes_on_where_nothing_is_left(whole_run, tmp_path):
    folder = shutil.copytree(whole_run.folder, tmp_path / "run")
    (folder / "cifar_resnet.json").unlink()
    again = run(folder)
    assert f"Restored step {STEPS} of {STEPS}" in again.stdout
    assert not again.steps
    assert results(folder) == results(whole_run.folder)


DIVERGING = ["--learning-rate", "1e30", "--warmup", "0.5"]


def test_divergence_is_a_result(cache, tmp_path):
    diverged = run(tmp_path, *DIVERGING, "--checkpoint-every", "1")
    found = results(tmp_path)
    at = found["diverged_at_step"]
    assert 1 < at < EPOCH_STEPS  # the rate of the first step is 0
    assert found["epochs"] == []
    kept = saved_steps(tmp_path)[-1]
    assert kept == at - 1
    message = f"Diverged: at step {at} of {STEPS} a loss or a parameter is not finite"
    message += f". The last good checkpoint, of step {kept}, is kept."
    expected = f"{message} Try a lower --learning-rate and another --output."
    assert expected in unwrapped(diverged.stdout)
    state = checkpoint(tmp_path, kept)
    assert all(np.isfinite(array).all() for array in jax.tree.leaves(state["params"]))
    assert (tmp_path / "cifar_resnet.png").read_bytes().endswith(b"IEND\xaeB`\x82")


def test_divergence_before_a_checkpoint(cache, tmp_path):
    text = unwrapped(run(tmp_path, *DIVERGING).stdout)
    assert "not finite. No checkpoint is kept. Try a lower --learning-rate." in text
    assert saved_steps(tmp_path) == []


def test_interrupted(cache, tmp_path, monkeypatch, capsys):
    left = iter([cifar_resnet.train_step] * (SAVE_EVERY + 2))

    def interrupted(*args):
        for train_step in left:
            return train_step(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(cifar_resnet, "train_step", interrupted)
    with exits(130):
        run(tmp_path)
    assert "Interrupted. The same command goes on from the last" in capsys.readouterr().err
    assert saved_steps(tmp_path) == [SAVE_EVERY]


def test_full_disk(cache, tmp_path, monkeypatch, capsys):
    """Found before the second checkpoint, of which nothing is written."""

    def disk_usage(folder):
        return SimpleNamespace(free=0 if saved_steps(tmp_path) else 2**30)

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    with exits(1):
        run(tmp_path)
    path = tmp_path / "checkpoints" / f"{2 * SAVE_EVERY}"
    message = f"[Errno 28] No space left on device: '{path}'. With more space the same command"
    assert message in capsys.readouterr().err
    assert saved_steps(tmp_path) == [SAVE_EVERY]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoints", "tensorboard"]


@pytest.mark.parametrize(("epochs", "passes"), [(1, "1 epoch"), (2, "2 epochs")])
def test_title_of_the_figure(whole_run, epochs, passes, monkeypatch):
    titles = []
    monkeypatch.setattr(Figure, "suptitle", lambda _, title: titles.append(title))
    monkeypatch.setattr(Figure, "savefig", lambda *args, **kwargs: None)
    found = results(whole_run.folder)
    cifar_resnet.figure(found | {"settings": SETTINGS | {"epochs": epochs}})
    accuracy = 100 * found["epochs"][-1]["test_accuracy"]
    outcome = f"{accuracy:.2f} % test accuracy"
    assert titles == [f"resnet18 on digits, {passes}, one seed (4): {outcome}"]


def test_is_finite(whole_run):
    (state, *_), _ = whole_run.steps[0]
    bad = jnp.full((), np.nan)
    params = state.params["Dense_0"] | {"bias": state.params["Dense_0"]["bias"] * np.inf}
    assert cifar_resnet.is_finite(state)
    assert not cifar_resnet.is_finite(state.replace(totals=state.totals | {"loss": bad}))
    assert not cifar_resnet.is_finite(state.replace(params=state.params | {"Dense_0": params}))


def init_shapes(images, steps=1, **settings):
    """The state of a run, with shapes in place of arrays."""
    init = functools.partial(cifar_resnet.init_state, SETTINGS | settings, steps)
    return jax.eval_shape(init, images)


def apply(state, images):
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    return state.apply_fn(variables, images, train=False)


@pytest.mark.parametrize(
    ("name", "parameters"),
    # He et al. 2015, Table 6: 0.27 M. The others are ResNets of the paper's Table 1 whose first
    # convolution is 3x3 and whose last layer has 10 classes.
    [("resnet20", 269_722), ("resnet18", 11_173_962), ("resnet50", 23_520_842)],
)
def test_parameters(name, parameters):
    images = jnp.zeros((2, 32, 32, 3))
    state = init_shapes(images, network=name, bfloat16=True)
    logits = jax.eval_shape(apply, state, images)
    leaves = jax.tree.leaves(state.params)
    assert sum(leaf.size for leaf in leaves) == parameters
    floats = jax.tree.leaves((logits, state.params, state.batch_stats))
    assert {leaf.dtype for leaf in floats} == {jnp.dtype("float32")}
    assert logits.shape == (2, 10)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_computes_in(dtype, monkeypatch):
    monkeypatch.setitem(cifar_resnet.NETWORKS, SETTINGS["network"], TINY)
    images = jnp.zeros((2, 8, 8, 1))
    state = init_shapes(images, bfloat16=dtype == "bfloat16")
    jaxpr = jax.make_jaxpr(apply)(state, images)
    convolutions = [e for e in jaxpr.eqns if e.primitive.name == "conv_general_dilated"]
    assert len(convolutions) == 3
    assert {v.aval.dtype for e in convolutions for v in e.invars} == {jnp.dtype(dtype)}


def test_block():
    """Convolutions that keep a channel, or make it negative; a shortcut that adds zeros."""
    block = cifar_resnet.Block(4, 2, bottleneck=False, projection=False, dtype=jnp.float32)
    x = jax.random.normal(jax.random.key(0), (1, 4, 4, 2))
    init = functools.partial(block.init, train=False)
    shapes = jax.eval_shape(init, jax.random.key(1), x)
    variables = jax.tree.map_with_path(
        lambda path, leaf: np.full(leaf.shape, float(path[-1].key in ("scale", "var")), leaf.dtype),
        shapes,
    )
    for name, factors in (("Conv_0", [1, 1]), ("Conv_1", [1, -2])):
        variables["params"][name]["kernel"][1, 1, :2, :2] = np.diag(factors)
    seen = np.asarray(x)[:, ::2, ::2]
    assert (seen < 0).any((0, 1, 2)).all()  # both signs in both channels
    assert (seen > 0).any((0, 1, 2)).all()
    expected = np.zeros((1, 2, 2, 4))
    expected[..., :2] = np.maximum(np.maximum(seen, 0) * (1, -2) + seen, 0)
    found = block.apply(variables, x, train=False)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_nesterov_and_decay_of_all_but_batch_norm(monkeypatch):
    """By a constant gradient g the second update is -rate (1 + 0.9 + 0.81) (g + decay p).

    The first is 0, as the rate rises from there.
    """
    monkeypatch.setitem(cifar_resnet.NETWORKS, SETTINGS["network"], TINY)
    settings = {"learning_rate": 0.5, "warmup": 0.5, "weight_decay": 0.25}
    shapes = init_shapes(jnp.zeros((1, 8, 8, 1)), steps=4, **settings)
    params = jax.tree.map(lambda a: np.full(a.shape, 2.0, np.float32), shapes.params)
    grads = jax.tree.map(lambda a: np.full(a.shape, 3.0, np.float32), shapes.params)
    first, opt_state = shapes.tx.update(grads, shapes.tx.init(params), params)
    assert not any(map(np.any, jax.tree.leaves(first)))
    updates, _ = shapes.tx.update(grads, opt_state, params)
    seen = set()
    for path, update in jax.tree.leaves_with_path(updates):
        is_batch_norm = "BatchNorm" in jax.tree_util.keystr(path)
        expected = -0.25 * 2.71 * (3 + (0 if is_batch_norm else 0.25 * 2))
        np.testing.assert_allclose(update, expected, rtol=1e-6)
        seen.add((is_batch_norm, path[-1].key))
    assert seen == {(True, "scale"), (True, "bias"), (False, "kernel"), (False, "bias")}


@pytest.mark.parametrize(("warmup", "steps"), [(0.05, 400), (0.0, 7), (0.99, 10), (0.5, 1)])
def test_schedule(warmup, steps):
    settings = {"learning_rate": 0.3, "warmup": warmup}
    schedule = cifar_resnet.learning_rate_schedule(settings, steps)
    expected = schedule_oracle(0.3, warmup, steps)
    np.testing.assert_allclose(schedule(np.arange(steps)), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("side", [8, 28, 32])
@pytest.mark.parametrize("mirror", [False, True])
def test_augment(side, mirror):
    images = np.random.default_rng(1).random((200, side, side, 3), np.float32)
    augmented = cifar_resnet.augment(images, np.random.default_rng(2), mirror)
    assert augmented.dtype == images.dtype
    assert augmented.shape == images.shape
    padding = {8: 1, 28: 3, 32: 4}[side]
    rng = np.random.default_rng(2)
    offsets = rng.integers(2 * padding + 1, size=(2, len(images))).T
    mirrored = rng.random(len(images)) < 0.5
    for before, after, (top, left), flipped in zip(
        images, augmented, offsets, mirrored & mirror, strict=True
    ):
        expected = np.zeros_like(before)
        for row in range(side):
            for column in range(side):
                y, x = row + top - padding, column + left - padding
                if 0 <= y < side and 0 <= x < side:
                    expected[row, side - 1 - column if flipped else column] = before[y, x]
        np.testing.assert_array_equal(after, expected)
    assert {*offsets.ravel()} == {*range(2 * padding + 1)}


def test_standardizer():
    images = np.random.default_rng(0).integers(256, size=(50, 8, 8, 3), dtype=np.uint8)
    images[..., 1] //= 4
    wide = images.astype(np.float64)
    expected = (wide[:5] - wide.mean((0, 1, 2))) / wide.std((0, 1, 2))
    standardized = cifar_resnet.standardizer(images)(images[:5])
    assert standardized.dtype == np.float32
    np.testing.assert_allclose(standardized, expected, atol=1e-5)


def numbered(name, count=50):
    """A data set whose labels are the numbers of its images."""
    images = np.random.default_rng(0).integers(256, size=(count, 8, 8, 1), dtype=np.uint8)
    return cifar_resnet.Dataset(name, images, np.arange(count), images, np.arange(count))


def batches_of(name, seed=0):
    settings = {"batch_size": 8, "epochs": 3, "seed": seed}
    return cifar_resnet.train_batches(settings, numbered(name), np.float32)


def test_batches_by_step():
    """Each epoch takes other images in another order, each once; all follows from the step."""
    batches = functools.partial(batches_of, "cifar10")

    steps = list(batches(0))
    assert len(steps) == len(batches(0)) == 3 * 6
    epochs = np.concatenate([labels for _, labels in steps]).reshape(3, -1)
    assert all(len({*epoch}) == 48 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    for one, other in zip(steps[7:], batches(0)[7:].to_iter_dataset(), strict=True):
        jax.tree.map(np.testing.assert_array_equal, one, other)
    assert not np.array_equal(steps[0][1], batches(1)[0][1])


def test_each_step_is_augmented_in_its_own_way(monkeypatch):
    monkeypatch.setattr(cifar_resnet, "augment", lambda images, rng, mirror: rng.random())
    drawn = [draw for seed in (0, 1) for draw, _ in batches_of("cifar10", seed)]
    assert len({*drawn}) == 2 * 3 * 6


@pytest.mark.parametrize(
    ("name", "mirrors"),
    [("digits", False), ("mnist", False), ("fashion-mnist", True), ("cifar10", True)],
)
def test_which_are_mirrored(name, mirrors, monkeypatch):
    asked = []
    monkeypatch.setattr(cifar_resnet, "augment", lambda *args: asked.append(args[2]))
    batches_of(name)[0]
    assert asked == [mirrors]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--epochs", "0"], "must be a whole number from 1 to 2^31 - 1, not '0'"),
        (["--warmup", "1"], "must be a number from 0 to below 1, not '1'"),
        (["--label-smoothing", "some"], "must be a number from 0 to below 1, not 'some'"),
        (["--weight-decay", "-1"], "must be a number from 0 to below 1, not '-1'"),
        (["--learning-rate", "nan"], "must be a finite number above 0, not 'nan'"),
        (["--network", "vgg"], "invalid choice: 'vgg'"),
        (["--seed", "-1"], "must be a whole number from 0 to 2^32 - 1, not '-1'"),
        (["--batch-size", "12"], "--batch-size must divide among 8 devices, not 12"),
        (["--batch-size", "1352"], "--batch-size must be at most 1347, the images, not 1352"),
        (["--dataset", "cifar10", "--data-dir", "{tmp}/none"], "no folder {tmp}/none/cifar10"),
        (["--output", "{tmp}/file"], "--output must be a folder that can be created and written"),
    ],
)
def test_bad_flags(flags, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cifar_resnet, "train", None)  # calling it would be a TypeError
    (tmp_path / "file").touch()
    output, flags = tmp_path / "out", [flag.format(tmp=tmp_path) for flag in flags]
    with exits(2):
        cifar_resnet.main([*FLAGS, "--output", str(output), *flags])
    assert message.format(tmp=tmp_path) in unwrapped(capsys.readouterr().err)
    assert not output.exists()


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("cifar_resnet.json", Path.mkdir),
        ("cifar_resnet.png", Path.mkdir),
        ("tensorboard", Path.touch),
    ],
)
def test_output_that_is_taken(name, make, tmp_path, monkeypatch, capsys):
    """Found before training."""
    monkeypatch.setattr(cifar_resnet, "train", None)
    make(tmp_path / name)
    with exits(2):
        cifar_resnet.main([*FLAGS, "--output", str(tmp_path)])
    assert f"{tmp_path / name}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "was", "now"), [("network", "resnet18", "resnet50"), ("dataset", "digits", "cifar10")]
)
def test_checkpoint_of_another_run(whole_run, name, was, now, capsys):
    settings = results(whole_run.folder)["settings"] | {name: now}
    manager = cifar_resnet.checkpoints(whole_run.folder / "checkpoints")
    with exits(2):
        cifar_resnet.restore(argparse.ArgumentParser(), manager, None, settings)
    assert f"was saved with --{name} {was}, not --{name} {now};" in capsys.readouterr().err


def test_help(capsys):
    with exits(0):
        cifar_resnet.main(["--help"])
    text = unwrapped(capsys.readouterr().out)
    assert "ResNet-20 on CIFAR-10: a whole training script" in text
    assert text.count("(default: ") == 13


def test_readme_figures():
    """The accuracies of the shorter run are those of the committed one."""
    page = (ROOT / "examples/README.md").read_text()
    epochs = json.loads((ROOT / "examples/results/cifar_resnet.json").read_text())["epochs"]
    for name in ("test", "train"):
        cells = (f"{100 * epoch[f'{name}_accuracy']:.2f}" for epoch in epochs)
        assert f"% | {' | '.join(cells)} |" in page
