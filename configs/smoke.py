"""The whole road in under a minute: every phase takes a few steps on a few drawn photographs.

Command:   medattn train --config=configs/smoke.py --workdir=runs/smoke
Hardware:  two CPU cores.
Time:      30 to 33 s, most of it compiling, drawing the photographs included; 6 s when run again.
Score:     none to speak of: it shows that everything runs, not that it learns.
"""

import ml_collections


def phase(
    steps: int, learning_rate: float, warmup_steps: int, ema: float
) -> ml_collections.ConfigDict:
  page = ml_collections.ConfigDict()
  page.steps = steps
  page.optimizer = "adamw"
  page.learning_rate = learning_rate
  page.earlier_rate = 1.0
  page.momentum = 0.9
  page.weight_decay = 1e-2
  page.schedule = "cosine"
  page.warmup_steps = warmup_steps
  page.decay_every = 20_000
  page.decay_rate = 0.1
  page.accumulation = 1
  page.remat = "none"
  page.clip_norm = 1.0
  page.ema = ema
  return page


def get_config() -> ml_collections.ConfigDict:
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.precision = "float32"

  config.model = ml_collections.ConfigDict()
  config.model.name = "zoom_in_net"
  config.model.backbone = "resnet_local"
  config.model.neck_features = 32
  config.model.attention_features = 32
  config.model.attention_kernel = 3
  config.model.crop_backbone = "resnet_local"
  config.model.init_from = ""
  config.model.crop_init = "m_net"
  config.model.num_classes = 5
  config.model.num_regions = 4
  config.model.crop_size = 40
  config.model.mask_size = 26
  config.model.mask_scope = "level"
  config.model.coords = "resize"
  config.model.mean = (0.5, 0.5, 0.5)
  config.model.std = (0.5, 0.5, 0.5)
  config.model.local_width = 0.03
  config.model.local_gain = 4.0

  config.norm = ml_collections.ConfigDict()
  config.norm.group_size = 2
  config.norm.momentum = 0.9

  config.data = ml_collections.ConfigDict()
  config.data.name = "synthetic_fundus"
  config.data.dir = "data"
  config.data.full_size = 128
  config.data.image_size = 64
  config.data.batch_size = 8
  config.data.balanced = False
  config.data.synthetic = ml_collections.ConfigDict()  # of data.name = "synthetic_fundus"
  config.data.synthetic.seed = 0
  config.data.synthetic.train = 24
  config.data.synthetic.validation = 8
  config.data.synthetic.test = 8

  config.augment = ml_collections.ConfigDict()
  config.augment.dihedral = True
  config.augment.mirror = False
  config.augment.shift = 0.0
  config.augment.brightness = 0.0
  config.augment.contrast = 0.0
  config.augment.colour = 0.0

  config.loss = ml_collections.ConfigDict()
  config.loss.name = "cross_entropy"
  config.loss.class_weights = ()
  config.loss.auxiliary = 0.3
  config.loss.focal_gamma = 2.0
  config.loss.ordinal = 0.0

  config.phases = ml_collections.ConfigDict()
  config.phases.m = phase(4, 1e-3, 1, 0.0)
  config.phases.a = phase(4, 1e-3, 1, 0.0)
  config.phases.c = phase(4, 1e-3, 1, 0.9)

  config.checkpoint = ml_collections.ConfigDict()
  config.checkpoint.every = 4
  config.checkpoint.keep = 2
  config.evaluation = ml_collections.ConfigDict()
  config.evaluation.every = 4
  config.evaluation.batch_size = 8
  config.evaluation.bootstrap = 100
  config.evaluation.decision = "thresholds"
  config.logging = ml_collections.ConfigDict()
  config.logging.every = 1
  return config
