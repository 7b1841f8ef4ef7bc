"""Which layer feeds each batch norm of a model, and what else reads it: from the model's jaxpr.

The Flax layers run the model once on abstract values and pass the output of each linear layer and
of each batch norm through `mark`, an identity that also takes the layer's variables and inputs.
In the jaxpr that comes of it, every value is followed from the variables to the outputs, through
nested jaxprs. Each carries where it comes from, if that is a variable as it is stored or the output
of a linear layer, and what it depends on. What an output depends on other than through the layers
that own it is read elsewhere, too.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Primitive
from jax.interpreters import ad, batching

Path = tuple[Any, ...]


class Call(NamedTuple):
    """What is known of a layer's call when it is marked.

    Attributes:
        path: of the layer in the model.
        axes: the feature axes of its output (linear) or of its input (batch norm), not negative.
        kernel_axes: of a linear layer, where those lie in its kernel, negative; None for batch
            norm.
        epsilon: of a batch norm.
        obstacle: why it can't be folded whatever surrounds it.
        names: of the layer's variables that are marked.
        stacked: for each variable, how many leading axes of it `vmap` maps; None for other axes.
    """

    path: Path
    axes: tuple[int, ...]
    kernel_axes: tuple[int, ...] | None = None
    epsilon: float = 0.0
    obstacle: str | None = None
    names: tuple[str, ...] = ()
    stacked: tuple[int | None, ...] = ()


class Variable(NamedTuple):
    """A variable as it is stored, or a slice along its leading axes.

    Attributes:
        path: in the model's variables.
        stacked: the number of leading axes that are mapped away.
    """

    path: Path
    stacked: int = 0


@dataclasses.dataclass
class Layer:
    """What the calls of one layer have in common.

    Attributes:
        path: of the layer in the model.
        call: the last one.
        variables: by name.
        readers: paths of the batch norms that take the output of this linear layer.
        feeders: paths of the linear layers whose output this batch norm takes, or in words what
            else it takes.
        positions: which of the feeder's feature axes this batch norm's are.
        obstacles: why it can't be folded.
    """

    path: Path
    call: Call
    variables: dict[str, Variable] = dataclasses.field(default_factory=dict)
    readers: set[Path] = dataclasses.field(default_factory=set)
    feeders: dict[Path | str, None] = dataclasses.field(default_factory=dict)
    positions: tuple[int, ...] = ()
    obstacles: dict[str, None] = dataclasses.field(default_factory=dict)

    @property
    def name(self) -> str:
        """What the user knows it by."""
        return "/".join(map(str, self.path)) or "the model itself"


class Norm(NamedTuple):
    """A batch norm and what feeds it.

    Attributes:
        layer: the batch norm.
        feeder: the one linear layer whose output all its calls take, if there is one.
        obstacles: why it can't be folded into the feeder.
    """

    layer: Layer
    feeder: Layer | None
    obstacles: tuple[str, ...]

    @property
    def obstacle(self) -> str | None:
        """The first; None if it can be folded."""
        return next(iter(self.obstacles), None)


mark_p = Primitive("jbn_layer")
mark_p.def_impl(lambda y, *_, **__: y)
mark_p.def_abstract_eval(lambda y, *_, **__: y)


def mark(
    call: Call, y: jax.Array, variables: Mapping[str, jax.Array], args: Any, kwargs: Any
) -> jax.Array:
    """Returns `y`, marked as the output of the layer's call with these arguments, `x` the first."""
    first, *others = jax.tree.leaves((args, kwargs.get("x"), kwargs | {"x": None}))
    inputs = [jnp.asarray(first), *(v for v in others if isinstance(v, jax.Array))]
    call = call._replace(names=tuple(variables), stacked=(0,) * len(variables))
    return mark_p.bind(y, *variables.values(), *inputs, call=call)


def _mark_jvp(primals: Any, tangents: Any, *, call: Call) -> tuple[Any, Any]:
    return mark_p.bind(*primals, call=call), tangents[0]


def _mark_batch(operands: Any, dims: Any, *, call: Call) -> tuple[Any, Any]:
    """Under `vmap` the axes shift by the one that is mapped, and variables may be stacked."""
    n = len(call.names)
    operands, dims = list(operands), list(dims)
    if any(d is not None for d in dims[1 : 1 + n]):
        # One layer for each element of the mapped axis: of a norm along another axis than the
        # linear layer's, a transpose must tell.
        for i in (0, 1 + n):
            if dims[i]:
                operands[i], dims[i] = jnp.moveaxis(operands[i], dims[i], 0), 0
    where = dims[0] if call.kernel_axes is not None else dims[1 + n]
    axes = call.axes
    if where is not None:
        axes = tuple(a + (a >= where) for a in axes)
    stacked = tuple(
        k if d is None else k + 1 if d == 0 and k is not None else None
        for k, d in zip(call.stacked, dims[1 : 1 + n], strict=True)
    )
    return mark_p.bind(*operands, call=call._replace(axes=axes, stacked=stacked)), dims[0]


ad.primitive_jvps[mark_p] = _mark_jvp
batching.primitive_batchers[mark_p] = _mark_batch


def trace(function: Callable[..., Any], *trees: Any) -> ClosedJaxpr:
    """The jaxpr of `function` of the trees, whose arrays may be abstract; the rest is static."""
    leaves, treedef = jax.tree.flatten(trees)
    traced = [i for i, leaf in enumerate(leaves) if _is_array(leaf)]

    def of_arrays(arrays: Sequence[Any]) -> Any:
        filled = list(leaves)
        for i, array in zip(traced, arrays, strict=True):
            filled[i] = array
        return function(*jax.tree.unflatten(treedef, filled))

    return jax.make_jaxpr(of_arrays)([leaves[i] for i in traced])


def _is_array(leaf: Any) -> bool:
    """Whether the leaf is traced: arrays are, NumPy's scalars may be flags."""
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype") and not isinstance(leaf, np.generic)


def analyse(
    closed: ClosedJaxpr,
    paths: Sequence[Path],
    *,
    unchanged: Mapping[int, Path] | None = None,
    shares_traces: bool = False,
) -> list[Norm]:
    """The batch norms of a marked model, in the order of their first calls.

    Args:
        closed: the jaxpr, whose first inputs are the variables.
        paths: of the variables: of the layer they belong to, and a name.
        unchanged: outputs that hand back a variable, if they are the variable at this path: they
            do not count as reading it.
        shares_traces: whether one trace may serve two like layers, as that of Linen's `nn.jit`
            does: then a layer is known by its variables rather than by the path it was marked with.
    """
    variables = [_Value(Variable(path), frozenset({path})) for path in paths]
    rest = [_Value("an argument of the model")] * (len(closed.jaxpr.invars) - len(variables))
    found = _Found(shares_traces)
    outputs = _walk(closed, [*variables, *rest], found)
    for i, output in enumerate(outputs):
        if unchanged is None or output.source != Variable(unchanged.get(i, ())):
            found.read |= output.reads
    return [_judge(norm, found) for norm in found.norms.values()]


class _Output(NamedTuple):
    """The output of a linear layer: its path, and the feature axes counted from the last."""

    layer: Path
    axes: tuple[int, ...]


class _Value(NamedTuple):
    """A value in a jaxpr: where it comes from, else in words, and all that it depends on."""

    source: Variable | _Output | str
    reads: frozenset[Any] = frozenset()


@dataclasses.dataclass
class _Found:
    """All that the walk comes across.

    Attributes:
        shares_traces: as of `analyse`.
        linear: linear layers by path.
        norms: batch norms by path.
        users: the layers that own a variable, by its path.
        read: variables and outputs that something else than their layer or its batch norm reads.
    """

    shares_traces: bool
    linear: dict[Path, Layer] = dataclasses.field(default_factory=dict)
    norms: dict[Path, Layer] = dataclasses.field(default_factory=dict)
    users: dict[Path, set[Path]] = dataclasses.field(default_factory=dict)
    read: frozenset[Any] = frozenset()


def _reads(values: Sequence[_Value]) -> frozenset[Any]:
    return frozenset[Any]().union(*(v.reads for v in values))


def _walk(closed: ClosedJaxpr | Jaxpr, inputs: Sequence[_Value], found: _Found) -> list[_Value]:
    """The outputs of a jaxpr."""
    jaxpr: Any = getattr(closed, "jaxpr", closed)
    values = dict.fromkeys(jaxpr.constvars, _Value("a constant"))
    values.update(zip(jaxpr.invars, inputs, strict=True))

    def read(atom: Any) -> _Value:
        return _Value("a constant") if isinstance(atom, Literal) else values[atom]

    for eqn in jaxpr.eqns:
        operands = [read(atom) for atom in eqn.invars]
        if eqn.effects:
            found.read |= _reads(operands)
        values.update(zip(eqn.outvars, _equation(eqn, operands, found), strict=True))
    return [read(atom) for atom in jaxpr.outvars]


# Primitives that call their one jaxpr with their operands.
_CALLS = {
    "checkpoint",
    "closed_call",
    "core_call",
    "custom_jvp_call",
    "custom_vjp_call",
    "jit",
    "pjit",
    "remat2",
}


def _equation(eqn: JaxprEqn, operands: list[_Value], found: _Found) -> list[_Value]:
    """The outputs of an equation."""
    name = eqn.primitive.name
    if eqn.primitive is mark_p:
        return [_marked(eqn, operands, found)]
    params = jax.tree.leaves([*eqn.params.values()], is_leaf=_is_jaxpr)
    inner = [v for v in params if _is_jaxpr(v)]
    if name == "scan":
        return _scan(eqn, operands, found)
    if name == "cond":
        branches = [_walk(branch, operands[1:], found) for branch in inner]
        return [_Value(name, _reads([operands[0], *outs])) for outs in zip(*branches, strict=True)]
    if name in _CALLS and len(inner) == 1 and len(_invars(inner[0])) == len(operands):
        outs = _walk(inner[0], operands, found)
        if words := str(eqn.params.get("name", "")).strip("_"):
            outs = [v._replace(source=words) if isinstance(v.source, str) else v for v in outs]
        return outs
    reads = _reads(operands)
    for jaxpr in inner:  # such as while and shard_map, in which no variable is known as stored
        reads |= _reads(_walk(jaxpr, [_Value(name, reads)] * len(_invars(jaxpr)), found))
    return [_Value(name, reads)] * len(eqn.outvars)


def _is_jaxpr(value: Any) -> bool:
    return isinstance(value, ClosedJaxpr | Jaxpr)


def _invars(closed: Any) -> Sequence[Any]:
    return getattr(closed, "jaxpr", closed).invars


def _scan(eqn: JaxprEqn, operands: list[_Value], found: _Found) -> list[_Value]:
    """A body reads constants as they are, and slices along the leading axes of what is scanned."""
    n, m = _scan_sizes(eqn.params)

    def enter(v: _Value, sliced: int) -> _Value:
        if isinstance(v.source, Variable):
            return v._replace(source=v.source._replace(stacked=v.source.stacked + sliced))
        return v._replace(source="scan")

    consts = [enter(v, 0) for v in operands[:n]]
    carry = [v._replace(source="scan") for v in operands[n : n + m]]
    xs = [enter(v, 1) for v in operands[n + m :]]
    while True:
        outs = _walk(eqn.params["jaxpr"], [*consts, *carry, *xs], found)
        grown = [_Value("scan", _reads([a, b])) for a, b in zip(carry, outs[:m], strict=True)]
        if grown == carry:
            return [v._replace(source="scan") for v in (*carry, *outs[m:])]
        carry = grown


def _scan_sizes(params: dict[str, Any]) -> tuple[int, int]:
    """How many constants and carried values a scan has; jax 0.12 keeps trees of them."""
    if "ft_in" in params:
        consts, carry, _ = params["ft_in"].unpack()
        return len(consts), len(carry)
    return params["num_consts"], params["num_carry"]


def _marked(eqn: JaxprEqn, operands: list[_Value], found: _Found) -> _Value:
    """The output of a layer's call, which is noted."""
    call: Call = eqn.params["call"]
    n = len(call.names)
    y, variables, inputs = operands[0], operands[1 : 1 + n], operands[1 + n :]
    is_linear = call.kernel_axes is not None
    layer = _noted(call, variables, found.linear if is_linear else found.norms, found)
    own = {v.source.path for v in variables if isinstance(v.source, Variable)}
    if is_linear:
        ndim = _ndim(eqn.outvars[0])
        output = _Output(layer.path, tuple(a - ndim for a in call.axes))
        if output in _reads(inputs):  # of an earlier call: the layer reads itself
            found.read |= {output}
        return _Value(output, (y.reads - own) | _reads(inputs) | {output})
    x, *others = inputs
    ndim = _ndim(eqn.invars[1 + n])
    if not isinstance(x.source, _Output):
        layer.feeders[x.source if isinstance(x.source, str) else "a variable"] = None
        return _Value("batch norm", (y.reads - own) | _reads(inputs))
    layer.feeders[x.source.layer] = None
    found.linear[x.source.layer].readers.add(layer.path)
    _match_axes(layer, tuple(a - ndim for a in call.axes), x.source, found)
    taken = own | {x.source}
    return _Value("batch norm", (y.reads - taken) | (x.reads - {x.source}) | _reads(others))


def _ndim(atom: Any) -> int:
    return atom.aval.ndim


def _noted(
    call: Call, variables: Sequence[_Value], layers: dict[Path, Layer], found: _Found
) -> Layer:
    """The layer of a call, with what the call adds to what is known of it."""
    first, path = variables[0].source, call.path
    if found.shares_traces and isinstance(first, Variable):
        path = first.path[:-1]
    layer = layers.setdefault(path, Layer(path, call))
    if _settings(layer.call) != _settings(call):
        layer.obstacles["its settings differ from call to call"] = None
    layer.call = call
    if call.obstacle:
        layer.obstacles[call.obstacle] = None
    for name, value, stacked in zip(call.names, variables, call.stacked, strict=True):
        if not isinstance(value.source, Variable) or stacked is None:
            layer.obstacles[transformed(name)] = None
            continue
        variable = value.source._replace(stacked=value.source.stacked + stacked)
        if layer.variables.setdefault(name, variable) != variable:
            layer.obstacles[f"its {name} differs from call to call"] = None
        found.users.setdefault(variable.path, set()).add(path)
    return layer


def transformed(name: str) -> str:
    """The obstacle of a variable that is not read as it is stored."""
    return f"its {name} is not used as it is stored, but transformed"


def _settings(call: Call) -> tuple[Any, ...]:
    return call.names, call.kernel_axes, call.epsilon, call.obstacle


def _match_axes(norm: Layer, axes: tuple[int, ...], output: _Output, found: _Found) -> None:
    """Notes which feature axes of the linear layer the batch norm has."""
    if not set(axes) <= set(output.axes):
        name = found.linear[output.layer].name
        norm.obstacles[f"its feature axes are {axes}, those of {name} are {output.axes}"] = None
        return
    norm.positions = tuple(output.axes.index(a) for a in axes)


def _judge(norm: Layer, found: _Found) -> Norm:
    """Whether the batch norm may be folded."""
    feeders = [found.linear[f] for f in norm.feeders if not isinstance(f, str)]
    if len(feeders) != 1 or len(norm.feeders) != 1:
        words = [f"of {f}" if isinstance(f, str) else found.linear[f].name for f in norm.feeders]
        text = f"it is called on different inputs: {', '.join(words)}"
        if len(words) == 1:
            text = f"its input is not the output of a linear layer, but {words[0]}"
        return Norm(norm, None, (*norm.obstacles, text))
    (feeder,) = feeders
    outputs = {v.layer for v in found.read if isinstance(v, _Output)}
    alone = feeder.readers == {norm.path} and feeder.path not in outputs
    obstacles = [*norm.obstacles]
    if not alone:
        obstacles.append(f"something else reads the output of {feeder.name} as well")
    obstacles += [f"of {feeder.name}, {text}" for text in feeder.obstacles]
    for layer in (norm, feeder):
        obstacles += [
            f"something else reads the {key} of {layer.name} as well"
            for key, variable in layer.variables.items()
            if variable.path in found.read or found.users[variable.path] != {layer.path}
        ]
    if len({v.stacked for layer in (norm, feeder) for v in layer.variables.values()}) > 1:
        obstacles.append(f"it and {feeder.name} are not stacked alike")
    return Norm(norm, feeder, tuple(obstacles))
