"""Memory traffic, counted in compiled programs."""

import jax
import jax.numpy as jnp
import pytest

from benchmarks import hlo, traffic
from tests.scripts import exits

pytestmark = [pytest.mark.standard_jax, pytest.mark.quick_compile(same_hlo=True)]

X = jax.ShapeDtypeStruct((64, 8, 8, 128), "float32")
C = jax.ShapeDtypeStruct((128,), "float32")
UNIT = X.size * 4


def moved(f, *args):
    return hlo.moved(jax.jit(f).lower(*args).compile()) / UNIT


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


def test_a_conditional_counts_the_branch_that_moves_least():
    def f(x, again):
        return jax.lax.cond(again, lambda x: jnp.exp(x).sum(0), lambda x: x[0], x)

    x = jax.ShapeDtypeStruct((UNIT // 512, 128), "float32")
    assert moved(f, x, jax.ShapeDtypeStruct((), bool)) < 0.1


# What each platform moves, in units of x. The floor is x, x, y forward (and the residual) and
# dy, x, dy, x, dx backward (and the residual and its gradient, read back instead of dy where it
# is dz itself). The sample that gives the shift takes up to 0.1, on CPU 0.2.
LIMITS = {
    ("cuda", "", False): (3.1, 5.1),
    ("cuda", "relu", False): (3.1, 5.1),
    ("cuda", "gelu", False): (3.1, 5.1),
    ("cuda", "relu", True): (4.1, 7.1),
    ("cuda", "gelu", True): (4.1, 8.1),
    ("tpu", "", False): (3.1, 5.1),
    ("tpu", "relu", False): (3.1, 5.1),
    ("tpu", "gelu", False): (3.1, 5.1),
    ("tpu", "relu", True): (4.1, 7.1),
    # A kernel for each sum: one read more forward and backward, and dz is written and read back.
    ("cpu", "", False): (4.2, 6.01),
    ("cpu", "relu", False): (4.2, 9.01),
    ("cpu", "relu", True): (5.2, 10.01),
}


def measured(platform, activation, add, dtype):
    if packages := traffic.missing(platform):
        pytest.skip(f"compiling for {platform} needs: pip install {packages}")
    if jax.config.jax_platforms != "cpu" and platform != "cpu":
        pytest.skip(f"compiling for {platform} without one needs JAX_PLATFORMS=cpu")
    x = jax.ShapeDtypeStruct((128, 28, 28, 128), dtype)
    params, stats = {"scale": C, "bias": C}, {"mean": C, "var": C}
    f = traffic.batch_norm("jbn", activation, add, dtype)
    return traffic.measure(platform, f, x, params, stats, *([x] if add else []))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", LIMITS, ids=lambda c: f"{c[0]}-{'add-' * c[2]}{c[1]}")
def test_traffic(case, dtype):
    platform, activation, add = case
    forward, backward = LIMITS[case]
    traffic = measured(platform, activation, add, dtype)
    assert traffic.forward <= forward
    assert traffic.kept == pytest.approx(2 if add else 1, abs=0.01)
    assert traffic.backward <= backward
    assert traffic.forward_temporaries < 0.05
    assert traffic.backward_temporaries < 0.02


def test_a_missing_compiler_is_named(monkeypatch, capsys):
    monkeypatch.setattr(traffic, "missing", lambda platform: "some-package==1.0")
    with exits(2):
        traffic.main(["--platform", "tpu"])
    assert "--platform tpu needs: pip install some-package==1.0" in capsys.readouterr().err
