"""The benchmark command: all layers are one function; what it prints, writes and refuses."""

import argparse
import importlib.util
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import __main__ as command
from benchmarks import accuracy, networks, overhead, peers, results, speed, traffic
from benchmarks.peers import PEERS, Prepared
from tests import cases, oracle
from tests.scripts import exits, unwrapped

pytestmark = [pytest.mark.standard_jax, pytest.mark.quick_compile(same_hlo=True)]

PNG = b"\x89PNG\r\n\x1a\n"
CASES = [
    peers.Case((6, 3, 2, 5), "float32", "forward+backward"),
    peers.Case((6, 3, 2, 5), "bfloat16", "forward+backward", "add-relu"),
    peers.Case((16, 5), "float32", "forward", "relu"),
    peers.Case((6, 3, 2, 5), "float32", "inference", "add-relu"),
]


def need(name):
    if reason := peers.unavailable(name, "cpu"):
        pytest.skip(reason)


def expected(case, arrays):
    """All that a layer may compute, in float64."""
    like = cases.Case("", case.shape, residual=case.after == "add-relu", activation=case.activation)
    args = {k: np.asarray(v, np.float64) for k, v in arrays.items()}
    zeros = np.zeros(like.features)
    args = {"mask": None, "residual": None, "dy": np.zeros(case.shape)} | args
    args |= {"dmean": zeros, "dvar": zeros}
    with jax.enable_x64(True):
        if not case.training:
            xhat = (args["x"] - args["mean"]) / np.sqrt(args["var"] + peers.EPSILON)
            y = args["scale"] * xhat + args["bias"] + args["residual"]
            return {"y": np.maximum(y, 0)}
        y, mean, var, _ = oracle.batch_norm(like, args)
        grads = oracle.gradients(like, args)["y"]
    old = case.momentum
    return {
        "y": np.asarray(y),
        "mean": old * args["mean"] + (1 - old) * mean,
        "var": old * args["var"] + (1 - old) * var,
        **{f"d{name}": grad for name, grad in grads.items()},
    }


@pytest.mark.parametrize(
    ("name", "case"),
    [(name, case) for case in CASES for name in PEERS if peers.supports(name, case.shape)],
    ids=lambda v: v if isinstance(v, str) else f"{v.dtype} {v.mode} {v.after}",
)
def test_every_peer_computes_the_same(name, case):
    need(name)
    arrays = peers.draw(case)
    wanted = expected(case, arrays)
    if PEERS[name].module == "torch" and case.training:  # its running variance is unbiased
        n = math.prod(case.shape[:-1])
        old = case.momentum * np.asarray(arrays["var"], np.float64)
        wanted["var"] = old + (wanted["var"] - old) * n / (n - 1)
    prepared = PEERS[name].prepare(case, arrays)
    raw = prepared.call()
    assert case.dtype in str(raw["y"].dtype)
    assert all("float32" in str(v.dtype) for v in raw.values() if v.ndim == 1)
    found = PEERS[name].prepare(case, arrays).outputs()
    keys = {"forward": {"y", "mean", "var"}, "inference": {"y"}}.get(case.mode, set(wanted))
    assert set(found) == keys
    for key in keys:
        # NNX rounds more to bfloat16 than the output, once for each of scale, bias and residual.
        tolerance = 1e-5 if case.dtype == "float32" or key in ("mean", "var") else 0.04
        np.testing.assert_allclose(
            found[key], wanted[key], rtol=tolerance, atol=tolerance, err_msg=key
        )


def test_arrays_of_a_case():
    case = peers.Case((64, 32), "bfloat16", "forward+backward", "add-relu")
    arrays = peers.draw(case)
    wide = {k: v for k, v in arrays.items() if v.ndim > 1}
    assert set(wide) == {"x", "dy", "residual"}
    assert all((v.shape, v.dtype) == (case.shape, jnp.bfloat16) for v in wide.values())
    assert abs(np.corrcoef([np.ravel(v).astype(float) for v in wide.values()])[0, 1:]).max() < 0.1
    assert np.std(np.asarray(arrays["x"], np.float32)) == pytest.approx(1, abs=0.1)
    assert set(peers.draw(case._replace(mode="inference", after="relu"))) == {
        *("x", "scale", "bias", "mean", "var")
    }


@pytest.mark.parametrize(
    ("mode", "after", "floor"),
    [
        ("forward", "none", 3),  # x, x, y
        ("forward", "relu", 3),
        ("forward", "add-relu", 4),  # and the residual
        ("forward+backward", "none", 8),  # and dy, x, dy, x, dx
        ("forward+backward", "add-relu", 11),  # and the residual, its read and its gradient
        ("inference", "none", 2),  # x, y
        ("inference", "add-relu", 3),
    ],
)
def test_floor(mode, after, floor):
    assert speed.floor(peers.Case((8, 4), "float32", mode, after)) == floor


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_copy_writes_the_bytes_that_it_reads(dtype):
    x = jnp.arange(6, dtype=dtype).reshape(2, 3)
    copied = speed.copy(x).call()["copy"]
    bits = np.asarray(x).view(f"uint{8 * x.dtype.itemsize}")
    assert copied.nbytes == x.nbytes
    np.testing.assert_array_equal(copied, bits + 1)


def test_peers_take_turns(monkeypatch):
    monkeypatch.setattr(speed, "PAUSE", 0)
    monkeypatch.setattr(speed, "BLOCK", 1e-12)
    called = []

    def prepared(name):
        return Prepared(lambda: called.append(name) or {}, lambda _: None, None, -1)

    seconds = speed.take_turns({name: prepared(name) for name in "abc"}, rounds=4)
    # Each time once untimed, and once timed: first to see how long it takes, then in turns.
    assert "".join(called) == "aabbcc" + "aabbcc" + "bbccaa" + "ccaabb" + "aabbcc"
    assert {name: v.shape for name, v in seconds.items()} == dict.fromkeys("abc", (4,))
    assert all((v > 0).all() for v in seconds.values())


def test_measure(monkeypatch):
    monkeypatch.setattr(speed, "PAUSE", 0)
    timed = {
        "copy": np.array([2.0, 1.0, 9.0]),
        "jbn": np.array([8.0, 6.0, 4.0]),
        "linen": np.array([12.0, 12.0, 12.0]),
    }
    monkeypatch.setattr(speed, "take_turns", lambda prepared, rounds: timed)
    case = peers.Case((8, 4), "float32", "forward+backward", "relu")
    jbn, linen = speed.measure(case, ["jbn", "linen", "torch-channels-last"], rounds=3)
    assert jbn[:8] == ("jbn", (8, 4), "float32", "forward+backward", "relu", 6, 5, 7)
    assert jbn.compile_seconds > 0
    assert (jbn.copy_seconds, jbn.fraction_of_limit) == (2, 8 / 2 * 2 / 6)
    assert (jbn.ratio_to_linen, linen.ratio_to_linen) == (0.5, 1)
    cells = [list(column.cells) for column in speed.table([jbn, linen]).columns]
    assert cells[:5] == [
        ["jbn", "linen"],
        ["6e+03", "1.2e+04"],
        ["5e+03 to 7e+03", "1.2e+04 to 1.2e+04"],
        ["133", "67"],
        ["0.50", "1.00"],
    ]
    del timed["linen"]
    (alone,) = speed.measure(case, ["jbn"], rounds=3)
    assert alone.ratio_to_linen is None


def test_accuracy_far_from_zero(monkeypatch):
    monkeypatch.setattr(accuracy, "SHAPE", (64, 7, 7, 2))
    names = [name for name in PEERS if not peers.unavailable(name, "cpu")]
    records = {r.peer: r for r in accuracy.measure(names, 3000.0, 0.01)}
    assert list(records) == names
    assert records["jbn"].variance_error < 1e-5
    assert records["jbn"].y_error < 1e-4
    assert records["linen"].variance_error > 0.5
    assert records["linen"].y_error > 0.5
    assert 1e-4 < records["linen-two-pass"].y_error < 0.1
    near = accuracy.measure(names, 0.0, 1.0)
    assert all(r.variance_error < 1e-4 and r.y_error < 1e-4 for r in near)


def test_accuracy_shows_what_is_not_a_number():
    records = [
        accuracy.Record("jbn", 0.0, 1.0, 1e-7, 0.0),
        accuracy.Record("haiku", 0.0, 1.0, 1e-7, 2e-7),
        accuracy.Record("jbn", 10.0, 1.0, 1e-7, 3e-7),
        accuracy.Record("haiku", 10.0, 1.0, 1e-3, math.nan),
    ]
    cells = [list(column.cells) for column in accuracy.table(records, "y_error").columns]
    assert cells == [["jbn", "haiku"], ["0e+00", "2e-07"], ["3e-07", "nan"]]
    axes = accuracy.matplotlib.figure.Figure().subplots()
    accuracy.draw_panel(axes, records, "y_error")
    assert axes.get_legend_handles_labels()[1] == ["jbn", "haiku", "haiku: not a number"]
    assert axes.get_lines()[2].get_xdata() == [10]
    assert accuracy.figure(records).startswith(PNG)


@pytest.fixture
def quick(monkeypatch):
    """A run of a few seconds."""
    monkeypatch.setattr(accuracy, "SHAPE", (8, 3, 3, 2))
    monkeypatch.setattr(accuracy, "DISTRIBUTIONS", ((0.0, 1.0), (1e4, 1.0)))
    monkeypatch.setattr(speed, "BLOCK", 1e-4)
    monkeypatch.setattr(speed, "PAUSE", 0)
    monkeypatch.setattr(traffic, "table", lambda *args: f"Traffic of {args}")
    monkeypatch.setattr(networks, "table", lambda *args: f"Networks on {args}")
    monkeypatch.setattr(command, "show_communication", lambda platform: print("Communication"))
    monkeypatch.setattr(overhead, "table", lambda *args: "Overhead")
    return [
        *("--peers", "jbn", "linen", "--dtypes", "float32", "--rounds", "2", "--shapes", "small"),
        *("8x3", "--modes", "inference", "forward", "--after", "relu", "--platform", "cpu"),
    ]


def test_run(quick, tmp_path, capsys):
    folder = tmp_path / "new"
    command.main([*quick, "--json", str(folder / "a.json"), "--plot", str(folder / "b.png")])
    assert sorted(p.name for p in folder.iterdir()) == ["a.json", "b-accuracy.png", "b.png"]
    for name in ("b.png", "b-accuracy.png"):
        png = (folder / name).read_bytes()
        assert png.startswith(PNG)
        assert png.endswith(b"IEND\xaeB`\x82")

    content = json.loads((folder / "a.json").read_text())
    assert content["versions"]["jax"] == jax.__version__
    assert content["cores"] >= 1
    assert content["memory_bytes"] > 2**20
    records = content["speed"]
    assert [(r["mode"], r["after"], r["dtype"], tuple(r["shape"]), r["peer"]) for r in records] == [
        (mode, "relu", "float32", shape, peer)
        for mode in ("inference", "forward")
        for shape in ((256, 128), (8, 3))
        for peer in ("jbn", "linen")
    ]
    for r in records:
        assert set(r) == set(speed.Record._fields)
        assert 0 < r["lower_quartile"] <= r["seconds"] <= r["upper_quartile"]
        floor = {"forward": 3, "inference": 2}[r["mode"]]
        assert r["fraction_of_limit"] == floor / 2 * r["copy_seconds"] / r["seconds"]
    assert [r["ratio_to_linen"] for r in records if r["peer"] == "linen"] == [1.0] * 4
    assert [(r["peer"], r["mean"]) for r in content["accuracy"]] == [
        (peer, mean) for mean in (0, 1e4) for peer in ("jbn", "linen")
    ]

    out = unwrapped(capsys.readouterr().out)
    assert f"'jax': '{jax.__version__}'" in out
    assert "Relative error of the variance, float32, 72 rows" in out
    assert "Traffic of ('cpu', ['float32'], (256, 128))" in out
    assert "Communication" in out
    assert "float32 8x3, forward, then relu" in out
    assert out.count("A copy takes") == 4


def test_an_interrupted_run_leaves_no_file(quick, tmp_path, monkeypatch, capsys):
    measure, done = speed.measure, []

    def interrupted(*args):
        if done:
            raise KeyboardInterrupt
        done.append(args)
        return measure(*args)

    monkeypatch.setattr(speed, "measure", interrupted)
    old = tmp_path / "old.json"
    old.write_text("{}")
    with pytest.raises(KeyboardInterrupt):
        command.main([*quick, "--json", str(old), "--plot", str(tmp_path / "b.png")])
    assert list(tmp_path.iterdir()) == [old]
    assert old.read_text() == "{}"
    assert "float32 256x128, inference, then relu" in capsys.readouterr().out


def test_write_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    results.write_whole(path, b"new")
    assert path.read_text() == "new"
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError, match="taken"):
        results.write_whole(tmp_path / "taken", b"new")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "taken"]


def test_machine_names_what_timings_depend_on(monkeypatch):
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "123")
    machine = results.machine()
    assert machine["environment"]["MALLOC_TRIM_THRESHOLD_"] == "123"
    assert machine["device"] == jax.devices()[0].device_kind
    assert machine["cpu"]


def test_summary_is_a_geometric_mean():
    def record(peer, shape, ratio):
        times = 1.0, 1.0, 1.0, None, 1.0, 1.0
        return speed.Record(peer, shape, "float32", "forward", "none", *times, ratio)

    records = [
        record("jbn", (8, 2), 0.5),
        record("jbn", (16, 2), 2.0),
        record("torch", (8, 2), 3.0),
    ]
    table = speed.summary(records)
    assert [list(column.cells) for column in table.columns] == [
        ["jbn", "torch"],
        ["1.00\n0.50 to 2.00", "3.00\n3.00 to 3.00"],
    ]


def test_json_has_no_nan():
    record = accuracy.Record("haiku", 1e4, 1.0, math.inf, math.nan)
    assert json.loads(command.as_json(cpu="c", accuracy=[record])) == {
        "cpu": "c",
        "accuracy": [
            {"peer": "haiku", "mean": 1e4, "std": 1, "variance_error": None, "y_error": None}
        ],
    }


@pytest.fixture
def without_haiku(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "haiku" else find_spec(name)
    )


def test_a_missing_peer_is_named(quick, without_haiku, capsys):
    names = ["--peers", "haiku", "jbn", "--modes", "forward", "--after", "none"]
    command.main([*quick, *names])
    out = unwrapped(capsys.readouterr().out)
    assert "Left out: haiku is not installed: pip install dm-haiku" in out
    assert out.count("jbn") == 4  # of accuracy two rows, of speed one for each shape


def test_no_peer_left(without_haiku, capsys):
    assert "--peers: haiku is not installed: pip install dm-haiku" in refused(
        ["--peers", "haiku"], capsys
    )


def test_torch_needs_the_device():
    need("torch")
    assert peers.unavailable("torch", "tpu") == "torch does not run on tpu"


def refused(flags, capsys):
    with exits(2):
        command.main(flags)
    return unwrapped(capsys.readouterr().err).replace("'", "")


@pytest.mark.parametrize(
    ("flags", "allowed"),
    [
        (["--peers", "tensorflow"], "choose from jbn, linen, linen-two-pass, nnx, haiku, equinox"),
        (["--dtypes", "int8"], "invalid choice: int8 (choose from float32, bfloat16)"),
        (["--modes", "train"], "choose from forward, forward+backward, inference"),
        (["--after", "gelu"], "choose from none, relu, add-relu"),
        (["--platform", "rocm"], "choose from cpu, cuda, tpu"),
        (["--shapes", "resnet"], "must be one of resnet-56, resnet-28, resnet-14, resnet-7,"),
        (["--shapes", "8x8x8"], "or 2 or 4 sizes, features last and 2 rows or more, such as"),
        (["--shapes", "1x8"], "not 1x8"),
        (["--shapes", "8x0"], "not 8x0"),
        (["--rounds", "0"], "--rounds must be 1 or more, not 0"),
        (["--round", "3"], "unrecognized arguments: --round 3"),
    ],
)
def test_bad_flags(flags, allowed, capsys):
    assert allowed in refused(flags, capsys)


@pytest.mark.parametrize("flag", ["--json", "--plot"])
def test_files_are_checked_first(flag, tmp_path, monkeypatch, capsys):
    taken = tmp_path / "taken"
    taken.write_text("a file")
    for path in (tmp_path, taken / "below"):
        error = refused([flag, str(path)], capsys)
        assert f"{flag} must be a file that can be written" in error
    assert list(tmp_path.iterdir()) == [taken]


def test_a_platform_without_its_device_is_compiled_for(quick, monkeypatch, capsys, tmp_path):
    flags = [*quick, "--platform", "tpu"]
    monkeypatch.setattr(command, "has_device", lambda platform: False)
    monkeypatch.setattr(traffic, "missing", lambda platform: "some-package==1.0")
    error = refused(flags, capsys)
    assert "--platform tpu has no device here" in error
    assert "pip install some-package==1.0" in error
    monkeypatch.setattr(traffic, "missing", lambda platform: "")
    error = refused([*flags, "--json", str(tmp_path / "a")], capsys)
    assert "--json and --plot hold timings; --platform tpu has no device here" in error
    command.main(flags)
    out = unwrapped(capsys.readouterr().out)
    assert "Traffic of ('tpu', ['float32'], (1024, 128))" in out  # a larger batch
    assert "A copy takes" not in out


@pytest.mark.parametrize(("backend", "platform"), [("gpu", "cuda"), ("cpu", "tpu")])
def test_has_device(backend, platform, monkeypatch):
    output = argparse.Namespace(stdout=f"a warning\n{backend}\n")
    monkeypatch.setattr(command.subprocess, "run", lambda *args, **kwargs: output)
    assert command.has_device(platform) == (backend == "gpu")


def test_help(capsys):
    with exits(0):
        command.main(["--help"])
    text = unwrapped(capsys.readouterr().out)
    flags = ("peers", "shapes", "dtypes", "modes", "after", "platform", "rounds", "json", "plot")
    assert all(f"--{flag}" in text for flag in flags)
    assert text.count("(default: ") == len(flags)
