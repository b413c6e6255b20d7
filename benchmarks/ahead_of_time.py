"""What a step costs on devices that are not there, as a ratio to the plain step.

`tpu_cost.py`, `gpu_cost.py` and `t5x_tpu_cost.py` describe the devices and call `main`. It compiles
the train step of T5.1.1 ahead of time and reads FLOPs, memory and collectives from the compiled
step. Nothing runs, so nothing is timed but the compiler. Every case is written to the JSON as soon
as it is compiled, and cases that are there are not compiled again.
"""

import argparse
import contextlib
import dataclasses
import functools
import importlib.metadata
import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import sam_optax

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
from compiled import unrolled_loops
from cost_table import BATCH, HEAD, expected_flops, markdown
from finetune.loss import make_loss_fn
from finetune.model import (
    PUBLIC_SIZES,
    T5,
    DecoderLayer,
    EncoderLayer,
    T5Config,
    count_parameters,
    t5_1_1_base,
)
from hlo import collectives, loops_without_trip_count

RESULTS = Path(__file__).parent / "results"
INPUTS, TARGETS = 512, 62  # tokens an example

# bfloat16 activations, float32 parameters. No dropout: its masks cost the same in every pass, and
# without them a pass is nothing but the model.
_MODEL = {"dtype": "bfloat16", "dropout_rate": 0.0}
SIZES: dict[str, T5Config] = {
    "tiny": PUBLIC_SIZES["small"](
        vocab_size=2048,
        d_model=128,
        num_heads=2,
        d_ff=256,
        num_encoder_layers=2,
        num_decoder_layers=2,
        **_MODEL,
    ),
    "mini": t5_1_1_base(num_encoder_layers=2, num_decoder_layers=2, **_MODEL),
    **{size: make(**_MODEL) for size, make in PUBLIC_SIZES.items()},
}
# Where parameters lie, and whether a stack's layers are one layer in a loop, computed again in the
# backward pass, as models that need FSDP are mostly written.
LAYOUTS = ("data", "fsdp", "data, scanned", "fsdp, scanned")
SEVERAL = "groups = several shards"  # a step on meshes with an axis of groups
# The compiler's effort as JAX up to 0.10 takes it, and the level that compiles the same.
LEVELS = {-1.0: "O0", 0.0: "UNKNOWN"}


@dataclasses.dataclass(frozen=True)
class Case:
    """One step of one model on one slice."""

    size: str
    slice: str
    layout: str
    step: str
    effort: float
    mesh: Mapping[str, int]  # axes' sizes

    @property
    def key(self) -> str:
        """The case's name in the JSON."""
        return f"{self.size} {self.slice} {self.layout} effort={self.effort:g}: {self.step}"

    @property
    def fsdp(self) -> bool:
        """Whether parameters are sharded over `data`."""
        return self.layout.startswith("fsdp")

    @property
    def scanned(self) -> bool:
        """Whether a stack's layers are a loop."""
        return self.layout.endswith("scanned")


def make_steps(
    loss_fn: Callable, mesh: Mesh, *, fsdp: bool = False
) -> dict[str, Callable[[], Callable]]:
    """Every way of taking a gradient: `name -> function that makes (params, batch) -> ...`."""
    axes = batch_axes(mesh.shape)
    ours = functools.partial(
        sam_optax.value_and_grad,
        loss_fn,
        data_axes=axes,
        replicated_params=False if fsdp else None,
    )
    # The smallest fraction that four groups on every shard can share.
    m_fraction = min(1.0, max(0.25, 4 * shards_of(mesh.shape) / BATCH))
    groups = functools.partial(ours, group_axes=axes)
    several = functools.partial(ours, group_axes="group", replicated_params=True)
    return {
        "plain": lambda: jax.value_and_grad(loss_fn),
        "plain, one psum": lambda: plain_in_one_psum(loss_fn, mesh, None),
        "plain, one psum in bf16": lambda: plain_in_one_psum(loss_fn, mesh, jnp.bfloat16),
        "full SAM": lambda: ours(ascent_fraction=1.0),
        "two bare passes": lambda: two_bare_passes(loss_fn, axes),
        "prefix slice": lambda: sam_optax.value_and_grad(loss_fn),
        "ours": ours,
        "ours, ascent in bf16": lambda: ours(reduction_dtype=jnp.bfloat16),
        "groups = shards": groups,
        "groups = shards, in bf16": lambda: groups(reduction_dtype=jnp.bfloat16),
        SEVERAL: several,
        f"{SEVERAL}, in bf16": lambda: several(reduction_dtype=jnp.bfloat16),
        "m = 4, paper": lambda: ours(ascent_fraction=m_fraction, m=4),
        "m = 4, Foret": lambda: ours(ascent_fraction=m_fraction, m=4, m_sharpness="foret"),
        "m = 4, Foret, bare": lambda: bare_groups(loss_fn, m_fraction, axes),
    }


def batch_axes(mesh: Mapping[str, int]) -> tuple[str, ...]:
    """The mesh axes that the batch is sharded over: `data`, or `group` and `data`."""
    return tuple(axis for axis in mesh if axis != "model")


def shards_of(mesh: Mapping[str, int]) -> int:
    """The number of data shards."""
    return math.prod(mesh[axis] for axis in batch_axes(mesh))


STEPS = tuple(make_steps(lambda: None, Mesh(np.zeros((1, 1)), ("data", "model"))))


def plain_in_one_psum(loss_fn: Callable, mesh: Mesh, dtype: Any) -> Callable:
    """The plain step with the gradient reduced as with groups: one psum, in a dtype of choice.

    The compiler reduces most of the plain step's gradients in bfloat16, before they become float32.
    This is the plain step to compare the bytes of a stated reduction with.
    """
    axes, shards = batch_axes(mesh.shape), shards_of(mesh.shape)

    def on_one_shard(params, batch):
        params = jax.tree.map(lambda w: jax.lax.pcast(w, axes, to="varying"), params)
        loss, grads = jax.value_and_grad(loss_fn)(params, batch)

        def reduce(g):
            mean = g / shards
            return jax.lax.psum(mean.astype(dtype or g.dtype), axes).astype(g.dtype)

        return jax.lax.pmean(loss, axes), jax.tree.map(reduce, grads)

    return jax.shard_map(
        on_one_shard,
        in_specs=(P(), P(axes)),
        out_specs=(P(), P()),
        axis_names=set(axes),
    )


def two_bare_passes(loss_fn: Callable, axes: tuple[str, ...]) -> Callable:
    """The least that any SAM computes: no norm, no mask, no care. A floor for the temporaries."""

    def gradient(params, batch):
        ascent = jax.grad(loss_fn)(params, sam_optax.ascent_batch(batch, data_axes=axes))
        w_adv = jax.tree.map(lambda w, g: w + 0.1 * g, params, ascent)
        return jax.value_and_grad(loss_fn)(w_adv, batch)

    return gradient


def bare_groups(loss_fn: Callable, ascent_fraction: float, axes: tuple[str, ...]) -> Callable:
    """Four groups one after another as one writes them: a norm in one sum, and no care."""

    def gradient(params, batch):
        groups = sam_optax.ascent_groups(
            batch, ascent_fraction, m=4, m_sharpness="foret", data_axes=axes
        )

        def add_group(total, group):
            ascent, descent = group
            g = jax.grad(loss_fn)(params, ascent)
            scale = 0.15 / optax.tree.norm(g)
            w_adv = jax.tree.map(lambda w, g: w + scale * g, params, g)
            part = jax.value_and_grad(loss_fn)(w_adv, descent)
            return jax.tree.map(jnp.add, total, part), None

        zeros = jax.tree.map(jnp.zeros_like, (jnp.float32(0), params))
        total, _ = jax.lax.scan(add_group, zeros, groups)
        return jax.tree.map(lambda x: x / 4, total)

    return gradient


def not_applicable(case: Case) -> str | None:
    """Return why a case is not compiled, or None."""
    needs_whole_parameters = "groups" in case.step or "psum" in case.step
    if case.fsdp and needs_whole_parameters:
        return "each shard of `data` needs the parameters whole, and here they are sharded over it"
    return None


# Of each kernel, the dimension that is heads, feed-forward or vocabulary, and the one that is
# d_model.
_DIMENSIONS = {
    "": (0, 1),  # the embedding, which is at the top
    "query": (1, 0),
    "key": (1, 0),
    "value": (1, 0),
    "out": (0, 2),
    "wi_0": (1, 0),
    "wi_1": (1, 0),
    "wo": (0, 1),
    "logits": (1, 0),
    "relative_bias": (1, None),
}


def parameter_spec(path: str, shape: tuple[int, ...], case: Case) -> P:
    """Where a parameter lives, by its path.

    Heads, feed-forward and vocabulary lie over `model`, and with FSDP d_model over `data`. What
    the axis does not divide (Small's 6 heads by 8) is whole.
    """
    name = ("/" + path).split("/")[-2]
    dimensions = _DIMENSIONS.get(name, (None, 0))  # the others are the scales of norms
    layers = int(in_a_loop(path))  # their number is the first dimension
    spec: list[str | None] = [None] * len(shape)
    for axis, dimension in zip(("model", "data"), dimensions, strict=True):
        used = case.mesh[axis] > 1 and (axis == "model" or case.fsdp)
        if used and dimension is not None and shape[layers + dimension] % case.mesh[axis] == 0:
            spec[layers + dimension] = axis
    return P(*spec)


def in_a_loop(path: str) -> bool:
    """Whether a parameter is one of all layers of a stack."""
    return "layers" in path.split("/")


def gathered(params: Any, case: Case) -> Any:
    """Return parameters that are whole along `data`: FSDP gathers each where it is used.

    Without this the compiler prefers to shard the activations' d_model, as the parameters' is.
    Those in a loop it gathers there, as `keep_examples` holds the activations where they are.
    """
    whole = dataclasses.replace(case, layout="data")

    def gather(path, w):
        path = _path(path)
        if in_a_loop(path):
            return w
        return jax.lax.with_sharding_constraint(w, parameter_spec(path, w.shape, whole))

    return jax.tree_util.tree_map_with_path(gather, params)


def keep_examples(next_function: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
    """Keep the examples of a layer's activations where they are: for `nn.intercept_methods`."""
    result = next_function(*args, **kwargs)
    layer = isinstance(context.module, EncoderLayer | DecoderLayer)
    if layer and context.method_name == "__call__":
        return jax.lax.with_sharding_constraint(result, P("data"))
    return result


def state_specs(state: Any, params: Any, case: Case) -> Any:
    """The optimizer state: arrays like a parameter lie where it does; vectors as FSDP has them."""
    like = {_path(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(params)}

    def spec(path, leaf):
        path = _path(path)
        for parameter, shape in like.items():
            if path.endswith("/" + parameter) and leaf.shape == shape:
                return parameter_spec(parameter, shape, case)
        divides = leaf.ndim == 1 and leaf.shape[0] % case.mesh["data"] == 0
        return P("data") if case.fsdp and divides else P()

    return jax.tree_util.tree_map_with_path(spec, state)


def _path(path) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def batch_shapes() -> dict[str, jax.ShapeDtypeStruct]:
    """The arrays of one batch."""
    target = functools.partial(jax.ShapeDtypeStruct, (BATCH, TARGETS))
    return {
        "encoder_input_tokens": jax.ShapeDtypeStruct((BATCH, INPUTS), jnp.int32),
        "decoder_input_tokens": target(jnp.int32),
        "decoder_target_tokens": target(jnp.int32),
        "decoder_loss_weights": target(jnp.float32),
    }


def compile_case(case: Case, mesh: Mesh, hlo_folder: Path | None = None) -> dict[str, Any]:
    """Compile the train step and return what the JSON holds of it; save its HLO if asked to."""
    config = dataclasses.replace(SIZES[case.size], scan_layers=case.scanned)
    params, param_shardings, lowered = train_step(config, case, mesh)
    with jax.set_mesh(mesh):
        start = time.perf_counter()
        program = lowered().compile()
        seconds = time.perf_counter() - start
        cost = program.cost_analysis()
        # Cost analysis counts a loop's body once. Memory, collectives and compile time are those
        # of the step as it is; FLOPs and bytes accessed of steps without loops. (The plugin for
        # GPUs has no analysis.)
        if cost and case.scanned:
            cost = cost_of_layers(config, case, mesh)
        elif cost and case.step.startswith("m = 4"):
            with unrolled_loops():
                cost = lowered().compile().cost_analysis()
    save_hlo(case, program, hlo_folder)
    sizes = [
        4 * math.prod(sharding.shard_shape(w.shape))
        for w, sharding in zip(
            jax.tree.leaves(params), jax.tree.leaves(param_shardings), strict=True
        )
    ]
    return measurements(program, cost, case) | {
        "parameter_bytes": sum(sizes),
        "compile_seconds": round(seconds, 1),
        "parameters": count_parameters(params),
    }


def train_step(
    config: T5Config, case: Case, mesh: Mesh
) -> tuple[Any, Any, Callable[[], jax.stages.Lowered]]:
    """Return the shapes of a model's parameters, where they lie, and what lowers its step."""
    model = T5(config)
    with_aux = make_loss_fn(model)
    tokens = np.zeros((1, 8), np.int32)
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), tokens, tokens)["params"])
    optimizer = optax.adafactor(1e-3)
    state = jax.eval_shape(optimizer.init, params)

    def loss_fn(params, batch):
        if not case.fsdp:
            return with_aux(params, batch)[0]
        with nn.intercept_methods(keep_examples) if case.scanned else contextlib.nullcontext():
            return with_aux(gathered(params, case), batch)[0]

    make_gradient = make_steps(loss_fn, mesh, fsdp=case.fsdp)[case.step]
    specs = jax.tree_util.tree_map_with_path(
        lambda path, w: parameter_spec(_path(path), w.shape, case), params
    )
    param_shardings, state_shardings, batch_sharding, replicated = jax.tree.map(
        lambda spec: NamedSharding(mesh, spec),
        (specs, state_specs(state, params, case), P(batch_axes(case.mesh)), P()),
        is_leaf=lambda x: isinstance(x, P),
    )

    def lowered():
        gradient = make_gradient()

        def step(params, state, batch):
            loss, grads = gradient(params, batch)
            updates, state = optimizer.update(grads, state, params)
            return optax.apply_updates(params, updates), state, loss

        return jax.jit(
            step,
            in_shardings=(param_shardings, state_shardings, batch_sharding),
            out_shardings=(param_shardings, state_shardings, replicated),
            donate_argnums=(0, 1),
        ).lower(params, state, batch_shapes())

    return params, param_shardings, lowered


def cost_of_layers(config: T5Config, case: Case, mesh: Mesh) -> dict[str, float]:
    """FLOPs and bytes accessed of a step whose layers are a loop, as if they were not.

    A layer costs what a model of two has more than a model of one, without loops; the whole one
    without loops would take an hour to compile.
    """
    layers = config.num_encoder_layers
    assert layers == config.num_decoder_layers
    one, two = (_cost_without_loops(config, n, case, mesh) for n in (1, 2))
    return {
        name: one[name] + (layers - 1) * (two[name] - one[name])
        for name in ("flops", "bytes accessed")
    }


def _cost_without_loops(config: T5Config, layers: int, case: Case, mesh: Mesh) -> dict:
    smaller = dataclasses.replace(config, num_encoder_layers=layers, num_decoder_layers=layers)
    with unrolled_loops():
        return train_step(smaller, case, mesh)[2]().compile().cost_analysis()


def save_hlo(case: Case, program: Any, folder: Path | None) -> None:
    """Write the compiled program's text where it is asked for."""
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{case.key.replace(' ', '_')}.hlo").write_text(program.as_text())


def measurements(program: Any, cost: dict | None, case: Case) -> dict[str, Any]:
    """What the compiler says of a step; FLOPs and bytes accessed are `cost`'s."""
    memory, text = program.memory_analysis(), program.as_text()
    return {
        "status": "compiled",
        "flops": cost and cost["flops"],  # the plugin for GPUs does not count
        "bytes_accessed": cost and cost["bytes accessed"],
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "peak_bytes": memory.peak_memory_in_bytes,
        "output_bytes": memory.output_size_in_bytes,
        "alias_bytes": memory.alias_size_in_bytes,
        "collectives": summary(text, case.mesh),
        "loops_counted_once": loops_without_trip_count(text),
    }


def summary(text: str, mesh: Mapping[str, int]) -> list[dict[str, Any]]:
    """Collectives by kind, axes and dtype, with how many run in a step and their bytes."""
    total: dict[tuple, list[int]] = {}
    for c in collectives(text, mesh):
        entry = total.setdefault((c.kind, "+".join(c.axes), c.dtype), [0, 0])
        entry[0] += c.times
        entry[1] += c.times * c.bytes
    return [
        {"kind": kind, "axes": axes, "dtype": dtype, "count": count, "bytes": size}
        for (kind, axes, dtype), (count, size) in sorted(total.items())
    ]


def measure(
    case: Case, mesh: Mesh, hlo_folder: Path | None = None, compile_case: Callable = compile_case
) -> dict[str, Any]:
    """Compile a case, or say why it cannot be."""
    reason = not_applicable(case)
    if reason:
        result = {"status": "not applicable", "reason": reason}
    else:
        try:
            result = compile_case(case, mesh, hlo_folder)
        except ValueError as error:  # the library's own refusal, such as of groups too small
            result = {"status": "refused", "reason": str(error).splitlines()[0]}
        except jax.errors.JaxRuntimeError as error:
            if "memory" not in str(error).lower():
                raise
            result = {"status": "out of memory", "reason": str(error).splitlines()[0][:300]}
    flops = expected_flops(case.step, shards_of(case.mesh))
    return dataclasses.asdict(case) | {"expected_flops": flops, **result, "versions": versions()}


def versions() -> dict[str, str]:
    """Of what has a say in the result."""
    found = {"sam_optax": sam_optax.__version__}
    for name in ("jax", "libtpu", "jax-cuda12-plugin", "optax"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def load(path: Path) -> dict[str, Any]:
    """The cases that are done."""
    return json.loads(path.read_text()) if path.exists() else {}


def save(path: Path, results: dict[str, Any]) -> None:
    """Write the JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(results, indent=1) + "\n")
    partial.replace(path)


def main(
    slices: Mapping[str, dict[str, int]],
    describe: Callable[[str], np.ndarray],
    results: Path,
    compile_case: Callable = compile_case,
    sizes: Iterable[str] = SIZES,
    layouts: Iterable[str] = LAYOUTS,
    steps: Iterable[str] = STEPS,
    efforts: Iterable[float] = LEVELS,
    head: str = HEAD,
) -> None:
    """Compile what is asked for and not done; print and write the tables.

    Args:
      slices: mesh axes' sizes by the name of the devices, which stands before a comma.
      describe: from that name to the devices.
      results: where the JSON is, unless the user says otherwise.
      compile_case: from a case, its mesh and where to save its HLO, to what the JSON holds of it.
      sizes: models that the user can choose, as are `layouts`, `steps` and `efforts`.
      layouts: of the parameters.
      steps: ways of taking a step.
      efforts: of the compiler; the first is the default.
      head: of the tables.
    """
    parser = argparse.ArgumentParser(description="What a step costs on devices that are not there.")
    usual = [size for size in ("small", "base") if size in sizes]
    parser.add_argument("--sizes", nargs="*", default=usual, choices=sizes)
    parser.add_argument("--slices", nargs="*", default=[next(iter(slices))], choices=slices)
    parser.add_argument("--layouts", nargs="*", default=["data"], choices=layouts)
    parser.add_argument("--steps", nargs="*", default=steps, choices=steps, metavar="STEP")
    parser.add_argument(
        "--effort",
        type=float,
        choices=efforts,
        default=next(iter(efforts)),
        help="the compiler's: 0 is what jobs use, and -1, for TPUs, compiles several times faster; "
        "compare bytes and memory only within one effort",
    )
    parser.add_argument("--json", type=Path, default=results)
    parser.add_argument("--hlo", type=Path, help="a folder to save the compiled steps in")
    parser.add_argument("--again", action="store_true", help="compile also what is done")
    args = parser.parse_args()
    jax.config.update("jax_optimization_level", LEVELS[args.effort])

    described = functools.cache(describe)
    cases = [
        Case(size, slice_name, layout, step, args.effort, slices[slice_name])
        for slice_name in args.slices
        for layout in args.layouts
        for size in args.sizes
        for step in args.steps
        if "group" in slices[slice_name] or not step.startswith(SEVERAL)
    ]
    for case in cases:
        if case.key in load(args.json) and not args.again:
            continue
        devices = described(case.slice.split(",")[0])
        mesh = Mesh(devices.reshape(tuple(case.mesh.values())), tuple(case.mesh))
        result = measure(case, mesh, args.hlo, compile_case)
        save(args.json, load(args.json) | {case.key: result})
        seconds = result.get("compile_seconds", "")
        print(f"{case.key}: {result['status']} {seconds}", file=sys.stderr, flush=True)
        jax.clear_caches()
    table = markdown(load(args.json), head)
    args.json.with_suffix(".md").write_text(table)
    print(table)
