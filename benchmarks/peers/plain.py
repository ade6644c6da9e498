"""The base as a Hugging Face directory of plain tensors, as `base.load` has it.

Arguments: gguf, directory, dtype.
"""

import sys
from pathlib import Path

from base import load, report
from transformers import AutoTokenizer

gguf, directory, dtype = sys.argv[1:]
load(gguf, dtype).save_pretrained(directory)
path = Path(gguf)
AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(directory)
report()
