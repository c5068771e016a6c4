"""The row M-Net + A-Net of the paper's EyePACS table (papers.md §1).

Command:   medattn train --config=configs/paper/eyepacs_m_a.py --workdir=runs/m_a
           Data and weights as docs/reproduce.md says.
Hardware:  8 accelerators of 16 GB or more; or any number that divides data.batch_size.
Time:      not yet run.
Score:     not yet run; the paper: kappa .837 on validation, .832 on test.

All else is eyepacs_zoom_in_net.py's: phases m and a alone.
"""

import eyepacs_zoom_in_net
import ml_collections


def get_config() -> ml_collections.ConfigDict:
  config = eyepacs_zoom_in_net.get_config()
  config.phases.c.steps = 0
  return config
