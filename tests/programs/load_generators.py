"""Load each file given as a generator; print, as JSON, what was refused and how much the peak of memory grew (KB)."""

import json
import sys

from memory import peak_memory

from models import load_generator
from support.errors import UserError

results = []
for path in sys.argv[1:]:
    before = peak_memory()
    try:
        load_generator(path)
        refusal = None
    except UserError as error:
        refusal = str(error)
    results.append([refusal, peak_memory() - before])
print(json.dumps(results))
