"""What lies apart is computed once, and is what it would be."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from medattn_jax import apart


def test_what_is_given_is_not_computed_within_it():
  x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 12, 16)), jnp.float32)
  turn = lambda x: x.transpose(2, 1, 0)
  way = {"apart": lambda x: apart.call(turn, jnp.tanh(x)), "joined": lambda x: turn(jnp.tanh(x))}
  texts = {}
  for name, function in way.items():
    compiled = jax.jit(function).lower(x).compile()
    texts[name] = compiled.as_text()
    np.testing.assert_array_equal(compiled(x), turn(jnp.tanh(x)))
  assert " call(" in texts["apart"] and " call(" not in texts["joined"]


def test_it_has_gradients():
  x = jnp.arange(6.0).reshape(2, 3)
  slope = jax.grad(lambda x: (apart.call(jnp.transpose, x**2) * x.T).sum())(x)
  np.testing.assert_allclose(slope, 3 * x**2)
