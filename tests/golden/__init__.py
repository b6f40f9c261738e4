"""Golden runner: `python -m tests.golden DIR` compares this code with the stored outputs of the
PyTorch reference.

DIR is any folder in the format of golden/MANIFEST.md. One line is printed per stored output: file,
entry, largest absolute error, tolerance, ok or FAIL. Whatever cannot be run or is not compared is a
FAIL; see runner.py.
"""
