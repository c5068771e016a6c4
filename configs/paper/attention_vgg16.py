"""Global spatial attention before VGG-16 at 224 pixels, on aligned images (papers.md §2).

Command:   medattn prepare --source=npz --input=pneumoniamnist_224.npz --data-dir=data/chest_224
           medattn train --config=configs/paper/attention_vgg16.py --workdir=runs/vgg16
           Without attention: the same with --config.attention.source=none.
Hardware:  a GPU or TPU host; more devices with a batch that divides over them.
Time:      not yet run.
Score:     not yet run.

All else is attention_resnet50.py's.
"""

import attention_resnet50
import ml_collections


def get_config() -> ml_collections.ConfigDict:
  config = attention_resnet50.get_config()
  config.model.backbone = "vgg16"
  config.phases.joint.learning_rate = 1e-4  # without normalisation more is too much
  config.phases.frozen.learning_rate = 1e-5
  return config
