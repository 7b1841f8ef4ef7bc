"""Memory traffic, counted in compiled programs."""

import jax
import jax.numpy as jnp
import pytest

from benchmarks import hlo, traffic

pytestmark = pytest.mark.standard_jax

X = jax.ShapeDtypeStruct((64, 8, 8, 128), "float32")
C = jax.ShapeDtypeStruct((128,), "float32")
UNIT = X.size * 4


def moved(f, *args):
    compiled = jax.jit(f).lower(*args).compile()
    return sum(read + written for read, written in hlo.kernels(compiled).values()) / UNIT


def test_counts_of_known_programs():
    assert moved(lambda x: x + 1, X) == 2
    assert moved(lambda x, y: x * y + 1, X, X) == 3
    assert moved(lambda x: x.sum((0, 1, 2)), X) == pytest.approx(1, abs=1e-2)  # partial sums
    assert moved(lambda x: x.astype(jnp.bfloat16), X) == 1.5
    assert moved(lambda x: jnp.exp(x[::16]) + 1, X) == pytest.approx(2 / 16)


def test_parse():
    text = """
%body (p.1: f32[8,128]) -> f32[1,128] {
  %p.1 = f32[8,128]{1,0} parameter(0)
  ROOT %s.1 = f32[1,128]{1,0} slice(%p.1), slice={[0:1], [0:128]}
}

ENTRY %main (a: bf16[8,128], b: f32[8,128]) -> (f32[1,128], bf16[8,128]) {
  %a = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  %b = f32[8,128]{1,0} parameter(1)
  %c = f32[1,128]{1,0} fusion(%b), kind=kLoop, calls=%body
  %d = bf16[8,128]{1,0:T(8,128)(2,1)S(1)} copy(%a)
  ROOT %t = (f32[1,128]{1,0}, bf16[8,128]{1,0}) tuple(%c, %d)
}
"""

    class Compiled:
        def as_text(self):
            return text

    # The fusion reads a slice of b; the copy writes to memory on the chip.
    assert hlo.kernels(Compiled()) == {"c": (512, 512), "d": (2048, 0)}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("activation", ["", "relu"])
def test_kept_for_the_backward(dtype, activation):
    x = jax.ShapeDtypeStruct(X.shape, dtype)
    params, stats = {"scale": C, "bias": C}, {"mean": C, "var": C}
    f = traffic.batch_norm("jbn", activation, False, dtype)
    assert traffic.measure("cpu", f, x, params, stats).kept == pytest.approx(1, abs=0.01)


# Forward and backward at the floor: x, x, y and dy, x, dy, x, dx; with a residual one more each.
FLOOR = [
    ("", False, "float32", 3.1, 1.0, 5.1),
    ("", False, "bfloat16", 3.12, 1.0, 5.1),  # the sample that gives the shift is 0.1
    ("relu", False, "float32", 3.1, 1.0, 5.1),
    ("relu", True, "float32", 4.1, 2.0, 8.1),
]


@pytest.mark.parametrize(("activation", "add", "dtype", "forward", "kept", "backward"), FLOOR)
def test_cuda_traffic(activation, add, dtype, forward, kept, backward):
    if packages := traffic.missing("cuda"):
        pytest.skip(f"compiling for CUDA needs: pip install {packages}")
    if jax.config.jax_platforms != "cpu":
        pytest.skip("compiling for CUDA without a GPU needs JAX_PLATFORMS=cpu")
    x = jax.ShapeDtypeStruct((128, 28, 28, 128), dtype)
    params, stats = {"scale": C, "bias": C}, {"mean": C, "var": C}
    f = traffic.batch_norm("jbn", activation, add, dtype)
    measured = traffic.measure("cuda", f, x, params, stats, *([x] if add else []))
    assert measured.forward <= forward
    assert measured.kept <= kept + 0.01
    assert measured.backward <= backward


def test_a_missing_compiler_is_named(monkeypatch, capsys):
    monkeypatch.setattr(traffic, "missing", lambda platform: "some-package==1.0")
    with pytest.raises(SystemExit) as exit_info:
        traffic.main(["--platform", "tpu"])
    assert exit_info.value.code == 2
    assert "--platform tpu needs: pip install some-package==1.0" in capsys.readouterr().err
