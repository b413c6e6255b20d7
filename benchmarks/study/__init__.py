"""The paper's questions at a size that fits a CPU: `python benchmarks/paper_questions.py`."""
