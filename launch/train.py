"""`torchrun --nproc-per-node 4 launch/train.py --cfg configs/quickstart.yaml`."""

import sys

from dist_attn.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
