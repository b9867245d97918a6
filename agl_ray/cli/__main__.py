"""`python -m agl_ray.cli` is `agl-ray`."""

import sys

from agl_ray.cli.app import main

sys.exit(main())
