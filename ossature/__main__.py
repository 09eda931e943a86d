"""`python -m ossature`, which is also what torchrun starts."""

import sys

from ossature.cli import main

sys.exit(main())
