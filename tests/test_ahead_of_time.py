"""The reader of collectives by hand, and the smallest case compiled for TPUs and for GPUs."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import cost_table
import hlo
import pytest

ROOT = Path(__file__).resolve().parents[1]
MESH = {"data": 4, "model": 2}  # devices 2i and 2i + 1 share data shard i


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("{{0,1},{2,3}}, more={4}", [[0, 1], [2, 3]]),
        ("{}, more={4}", []),
        ("[2,4]<=[8], dimensions={0}", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        # [[0, 1], [2, 3], [4, 5], [6, 7]], transposed
        ("[2,4]<=[4,2]T(1,0), to_apply=%f", [[0, 2, 4, 6], [1, 3, 5, 7]]),
        ("[4,2]<=[2,2,2]T(0,2,1)", [[0, 2], [1, 3], [4, 6], [5, 7]]),
        ("mesh['a'=4,'b'=2] {'a'}, x", [[0, 2, 4, 6], [1, 3, 5, 7]]),
        ("mesh['a'=4,'b'=2] {'b'}", [[0, 1], [2, 3], [4, 5], [6, 7]]),
        ("mesh['a'=4,'b'=2,'c'=1] {'a','b','c'}", [[0, 1, 2, 3, 4, 5, 6, 7]]),
        ("mesh['a'=2,'b'=2] {'b','a'}", [[0, 2, 1, 3]]),
        # the devices of row a are 0, 2, 4, 6 and 1, 3, 5, 7
        (
            "mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}, y",
            [[0, 2, 4, 6], [1, 3, 5, 7]],
        ),
        ("mesh['a'=4], device_ids=(3,1,2,0) {'a'}", [[3, 1, 2, 0]]),
        # an axis of 8 as 2 x 4: its major and its minor part
        ("mesh['a'=8] {'a':(1)2}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("mesh['a'=8] {'a':(2)4}", [[0, 1, 2, 3], [4, 5, 6, 7]]),
    ],
)
def test_replica_groups_in_every_notation(text, groups):
    assert hlo.replica_groups(text) == groups


@pytest.mark.parametrize(
    ("groups", "axes"),
    [
        ([[0, 1], [2, 3], [4, 5], [6, 7]], ("model",)),
        ([[0, 2, 4, 6], [1, 3, 5, 7]], ("data",)),
        ([[0, 2], [4, 6]], ("data",)),  # some of an axis
        ([[0, 1, 2, 3, 4, 5, 6, 7]], ("data", "model")),
        ([[0, 3]], ("data", "model")),
        ([[0], [1]], ()),
        ([], ("data", "model")),
    ],
)
def test_axes_are_those_along_which_a_group_differs(groups, axes):
    assert hlo.axes_of(groups, MESH) == axes


PROGRAM = """HloModule jit_step

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%all-reduce-scatter.1 (x: bf16[8,4]) -> bf16[4,4] {
  %x = bf16[8,4]{1,0} parameter(0)
  %r = bf16[8,4]{1,0} all-reduce(%x), replica_groups=[4,2]<=[8], to_apply=%add
  ROOT %slice = bf16[4,4]{1,0} slice(%r), slice={[0:4], [0:4]}
}

%body.2 (p: (s32[], f32[6])) -> (s32[], f32[6]) {
  %g = f32[6]{0} all-reduce(%y), replica_groups={{0,2,4,6},{1,3,5,7}}, to_apply=%add
}

%unknown.3 (p: (s32[], f32[6])) -> pred[] {
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

%below.4 (p: (s32[], f32[6])) -> pred[] {
  %n.1 = s32[]{:T(128)} constant(5)
  ROOT %less = pred[]{:T(512)} compare(%i, %n.1), direction=LT
}

ENTRY %main (p: f32[3,5]) -> f32[3,5] {
  %both = (f32[3,5]{1,0:T(8,128)S(1)}, /*index=1*/bf16[7]{0:T(256)}) all-reduce(%p, %q), \
replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0'}, to_apply=%add
  %s = f32[]{:T(128)} all-reduce-start(%z), replica_groups={}, to_apply=%add
  %t = f32[]{:T(128)} all-reduce-done(%s)
  %h = ((f32[2]{0}), (f32[4]{0})) all-gather-start(%w), replica_groups=[4,2]<=[8], dimensions={0}
  %c = (s32[9]{0}, s32[9]{0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%v), \
source_target_pairs={{0,2},{2,4}}, metadata={op_name="x"}
  %w = (s32[], f32[6]) while(%i), condition=%unknown.3, body=%body.2, \
backend_config={"known_trip_count":{"n":"3"}}
  %l = (s32[], f32[6]) while(%i), condition=%below.4, body=%body.2, metadata={op_name="x"}
  %k = f32[8]{0} all-gather(%v), replica_groups=[4,2]<=[8], frontend_attributes={chain_id="0"}
  %m = f32[8]{0} all-gather(%v), replica_groups=[4,2]<=[8], frontend_attributes={chain_id="0"}
  %u = (s32[], f32[6]) while(%i), condition=%unknown.3, body=%body.2
  %fusion = bf16[4,4]{1,0} fusion(%k), kind=kCustom, calls=%all-reduce-scatter.1
}
"""


def test_collectives_of_a_program():
    found = hlo.collectives(PROGRAM, MESH)
    assert sorted(found) == sorted(
        [
            ("reduce-scatter", ("model",), "bf16", 64, 1),
            ("all-reduce", ("data",), "f32", 24, 3 + 5 + 1),  # the last loop counts once
            ("all-reduce", ("data",), "f32", 60, 1),
            ("all-reduce", ("data",), "bf16", 14, 1),
            ("all-reduce", ("data", "model"), "f32", 4, 1),
            ("all-gather", ("model",), "f32", 16, 1),
            ("all-gather", ("model",), "f32", 32, 1),  # two links of a chain
            ("collective-permute", ("data",), "s32", 36, 1),
        ]
    )
    assert hlo.loops_without_trip_count(PROGRAM) == 1


def test_what_goes_to_other_slices_of_a_pod():
    text = """
  %send.1 = (f32[64,8]{1,0:T(8,128)}, u32[], token[]) send(%x, %t), channel_id=4, \
is_host_transfer=true, frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}
  %done = token[] send-done(%send.1), channel_id=4, is_host_transfer=true
  %send.2 = (bf16[3]{0}, u32[], token[]) send(%y, %t), channel_id=5, is_host_transfer=true
  %send.3 = (f32[9]{0}, u32[], token[]) send(%y, %t), channel_id=6
"""
    assert hlo.sent_between_slices(text) == 4 * 64 * 8 + 2 * 3


def test_expected_flops():
    # b = 128: a quarter is 32 examples, and each of 64 shards gives at least one
    assert cost_table.expected_flops("ours", 16) == 1.25
    assert cost_table.expected_flops("groups = shards, in bf16", 64) == 1.5
    assert cost_table.expected_flops("m = 4, paper", 16) == 4.5
    assert cost_table.expected_flops("m = 4, Foret", 32) == 2.0


def test_a_model_that_does_not_fit_is_in_the_table():
    case = {"size": "xl", "slice": "v5e:4x4", "layout": "data", "effort": -1, "step": "plain"}
    table = cost_table.markdown({"": case | {"status": "out of memory", "reason": "17 of 16 GB"}})
    assert "## xl, v5e:4x4, data, effort -1" in table
    assert "- plain: out of memory: 17 of 16 GB" in table


def test_memory_beyond_the_plain_step_is_told_apart():
    """What a step reserves holds the gaps of its packing; what is alive at the peak does not."""
    case = {"size": "xl", "slice": "v5e:4x4", "layout": "fsdp", "effort": 0, "mesh": {"data": 16}}
    case |= {"status": "compiled", "expected_flops": 1.0, "loops_counted_once": 0}
    case |= dict.fromkeys(("flops", "bytes_accessed", "argument_bytes", "compile_seconds"), 1.0)
    case |= {"collectives": [], "parameters": 1, "parameter_bytes": 100}
    plain = case | {"step": "plain", "temporary_bytes": 1000, "peak_bytes": 900}
    ours = case | {"step": "ours", "temporary_bytes": 1250, "peak_bytes": 890}
    assert cost_table.broken_expectations(ours, plain) == [
        "temporaries of the plain step and 2.50 copies of the parameters, -0.10 at the peak"
    ]
    bare = case | {"step": "two bare passes", "temporary_bytes": 1400, "peak_bytes": 1000}
    table = cost_table.markdown({"plain": plain, "ours": ours, "bare": bare})
    assert (
        "| xl | v5e:4x4 | fsdp | 0 | ours | 1.0000 | 1 | - | +2.50, -0.10 | +4.00, +1.00 |" in table
    )
    table = cost_table.markdown({"plain": plain, "ours": ours})
    table = table[table.index("## xl") :]
    head, _, *rows = (line.split("|") for line in table.splitlines() if line.startswith("|"))
    at = head.index(" peak ")
    assert [row[at] for row in rows] == [" +0.00 ", " -0.10 "]
    assert {len(row) for row in rows} == {len(head)}
    del ours["peak_bytes"]  # as older files are
    assert "-0.10" not in cost_table.markdown({"plain": plain, "ours": ours})


def test_tables_are_in_order():
    compiled = dict.fromkeys(("flops", "bytes_accessed", "argument_bytes", "compile_seconds"), 1.0)
    compiled |= {"status": "compiled", "expected_flops": 1.0, "loops_counted_once": 0}
    compiled |= {"collectives": [], "parameters": 1, "parameter_bytes": 1, "temporary_bytes": 1}
    compiled |= {"step": "plain", "effort": 0, "layout": "data", "mesh": {"data": 16}}
    table = cost_table.markdown(
        {
            "1": compiled | {"size": "xl", "slice": "v5e:16x16"},
            "2": compiled | {"size": "base", "slice": "v5e:4x4"},
            "3": compiled | {"size": "mini", "slice": "v5e:4x4"},
        }
    )
    assert [line for line in table.splitlines() if line.startswith("## ")] == [
        "## mini, v5e:4x4, data, effort 0",
        "## base, v5e:4x4, data, effort 0",
        "## xl, v5e:16x16, data, effort 0",
    ]


STEPS = ["ours", "groups = shards", "groups = shards, in bf16"]
FOR_TPUS = "tpu_cost.py", "v5e:4x4", "libtpu", "pip install -e '.[tpu-aot]'"
FOR_GPUS = "gpu_cost.py", "h100:1x8", "jax_cuda12_plugin", "pip install 'jax[cuda12]' flax"


@pytest.fixture(scope="module", params=[FOR_TPUS, FOR_GPUS], ids=["TPUs", "GPUs"])
def compiled(request, tmp_path_factory):
    """The smallest case: step -> what the benchmark's JSON holds of it."""
    left_out = [] if request.config.getoption("whole_contract") else ["groups = shards"]
    steps = [step for step in ["plain", *STEPS] if step not in left_out]
    return compiled_case(request.param, "data", steps, tmp_path_factory)


def compiled_case(where, layout, steps, tmp_path_factory):
    script, devices, compiler, command = where
    for module in (compiler, "flax"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed ({command})")
    results = tmp_path_factory.mktemp("costs") / "cost.json"
    ours = ("XLA_FLAGS", "JAX_PLATFORMS", "JAX_COMPILATION_CACHE_DIR")
    environment = {k: v for k, v in os.environ.items() if k not in ours}
    # A process of its own: these compilers need other settings than these tests have.
    case = ["--sizes", "tiny", "--slices", devices, "--layouts", layout, "--steps", *steps]
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / script, "--json", results, *case],
        env=environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return {entry["step"]: entry for entry in json.loads(results.read_text()).values()}


@pytest.fixture(params=STEPS)
def step(request, compiled):
    if request.param not in compiled:
        pytest.skip("left out unless --whole-contract is given")
    return request.param


def test_flops_on_a_slice(compiled, step):
    if compiled["plain"]["flops"] is None:
        pytest.skip("XLA's compiler for GPUs does not say")
    ratio = compiled[step]["flops"] / compiled["plain"]["flops"]
    assert ratio == pytest.approx(1.25, rel=0.005)


def test_no_example_leaves_its_device(compiled, step):
    kinds = {c["kind"] for c in compiled[step]["collectives"]}
    assert kinds == {"all-reduce"} == {c["kind"] for c in compiled["plain"]["collectives"]}


def test_temporaries_on_a_slice(compiled, step):
    plain = compiled["plain"]
    allowed = plain["temporary_bytes"] + 1.01 * plain["parameter_bytes"]
    assert compiled[step]["temporary_bytes"] <= allowed


@pytest.mark.parametrize(
    ("groups", "width"), [("groups = shards", 1), ("groups = shards, in bf16", 0.5)]
)
def test_groups_reduce_one_gradient(compiled, groups, width):
    """The ascent gradient is never reduced: every parameter's bytes cross the mesh once."""
    if groups not in compiled:
        pytest.skip("left out unless --whole-contract is given")
    crossed = cost_table.bytes_over(compiled[groups], "data")
    gradient = width * compiled["plain"]["parameter_bytes"]
    assert gradient <= crossed <= 1.001 * gradient


def test_groups_in_bfloat16_reduce_what_the_plain_step_does(compiled):
    groups = cost_table.bytes_over(compiled["groups = shards, in bf16"], "data")
    assert groups <= 1.05 * cost_table.bytes_over(compiled["plain"], "data")


def test_ours_reduces_two_gradients(compiled):
    plain, ours = (cost_table.bytes_over(compiled[step], "data") for step in ("plain", "ours"))
    assert ours == pytest.approx(2 * plain, rel=0.001)


def test_fsdp_with_layers_in_a_loop(request, tmp_path_factory):
    if not request.config.getoption("whole_contract"):
        pytest.skip("minutes of compiling, with --whole-contract only")
    plain, ours = compiled_case(
        FOR_TPUS, "fsdp, scanned", ["plain", "ours"], tmp_path_factory
    ).values()
    # By their shards the parameters are FSDP's: what no axis divides is a small part of them.
    assert plain["parameter_bytes"] < 1.05 * 4 * plain["parameters"] / 16
    assert ours["flops"] / plain["flops"] == pytest.approx(1.25, rel=0.005)
    assert cost_table.moved_examples(ours) == 0
    # A twentieth of a step's temporaries is what packing so small a model may cost.
    assert ours["temporary_bytes"] <= 1.05 * plain["temporary_bytes"] + plain["parameter_bytes"]
    for kind in ("all-gather", "all-reduce"):
        plains, both = (cost_table.count_of(entry, kind) for entry in (plain, ours))
        assert 0 < plains < both <= 2 * plains + 1  # the norm's is one more


# A leaf of 8 elements, one on each device, and its norm as XLA's compiler for TPUs has it.
NORM = """
import jax, numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from sam_optax._norm import unit_and_norm

devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4").devices
sharding = NamedSharding(Mesh(np.array(devices).reshape(8), ("data",)), P("data"))
leaf = jax.ShapeDtypeStruct((8,), np.float32, sharding=sharding)
print(jax.jit(unit_and_norm).lower([leaf]).compile().as_text())
"""


def printed_with_libtpu(code):
    """What a process of its own prints that can compile for TPUs."""
    if not importlib.util.find_spec("libtpu"):
        pytest.skip("needs libtpu: pip install -e '.[tpu-aot]'")
    ours = ("XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR")
    environment = {k: v for k, v in os.environ.items() if k not in ours}
    without_a_tpu = {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0",
    }
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment | without_a_tpu | {"PYTHONPATH": f"{ROOT}:{ROOT / 'benchmarks'}"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_the_scales_are_not_squared_for_one_element_on_a_device():
    program = printed_with_libtpu(NORM)
    assert "1.84467441e+19" in program  # 2^64, as it is: its square would be {inf}
    assert "{inf}" not in program


# The first layers of a ViT, on 8 images a device.
IMAGES = """
import os
os.environ["JAX_EXEC_TIME_OPTIMIZATION_EFFORT"] = "-1.0"  # seconds of compiling, not minutes
import jax, jax.numpy as jnp, numpy as np, sam_optax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:4x4").devices
mesh = Mesh(np.array(devices).reshape(16), ("data",))

def loss_fn(params, images):
    kernel, up, down = (w.astype(jnp.bfloat16) for w in params)
    x = jax.lax.conv_general_dilated(images.astype(jnp.bfloat16), kernel, (16, 16), "VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC")).reshape(-1, 196, 768)
    x = x + jax.nn.gelu(x @ up) @ down
    return jnp.mean(jnp.square(x.astype(jnp.float32)))

def on(shape, *spec):
    return jax.ShapeDtypeStruct(shape, np.float32, sharding=NamedSharding(mesh, P(*spec)))
params = [on((16, 16, 3, 768)), on((768, 3072)), on((3072, 768))]
images = on((128, 224, 224, 3), "data")
ways = [jax.value_and_grad(loss_fn)]
for options in ({}, {"group_axes": "data"}):
    ways.append(sam_optax.value_and_grad(loss_fn, data_axes="data", mesh=mesh, **options))
for way in ways:
    compiled = jax.jit(way).lower(params, images).compile()
    print(compiled.memory_analysis().temp_size_in_bytes, compiled.cost_analysis()["bytes accessed"])
"""


def test_a_slice_of_images_does_not_lay_out_the_batch_anew():
    plain, *ways = (
        [float(number) for number in line.split()]
        for line in printed_with_libtpu(IMAGES).splitlines()
    )
    parameters = 4 * (16 * 16 * 3 * 768 + 2 * 768 * 3072)
    for temporaries, accessed in ways:
        assert temporaries < plain[0] + parameters and accessed < 1.7 * plain[1]


# A small case of benchmarks/two_slices.py: what crosses the network between slices.
TWO_SLICES = """
import json, two_slices

two_slices.D_MODEL, two_slices.D_FF, two_slices.LAYERS = 256, 512, 1
mesh = two_slices.two_slices("v5e:2x2", model_shards=1)
steps = {
    "replicated": ["plain", "ours", "groups = shards, in bf16", "groups = slices",
                   "groups = slices, replicated_params"],
    "FSDP in each slice": ["plain", "groups = slices"],
}
found = {
    layout: [two_slices.sent_bytes(two_slices.make_steps(layout)[s], mesh, layout) for s in names]
    for layout, names in steps.items()
}
print(json.dumps(found))
"""


def test_what_is_sent_between_slices():
    found = json.loads(printed_with_libtpu(TWO_SLICES))
    plain, ours, shards_in_bf16, slices, at_once = found["replicated"]
    # Each of a slice's four chips sends its quarter of the gradient, and where each slice is a
    # group, as docs/meshes.md warns, all of it. (And scalars, which take a tile each.)
    assert plain == pytest.approx(4 * 2 * 256 * 512 / 4, rel=0.03)
    assert [ours, shards_in_bf16, slices] == pytest.approx([2 * plain, plain / 2, 4 * plain], 0.03)
    assert at_once == pytest.approx(plain, rel=0.03)
    plain, slices = found["FSDP in each slice"]
    assert slices == pytest.approx(plain, rel=0.03)
