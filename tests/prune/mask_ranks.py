"""`drama masks` in float32, whatever the processor is fast in: python mask_ranks.py SETTINGS, also under torchrun."""

import sys

from drama_dist.cli import main
from drama_dist.distributed import precision

if __name__ == "__main__":
    precision.bfloat16_instructions = list
    sys.exit(main(["masks", *sys.argv[1:]]))
