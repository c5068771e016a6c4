"""Zoom-in-Net as the paper trains it: Inception-ResNet-v2 at 492², crops of 384² from 1230².

Command:   medattn prepare --source=csv --input=EYEPACS --data-dir=data/eyepacs
           medattn train --config=configs/zoom_in_net.py --workdir=runs/zoom_in_net
Hardware:  8 accelerators of 16 GB or more (a patient of each small batch on each); or any number
           that divides data.batch_size.
Time:      not yet run to the end. Two CPU cores take two steps of each phase on drawn photographs
           (data.name=synthetic_fundus, data.batch_size=1, accumulation 1): with compiling,
           checkpoints and evaluation 11 minutes of processor time, 10.3 GB at most.
Score:     not yet run; the paper reports a kappa of .849 on the EyePACS test set.

The paper states SGD with momentum .9, a rate of 1e-5 decayed by step every 20,000 iterations and 12
small batches an update (papers.md §1); the number of steps of each phase is our choice.
"""

import ml_collections


def phase(steps: int) -> ml_collections.ConfigDict:
  """The paper's one recipe, used in all three phases."""
  page = ml_collections.ConfigDict()
  page.steps = steps
  page.optimizer = "sgd"
  page.learning_rate = 1e-5
  page.earlier_rate = 1.0
  page.momentum = 0.9
  page.weight_decay = 0.0
  page.schedule = "step"
  page.warmup_steps = 0
  page.decay_every = 20_000
  page.decay_rate = 0.1
  page.accumulation = 12
  page.remat = "none"
  page.clip_norm = 0.0
  page.ema = 0.0
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
  config.norm.group_size = 2
  config.norm.momentum = 0.99

  config.data = ml_collections.ConfigDict()
  config.data.name = "csv"
  config.data.dir = "data/eyepacs"
  config.data.full_size = 1230
  config.data.image_size = 492
  config.data.batch_size = 8
  config.data.balanced = False
  config.data.synthetic = ml_collections.ConfigDict()  # of data.name = "synthetic_fundus"
  config.data.synthetic.seed = 0
  config.data.synthetic.train = 2000
  config.data.synthetic.validation = 300
  config.data.synthetic.test = 500

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
  config.phases.m = phase(60_000)
  config.phases.a = phase(20_000)
  config.phases.c = phase(40_000)

  config.checkpoint = ml_collections.ConfigDict()
  config.checkpoint.every = 500
  config.checkpoint.keep = 3
  config.evaluation = ml_collections.ConfigDict()
  config.evaluation.every = 2500
  config.evaluation.batch_size = 16
  config.evaluation.bootstrap = 1000
  config.evaluation.decision = "thresholds"
  config.logging = ml_collections.ConfigDict()
  config.logging.every = 20
  return config
