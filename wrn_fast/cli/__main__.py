import sys

from wrn_fast.cli import main

sys.exit(main())
