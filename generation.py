"""Synthesize labelled images with a fine-tuned model; everything is in tiger/generate.py.

python generation.py --model runs/finetune --data_dir data/thyroid --count FTC=30,MTC=30 --output_dir runs/generated
python generation.py --help
"""

import sys

from tiger.errors import run
from tiger.generate import main

if __name__ == "__main__":
    sys.exit(run(main))
