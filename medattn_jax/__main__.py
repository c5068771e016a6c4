"""`python -m medattn_jax` is `medattn`."""

from medattn_jax.cli import main

main()
