"""`python -m imaml_ext`: the command `imaml`."""

import sys

from imaml_ext.cli import main

sys.exit(main())
