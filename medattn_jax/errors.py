"""The one exception that is the user's to mend, and the hint that helps with it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
  """A mistake of the user's: one line that names the file, key or value and what is accepted.

  The command line prints it as `medattn: error: …` and exits with 2.
  """


def nearest(word: object, known: Iterable[str]) -> str:
  """' (did you mean X?)' for the known word nearest to `word`, or nothing."""
  close = difflib.get_close_matches(str(word), list(known), n=1, cutoff=0.5)
  return f" (did you mean {close[0]}?)" if close else ""
