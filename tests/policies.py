"""When two training states are the same to float32 rounding."""

import jax
import numpy as np

from astrolabe_jax.types import TrainState


def assert_same_state(state: TrainState, want: TrainState, atol: float = 2e-6) -> None:
    """Compare gradients, which the moments carry, and what a first optimizer step made of them.

    Both states are on the host.
    """
    for a, b in zip(jax.tree.leaves(state.optimizer), jax.tree.leaves(want.optimizer), strict=True):
        np.testing.assert_allclose(a, b, atol=atol)
    # Where the gradient is near zero, Adam's first step is its sign: compare where it is not.
    for name in state.current:
        for half in "ab":
            moment = want.optimizer[0].mu[name][half]
            clear = np.abs(moment) > 1e-3 * np.abs(moment).max()
            for policy in ("current", "ema"):
                got = getattr(state, policy)[name][half][clear]
                expected = getattr(want, policy)[name][half][clear]
                error = f"{policy} {name}.{half}"
                np.testing.assert_allclose(got, expected, atol=2e-5, err_msg=error)
