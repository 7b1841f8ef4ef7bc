"""docs/migrating.md: its code runs, its tables are the libraries', converted layers do the same.

Where a library is not installed, what needs it is skipped; what the page says of jbn is compared
with NumPy in any case.
"""

import ast
import functools
import importlib
import inspect
import itertools
import pathlib
import re
from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.nn import initializers

import jbn
import jbn.linen
import jbn.nnx
from benchmarks import peers

pytestmark = [pytest.mark.standard_jax(x64=True), pytest.mark.quick_compile]

PAGE = pathlib.Path(__file__).parent.parent / "docs/migrating.md"
INTRODUCTION, *PARTS = re.split(r"^## ", PAGE.read_text(), flags=re.MULTILINE)
SECTIONS = {part.partition("\n")[0]: part for part in PARTS}
LIBRARIES = [name for name in SECTIONS if name not in ("Conventions", "Functions")]
OURS = {
    name
    for layer in (jbn.linen.BatchNorm, jbn.nnx.BatchNorm)
    for function in (layer.__init__, layer.__call__)
    for name in inspect.signature(function).parameters
}


def blocks(text):
    return re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def spans(cell):
    """The pieces of code in a cell of a table."""
    return re.findall(r"`(.*?)`", cell)


def tables(text):
    """Of each table, the rows below its header, by what their first cell says."""
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        rows = [[c.strip() for c in line.strip("|").split("|")] for line in table.splitlines()]
        yield {first: rest for first, *rest in rows[2:]}


def keywords(code, **names):
    """The arguments in `a=1, b=2`."""
    call = ast.parse(f"f({code})", mode="eval").body
    assert isinstance(call, ast.Call)
    return {k.arg: eval(ast.unparse(k.value), names) for k in call.keywords}


CONVENTIONS, NAMES = (
    {label.replace("`", ""): cells for label, cells in table.items()}
    for table in tables(SECTIONS["Conventions"])
)


def need(library):
    """The library's module, imported; skips where it is not installed."""
    module = library.partition(",")[0]
    if reason := peers.unavailable(module.removeprefix("flax."), "cpu"):
        pytest.skip(reason)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KERAS_BACKEND", "jax")
        return importlib.import_module(module)


def close(a, b, rtol=1e-10):
    jax.tree.map(lambda u, v: np.testing.assert_allclose(u, v, rtol=rtol, atol=rtol), a, b)


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(1, 3, shape)


# The layers, in float64 where they can: `layer(x, training)`, with the fields that the page names.


class Linen:
    def __init__(self, x, scale, bias, /, cls=nn.BatchNorm, **options):
        wide = {"param_dtype": jnp.float64, "force_float32_reductions": False}
        self.norm = cls(**(wide | options))
        variables = self.norm.init(jax.random.key(0), x, use_running_average=False)
        given = {"scale": scale, "bias": bias}
        self.params = {name: given[name] for name in variables.get("params", {})}
        self.batch_stats = variables["batch_stats"]

    def __call__(self, x, training, **kwargs):
        variables = {"params": self.params, "batch_stats": self.batch_stats}
        kwargs = {"use_running_average": not training} | kwargs
        y, updated = self.norm.apply(variables, x, mutable=["batch_stats"], **kwargs)
        self.batch_stats = updated["batch_stats"]
        return y

    def load(self, mean, var):
        self.batch_stats = self.batch_stats | {"mean": mean, "var": var}


class NNX:
    def __init__(self, x, scale, bias, /, cls=nnx.BatchNorm, **options):
        features = scale.shape if scale.ndim > 1 else scale.size
        self.norm = cls(features, rngs=nnx.Rngs(0), **options)
        for variable, value in ((self.norm.scale, scale), (self.norm.bias, bias)):
            if variable is not None:
                variable[...] = value.astype("float32")

    def __call__(self, x, training, **kwargs):
        kwargs = {"use_running_average": not training} | kwargs
        return self.norm(jnp.float32(x), **kwargs)

    def load(self, mean, var):
        self.norm.mean[...], self.norm.var[...] = np.float32(mean), np.float32(var)


class Haiku:
    def __init__(self, x, scale, bias, /, **options):
        hk = need("haiku")
        options = {"create_scale": True, "create_offset": True, "decay_rate": 0.99} | options

        def call(x, *args, **kwargs):
            return hk.BatchNorm(**options)(x, *args, **kwargs)

        self.network = hk.without_apply_rng(hk.transform_with_state(call))
        params, self.state = self.network.init(None, x, True)
        given = {"scale": scale, "offset": bias}
        self.params = {
            module: {name: given[name].reshape(v.shape) for name, v in values.items()}
            for module, values in params.items()
        }

    def __call__(self, x, training, **kwargs):
        y, self.state = self.network.apply(self.params, self.state, x, training, **kwargs)
        return y


class Equinox:
    def __init__(self, x, scale, bias, /, **options):
        eqx = need("equinox")
        self.inference_mode = eqx.nn.inference_mode
        options = {"mode": "batch"} | options
        make = eqx.nn.make_with_state(eqx.nn.BatchNorm)
        self.norm, self.state = make(scale.size, axis_name="batch", **options)
        if self.norm.weight is not None:
            self.norm = eqx.tree_at(lambda n: (n.weight, n.bias), self.norm, (scale, bias))

    def __call__(self, x, training):
        norm = self.inference_mode(self.norm, not training)
        over_batch = jax.vmap(norm, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
        y, self.state = over_batch(x, self.state)
        return y


class Keras:
    def __init__(self, x, scale, bias, /, **options):
        self.norm = need("keras").layers.BatchNormalization(**options)
        self.norm.build(x.shape)
        for variable, value in ((self.norm.gamma, scale), (self.norm.beta, bias)):
            if variable is not None:
                variable.assign(value)

    def __call__(self, x, training, **kwargs):
        return self.norm(x.astype("float32"), training=training, **kwargs)


class Torch:
    def __init__(self, x, scale, bias, /, cls="BatchNorm1d", **options):
        self.torch = need("torch")
        wide = {"dtype": self.torch.float64}
        self.norm = getattr(self.torch.nn, cls)(scale.size, **(wide | options))
        for parameter, value in ((self.norm.weight, scale), (self.norm.bias, bias)):
            if parameter is not None:
                parameter.data = self.torch.tensor(value)

    def __call__(self, x, training):
        return self.norm.train(training)(self.torch.tensor(x)).detach().numpy()


LAYERS = {
    "flax.linen": Linen,
    "flax.nnx": NNX,
    "haiku": Haiku,
    'equinox, mode="batch"': Equinox,
    'equinox, mode="ema"': functools.partial(Equinox, mode="ema"),
    "keras": Keras,
    "torch": Torch,
    "jbn.linen": functools.partial(Linen, cls=jbn.linen.BatchNorm),
    "jbn.nnx": functools.partial(NNX, cls=jbn.nnx.BatchNorm),
}
BATCH, EMA = 'equinox, mode="batch"', 'equinox, mode="ema"'
CHANNELS_SECOND = ("equinox", "torch")
BATCH_ALONE = {"use_running_average": False, "update_running_average": False}


def fields(library, layer, columns=slice(2, 4)):
    """What the page's names of a checkpoint's parts hold: by default of mean and variance."""
    (cells,) = (cells for label, cells in NAMES.items() if library in label)
    values = [eval(code, vars(layer)) for cell in cells[columns] for code in spans(cell)]
    return [np.ravel(v.detach() if hasattr(v, "detach") else np.asarray(v)) for v in values]


def sole(name, x, **options):
    """A layer with a scale of 2 and a bias of 5, for x [N, C], or [..., C] if channels are last."""
    features = np.ones(x.shape[-1])
    return LAYERS[name](x, 2 * features, 5 * features, **options)


def oracle(x):
    """x [N, C] normalized by its batch."""
    return (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5)


def tolerance(*names):
    return 2e-5 if {"flax.nnx", "keras", "jbn.nnx"} & set(names) else 1e-10


# The code.


@pytest.mark.parametrize("library", LIBRARIES)
def test_code(library):
    """Two blocks at a time, before and after, leave the same outputs."""
    need(library)
    code = blocks(SECTIONS[library])
    assert len(code) in (2, 4)
    with pytest.MonkeyPatch.context() as patch, jax.enable_x64(False):
        patch.setenv("KERAS_BACKEND", "jax")
        session = {}
        for block in blocks(INTRODUCTION):
            exec(compile(block, PAGE, "exec"), session)
        results = []
        for block in code:
            exec(compile(block, PAGE, "exec"), session)
            results.append({k: session.pop(k) for k in ("y", "y_test") if k in session})
    assert results[0].keys() == {"y", "y_test"}
    for before, after in zip(results[::2], results[1::2], strict=True):
        assert abs(before["y"]).max() > 1
        close(after, before, 1e-5)


def test_functions():
    session = {"jax": jax, "jnp": jnp, "x": jnp.asarray(draw(32, 16))}
    for block in blocks(SECTIONS["Functions"]):
        exec(compile(block, PAGE, "exec"), session)
    close(session["running"].mean, 0.1 * session["x"].mean(0))
    close(session["running"].var, 0.9 + 0.1 * session["x"].var(0, ddof=1))

    running = jbn.RunningStats(*jnp.zeros((3, 2)))
    batches, weights = draw(3, 9, 2), 0.7 ** np.arange(3.0)[::-1]
    for x in batches:
        running = session["haikus"](running, jbn.moments(x), 0.7)
    close(running.mean, np.average(batches.mean(1), axis=0, weights=weights))
    close(running.var, np.average(batches.var(1), axis=0, weights=weights))


@pytest.mark.parametrize("code", next(tables(SECTIONS["Functions"])))
def test_functions_of_the_table(code):
    library = "torch" if code.startswith("`F.") else "keras"
    module = need(library)
    (theirs,), (ours,) = spans(code), spans(next(tables(SECTIONS["Functions"]))[code][0])
    arrays = {"x": draw(5, 3, 4), "mean": draw(3, seed=1), "var": np.exp(draw(3, seed=2) / 4)}
    arrays |= {"weight": draw(3, seed=3), "bias": draw(3, seed=4)}
    arrays = {name: value.astype("float32") for name, value in arrays.items()}
    after = eval(ours, {"jbn": jbn} | arrays)
    if library == "torch":
        arrays = {name: module.tensor(value) for name, value in arrays.items()}
        close(after, eval(theirs, {"F": module.nn.functional} | arrays).numpy(), 1e-5)
    else:
        close(tuple(after), tuple(eval(theirs, {"keras": module} | arrays)), 1e-5)


# The tables.


def listed(library):
    """Its arguments on the page: for constructor and call, name -> (default, in jbn)."""
    found = {"constructor": {}, "call": {}}
    for cell, (ours,) in next(tables(SECTIONS[library])).items():
        where = "call" if cell.startswith("at the call: ") else "constructor"
        for code in spans(cell):
            name, _, default = code.partition("=")
            assert name not in found[where]
            found[where][name] = default, ours
    return found


def signatures(library):
    """The functions that take them."""
    module = need(library)
    if library == "keras":
        layer = module.layers.BatchNormalization
        return {"constructor": [layer.__init__, module.Layer.__init__], "call": [layer.call]}
    if library == "torch":
        names = "BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "SyncBatchNorm"
        layers = [getattr(module.nn, name) for name in names]
        constructors = [layer.__init__ for layer in layers]
        return {"constructor": constructors, "call": [layer.forward for layer in layers]}
    layer = module.nn.BatchNorm if library == "equinox" else module.BatchNorm
    return {"constructor": [layer.__init__], "call": [layer.__call__]}


def parameters(function):
    variadic = inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL
    found = inspect.signature(function).parameters.values()
    return {p.name: p for p in found if p.name != "self" and p.kind not in variadic}


@pytest.mark.parametrize("where", ["constructor", "call"])
@pytest.mark.parametrize("library", LIBRARIES)
def test_every_argument_is_on_the_page(library, where):
    rows = listed(library)[where]
    functions = signatures(library)[where]
    assert set(rows) == {name for function in functions for name in parameters(function)}
    for function in functions:
        for name, parameter in parameters(function).items():
            default, ours = rows[name]
            if ours.startswith("the same"):
                layer = {"flax.linen": jbn.linen, "flax.nnx": jbn.nnx}[library].BatchNorm
                own = layer.__init__ if where == "constructor" else layer.__call__
                same = parameters(own)[name]
                assert (same.default, same.kind) == (parameter.default, parameter.kind), name
            elif default:
                assert ast.literal_eval(default) == parameter.default, name
            else:
                assert parameter.default is parameter.empty, name


def test_every_name_of_jbn_exists():
    cells = [row[-1] for row in CONVENTIONS.values()]
    cells += [ours for library in LIBRARIES for (ours,) in next(tables(SECTIONS[library])).values()]
    names = set()
    for code in (code for cell in cells for code in spans(cell)):
        call = ast.parse(f"f({code})", mode="eval").body
        assert isinstance(call, ast.Call)
        names |= {k.arg for k in call.keywords}
        names |= {a.id for a in call.args if isinstance(a, ast.Name)} - {"batch_stats"}
    assert len(names) > 15
    assert names <= OURS
    for path in re.findall(r"jbn(?:\.\w+)+", PAGE.read_text()):
        functools.reduce(getattr, path.split(".")[1:], jbn)


def test_links():
    text = PAGE.read_text()
    for target in re.findall(r"\]\(([^)#]+)", text):
        assert (PAGE.parent / target).exists(), target
    anchors = {name.lower().replace(".", "") for name in SECTIONS}
    assert set(re.findall(r"\]\(#(.*?)\)", text)) <= anchors


def updated(label, momentum, batches):
    """Running mean and variance after the batches, by what the page says of a library."""
    _, weighted, _, variance, start, _ = CONVENTIONS[label]
    ddof = {"biased": 0, "unbiased": 1}[variance]
    first = start == "the first batch"
    stats = np.zeros((2, 1)) if first else np.array(start.split(", ")[:2], float)[:, None]
    for t, x in enumerate(batches):
        new = np.stack([x.mean(0), x.var(0, ddof=ddof)])
        old = {"the old value": momentum, "the new value": 1 - momentum, "all alike": t / (t + 1)}
        weight = 0 if first and t == 0 else old[weighted]
        stats = weight * stats + (1 - weight) * new
    return tuple(stats)


@pytest.mark.parametrize("label", CONVENTIONS)
def test_conventions_of_the_library(label):
    """Defaults are those of the signatures; two updates are what the words say."""
    momentum, _, epsilon, *_ = CONVENTIONS[label]
    key = {"jbn": "jbn.linen", "torch, momentum=None": "torch"}.get(label, label)
    library = key.partition(",")[0]
    ours = [jbn.linen.BatchNorm.__init__, jbn.nnx.BatchNorm.__init__]
    functions = ours if label == "jbn" else signatures(library)["constructor"]
    for cell, function in itertools.product((momentum, epsilon), functions):
        name, _, default = spans(cell)[0].partition("=")
        assert cell.endswith(", none") == (default == "")
        expected = ast.literal_eval(default) if default else inspect.Parameter.empty
        assert name not in parameters(function) or parameters(function)[name].default == expected

    batches = draw(2, 6, 3)
    name = spans(momentum)[0].partition("=")[0]
    value = None if label == "torch, momentum=None" else 0.8
    layer = sole(key, batches[0], **{name: value})
    for t, x in enumerate(batches, start=1):
        layer(x, True)
        stats = fields(key, layer)
        if library == "haiku":  # the name on the page is that of the debiased average
            stats = [v * (1 - value**t) for v in stats]
        close(tuple(stats), updated(label, value or 0, batches[:t]), tolerance(library))


@pytest.mark.parametrize("label", [k for k in CONVENTIONS if 'mode="ema"' not in k])
def test_conventions_in_jbn(label):
    """What the page says to write does what it says of the library, by NumPy."""
    momentum, *_, start, in_jbn = CONVENTIONS[label]
    default = keywords(spans(momentum)[0]).get("momentum", 0.8)
    options = keywords("".join(spans(in_jbn)), decay_rate=default)
    options |= {"var_init": initializers.zeros} if start.startswith("0, 0") else {}
    batches = draw(3, 6, 3)
    for name in ("jbn.linen", "jbn.nnx"):
        layer = sole(name, batches[0], **options)
        for x in batches:
            layer(x, True)
        close(tuple(fields(name, layer)), updated(label, default, batches), tolerance(name))


# The layers, before and after.

CASES = [
    ("flax.linen", {}),
    ("flax.linen", {k: k for k in ("axis=1", "momentum=0.7", "epsilon=0.1", "use_bias=False")}),
    ("flax.nnx", {}),
    ("flax.nnx", {k: k for k in ("axis=1", "momentum=0.7", "epsilon=0.1", "use_scale=False")}),
    ("haiku", {}),
    (
        "haiku",
        {
            "create_scale=False": "use_scale=False",
            "decay_rate=0.6": "momentum=0.6",
            "eps=0.1": "epsilon=0.1",
        },
    ),
    ("haiku", {"create_offset=False": "use_bias=False", "axis=[0]": "axis=(1, 2)"}),
    ("haiku", {'data_format="channels_first"': "axis=1"}),
    ("haiku", {'data_format="NC..."': "axis=1"}),
    (BATCH, {}),
    (
        BATCH,
        {
            "momentum=0.6": "momentum=0.6",
            "eps=0.1": "epsilon=0.1",
            "channelwise_affine=False": "use_scale=False, use_bias=False",
        },
    ),
    ("keras", {}),
    (
        "keras",
        {
            "axis=1": "axis=1",
            "momentum=0.6": "momentum=0.6",
            "epsilon=0.1": "epsilon=0.1",
            "center=False": "use_bias=False",
        },
    ),
    (
        "keras",
        {
            "scale=False": "use_scale=False",
            'moving_mean_initializer="ones"': "mean_init=ones",
            'moving_variance_initializer="zeros"': "var_init=zeros",
        },
    ),
    ("torch", {}),
    (
        "torch",
        {
            "momentum=0.4": "momentum=0.6",
            "eps=0.1": "epsilon=0.1",
            "affine=False": "use_scale=False, use_bias=False",
        },
    ),
    ("torch", {"momentum=None": "momentum=None", "bias=False": "use_bias=False"}),
    ("torch", {'cls="SyncBatchNorm"': ""}),
]


@pytest.mark.parametrize(
    ("library", "arguments"), CASES, ids=lambda v: v if isinstance(v, str) else "-".join(v)
)
def test_a_converted_layer_does_the_same(library, arguments):
    """In three updates of different batches, then at inference."""
    name = library.partition(",")[0]
    start, in_jbn = CONVENTIONS[library][-2:]
    options = keywords("".join(spans(in_jbn)), decay_rate=0.99)
    options |= {"axis": 1} if name in CHANNELS_SECOND else {}
    options |= {"var_init": initializers.zeros} if name == "haiku" else {}
    theirs = {}
    for code, converted in arguments.items():
        theirs |= keywords(code)
        for key, value in keywords(converted, **vars(initializers)).items():
            options[key] = value
            row = listed(name)["constructor"][code.partition("=")[0]][1]
            assert f"`{key}" in row or f" {key}=" in row or row.startswith("the same")

    *batches, last = draw(4, 6, 4, 3)
    features = np.atleast_1d(np.take(last.shape, options.get("axis", -1)))
    scale, bias = draw(*features, seed=1), draw(*features, seed=2)
    after = [library.replace("flax", "jbn")] if "flax" in library else ["jbn.linen"]
    after += ["jbn.nnx"] if not arguments and "flax" not in library else []
    layers = {key: LAYERS[key](last, scale, bias, **options) for key in after}
    before = LAYERS[library](last, scale, bias, **theirs)
    if not arguments:
        close(fields(library, before, slice(2)), [scale, bias], 1e-6)
    for x in batches:
        y = before(x, True)
        for key, layer in layers.items():
            close(layer(x, True), y, tolerance(name, key))

    rest = 1 - options.get("momentum", 0.99) ** len(batches) if "debiased" in start else 1
    expected = [v / rest if name == "equinox" else v for v in fields(library, before)]
    y = before(last, False)
    for key, layer in layers.items():
        stats = [v / rest for v in fields(key, layer)]
        close(stats, expected, tolerance(name, key))
        layer.load(*(np.reshape(v, scale.shape) for v in stats))
        close(layer(last, False), y, tolerance(name, key))


@pytest.mark.parametrize("library", [name for name in LAYERS if "jbn" not in name])
def test_a_bad_batch(library):
    good = draw(6, 3)
    bad = np.where(np.arange(18).reshape(6, 3) == 4, np.inf, good)
    for name in (library, "jbn.linen", "jbn.nnx"):
        layer = sole(name, good)
        for x in (good, bad, good):
            layer(x, True)
        finite = np.isfinite(np.stack(fields(name, layer)))
        assert finite.all() == ("jbn" in name)
        assert finite[:, [0, 2]].all()


@pytest.mark.parametrize("flax", ["flax.linen", "flax.nnx"])
def test_flax_masks(flax):
    x = draw(6, 3)
    before, after = (sole(name, x) for name in (flax, flax.replace("flax", "jbn")))
    mask = np.arange(6)[:, None] < 4
    close(after(x, True, mask=mask), before(x, True, mask=mask), 1e-5)
    close(fields(flax, after), fields(flax, before), 1e-5)
    nothing = np.zeros((6, 1), bool)
    assert np.isnan(before(x, True, mask=nothing)).all()
    np.testing.assert_array_equal(after(x, True, mask=nothing), 5)
    assert np.isfinite(fields(flax, after)).all()


def test_linens_masks_are_booleans():
    x, weights = draw(6, 3), np.array([[1.0], [2.0], [0.0], [3.0], [1.0], [1.0]])
    before, after = (sole(name, x) for name in ("flax.linen", "jbn.linen"))
    close(before(x, True, mask=weights), after(x, True, mask=weights != 0))
    counted = np.repeat(x, weights[:, 0].astype(int), 0)
    close(after(x, True, mask=weights)[0], 2 * oracle(counted)[0] + 5)


def test_dtypes_of_linens_statistics():
    x = draw(6, 3)
    for name, dtype in (("flax.linen", "float64"), ("jbn.linen", "float32")):
        layer = sole(name, x, force_float32_reductions=True)
        layer(x, True)
        assert {v.dtype for v in layer.batch_stats.values()} == {np.dtype(dtype)}
    x = x.astype(jnp.bfloat16)
    exact = x.astype("float64").var(0)
    layer = sole("jbn.linen", x, param_dtype=jnp.bfloat16, momentum=0.0)  # forced to nothing
    layer(x, True)
    rounded = layer.batch_stats["var"]
    assert rounded.dtype == jnp.bfloat16
    close(rounded.astype("float64"), exact, 2.0**-8)  # half of a unit in the last place


def test_nnx_rounds_no_statistics_at_inference():
    """bfloat16 input, running mean 1000.3: x = 1000 is 0.3 below it."""
    x = jnp.full((1, 3), 1000.0, jnp.bfloat16)
    for cls, expected in ((nnx.BatchNorm, 0), (jbn.nnx.BatchNorm, -0.3)):
        norm = cls(3, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
        norm(x)
        assert norm.mean[...].dtype == jnp.float32
        norm.mean[...], norm.var[...] = np.full((2, 3), [[1000.3], [1.0]], "float32")
        y = norm(x, use_running_average=True)
        np.testing.assert_allclose(y.astype("float32"), expected, rtol=1e-2)


def test_haikus_call():
    x, other = draw(2, 6, 3)
    before, after = sole("haiku", x), sole("jbn.linen", x)
    close(before(x, False), 2 * oracle(x) + 5)  # by the batch of init
    kept = jax.tree.leaves((before.state, after.batch_stats))
    close(after(other, False, **BATCH_ALONE), before(other, False, test_local_stats=True))
    close(jax.tree.leaves((before.state, after.batch_stats)), kept, 0)
    with pytest.raises(ValueError, match="average"):
        before.network.init(None, x, False)

    before = sole("haiku", x, create_scale=False, create_offset=False)
    close(before(x, True, scale=x, offset=other), x * oracle(x) + other)
    scale, bias = draw(2, 3)
    close(before(x, True, scale=scale, offset=bias), jbn.batch_norm(x, scale, bias)[0])


def test_haikus_dtypes():
    x = draw(6, 3).astype(jnp.bfloat16)
    before = sole("haiku", x)
    before(x, True)
    params, state = before.network.init(None, x, True)
    dtypes = {v.dtype.name for v in jax.tree.leaves((params, state, before.state))}
    assert dtypes == {"bfloat16", "int32"}  # the counter
    for dtype, expected in ((None, "float32"), (jnp.bfloat16, "bfloat16")):
        norm = jbn.nnx.BatchNorm(3, dtype=dtype, rngs=nnx.Rngs(0))
        assert norm(jnp.asarray(x)).dtype == expected
        assert {v.dtype.name for v in jax.tree.leaves(nnx.state(norm))} == {"float32"}


def test_haikus_devices():
    """Two groups of two devices."""
    x, groups = draw(4, 6, 3), [[0, 2], [1, 3]]
    hk = need("haiku")

    def call(x):
        options = {"cross_replica_axis": "d", "cross_replica_axis_index_groups": groups}
        return hk.BatchNorm(True, True, 0.9, **options)(x, True)

    network = hk.without_apply_rng(hk.transform_with_state(call))
    params, state = jax.pmap(network.init, "d", in_axes=(None, 0))(None, x)
    before, _ = jax.pmap(network.apply, "d")(params, state, x)
    norm = jbn.linen.BatchNorm(False, axis_name="d", axis_index_groups=groups)
    variables = norm.init(jax.random.key(0), x[0])
    apply = functools.partial(norm.apply, variables, mutable=["batch_stats"])
    close(jax.pmap(apply, "d")(x)[0], before)


def test_initializers():
    """Their initializers take no key; those of jbn's statistics are given none."""

    def filled(value):
        return lambda key, shape, dtype: jnp.full(shape, value + (key is None), dtype)

    names = "scale_init", "bias_init", "mean_init", "var_init"
    options = {name: filled(value) for value, name in enumerate(names)}
    norm = jbn.nnx.BatchNorm(3, rngs=nnx.Rngs(0), **options)
    values = norm.scale, norm.bias, norm.mean, norm.var
    np.testing.assert_array_equal([v[...][0] for v in values], [0, 1, 3, 4])
    variables = jbn.linen.BatchNorm(False, **options).init(jax.random.key(0), draw(6, 3))
    params, batch_stats = variables["params"], variables["batch_stats"]
    values = params["scale"], params["bias"], batch_stats["mean"], batch_stats["var"]
    np.testing.assert_array_equal([v[0] for v in values], [0, 1, 3, 4])
    hk = need("haiku")
    options = {"scale_init": hk.initializers.Constant(4.0), "offset_init": jnp.ones}
    network = hk.transform_with_state(lambda x: hk.BatchNorm(True, True, 0.9, **options)(x, True))
    params = network.init(None, draw(6, 3))[0]["batch_norm"]
    np.testing.assert_array_equal([params["scale"][0, 0], params["offset"][0, 0]], [4, 1])


def test_equinox_modes():
    eqx, x = need("equinox"), draw(6, 3)
    with pytest.warns(UserWarning, match="defaults to 'ema'"):
        assert eqx.nn.BatchNorm(3, "batch").mode == "ema"
    for updates, excess in ((1, "99"), (100, "0.58")):
        layer = sole(BATCH, x)
        for _ in range(updates):
            layer(x, True)
        mean, var = (v / (1 - 0.99**updates) for v in fields(BATCH, layer))
        close(layer(x, False), 2 * (x - mean) / np.sqrt(var + 1e-5) + 5)
        np.testing.assert_allclose(mean, x.mean(0))
        np.testing.assert_allclose(var - x.var(0), float(excess), rtol=1e-2)
        assert f"{excess} after" in SECTIONS["Conventions"]


def test_equinox_under_vmap():
    x = draw(6, 3)
    before = sole(BATCH, x)
    y = before(x, True)

    norm = jbn.linen.BatchNorm(False, axis=0, axis_name="batch")
    variables = norm.init(jax.random.key(0), x[0])
    apply = functools.partial(norm.apply, variables, mutable=["batch_stats"])
    ours, updated = jax.vmap(apply, axis_name="batch", out_axes=(0, None))(x)
    close(2 * ours + 5, y)
    close([updated["batch_stats"][k] for k in ("mean", "var")], fields(BATCH, before), 1e-6)

    norm = jbn.nnx.BatchNorm(3, axis=0, axis_name="batch", rngs=nnx.Rngs(0))
    over_batch = nnx.vmap(lambda norm, x: norm(x), in_axes=(None, 0), axis_name="batch")
    close(2 * over_batch(norm, jnp.float32(x)) + 5, y, 1e-5)
    close(fields("jbn.nnx", SimpleNamespace(norm=norm)), fields(BATCH, before), 1e-6)


def test_equinox_ema_is_the_same_function():
    """Three batches, with gradients, then inference."""
    batches, scale, bias = draw(3, 6, 3), np.full(3, 2.0), np.full(3, 5.0)
    layer = sole(EMA, batches[0], momentum=0.6)
    session = {"jax": jax, "jnp": jnp, "images": np.ones((2, 16))}
    exec(compile(blocks(SECTIONS["equinox"])[-1], PAGE, "exec"), session)

    def summed(f):
        def g(x, state):
            y, state = f(x, state)
            return jnp.sum(jnp.sin(y)), (y, state)

        return jax.jit(jax.grad(g, has_aux=True))

    over_batch = jax.vmap(layer.norm, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
    theirs = summed(over_batch)
    ours = summed(lambda x, s: session["ema_batch_norm"](x, scale, bias, s, momentum=0.6))
    running = jbn.RunningStats(*np.zeros((3, 3)))
    for x in batches:
        before, (y, layer.state) = theirs(x, layer.state)
        after, (our_y, running) = ours(x, running)
        close((our_y, after), (y, before))
    close([running.mean, running.var], fields(EMA, layer))
    inferred = jbn.batch_norm_inference(x, running.mean, running.var, scale, bias)
    close(inferred, layer(x, False))


def test_keras_masks():
    x = draw(6, 4, 3)
    mask = np.arange(24).reshape(6, 4) % 3 > 0
    before, after = (sole(name, x, epsilon=1e-3) for name in ("keras", "jbn.nnx"))
    close(after(x, True, mask=mask[..., None]), before(x, True, mask=mask), 1e-5)
    stats, kept = fields("keras", before), fields("jbn.nnx", after)
    close(kept, stats, 1e-6)
    before(x, True, mask=np.zeros((6, 4), bool))
    after(x, True, mask=np.zeros((6, 4, 1), bool))
    close(fields("keras", before), [0.99 * v for v in stats], 1e-6)
    close(fields("jbn.nnx", after), kept, 0)


def test_keras_modes():
    keras, x = need("keras"), draw(6, 3)
    inferred = 2 * x / np.sqrt(1 + 1e-3) + 5
    close(sole("keras", x, trainable=False)(x, True), inferred, 1e-5)
    close(sole("keras", x)(x, None), inferred, 1e-5)
    with pytest.raises(ValueError, match="TensorFlow"):
        keras.layers.BatchNormalization(synchronized=True)


def test_keras_dtypes():
    need("keras")
    x = draw(6, 3)
    for policy, stored in (("mixed_bfloat16", "float32"), ("bfloat16", "bfloat16")):
        before = sole("keras", x, dtype=policy)
        norm = jbn.nnx.BatchNorm(3, dtype="bfloat16", param_dtype=stored, rngs=nnx.Rngs(0))
        for scale in (before.norm.gamma.value, norm.scale):
            assert scale.dtype == stored
        for y in (before(x, True), norm(jnp.float32(x))):
            assert y.dtype == "bfloat16"
    x = np.full((2, 1), 1 / 3)
    error = {
        name: abs(sole(name, x, epsilon=0.0)(x, False) - (2 * x + 5)).max()
        for name in ("keras", "jbn.linen")
    }
    assert error["keras"] > 1e-9 > 1e-14 > error["jbn.linen"]


def test_torchs_modes():
    x = draw(6, 3)
    layer = sole("torch", x, track_running_stats=False)
    assert layer.norm.running_mean is None
    for training in (True, False):
        close(layer(x, training), 2 * oracle(x) + 5)
    layer = sole("torch", x, momentum=None)
    layer(x, True), layer(x, True)
    assert layer.norm.num_batches_tracked == 2
    with pytest.raises(ValueError, match="more than 1 value"):
        layer(x[:1], True)


def test_torchs_modes_in_jbn():
    x = draw(6, 3)
    bad = np.where(np.arange(18).reshape(6, 3) == 1, np.inf, x)
    layer = sole("jbn.linen", x, unbiased=True)
    for training in (True, False):
        close(layer(x, training, **BATCH_ALONE), 2 * oracle(x) + 5)
    np.testing.assert_array_equal(layer(x[:1], True), 5)
    close(layer.batch_stats["var"], np.ones(3), 0)
    layer = sole("jbn.linen", x, momentum=None, unbiased=True)
    for batch in (x, bad):
        layer(batch, True)
    np.testing.assert_array_equal(layer.batch_stats["count"], [2, 1, 2])
    biased = sole("jbn.linen", x, momentum=None)
    biased(x, True)
    close(biased.batch_stats["var"], x.var(0, ddof=1) * 5 / 6)


def test_of_jbn_alone():
    """A sharded batch is one batch under jit, without an axis name; integers are errors."""
    x = draw(8, 3)
    mesh = jax.make_mesh((4,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    sharded = jax.device_put(x, jax.NamedSharding(mesh, jax.sharding.PartitionSpec("d")))
    norm = jbn.linen.BatchNorm(False)
    variables = norm.init(jax.random.key(0), x)
    y, _ = jax.jit(functools.partial(norm.apply, variables, mutable=["batch_stats"]))(sharded)
    close(y, oracle(x))
    with pytest.raises(TypeError, match="Cast it first"):
        norm.init(jax.random.key(0), jnp.arange(6).reshape(2, 3))
    with pytest.raises(TypeError, match="Cast it first"):
        jbn.nnx.BatchNorm(3, rngs=nnx.Rngs(0))(jnp.arange(6).reshape(2, 3))
