"""Not to be collected: both import T5X, which is not on PyPI."""

collect_ignore = ["tiny.py", "worker.py"]
