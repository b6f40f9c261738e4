"""When two training states are the same to float32 rounding."""

import jax
import numpy as np


def assert_same_state(state, want, atol=2e-6) -> None:
    """Gradients, which the moments carry, and what a first optimizer step made of them; both states
    on the host.
    """
    for a, b in zip(jax.tree.leaves(state.optimizer), jax.tree.leaves(want.optimizer), strict=True):
        np.testing.assert_allclose(a, b, atol=atol)
    # Where the gradient is near zero, Adam's first step is its sign: compare where it is not.
    for name in state.current:
        for half in "ab":
            moment = want.optimizer[0].mu[name][half]
            clear = np.abs(moment) > 1e-3 * np.abs(moment).max()
            for policy in ("current", "ema"):
                a, b = (getattr(s, policy)[name][half][clear] for s in (state, want))
                np.testing.assert_allclose(a, b, atol=1e-5, err_msg=f"{policy} {name}.{half}")
