"""`drama masks` in float32, on any processor, with small chunks and early updates: torchrun mask_ranks.py SETTINGS."""

import sys

from drama_dist.cli import main
from drama_dist.distributed import precision
from drama_dist.prune import language_batches, language_loss

if __name__ == "__main__":
    precision.bfloat16_instructions = list
    language_loss._CHUNK_TOKENS = 48
    language_batches._UPDATE_EVERY = 4
    sys.exit(main(["masks", *sys.argv[1:]]))
