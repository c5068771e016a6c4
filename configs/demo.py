"""Zoom-in-Net on drawn eyes, on two cores, from nothing to graded eyes with the lesions shown.

Command:   make demo   (medattn train --config=configs/demo.py --workdir=runs/demo)
Hardware:  two CPU cores as one or two devices; more with a smaller norm.group_size.
Time:      three and a half minutes, a third of one drawing the photographs (two cores of a Xeon).
Score:     kappa .900 on the drawn test split (M-Net alone .820), seed 0; .896 (.829), seed 1.
           Lesion recall .70 and .71 (random .44, best possible .92).
"""

import ml_collections


def phase(
    steps: int, learning_rate: float, warmup_steps: int, ema: float, earlier_rate: float = 1.0
) -> ml_collections.ConfigDict:
  page = ml_collections.ConfigDict()
  page.steps = steps
  page.optimizer = "adamw"
  page.learning_rate = learning_rate
  page.earlier_rate = earlier_rate
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
  config.model.neck_features = 128
  config.model.attention_features = 64
  config.model.attention_kernel = 1
  config.model.crop_backbone = "resnet_small"
  config.model.init_from = ""
  config.model.crop_init = "m_net"
  config.model.num_classes = 5
  config.model.num_regions = 4
  config.model.crop_size = 112
  config.model.mask_size = 76
  config.model.mask_scope = "all"
  config.model.coords = "resize"
  config.model.mean = (0.5, 0.5, 0.5)
  config.model.std = (0.5, 0.5, 0.5)
  config.model.local_width = 0.03
  config.model.local_gain = 2.0

  config.norm = ml_collections.ConfigDict()
  config.norm.group_size = 16
  config.norm.momentum = 0.9

  config.data = ml_collections.ConfigDict()
  config.data.name = "synthetic_fundus"
  config.data.dir = "data"
  config.data.full_size = 400
  config.data.image_size = 160
  config.data.batch_size = 16
  config.data.balanced = True
  config.data.synthetic = ml_collections.ConfigDict()  # of data.name = "synthetic_fundus"
  config.data.synthetic.seed = 0
  config.data.synthetic.train = 700
  config.data.synthetic.validation = 120
  config.data.synthetic.test = 240

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
  config.loss.ordinal = 1.0

  config.phases = ml_collections.ConfigDict()
  config.phases.m = phase(320, 3e-3, 30, 0.99)
  config.phases.a = phase(160, 3e-3, 20, 0.0)
  config.phases.c = phase(220, 3e-3, 20, 0.99, earlier_rate=0.1)

  config.checkpoint = ml_collections.ConfigDict()
  config.checkpoint.every = 100
  config.checkpoint.keep = 2
  config.evaluation = ml_collections.ConfigDict()
  config.evaluation.every = 1000
  config.evaluation.batch_size = 16
  config.evaluation.bootstrap = 1000
  config.evaluation.decision = "thresholds"
  config.logging = ml_collections.ConfigDict()
  config.logging.every = 10
  return config
