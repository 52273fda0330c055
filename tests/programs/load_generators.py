"""Load each file given as a generator; print, as JSON, what was refused and how much the peak of memory grew (KB)."""

import json
import resource
import sys

from models import load_generator
from support.errors import UserError

results = []
for path in sys.argv[1:]:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        load_generator(path)
        refusal = None
    except UserError as error:
        refusal = str(error)
    results.append([refusal, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before])
print(json.dumps(results))
