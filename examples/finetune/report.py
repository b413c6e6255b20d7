"""The table and the picture of the two runs."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # there may be no display

import matplotlib.pyplot as plt

COLOURS = {"plain": "#b5482a", "sam": "#1f6f8b"}
NAMES = {"plain": "plain", "sam": "SAM"}


def table(runs: dict[str, dict]) -> str:
    """The comparison as text, one line for each quantity."""
    plain, sam = runs["plain"], runs["sam"]
    rows = [("", *(NAMES[name] for name in ("plain", "sam")), "SAM - plain")]
    for which in ("best", "last"):
        title = "best checkpoint (by validation)" if which == "best" else "last checkpoint"
        rows.append((f"{title}, step", str(plain[which]["step"]), str(sam[which]["step"]), ""))
        for key, label, unit in _TEST_METRICS:
            rows.append(_difference(f"  {label}", plain[which][key], sam[which][key], unit))
    end = plain["records"][-1], sam["records"][-1]
    rows.append(_difference("  training loss", end[0]["train_loss"], end[1]["train_loss"], ""))
    rows.append(("", "", "", "SAM / plain"))
    for key, label, unit, scale in _RATIOS:
        rows.append(_ratio(label, plain[key] / scale, sam[key] / scale, unit))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = [
        "  ".join(
            [
                row[0].ljust(widths[0]),
                *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)),
            ]
        )
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)


_TEST_METRICS = (
    ("exact_match", "test exact match", "%"),
    ("phoneme_error_rate", "test phoneme error rate", "%"),
    ("loss", "test loss", ""),
)
_RATIOS = (
    ("sharpness", "sharpness (top Hessian eigenvalue)", "", 1),
    ("step_seconds", "time of a step", " ms", 1e-3),
    ("step_flops", "FLOPs of a step", " G", 1e9),
)


def _difference(label, plain, sam, unit):
    digits = 1 if unit == "%" else 3
    values = (f"{x:.{digits}f}{unit}" for x in (plain, sam))
    return (label, *values, f"{sam - plain:+.{digits}f}")


def _ratio(label, plain, sam, unit):
    return (label, f"{plain:.4g}{unit}", f"{sam:.4g}{unit}", f"{sam / plain:.2f}")


def draw(runs: dict[str, dict], path: Path, caption: str) -> None:
    """Saves the picture: loss and exact match against step, and the loss around both solutions."""
    figure, axes = plt.subplot_mosaic("AAABBB;CCDDEE", figsize=(12, 8), layout="constrained")
    _draw_losses(axes["A"], runs)
    _draw_exact_match(axes["B"], runs)
    _draw_surroundings(axes["C"], runs, "top_eigenvector", "the top Hessian eigenvector")
    _draw_surroundings(axes["D"], runs, "gradient", "the gradient")
    _draw_surroundings(axes["E"], runs, "random", "one random direction")
    for axis in axes.values():
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    figure.suptitle(caption, fontsize=11)
    temporary = path.with_name("unfinished-" + path.name)
    figure.savefig(temporary, dpi=150)
    plt.close(figure)
    temporary.replace(path)


def _draw_losses(axis, runs):
    for name, run in runs.items():
        steps = [record["step"] for record in run["records"]]
        held_out = [record["loss"] for record in run["records"]]
        training = [record["train_loss"] for record in run["records"]]
        axis.plot(steps, held_out, color=COLOURS[name], label=f"{NAMES[name]}, held-out")
        axis.plot(steps, training, "--", color=COLOURS[name], label=f"{NAMES[name]}, training")
    axis.set(title="Loss", xlabel="step", ylabel="cross entropy per phoneme (nats)")
    axis.set_ylim(bottom=0)
    axis.legend(frameon=False)


def _draw_exact_match(axis, runs):
    for name, run in runs.items():
        steps = [record["step"] for record in run["records"]]
        values = [record["exact_match"] for record in run["records"]]
        axis.plot(steps, values, color=COLOURS[name], label=NAMES[name])
        best = steps.index(run["best"]["step"])
        axis.plot(steps[best], values[best], "o", color=COLOURS[name])
    axis.set(title="Exact match on validation words", xlabel="step", ylabel="%")
    axis.set_ylim(bottom=0)
    axis.legend(frameon=False, title="dot: best checkpoint")


def _draw_surroundings(axis, runs, direction, words):
    for name, run in runs.items():
        walk = run["loss_along"][direction]
        label = f"{NAMES[name]}, eigenvalue {run['sharpness']:.3g}"
        label = label if direction == "top_eigenvector" else NAMES[name]
        axis.plot(walk["distance"], walk["loss"], color=COLOURS[name], label=label)
    axis.set(
        title=f"Along {words}",
        xlabel="distance from the last checkpoint",
        ylabel="training loss (nats)",
    )
    axis.set_ylim(bottom=0)
    axis.legend(frameon=False)
