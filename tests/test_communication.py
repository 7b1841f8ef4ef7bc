"""Communication, counted in compiled programs."""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jbn
import jbn.linen
from benchmarks import communication, hlo, traffic
from benchmarks.communication import AXIS, Setting
from tests.scripts import exits

pytestmark = [pytest.mark.standard_jax, pytest.mark.quick_compile(same_hlo=True)]

ROWS, COLUMNS = 32, 128
BYTES = 4 * COLUMNS


def collectives(f, shape=(2, 2), axes=("a", "b")):
    """Those of f under `shard_map`, over x [32, 128] split along the first axis."""
    mesh = Mesh(jax.devices()[:4], axes) if len(axes) == 1 else jax.make_mesh(shape, axes)
    split = PartitionSpec(axes[0])
    x = jax.ShapeDtypeStruct((ROWS, COLUMNS), "float32", sharding=NamedSharding(mesh, split))
    f = jax.shard_map(f, mesh=mesh, in_specs=split, out_specs=split, check_vma=False)
    return hlo.collectives(jax.jit(f).lower(x).compile())


KNOWN = {  # what each device contributes in numbers, the size of the group, and bytes sent
    "all-gather": (lambda x: lax.all_gather(x, "a").sum(0), 8 * COLUMNS, 3 * 8 * BYTES),
    "all-reduce": (lambda x: x * lax.psum(x[0], "a"), COLUMNS, 2 * 3 / 4 * BYTES),
    "reduce-scatter": (
        lambda x: lax.psum_scatter(x, "a", tiled=True),
        8 * COLUMNS,
        3 / 4 * 8 * BYTES,
    ),
    "all-to-all": (
        lambda x: lax.all_to_all(x, "a", 0, 0, tiled=True),
        8 * COLUMNS,
        3 / 4 * 8 * BYTES,
    ),
    "collective-permute": (
        lambda x: lax.ppermute(x, "a", [(i, (i + 1) % 4) for i in range(4)]),
        8 * COLUMNS,
        8 * BYTES,
    ),
}


@pytest.mark.parametrize("op", KNOWN)
def test_known_programs(op):
    f, numbers, sent = KNOWN[op]
    (found,) = collectives(f, axes=("a",))
    assert (found.op, found.group, found.numbers) == (op, 4, numbers)
    assert found.size == 4 * numbers
    assert found.sent == sent


def test_in_a_loop_combined_and_in_groups():
    def loop(x):
        def step(x, _):
            a, b = lax.psum((jnp.cos(x), x[0]), "a", axis_index_groups=[[0, 1], [2, 3]])
            return jnp.sin(x) + a * b, None

        return lax.scan(step, x, None, length=5)[0]

    (found,) = collectives(loop, axes=("a",))  # one for both arrays
    assert (found.op, found.group, found.numbers) == ("all-reduce", 2, 9 * COLUMNS)
    assert set(found.shapes) == {"f32[8,128]", "f32[128]"}


def test_along_one_axis_of_a_mesh_and_complex():
    (found,) = collectives(lambda x: jnp.abs(lax.psum(lax.complex(x[0], x[1]), "a")) + x)
    assert (found.group, found.numbers) == (2, 2 * COLUMNS)


def test_none():
    assert collectives(lambda x: x + 1) == []


def parsed(line, called=""):
    """What is found in a program of one instruction, which may call a computation."""
    text = f"""HloModule m, num_partitions=8
{called}
ENTRY %main (a: f32[4,128], b: bf16[64]) -> f32[] {{
  %a = f32[4,128]{{1,0:T(4,128)S(1)}} parameter(0)
  %b = bf16[64]{{0}} parameter(1)
  {line}
}}
"""

    class Compiled:
        def as_text(self):
            return text

    return hlo.collectives(Compiled())


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("replica_groups={{0,1,2,3},{4,5,6,7}}", 4),
        ("replica_groups={{0,1,2},{3}}", 3),
        ("replica_groups={}", 8),
        ("replica_groups=[4,2]<=[8]", 2),
        ("replica_groups=[2,4]<=[4,2]T(1,0)", 4),
        ("replica_groups=mesh['x'=4,'y'=2] {'x','y'}", 8),
        ("replica_groups=mesh['x'=4,'y'=2] {'y'}", 2),
        ("replica_groups=mesh['x'=8] {'x':(2)4}", 4),
    ],
)
def test_groups_in_every_form(groups, size):
    (found,) = parsed(f"ROOT %r = f32[4,128] all-reduce(%a), channel_id=1, {groups}, to_apply=%f")
    assert found.group == size


def test_asynchronous_forms_count_once():
    (found,) = parsed(
        "%s = ((f32[4,128], bf16[64]), (f32[16,128], bf16[256])) all-gather-start(%a, %b), "
        "replica_groups=[2,4]<=[8], dimensions={0}\n"
        "  ROOT %d = (f32[16,128], bf16[256]) all-gather-done(%s)"
    )
    assert (found.op, found.shapes, found.group) == ("all-gather", ("f32[4,128]", "bf16[64]"), 4)
    assert (found.numbers, found.size) == (576, 4 * 512 + 2 * 64)
    assert found.sent == 3 * found.size


@pytest.mark.parametrize("op", ["async-start", "reduce-scatter-start"])
def test_an_asynchronous_wrapper_counts_what_it_calls(op):
    called = """
%wrapped (p: f32[4,128]) -> f32[1,128] {
  %p = f32[4,128] parameter(0)
  ROOT %r = f32[1,128] reduce-scatter(%p), replica_groups=[2,4]<=[8], dimensions={0}, to_apply=%f
}
"""
    start = f"ROOT %s = ((f32[4,128]), f32[1,128], u32[]) {op}(%a), calls=%wrapped"
    (found,) = parsed(start, called)
    assert (found.op, found.group, found.numbers, found.sent) == ("reduce-scatter", 4, 512, 1536)


def test_pairs():
    (found,) = parsed(
        "ROOT %p = bf16[64] collective-permute(%b), source_target_pairs={{0,1},{1,0}}"
    )
    assert (found.group, found.sent) == (2, 128)


# The layer.

C = 256
WHERE = [
    ("cpu", 4, 2),
    ("cuda", 8, 4),
    ("cuda", 256, 8),
    ("tpu", 32, 8),
    ("tpu", 256, 8),
]


@pytest.fixture(params=WHERE, ids=lambda where: f"{where[0]}-{where[1]}")
def where(request):
    """Skips what cannot be compiled for here."""
    platform = request.param[0]
    if packages := traffic.missing(platform):
        pytest.skip(f"compiling for {platform} needs: pip install {packages}")
    if platform != "cpu" and jax.config.jax_platforms != "cpu":
        pytest.skip(f"compiling for {platform} without one needs JAX_PLATFORMS=cpu")
    return request.param


def passes(platform, setting, model=None):
    """The collectives of the forward pass, and how many and how much the backward pass adds."""
    layer, x = communication.one_layer(setting, C)
    programs = [
        communication.collectives(platform, setting, program, model or layer, x)
        for program in ("forward", "step")
    ]
    forward, step = (communication.record(setting, C, "", found) for found in programs)
    assert all(c.group == setting.group for found in programs for c in found)
    return forward, step.collectives - forward.collectives, step.numbers - forward.numbers


def assert_one_gather(platform, forward):
    """Each device gives shift, offset and variance."""
    if platform == "tpu" and forward.setting.group >= 64:
        # Over a whole slice XLA writes it as an all-reduce, each device's own among zeros.
        assert forward.ops == {"all-reduce": 1}
        assert forward.numbers == forward.setting.group * 3 * C
    else:
        assert forward.ops == {"all-gather": 1}
        assert forward.numbers == 3 * C


@pytest.mark.parametrize("how", ["axis_name", "axis_index_groups"])
def test_one_all_gather_and_one_all_reduce(how, where):
    platform, devices, group = where
    setting = Setting("jbn", how, devices, devices if how == "axis_name" else group)
    forward, backward, numbers = passes(platform, setting)
    assert_one_gather(platform, forward)
    assert backward == 1
    assert numbers <= 4 * C


@pytest.mark.parametrize("how", ["jit, auto", "jit, explicit"])
def test_one_collective_each_way_under_jit(how, where):
    platform, devices, _ = where
    if (platform, how) == ("tpu", "jit, auto"):
        pytest.skip("on TPU the devices share the shift first")
    forward, backward, numbers = passes(platform, Setting("jbn", how, devices, devices))
    assert_one_gather(platform, forward)
    assert backward == 1
    assert 0 < numbers <= 4 * C


def test_none_at_inference(where):
    platform, devices, group = where
    for how in ("axis_name", "axis_index_groups", "jit, auto", "jit, explicit"):
        setting = Setting("jbn", how, devices, group if how == "axis_index_groups" else devices)
        model, x = communication.one_layer(setting, C, inference=True)
        assert communication.collectives(platform, setting, "forward", model, x) == []


class Masked(nn.Module):
    """A layer that sees the positive elements."""

    @nn.compact
    def __call__(self, x):
        return jbn.linen.BatchNorm(use_running_average=False, axis_name=AXIS)(x, mask=x > 0)


def test_a_mask_adds_the_counts():
    forward, backward, numbers = passes("cpu", Setting("jbn", "axis_name", 4, 4), Masked())
    assert forward.ops == {"all-gather": 1}
    assert forward.numbers == 4 * C
    assert backward == 1
    assert numbers <= 4 * C


def test_several_axis_names_are_one():
    mesh = jax.make_mesh((2, 2), ("a", "b"))
    split = PartitionSpec(("a", "b"))
    x = jax.ShapeDtypeStruct((1024, C), "float32", sharding=NamedSharding(mesh, split))

    def forward(x):
        return jbn.batch_norm(x, axis_name=("a", "b"))[0]

    def gradient(x):
        return jax.grad(lambda x: jnp.sin(forward(x)).sum())(x)

    counts = []
    for f in (forward, gradient):
        mapped = jax.shard_map(f, mesh=mesh, in_specs=split, out_specs=split)
        counts.append(hlo.collectives(jax.jit(mapped).lower(x).compile()))
    forward, step = counts
    assert [(c.op, c.group, c.numbers) for c in forward] == [("all-gather", 4, 3 * C)]
    assert sorted(c.op for c in step) == ["all-gather", "all-reduce"]
    assert sum(c.numbers for c in step) <= 7 * C


def test_a_network_is_the_sum_of_its_layers():
    setting = Setting("jbn", "axis_name", 4, 4)

    def step(model, x):
        found = communication.collectives("cpu", setting, "step", model, x)
        return communication.record(setting, "", "step", found)

    images = jax.ShapeDtypeStruct((4, 8, 8, 3), "float32")
    whole = step(communication.network(setting, stages=(1,), features=8), images)
    narrow, wide = (step(*communication.one_layer(setting, features)) for features in (8, 32))
    numbers = 3 * narrow.numbers + 2 * wide.numbers
    # The projection and the layer that it is added to have one dz, which XLA may sum once.
    assert numbers - 32 <= whole.numbers <= numbers
    sent = 3 * narrow.sent + 2 * wide.sent
    assert sent - 2 * 3 / 4 * 4 * 32 <= whole.sent <= sent
    # XLA combines what two branches send.
    assert 8 <= whole.collectives <= 10


def test_widths_of_resnet50():
    widths = communication.widths()
    assert sum(widths.values()) == 53
    assert sum(features * n for features, n in widths.items()) == 26560
    assert set(communication.FEATURES) <= set(widths)


# What it costs.


def test_latencies():
    """By hand, from the formulas of the sources."""
    us = pytest.approx
    nccl, ici = communication.nccl_latency, communication.ici_latency
    assert nccl("all-gather", 8) * 1e6 == us(6.6 + 7 * 0.6)
    assert nccl("all-reduce", 8) * 1e6 == us(6.6 + 14 * 0.6)
    assert nccl("all-gather", 16) * 1e6 == us(6.6 + 14 * 1.0 + 2.7)
    assert nccl("all-reduce", 16) * 1e6 == us(6.8 + 2 * (7 * 0.6 + 5.0))
    assert ici("all-gather", 8) * 1e6 == us(1 + 3)
    assert ici("all-reduce", 256) * 1e6 == us(2 * (8 + 8))


def test_share_of_a_step():
    machine = communication.Machine("m", "cpu", 100.0, lambda group: 1e3, lambda op, group: 2e-3)
    setting = Setting("jbn", "axis_name", 4, 4)
    ops = {"all-gather": 2, "all-reduce": 1}
    record = communication.Record(setting, "ResNet-50", "step", 3, 10, 40.0, ops)
    assert machine.step(64) == 0.64
    assert machine.seconds(record) == pytest.approx((0.04, 0.006))
    table = communication.share_table(machine, [record])
    shares = [next(iter(column.cells)) for column in table.columns]
    assert shares[:5] == ["4", "jbn", "0.00", "40.000", "6.000"]
    assert shares[5:] == ["6.25", "7.19", "1.56", "1.80"]


@pytest.fixture
def quick(monkeypatch):
    """A run of a few seconds."""
    monkeypatch.setattr(communication, "FEATURES", (8,))
    monkeypatch.setattr(communication, "widths", lambda: {8: 2})
    devices = jax.device_count()
    settings = [Setting("flax", "axis_name", devices, devices)]
    monkeypatch.setattr(communication, "settings", lambda platform: settings)


def test_run(quick, tmp_path, capsys):
    files = tmp_path / "new" / "a.json", tmp_path / "new" / "b.png"
    communication.main(["--json", str(files[0]), "--plot", str(files[1])])
    rows = json.loads(files[0].read_text())["communication"]
    assert [(r["devices"], r["features"], r["program"], r["collectives"]) for r in rows] == [
        (8, 8, "forward", 1),
        (8, 8, "step", 2),
        (8, "ResNet-50", "step", 4),
    ]
    assert files[1].read_bytes().startswith(b"\x89PNG")
    out = " ".join(capsys.readouterr().out.split())
    assert "Collectives of one layer in training over 8 devices, cpu" in out
    assert "KB that each device sends in a training step, cpu" in out


def test_an_interrupted_run_leaves_no_file(quick, tmp_path, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(communication, "collectives", interrupted)
    with pytest.raises(KeyboardInterrupt):
        communication.main(["--json", str(tmp_path / "a"), "--plot", str(tmp_path / "b")])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--platform", "tpu"], "--platform tpu needs: pip install some-package==1.0"),
        (["--platform", "rocm"], "(choose from cpu, cuda, tpu)"),
        (["--json", "."], "--json must be a file that can be written"),
        (["--plot", "."], "--plot must be a file that can be written"),
    ],
)
def test_bad_flags(flags, message, monkeypatch, capsys):
    packages = {"tpu": "some-package==1.0"}
    monkeypatch.setattr(traffic, "missing", lambda platform: packages.get(platform, ""))
    monkeypatch.setattr(communication, "measure", None)  # refused before it starts
    with exits(2):
        communication.main(flags)
    assert message in " ".join(capsys.readouterr().err.replace("'", "").split())
