"""From the JSON of `ahead_of_time.py` to ratios, checks and a table. Needs no compiler, no JAX."""

from collections.abc import Iterable
from typing import Any

BATCH = 128  # examples in a step
REDUCTIONS = ("all-reduce", "reduce-scatter")


def expected_flops(step: str, shards: int) -> float:
    """FLOPs in plain steps: the descent, and an ascent on 1/4 or at least one example a shard."""
    fraction = max(BATCH // 4, shards) / BATCH
    if step.startswith("plain"):
        return 1.0
    if step == "full SAM":
        return 2.0
    if step == "prefix slice":
        return 1.25
    if step.startswith("m = 4"):
        fraction = min(1.0, max(0.25, 4 * shards / BATCH))
        return (4.0 if "paper" in step else 1.0) + fraction
    return 1 + fraction


def bytes_over(
    entry: dict[str, Any],
    axis: str | None = None,
    kinds: Iterable[str] = REDUCTIONS,
    dtype: str | None = None,
) -> int:
    """Bytes of the collectives of some kinds. One over several axes counts under its first.

    The batch is sharded over `data`, and where there are groups of several shards, over `group`
    and `data`: both count as `data`.
    """
    return sum(
        c["bytes"]
        for c in entry["collectives"]
        if c["kind"] in kinds
        and axis in (None, c["axes"].split("+")[0].replace("group", "data"))
        and dtype in (None, c["dtype"])
    )


def numbers_over(entry: dict[str, Any], axis: str) -> float:
    """How many numbers are reduced over an axis: bytes at equal dtype."""
    return sum(bytes_over(entry, axis, dtype=d) / w for d, w in (("f32", 4), ("bf16", 2)))


def count_of(entry: dict[str, Any], kind: str, dtype: str | None = None) -> int:
    """How many collectives of a kind a step runs."""
    return sum(
        c["count"]
        for c in entry["collectives"]
        if c["kind"] == kind and dtype in (None, c["dtype"])
    )


def moved_examples(entry: dict[str, Any]) -> int:
    """Collectives that move signed integers: in these models, tokens, so examples between devices.

    Random bits and their counters are unsigned.
    """
    return sum(
        c["count"]
        for c in entry["collectives"]
        if c["dtype"] in ("s32", "s64") and c["kind"] not in REDUCTIONS
    )


def extra_copies(entry: dict[str, Any], plain: dict[str, Any]) -> float:
    """Temporaries beyond the plain step's, in copies of the parameters as they are sharded."""
    return (entry["temporary_bytes"] - plain["temporary_bytes"]) / plain["parameter_bytes"]


def copies_at_the_peak(entry: dict[str, Any], plain: dict[str, Any]) -> float | None:
    """The same of what is alive at once at the most; None if one of them does not have it."""
    if "peak_bytes" not in entry or "peak_bytes" not in plain:
        return None
    return (entry["peak_bytes"] - plain["peak_bytes"]) / plain["parameter_bytes"]


def broken_expectations(entry: dict[str, Any], plain: dict[str, Any]) -> list[str]:
    """Return what a compiled step costs beyond what it should, in words."""
    found = []
    if entry["loops_counted_once"]:
        found.append(f"{entry['loops_counted_once']} loops of unknown length, counted once")
    if entry["flops"] is not None:
        flops = entry["flops"] / plain["flops"]
        if abs(flops / entry["expected_flops"] - 1) > 0.005:
            found.append(f"FLOPs {flops:.4f} instead of {entry['expected_flops']:.4f}")
    if entry["step"] != "prefix slice" and moved_examples(entry) > moved_examples(plain):
        found.append(f"{moved_examples(entry)} collectives move examples")
    if not entry["step"].startswith("m = 4"):
        allowed = plain["temporary_bytes"] + 1.01 * plain["parameter_bytes"]
        if entry["temporary_bytes"] > allowed:
            at_the_peak = copies_at_the_peak(entry, plain)
            found.append(
                f"temporaries of the plain step and {extra_copies(entry, plain):.2f} copies of the "
                "parameters" + ("" if at_the_peak is None else f", {at_the_peak:+.2f} at the peak")
            )
    # A dense model's step has no use for one: it would reshard something the size of a parameter.
    resharded = count_of(entry, "all-to-all") - count_of(plain, "all-to-all")
    if entry["step"] != "prefix slice" and resharded > 0:
        found.append(f"{resharded} all-to-alls")
    if entry["step"].startswith("groups = shards"):
        numbers = numbers_over(entry, "data") / numbers_over(plain, "data")
        if numbers > 1.05:
            found.append(f"{numbers:.3f} of the numbers reduced over `data`")
        over_model = bytes_over(entry, "model"), bytes_over(plain, "model")
        if over_model[0] > entry["expected_flops"] * over_model[1]:  # as much as there is work
            found.append(f"{over_model[0] / over_model[1]:.4f} of the bytes reduced over `model`")
    return found


_SIZES = ("tiny", "mini", "small", "base", "large", "xl")


def markdown(results: dict[str, Any], head: str | None = None) -> str:
    """An overview, and one table for each slice, layout, model and effort, under `head`."""
    settings: dict[tuple, dict[str, Any]] = {}
    for entry in results.values():
        key = tuple(entry[name] for name in ("slice", "layout", "size", "effort"))
        settings.setdefault(key, {})[entry["step"]] = entry
    in_order = sorted(settings.items(), key=_place)
    sections = [_section(*key, steps) for key, steps in in_order]
    overview = _overview(dict(in_order))
    return "\n\n".join([head or HEAD, *(s for s in (overview, *sections) if s)]) + "\n"


def _place(setting: tuple[tuple, Any]) -> tuple:
    (slice_name, layout, size, effort), _ = setting
    # The slices of 16 chips have the shorter names.
    place = _SIZES.index(size) if size in _SIZES else len(_SIZES)
    return len(slice_name), slice_name, layout, place, effort


_IN_THE_OVERVIEW = ("ours", "groups = shards, in bf16")


def _overview(settings: dict[tuple, dict[str, Any]]) -> str:
    """A line for each setting's exact step and groups, without what is in the tables only."""
    lines = []
    for (slice_name, layout, size, effort), steps in settings.items():
        plain, bare = steps.get("plain"), steps.get("two bare passes")
        if plain is None or plain["status"] != "compiled":
            continue
        named = f"{size} | {slice_name} | {layout} | {effort:g}"
        for name in _IN_THE_OVERVIEW:
            entry = steps.get(name)
            if entry is None or entry["status"] != "compiled":
                continue
            flops = "-" if entry["flops"] is None else f"{entry['flops'] / plain['flops']:.4f}"
            reduced = _ratio(bytes_over(entry, "data"), bytes_over(plain, "data"))
            of_bare = "" if bare is None else _copies(bare, plain)
            lines.append(
                f"| {named} | {name} | {flops} | {entry['expected_flops']:g} | {reduced} "
                f"| {_copies(entry, plain)} | {of_bare} |"
            )
    if not lines:
        return ""
    columns = (
        "| model | slice | layout | effort | step | FLOPs | expected | reduced over data "
        "| temporaries, peak | of two bare passes |"
    )
    return "\n".join(["## Overview", "", columns, "|---" * 10 + "|", *lines])


def _copies(entry: dict[str, Any], plain: dict[str, Any]) -> str:
    peak = copies_at_the_peak(entry, plain)
    return f"{extra_copies(entry, plain):+.2f}, {'-' if peak is None else f'{peak:+.2f}'}"


LEGEND = """\
- *temporaries*: ratio, and the difference in copies of the parameters as they are sharded. This is
  what the step reserves: its arrays as the compiler packs them, with the gaps between them.
- *peak*: what is alive at once at the most, of arguments and temporaries, as the compiler says; in
  the same copies more than the plain step's.
- *reduced over data, model*: result bytes of the all-reduces and reduce-scatters over that mesh
  axis, and *in bf16*, the share of them that is in bfloat16.
- *other*: result bytes of the collectives that reduce nothing (all-gather, all-to-all,
  collective-permute).
- *collectives*: how many all-reduces, reduce-scatters, all-gathers, all-to-alls and permutes.
- *examples moved*: collectives of signed integers that reduce nothing: tokens, and in T5X's plain
  step the argmax of its accuracy.
- *effort*: the compiler's. At -1 it compiles several times faster and spends less on packing
  memory, so compare temporaries only within one effort, and trust those at 0."""

HEAD = f"""# What a step costs on TPU slices, as ratios to the plain step

Compiled ahead of time by `tpu_cost.py`, per device; nothing was run. T5.1.1, bfloat16 activations,
float32 parameters, Adafactor, no dropout, 128 examples of 512 and 62 tokens. Without collective
matrix products, which are loops that the compiler counts once
(`LIBTPU_INIT_ARGS=--xla_jf_spmd_threshold_for_windowed_einsum_mib=1000000`).

{LEGEND}
- *plain, one psum*: the plain step with its gradient reduced as with groups, in a stated dtype. The
  compiler reduces most of the plain step's in bfloat16; groups reduce in the gradient's float32
  unless `reduction_dtype` says otherwise.
- *two bare passes*: `grad(w + 0.1 grad(w))` with the same ascent examples, without norm or checks:
  what any SAM costs at least, to this compiler.
- *ours* with FSDP is with `replicated_params=False` where layers are scanned. Without a loop, and
  of Base and XL on v5e:4x4 at effort 0, it was compiled before there was that setting: the default.
- *scanned*: a stack's layers are one layer in a loop, computed again in the backward pass, as
  models that need FSDP are mostly written. FLOPs and bytes accessed are added up from those of
  models of one layer and of two, without loops (Base's whole step without loops had the same
  FLOPs to 2e-5, and 1 to 2% fewer bytes; Small's here are counted so).
- *m = 4* takes the ascent on the smallest share of the batch that 4 groups on every shard can have:
  4 examples a shard, 1/2 of the batch on 16 shards, all of it on 32. *bare* is Foret's form as one
  writes it, with a norm in one sum and no care for extreme gradients.
- *groups = several shards*: a group is 4 shards, so that there are 4 groups, too, at the same time:
  the mesh is 4 `group` x 4 `data`. The ascent's gradient is reduced over `data` only."""

GPU_HEAD = f"""# What a step costs on nodes of GPUs, as ratios to the plain step

Compiled ahead of time by `gpu_cost.py`, per device; nothing was run. `h100:4x8` is 4 nodes of 8
H100s. The model, the batch and the steps are those of the [table for TPUs](tpu_cost.md). This
compiler does not say FLOPs or bytes accessed. No kernel is tuned and no cuBLAS workspace counted,
as there is no GPU.

{LEGEND}"""


def _section(slice_name: str, layout: str, size: str, effort: float, steps: dict) -> str:
    plain = steps.get("plain")
    if plain is None:
        return ""
    title = f"## {size}, {slice_name}, {layout}, effort {effort:g}"
    if plain["status"] != "compiled":
        why = [f"- {name}: {e['status']}: {e.get('reason', '')}" for name, e in steps.items()]
        return "\n".join(
            [title, "", "The plain step is not compiled, so there are no ratios:", "", *why]
        )
    mesh = " x ".join(f"{n} {axis}" for axis, n in plain["mesh"].items())
    lines = [
        title,
        "",
        f"{plain['parameters'] / 1e6:.0f}M parameters on {mesh}. Plain: {_counted(plain)}"
        f"{plain['argument_bytes'] / 1e9:.2f} GB of arguments, "
        f"{plain['temporary_bytes'] / 1e9:.2f} GB of temporaries, "
        f"{bytes_over(plain, 'data') / 1e6:.0f} MB reduced over data, "
        f"{bytes_over(plain, 'model') / 1e6:.0f} MB over model, "
        f"{bytes_over(plain, kinds=_OTHER) / 1e6:.0f} MB in other collectives; compiled in "
        f"{plain['compile_seconds']:.0f} s.",
        "",
        "| step | FLOPs | expected | bytes accessed | temporaries | peak | reduced over data "
        "| in bf16 | over model | other "
        "| collectives | examples moved | compile |",
        "|---" * 13 + "|",
    ]
    lines += [_row(entry, plain) for entry in steps.values()]
    notes = [
        f"- {name}: {note}"
        for name, entry in steps.items()
        if entry["status"] == "compiled"
        for note in broken_expectations(entry, plain)
    ]
    if notes:
        lines += ["", "Beyond what is expected:", "", *notes]
    return "\n".join(lines)


def _counted(plain: dict[str, Any]) -> str:
    if plain["flops"] is None:
        return ""
    tflop, gb = plain["flops"] / 1e12, plain["bytes_accessed"] / 1e9
    return f"{tflop:.3f} TFLOP, {gb:.1f} GB accessed, "


_OTHER = ("all-gather", "all-to-all", "collective-permute")


def _row(entry: dict[str, Any], plain: dict[str, Any]) -> str:
    if entry["status"] != "compiled":
        return f"| {entry['step']} | {entry['status']}: {entry['reason']} " + "|" * 12
    over_data = bytes_over(entry, "data")
    cells = [
        entry["step"],
        "-" if entry["flops"] is None else f"{entry['flops'] / plain['flops']:.4f}",
        f"{entry['expected_flops']:g}",
        "-"
        if entry["bytes_accessed"] is None
        else f"{entry['bytes_accessed'] / plain['bytes_accessed']:.2f}",
        f"{entry['temporary_bytes'] / plain['temporary_bytes']:.2f} "
        f"({extra_copies(entry, plain):+.2f})",
        "-" if (copies := copies_at_the_peak(entry, plain)) is None else f"{copies:+.2f}",
        _ratio(over_data, bytes_over(plain, "data")),
        _ratio(bytes_over(entry, "data", dtype="bf16"), over_data),
        _ratio(bytes_over(entry, "model"), bytes_over(plain, "model")),
        _ratio(bytes_over(entry, kinds=_OTHER), bytes_over(plain, kinds=_OTHER)),
        ", ".join(str(count_of(entry, kind)) for kind in (*REDUCTIONS, *_OTHER)),
        str(moved_examples(entry)),
        f"{entry['compile_seconds'] / plain['compile_seconds']:.2f}",
    ]
    return "| " + " | ".join(cells) + " |"


def _ratio(value: float, base: float) -> str:
    if base:
        return f"{value / base:.3f}"
    return "-" if not value else f"{value / 1e6:.1f} MB"
