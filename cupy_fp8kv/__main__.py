"""``python -m cupy_fp8kv``."""

import sys

from .cli import main

if __name__ == "__main__":  # worker processes import it too
    sys.exit(main())
