"""The row M-Net of the paper's EyePACS table (papers.md §1).

Command:   medattn train --config=configs/paper/eyepacs_m_net.py --workdir=runs/m_net
           Data and weights as docs/reproduce.md says.
Hardware:  8 accelerators of 16 GB or more; or any number that divides data.batch_size.
Time:      not yet run.
Score:     not yet run; the paper: kappa .832 on validation, .825 on test.

All else is eyepacs_zoom_in_net.py's: its phase m is the only one.
"""

import eyepacs_zoom_in_net
import ml_collections


def get_config() -> ml_collections.ConfigDict:
  config = eyepacs_zoom_in_net.get_config()
  config.model.name = "m_net"
  config.phases = ml_collections.ConfigDict({"joint": config.phases.m})
  return config
