"""The contract's table: every gradient transformation of Optax, and what cannot work with which.

A check that an entry cannot pass is named in `cannot`, with the reason; the tests assert that the
optimizer alone, without SAM, cannot pass it either.
"""

import functools
import inspect
import warnings
from collections.abc import Callable, Mapping
from types import FunctionType
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
import optax.contrib


class Entry(NamedTuple):
    """How to build one of Optax's gradient transformations.

    Attributes:
      make: builds it.
      cannot: from the name of a check to why the transformation alone cannot pass it.
      needs: the extra arguments that it cannot do without, if it does not take others.
    """

    make: Callable[[], optax.GradientTransformation]
    cannot: Mapping[str, str] = {}
    needs: tuple[str, ...] = ()


LR = 0.02


def as_matrices(updates):
    """Tell Muon that each leaf is a matrix."""
    return jax.tree.map(lambda _: optax.contrib.MuonDimensionNumbers(), updates)


NOT_A_BATCH_GRADIENT = "it takes one gradient per example, and raises for the batch's"
NO_EXTRA_ARGUMENTS = "its update has no **extra_args"
NO_UNKNOWN_ARGUMENTS = "a line search takes no argument that value_fn does not name"
PROMOTES = "it promotes ranks silently, and the tests make that an error"
WEAK = "its state starts with other weak types than it goes on with"
GROWS = "its state has no measurements before the first update"
KEY_LEAF = "its state has a PRNG key, which Flax's format does not have"
KEY_ON_A_MESH = "its state has a PRNG key, and JAX compiles a second time for the key of a step"
EMPTY_LEAF = "its state has an array of size 0 for the bias, and Orbax saves none"
NEEDS_LEAVES = "its init looks into the leaves, of which tree_map_params's placeholder has none"
FLATTENS = "it flattens sharded leaves, which explicit axes forbid without out_sharding"
MULTIPLIES = "it multiplies along a sharded axis, which explicit axes forbid without out_sharding"

PER_EXAMPLE = {"gradient": NOT_A_BATCH_GRADIENT}
LINE_SEARCH = {"extra": NO_UNKNOWN_ARGUMENTS, "types": WEAK}
LINE_SEARCH_NEEDS = ("value", "grad", "value_fn")
LBFGS = LINE_SEARCH | {"sharded": FLATTENS, "map_params": NEEDS_LEAVES}
GALORE = {"sharded": "it takes the SVD, which explicit axes forbid", "orbax": EMPTY_LEAF}

# What trains by itself: the whole contract.
OPTIMIZERS = {
    "adabelief": Entry(lambda: optax.adabelief(LR)),
    "adadelta": Entry(lambda: optax.adadelta(1.0)),
    "adafactor": Entry(lambda: optax.adafactor(LR, min_dim_size_to_factor=4, momentum=0.9)),
    "adagrad": Entry(lambda: optax.adagrad(LR)),
    "adam": Entry(lambda: optax.adam(LR)),
    "adamax": Entry(lambda: optax.adamax(LR)),
    "adamaxw": Entry(lambda: optax.adamaxw(LR)),
    "adamw": Entry(lambda: optax.adamw(LR)),
    "adan": Entry(lambda: optax.adan(LR)),
    "amsgrad": Entry(lambda: optax.amsgrad(LR)),
    "fromage": Entry(lambda: optax.fromage(LR)),
    "lamb": Entry(lambda: optax.lamb(LR)),
    "lars": Entry(lambda: optax.lars(LR)),
    "lbfgs": Entry(lambda: optax.lbfgs(memory_size=2), LBFGS, LINE_SEARCH_NEEDS),
    "lion": Entry(lambda: optax.lion(LR)),
    "nadam": Entry(lambda: optax.nadam(LR)),
    "nadamw": Entry(lambda: optax.nadamw(LR)),
    "noisy_sgd": Entry(
        lambda: optax.noisy_sgd(LR, key=jax.random.key(0)),
        {"flax": KEY_LEAF, "one program on a mesh": KEY_ON_A_MESH},
    ),
    "novograd": Entry(lambda: optax.novograd(LR)),
    "optimistic_adam": Entry(lambda: optax.optimistic_adam(LR, optimism=0.1)),
    "optimistic_adam_v2": Entry(lambda: optax.optimistic_adam_v2(LR)),
    "optimistic_gradient_descent": Entry(lambda: optax.optimistic_gradient_descent(LR)),
    "polyak_sgd": Entry(lambda: optax.polyak_sgd(0.1)),
    "radam": Entry(lambda: optax.radam(LR)),
    "rmsprop": Entry(lambda: optax.rmsprop(LR, momentum=0.9)),
    "rprop": Entry(lambda: optax.rprop(LR)),
    "sgd": Entry(lambda: optax.sgd(LR, momentum=0.9, nesterov=True)),
    "sign_sgd": Entry(lambda: optax.sign_sgd(LR)),
    "signum": Entry(lambda: optax.signum(LR)),
    "sm3": Entry(lambda: optax.sm3(LR)),
    "yogi": Entry(lambda: optax.yogi(LR)),
    "contrib.acprop": Entry(lambda: optax.contrib.acprop(LR)),
    "contrib.ademamix": Entry(lambda: optax.contrib.ademamix(LR)),
    "contrib.adopt": Entry(lambda: optax.contrib.adopt(LR)),
    "contrib.cocob": Entry(lambda: optax.contrib.cocob()),
    "contrib.dadapt_adamw": Entry(lambda: optax.contrib.dadapt_adamw(), {"sharded": FLATTENS}),
    "contrib.dog": Entry(lambda: optax.contrib.dog()),
    "contrib.dowg": Entry(lambda: optax.contrib.dowg()),
    "contrib.dpsgd": Entry(lambda: optax.contrib.dpsgd(LR, 1.0, 0.1, seed=0), PER_EXAMPLE),
    "contrib.galore": Entry(lambda: optax.contrib.galore(LR, rank=2, update_proj_gap=2), GALORE),
    "contrib.madgrad": Entry(lambda: optax.contrib.madgrad(LR)),
    "contrib.mechanize": Entry(
        lambda: optax.contrib.mechanize(optax.sgd(LR)), {"sharded": FLATTENS}
    ),
    "contrib.momo": Entry(lambda: optax.contrib.momo(), {"sharded": FLATTENS}),
    "contrib.momo_adam": Entry(lambda: optax.contrib.momo_adam(), {"sharded": FLATTENS}),
    "contrib.muon": Entry(lambda: optax.contrib.muon(LR), {"sharded": MULTIPLIES}),
    "contrib.prodigy": Entry(lambda: optax.contrib.prodigy(), {"sharded": FLATTENS}),
    "contrib.sam": Entry(
        lambda: optax.contrib.sam(optax.sgd(LR), optax.sgd(0.1)), {"extra": NO_EXTRA_ARGUMENTS}
    ),
    "contrib.schedule_free": Entry(lambda: optax.contrib.schedule_free(optax.sgd(LR), LR)),
    "contrib.schedule_free_adamw": Entry(lambda: optax.contrib.schedule_free_adamw(LR)),
    "contrib.schedule_free_sgd": Entry(lambda: optax.contrib.schedule_free_sgd(LR)),
    "contrib.simplified_ademamix": Entry(lambda: optax.contrib.simplified_ademamix(LR)),
    "contrib.sophia": Entry(lambda: optax.contrib.sophia(LR)),
    # Settings that make another optimizer of the same function.
    "lbfgs, backtracking": Entry(
        lambda: optax.lbfgs(
            memory_size=2,
            linesearch=optax.scale_by_backtracking_linesearch(5, store_grad=True),
        ),
        LBFGS,
        LINE_SEARCH_NEEDS,
    ),
    "adam, with a schedule": Entry(lambda: optax.adam(optax.linear_schedule(LR, 0.0, 4))),
    "sgd, reduce_on_plateau": Entry(
        lambda: optax.chain(optax.sgd(LR), optax.contrib.reduce_on_plateau(patience=1))
    ),
}


# What stands in a chain in front of or behind an optimizer.
PARTS = {
    "adaptive_grad_clip": Entry(lambda: optax.adaptive_grad_clip(0.01)),
    "add_decayed_weights": Entry(lambda: optax.add_decayed_weights(0.1)),
    "add_noise": Entry(lambda: optax.add_noise(0.1, 0.5, key=jax.random.key(1))),
    "apply_every": Entry(lambda: optax.apply_every(2)),
    "centralize": Entry(lambda: optax.centralize()),
    "clip": Entry(lambda: optax.clip(0.01)),
    "clip_by_block_rms": Entry(lambda: optax.clip_by_block_rms(0.01)),
    "clip_by_global_norm": Entry(lambda: optax.clip_by_global_norm(0.01)),
    "ema": Entry(lambda: optax.ema(0.9)),
    "freeze": Entry(lambda: optax.freeze({"w": True, "b": False})),
    "identity": Entry(lambda: optax.identity()),
    "keep_params_nonnegative": Entry(lambda: optax.keep_params_nonnegative()),
    "measure_with_ema": Entry(
        lambda: optax.monitor({"norm": optax.measure_with_ema(optax.tree.norm, 0.9)}),
        {"types": GROWS},
    ),
    "monitor": Entry(lambda: optax.monitor({"norm": optax.tree.norm}), {"types": GROWS}),
    "normalize_by_update_norm": Entry(lambda: optax.normalize_by_update_norm()),
    "scale": Entry(lambda: optax.scale(-0.5)),
    "scale_by_adadelta": Entry(lambda: optax.scale_by_adadelta()),
    "scale_by_adam": Entry(lambda: optax.scale_by_adam()),
    "scale_by_adamax": Entry(lambda: optax.scale_by_adamax()),
    "scale_by_adan": Entry(lambda: optax.scale_by_adan()),
    "scale_by_amsgrad": Entry(lambda: optax.scale_by_amsgrad()),
    "scale_by_backtracking_linesearch": Entry(
        lambda: optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(5)),
        LINE_SEARCH,
        LINE_SEARCH_NEEDS,
    ),
    "scale_by_belief": Entry(lambda: optax.scale_by_belief()),
    "scale_by_distance_over_gradients": Entry(
        lambda: optax.scale_by_distance_over_gradients(), {"gradient": PROMOTES}
    ),
    "scale_by_factored_rms": Entry(lambda: optax.scale_by_factored_rms(min_dim_size_to_factor=4)),
    "scale_by_lbfgs": Entry(lambda: optax.scale_by_lbfgs(memory_size=2)),
    "scale_by_learning_rate": Entry(lambda: optax.scale_by_learning_rate(LR)),
    "scale_by_lion": Entry(lambda: optax.scale_by_lion()),
    "scale_by_novograd": Entry(lambda: optax.scale_by_novograd()),
    "scale_by_optimistic_gradient": Entry(lambda: optax.scale_by_optimistic_gradient()),
    "scale_by_param_block_norm": Entry(lambda: optax.scale_by_param_block_norm()),
    "scale_by_param_block_rms": Entry(lambda: optax.scale_by_param_block_rms()),
    "scale_by_polyak": Entry(lambda: optax.scale_by_polyak()),
    "scale_by_radam": Entry(lambda: optax.scale_by_radam()),
    "scale_by_rms": Entry(lambda: optax.scale_by_rms()),
    "scale_by_rprop": Entry(lambda: optax.scale_by_rprop(LR)),
    "scale_by_rss": Entry(lambda: optax.scale_by_rss()),
    "scale_by_schedule": Entry(lambda: optax.scale_by_schedule(lambda count: -LR / (1 + count))),
    "scale_by_sign": Entry(lambda: optax.scale_by_sign()),
    "scale_by_sm3": Entry(lambda: optax.scale_by_sm3()),
    "scale_by_stddev": Entry(lambda: optax.scale_by_stddev()),
    "scale_by_trust_ratio": Entry(lambda: optax.scale_by_trust_ratio()),
    "scale_by_yogi": Entry(lambda: optax.scale_by_yogi()),
    "scale_by_zoom_linesearch": Entry(
        lambda: optax.chain(optax.sgd(1.0), optax.scale_by_zoom_linesearch(5)),
        LINE_SEARCH,
        LINE_SEARCH_NEEDS,
    ),
    "set_to_zero": Entry(lambda: optax.set_to_zero()),
    "snapshot": Entry(lambda: optax.snapshot("norm", optax.tree.norm)),
    "stateless": Entry(lambda: optax.stateless(lambda g, w: jax.tree.map(jnp.add, g, w))),
    "stateless_with_tree_map": Entry(lambda: optax.stateless_with_tree_map(lambda g, w: g + w)),
    "trace": Entry(lambda: optax.trace(0.9)),
    "zero_nans": Entry(lambda: optax.zero_nans()),
    "contrib.differentially_private_aggregate": Entry(
        lambda: optax.contrib.differentially_private_aggregate(1.0, 0.1, key=jax.random.key(0)),
        PER_EXAMPLE,
    ),
    "contrib.hutchinson_estimator_diag_hessian": Entry(
        lambda: optax.contrib.hutchinson_estimator_diag_hessian()
    ),
    "contrib.normalize": Entry(lambda: optax.contrib.normalize()),
    "contrib.reduce_on_plateau": Entry(lambda: optax.contrib.reduce_on_plateau()),
    "contrib.scale_by_acprop": Entry(lambda: optax.contrib.scale_by_acprop()),
    "contrib.scale_by_ademamix": Entry(lambda: optax.contrib.scale_by_ademamix()),
    "contrib.scale_by_adopt": Entry(lambda: optax.contrib.scale_by_adopt()),
    "contrib.scale_by_cocob": Entry(lambda: optax.contrib.scale_by_cocob()),
    "contrib.scale_by_galore": Entry(lambda: optax.contrib.scale_by_galore(rank=2)),
    "contrib.scale_by_madgrad": Entry(lambda: optax.contrib.scale_by_madgrad(LR)),
    "contrib.scale_by_muon": Entry(
        lambda: optax.masked(
            optax.contrib.scale_by_muon(weight_dimension_numbers=as_matrices),
            {"w": True, "b": False},
        )
    ),
    "contrib.scale_by_simplified_ademamix": Entry(
        lambda: optax.contrib.scale_by_simplified_ademamix()
    ),
}

# Before Optax 0.2.8 some states change a weak type or a sharding in the first update, or warn when
# they are initialised with the placeholder of tree_map_params.
BEFORE = "an older Optax than 0.2.8 cannot"
IS_OLDER = tuple(int(n) for n in optax.__version__.split(".")[:3]) < (0, 2, 8)
BEFORE_0_2_8 = {
    "sharded": (
        "adafactor",
        "sm3",
        "contrib.simplified_ademamix",
        "sgd, reduce_on_plateau",
    ),
    "map_params": (
        "contrib.dadapt_adamw",
        "contrib.dog",
        "contrib.dowg",
        "contrib.mechanize",
        "contrib.momo",
        "contrib.momo_adam",
        "contrib.prodigy",
        "contrib.schedule_free",
        "contrib.schedule_free_adamw",
        "contrib.schedule_free_sgd",
        "sgd, reduce_on_plateau",
    ),
    "types": ("contrib.simplified_ademamix", "sgd, reduce_on_plateau"),
}

# Public functions that return, or may return, a gradient transformation and are not in the tables.
WRAPPER = "a wrapper: test_contract_wrappers.py has it inside and around"
NO_TRANSFORMATION = "its signature does not say, but it returns no gradient transformation"
EXCLUDED = {
    "apply_if_finite": WRAPPER,
    "chain": WRAPPER,
    "conditionally_mask": WRAPPER,
    "conditionally_transform": WRAPPER,
    "flatten": WRAPPER,
    "inject_hyperparams": WRAPPER,
    "inject_stateful_hyperparams": "a deprecated name of inject_hyperparams",
    "lookahead": WRAPPER,
    "masked": WRAPPER,
    "multi_transform": WRAPPER,
    "named_chain": WRAPPER,
    "partition": WRAPPER,
    "selective_transform": WRAPPER,
    "with_extra_args_support": "it changes nothing but the type; sharpness_aware calls it",
    "contrib.split_real_and_imaginary": WRAPPER,
    "matrix_inverse_pth_root": NO_TRANSFORMATION,
    "sigmoid_binary_cross_entropy": NO_TRANSFORMATION,
    "update_infinity_moment": NO_TRANSFORMATION,
    "update_moment": NO_TRANSFORMATION,
    "update_moment_per_elem_norm": NO_TRANSFORMATION,
    "contrib.schedule_free_eval_params": NO_TRANSFORMATION,
}


def public_factories() -> set[str]:
    """Names of the installed Optax's functions that return a gradient transformation, or may."""
    names = set()
    for prefix, module in (("", optax), ("contrib.", optax.contrib)):
        for name, function in vars(module).items():
            if name.startswith("_") or not isinstance(function, FunctionType | functools.partial):
                continue
            returns = inspect.signature(function).return_annotation
            if returns is inspect.Signature.empty or "GradientTransformation" in str(returns):
                names.add(prefix + name)
    return names


def is_installed(name: str) -> bool:
    """Whether the installed Optax has the function that an entry is named after."""
    function = name.split(",")[0]
    module, _, function = function.rpartition(".")
    return hasattr(optax.contrib if module else optax, function)


def base(name: str) -> optax.GradientTransformationExtraArgs:
    """Return the optimizer or part by itself, without SAM."""
    with warnings.catch_warnings():
        # Optax deprecates optimistic_adam, and dpsgd's seed, which 0.2.6 requires.
        warnings.simplefilter("ignore", DeprecationWarning)
        return optax.with_extra_args_support((OPTIMIZERS | PARTS)[name].make())


def needs(name: str) -> tuple[str, ...]:
    """Return the extra arguments that the optimizer needs, if it does not take any others."""
    return (OPTIMIZERS | PARTS)[name].needs


def cannot(name: str) -> dict[str, str]:
    """Return from the name of a check to why the optimizer or part cannot pass it by itself."""
    older = {check: BEFORE for check, them in BEFORE_0_2_8.items() if name in them}
    return {**(OPTIMIZERS | PARTS)[name].cannot, **(older if IS_OLDER else {})}
