"""Zoom-in-Net as one would train it today: AdamW, cosine, warm-up, averaged weights, large batch.

Command:   medattn train --config=configs/zoom_in_net_fast.py --workdir=runs/zoom_in_net_fast
Hardware:  8 accelerators of 32 GB or more; 8 patients of a batch on each.
Time:      not yet run.
Score:     not yet run.
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
  config.precision = "bfloat16"

  config.model = ml_collections.ConfigDict()
  config.model.name = "zoom_in_net"
  config.model.backbone = "inception_resnet_v2"
  config.model.neck_features = 1024
  config.model.attention_features = 1024
  config.model.attention_kernel = 3
  config.model.crop_backbone = "inception_v3"
  config.model.init_from = ""
  config.model.crop_init = "random"
  config.model.num_classes = 5
  config.model.num_regions = 4
  config.model.crop_size = 384
  config.model.mask_size = 200
  config.model.mask_scope = "level"
  config.model.coords = "resize"
  config.model.mean = (0.5, 0.5, 0.5)
  config.model.std = (0.5, 0.5, 0.5)
  config.model.local_width = 0.0
  config.model.local_gain = 4.0

  config.norm = ml_collections.ConfigDict()
  config.norm.group_size = 8
  config.norm.momentum = 0.99

  config.data = ml_collections.ConfigDict()
  config.data.name = "csv"
  config.data.dir = "data/eyepacs"
  config.data.full_size = 1230
  config.data.image_size = 492
  config.data.batch_size = 64
  config.data.balanced = True
  config.data.synthetic = ml_collections.ConfigDict()  # of data.name = "synthetic_fundus"
  config.data.synthetic.seed = 0
  config.data.synthetic.train = 2000
  config.data.synthetic.validation = 300
  config.data.synthetic.test = 500

  config.augment = ml_collections.ConfigDict()
  config.augment.dihedral = True
  config.augment.mirror = False
  config.augment.shift = 0.0
  config.augment.brightness = 0.1
  config.augment.contrast = 0.2
  config.augment.colour = 0.1

  config.loss = ml_collections.ConfigDict()
  config.loss.name = "cross_entropy"
  config.loss.class_weights = ()
  config.loss.auxiliary = 0.3
  config.loss.focal_gamma = 2.0
  config.loss.ordinal = 0.0

  config.phases = ml_collections.ConfigDict()
  config.phases.m = phase(12_000, 1e-3, 1000, 0.999)
  config.phases.a = phase(3_000, 1e-3, 200, 0.999)
  config.phases.c = phase(8_000, 3e-4, 500, 0.999)

  config.checkpoint = ml_collections.ConfigDict()
  config.checkpoint.every = 500
  config.checkpoint.keep = 3
  config.evaluation = ml_collections.ConfigDict()
  config.evaluation.every = 1000
  config.evaluation.batch_size = 64
  config.evaluation.bootstrap = 1000
  config.evaluation.decision = "thresholds"
  config.logging = ml_collections.ConfigDict()
  config.logging.every = 20
  return config
