"""The paper's experiments, as the notebooks run them; the library itself does not import this package."""

import os

# Caches of keys and values grow, and leave gaps that nothing else fits into: with Llama-2-13B's shape 80 GB were reserved
# where 62 GB were in use. Memory that may grow in place leaves none. To be said before CUDA's first allocation.
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
