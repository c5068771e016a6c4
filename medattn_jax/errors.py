"""The one exception that is the user's to mend."""


class UserError(ValueError):
  """A mistake of the user's: one line that names the file, key or value and what is accepted.

  The command line prints it as `medattn: error: …` and exits with 2.
  """
