"""Optax wrappers that cannot work around `sharpness_aware`, and why."""

import inspect

_REASONS = {
    "MultiSteps": (
        "optax.MultiSteps accumulates the gradients it is given, but sharpness_aware computes its "
        "own, on the batch of the last micro-step alone"
    ),
    "apply_if_finite.<locals>": (
        "optax.apply_if_finite checks the gradient it is given, but sharpness_aware computes the "
        "one that counts after that check"
    ),
    "masked.<locals>": (
        "optax.masked, of which optax.partition is made, hides parameters from what it wraps, but "
        "sharpness_aware hands all of them to grad_fn"
    ),
    "mechanize.<locals>": (
        "optax.contrib.mechanize tunes the step size on the gradient it is given, but "
        "sharpness_aware computes the one that counts after that"
    ),
    "flatten.<locals>": (
        "optax.flatten hands on the parameters as one vector, but grad_fn takes them as they are"
    ),
    "lookahead.<locals>": (
        "optax.lookahead does not hand on grad_fn and the batch, which sharpness_aware needs (and "
        "inside it wants the gradient at its fast parameters only: inner=optax.chain("
        "optax.stateless(lambda grads, _: grads.fast), optax.lookahead(...)))"
    ),
    "split_real_and_imaginary.<locals>": (
        "optax.contrib.split_real_and_imaginary does not hand on grad_fn and the batch, which "
        "sharpness_aware needs"
    ),
}
_REASONS_WITHOUT_UPDATES = {
    f"{name}.<locals>": (
        f"optax.{name} returns either an update or what it makes of the updates it is given, and "
        "is given None: give it the ascent gradient as updates"
    )
    for name in ("conditionally_mask", "conditionally_transform")
}


def refuse_outer_wrapper(*, has_updates: bool = True) -> None:
    """Raise if the caller is a wrapper that would make the step silently wrong.

    These wrappers work on the gradient that they pass down, and leave no trace in the arguments of
    the transformation that they wrap; so this looks at who called. It costs nothing inside `jit`.

    Args:
      has_updates: whether updates are given, which some wrappers cannot do without.

    Raises:
      ValueError: with the reason, and the form that works.
    """
    reasons = _REASONS if has_updates else _REASONS | _REASONS_WITHOUT_UPDATES
    frame = inspect.currentframe()
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        wrapper, _, _ = frame.f_code.co_qualname.rpartition(".")  # of its init or update
        reason = reasons.get(wrapper) if module.startswith("optax.") else None
        if reason:
            raise ValueError(
                f"sharpness_aware cannot work here: {reason}. Put the wrapper around the plain "
                "optimizer and give it the gradient of sam_optax.value_and_grad(loss_fn), or put "
                "it inside, sharpness_aware(inner=...)."
            )
        frame = frame.f_back
