"""cost.py: exact counts of small programs, and compilers' memory of larger ones."""

from types import MappingProxyType

import jax
import jax.numpy as jnp
import pytest

from astrolabe_jax import cost
from astrolabe_jax.models.attention import attention
from astrolabe_jax.runtime import backend


def cost_of(function, *shapes, split=MappingProxyType({}), **options):
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    program = jax.make_jaxpr(jax.jit(function, **options))(*arrays)
    ((_, taken),) = cost.calls(program, split)
    return taken


def test_of_arrays_that_are_split_a_device_holds_its_part():
    taken = cost_of(lambda x, w: (x @ w, w @ w), (6, 8), (8, 8), split={(8, 8): 4})
    assert taken.held == 4 * (6 * 8 + 8 * 8 / 4)
    assert taken.products == 2 * 6 * 8 * 8 + 2 * 8 * 8 * 8


def test_products_and_convolutions_are_counted_exactly():
    taken = cost_of(lambda x, w: x @ w, (6, 8), (8, 4))
    assert taken == (2 * 6 * 8 * 4, 0, 4 * (6 * 8 + 8 * 4 + 6 * 4), 4 * 6 * 4)
    batched = cost_of(lambda x, w: jnp.einsum("bij,bkj->bik", x, w), (3, 6, 8), (3, 4, 8))
    assert batched.products == 2 * 3 * 6 * 8 * 4
    dims = jax.lax.conv_dimension_numbers((1, 9, 9, 6), (3, 3, 3, 8), ("NHWC", "HWIO", "NHWC"))

    def convolve(x, kernel):
        return jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=dims, feature_group_count=2
        )

    taken = cost_of(convolve, (1, 9, 9, 6), (3, 3, 3, 8))
    assert (taken.products, taken.convolutions) == (0, 2 * 9 * 9 * 8 * 3 * 3 * 3)


def test_loops_count_as_often_as_they_run_and_branches_once():
    def loop(x, w):
        return jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, None, length=5)[0]

    assert cost_of(loop, (6, 8), (8, 8)).products == 5 * 2 * 6 * 8 * 8

    def branch(x, w):
        return jax.lax.cond(x[0, 0] > 0, lambda: x @ w @ w, lambda: x @ w)

    assert cost_of(branch, (6, 8), (8, 8)).products == 2 * 2 * 6 * 8 * 8


def test_what_is_computed_on_the_way_is_not_held():
    def chain(x, w):
        return (jnp.sin(2 * x + 1) * x).T @ w

    taken = cost_of(chain, (64, 32), (64, 4))
    assert taken.held == 4 * (64 * 32 + 32 * 4)  # the left operand of the product, and the result
    assert cost_of(lambda x: jnp.sum(jnp.sin(x) ** 2, axis=0), (64, 32)).held == 4 * 32


def test_what_is_dead_is_not_held():
    def layers(x, w):
        for _ in range(8):
            x = x @ w
        return x

    assert cost_of(layers, (64, 32), (32, 32)).held == 2 * 4 * 64 * 32


def test_donated_memory_is_used_again():
    def write(cache, x):
        return jax.lax.dynamic_update_slice(cache, x @ x, (0, 0))

    shapes = ((512, 8), (8, 8))
    assert cost_of(write, *shapes, donate_argnums=0).held == 4 * 8 * 8
    accumulated = cost_of(lambda total, x: total + x @ x.T, (8, 8), (8, 2), donate_argnums=0)
    assert accumulated.held == 4 * 8 * 8


def test_a_kernel_of_attention_counts_its_products():
    q, k = (jax.ShapeDtypeStruct((2, n, 3, 128), jnp.bfloat16) for n in (256, 1024))
    with backend.planned("tpu"):
        program = jax.make_jaxpr(jax.jit(lambda q, k, v: attention(q, k, v)))(q, k, k)
    ((_, taken),) = cost.calls(program)
    assert taken.products == 4 * 2 * 3 * 256 * 1024 * 128
    assert taken.held < 1.25 * 2 * (q.size + k.size) * q.dtype.itemsize  # no scores


@pytest.mark.parametrize("gradient", [False, True])
def test_it_is_near_what_a_compiler_holds(gradient):
    """Of the CPU's, which fuses less than those of accelerators."""

    def network(x, w):
        def layer(x, w):
            return x + jax.nn.gelu(x @ w[0]) @ w[1], None

        return jnp.sum(jax.lax.scan(jax.checkpoint(layer), x, w)[0] ** 2)

    function = jax.grad(network) if gradient else network
    shapes = ((512, 64), (6, 2, 64, 64))
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    memory = jax.jit(function).lower(*arrays).compile().memory_analysis()
    compiled = memory.temp_size_in_bytes + memory.output_size_in_bytes
    assert cost_of(function, *shapes).held == pytest.approx(compiled, rel=0.35)
