"""The one door to TensorFlow and TFDS: no network, no GPU, no chatter.

`from medattn_jax.data.backend import tf, tfds`. Costs about ten seconds on the first import.
"""

from __future__ import annotations

import logging
import os

# Read while TFDS is imported: without it a metadata server is waited for.
os.environ.setdefault("NO_GCE_CHECK", "true")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # and its notice: nothing is multiplied here

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds

# The devices belong to JAX: TensorFlow would take the memory of every GPU it sees.
tf.config.set_visible_devices([], "GPU")

# TFDS warns of every drawn set that it has a configuration.
logging.getLogger("absl").addFilter(lambda r: "custom data configuration" not in r.getMessage())

__all__ = ["np", "tf", "tfds"]
