"""`dist-attn plan` as a script: tools/plan.py --cfg FILE --lengths FILE --out DIR."""

import sys

from dist_attn.cli import main

sys.exit(main(["plan", *sys.argv[1:]]))
