"""The row Zoom-in-Net of the paper's EyePACS table (papers.md §1).

Command:   medattn train --config=configs/paper/eyepacs_zoom_in_net.py --workdir=runs/eyepacs
           Data and weights as docs/reproduce.md says.
Hardware:  8 accelerators of 16 GB or more; or any number that divides data.batch_size.
Time:      not yet run.
Score:     not yet run; the paper: kappa .857 on validation, .849 on test; the ensemble of three
           runs .865 and .854.

All else is configs/zoom_in_net.py's; --config.seed=1 and 2 make the ensemble's other runs.
"""

import ml_collections
import zoom_in_net


def get_config() -> ml_collections.ConfigDict:
  config = zoom_in_net.get_config()
  config.data.name = "eyepacs"
  config.data.dir = "data/eyepacs"
  config.model.init_from = "weights/inception_resnet_v2"
  config.model.crop_init = "weights/inception_v3"
  return config
