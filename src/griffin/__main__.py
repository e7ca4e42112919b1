"""`python -m griffin`."""

import sys

from griffin.cli import main

sys.exit(main())
