"""``python -m bench.resources``"""

import sys

from bench.compiler.resources import main

if __name__ == "__main__":
    sys.exit(main())
