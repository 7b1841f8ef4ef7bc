"""Memory and traffic of whole networks' training steps, from compiled programs alone.

    python -m benchmarks.networks --platform cuda

Two networks, each with Flax's layer and with jbn's:

- 16 layers of convolution, batch norm and relu under `nn.scan`. What one layer keeps for the
  backward pass is stacked 16 times, and no compiler can take it back.
- ResNet-50, unrolled. XLA itself recomputes there what it can; `jbn.save_batch_norm_inputs` on
  each block names what is worth keeping.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from rich.console import Console
from rich.table import Table

import jbn.linen
from benchmarks import hlo, traffic

SHAPE = (64, 28, 28, 128)  # the third stage of a ResNet-50
IMAGES = (64, 224, 224, 3)
LEARNING_RATE = 0.1

Norm = Callable[..., jax.Array]


class Step(NamedTuple):
    """What a compiled training step takes.

    Attributes:
        temporaries: bytes allocated beside arguments and results.
        traffic: bytes that its kernels read and write, those in a loop left out.
        convolutions: how many the program holds.
        sums: how many reductions it holds; one in two stages is two.
    """

    temporaries: int
    traffic: int
    convolutions: int
    sums: int


def flax_norm(
    x: jax.Array,
    activation: Callable[[jax.Array], jax.Array] | None = None,
    residual: jax.Array | None = None,
    use_fast_variance: bool = True,
    inference: bool = False,
) -> jax.Array:
    """Flax's layer, and after it the residual and the activation."""
    layer = nn.BatchNorm(
        use_running_average=inference,
        momentum=0.9,
        dtype=x.dtype,
        use_fast_variance=use_fast_variance,
    )
    y = layer(x) if residual is None else layer(x) + residual
    return y if activation is None else activation(y)


def jbn_norm(
    x: jax.Array,
    activation: Callable[[jax.Array], jax.Array] | None = None,
    residual: jax.Array | None = None,
    inference: bool = False,
) -> jax.Array:
    """jbn's layer, the residual and the activation fused."""
    layer = jbn.linen.BatchNorm(
        use_running_average=inference, momentum=0.9, dtype=x.dtype, activation=activation
    )
    return layer(x, residual=residual)


class Layer(nn.Module):
    """Convolution, batch norm and relu, as the body of a scan."""

    norm: Norm

    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        """[N, H, W, C] to the same."""
        x = nn.Conv(x.shape[-1], (3, 3), use_bias=False, dtype=x.dtype)(x)
        return self.norm(x, nn.relu), None


class Scanned(nn.Module):
    """Equal layers under `nn.scan`, and a classifier."""

    norm: Norm
    layers: int = 16

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[N, H, W, C] to logits [N, 10]."""
        scan = nn.scan(
            Layer,
            variable_axes={"params": 0, "batch_stats": 0},
            split_rngs={"params": True},
            length=self.layers,
        )
        x, _ = scan(self.norm)(x, None)
        return nn.Dense(10, dtype=jnp.float32)(x.mean((1, 2)))


class Stem(nn.Module):
    """The first convolution of a ResNet and its pooling."""

    norm: Norm
    features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[N, H, W, 3] to [N, H / 4, W / 4, features]."""
        x = nn.Conv(self.features, (7, 7), 2, use_bias=False, dtype=x.dtype)(x)
        return nn.max_pool(self.norm(x, nn.relu), (3, 3), (2, 2), padding="SAME")


class Block(nn.Module):
    """A bottleneck: v1.5, which strides in the 3x3 convolution."""

    norm: Norm
    features: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[N, H, W, C] to [N, H / stride, W / stride, 4 features]."""
        conv = functools.partial(nn.Conv, use_bias=False, dtype=x.dtype)
        y = self.norm(conv(self.features, (1, 1))(x), nn.relu)
        y = self.norm(conv(self.features, (3, 3), self.stride)(y), nn.relu)
        y = conv(4 * self.features, (1, 1))(y)
        if x.shape != y.shape:
            x = self.norm(conv(4 * self.features, (1, 1), self.stride)(x))
        return self.norm(y, nn.relu, x)


class ResNet(nn.Module):
    """ResNet-50 (He et al. 2015, arXiv:1512.03385).

    Attributes:
        norm: called with x, an activation and a residual.
        policy: of `jax.checkpoint`, for the stem and each block; None for no rematerialisation.
        stages: number of blocks in each.
        features: of the first stage.
    """

    norm: Norm
    policy: Callable[..., bool] | None = None
    stages: Sequence[int] = (3, 4, 6, 3)
    features: int = 64

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[N, H, W, 3] to logits [N, 1000]."""
        stem: Any = Stem
        block: Any = Block
        if self.policy is not None:
            stem, block = (nn.remat(module, policy=self.policy) for module in (stem, block))
        x = stem(self.norm, self.features, name="stem")(x)
        for stage, blocks in enumerate(self.stages):
            for i in range(blocks):
                stride = 2 if stage and i == 0 else 1
                name = f"stage{stage}_block{i}"
                x = block(self.norm, self.features * 2**stage, stride, name=name)(x)
        return nn.Dense(1000, dtype=jnp.float32)(x.mean((1, 2)))


SCANNED = {
    "flax": functools.partial(Scanned, flax_norm),
    "jbn": functools.partial(Scanned, jbn_norm),
}
RESNETS = {
    "flax": functools.partial(ResNet, flax_norm),
    "flax two-pass": functools.partial(
        ResNet, functools.partial(flax_norm, use_fast_variance=False)
    ),
    "jbn": functools.partial(ResNet, jbn_norm),
    "jbn, policy": functools.partial(ResNet, jbn_norm, policy=jbn.save_batch_norm_inputs),
}


def train_step(
    model: nn.Module, variables: Any, images: jax.Array, labels: jax.Array
) -> tuple[Any, jax.Array]:
    """One step of SGD: the new variables and the loss."""

    def loss_fn(params: Any) -> tuple[jax.Array, Any]:
        logits, updated = model.apply(
            {**variables, "params": params}, images, mutable=["batch_stats"]
        )
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), updated

    (loss, updated), grads = jax.value_and_grad(loss_fn, has_aux=True)(variables["params"])
    params = jax.tree.map(lambda p, g: p - LEARNING_RATE * g, variables["params"], grads)
    return {"params": params, **updated}, loss


def compile_step(platform: str, model: nn.Module, shape: tuple[int, ...], dtype: Any) -> Any:
    """Compiles a training step on images of this shape and dtype."""
    images = jax.ShapeDtypeStruct(shape, dtype)
    labels = jax.ShapeDtypeStruct(shape[:1], "int32")
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    step = functools.partial(train_step, model)
    return traffic.compile_for(platform, step, variables, images, labels)


def measure(compiled: Any) -> Step:
    """Reads off what a compiled step takes."""
    computations, _ = hlo.parse(compiled.as_text())
    values = [value for body in computations.values() for value in body.values()]
    return Step(
        temporaries=compiled.memory_analysis().temp_size_in_bytes,
        traffic=hlo.moved(compiled),
        convolutions=sum(v.op == "convolution" or "$conv" in v.attributes for v in values),
        sums=sum(v.op == "reduce" for v in values),
    )


def table(platform: str, resnet50: bool = False) -> Table:
    """Both networks; ResNet-50 for CUDA, or where asked for."""
    result = Table(
        title=f"A training step on {platform}",
        caption=f"Compiled by jax {jax.__version__}, not run. {SHAPE} scanned 16 times; "
        f"images {IMAGES}. Temp: temporary memory.",
    )
    for column in ("network", "layer"):
        result.add_column(column)
    for column in ("temp, GB", "of flax", "traffic, GB", "conv", "sums"):
        result.add_column(column, justify="right")
    for dtype in ("bfloat16", "float32"):
        steps = {
            name: measure(compile_step(platform, model(), SHAPE, dtype))
            for name, model in SCANNED.items()
        }
        for name, step in steps.items():
            result.add_row(f"scan {dtype}", name, *_temporaries(step, steps["flax"]))
        result.add_section()
    if resnet50 or platform == "cuda":
        steps = {
            name: measure(compile_step(platform, model(), IMAGES, "bfloat16"))
            for name, model in RESNETS.items()
        }
        for name, step in steps.items():
            counts = f"{step.traffic / 1e9:.2f}", str(step.convolutions), str(step.sums)
            result.add_row("ResNet-50", name, *_temporaries(step, steps["flax"]), *counts)
    return result


def _temporaries(step: Step, flax: Step) -> tuple[str, str]:
    """In gigabytes, and over those of Flax's layer."""
    return f"{step.temporaries / 1e9:.3f}", f"{step.temporaries / flax.temporaries:.3f}"


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the table of one platform."""
    parser = traffic.make_parser(
        "Memory and traffic of whole networks, from compiled programs alone."
    )
    parser.add_argument(
        "--resnet50",
        action="store_true",
        help="compile ResNet-50 too; always done for cuda, seven minutes for tpu",
    )
    args = traffic.parse_args(parser, argv)
    Console().print(table(args.platform, args.resnet50))


if __name__ == "__main__":
    main()
