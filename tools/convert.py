"""`python -m tools.convert` is `streamer convert`."""

import sys

from streamer.convert import main

if __name__ == "__main__":
    sys.exit(main())
