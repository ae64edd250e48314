"""The course; README.md has the way through it.

one_step.py, notebook.py        a walk through one training step, in cells; as a notebook
sheet.py, pictures.py           the same step on one page; pictures of both
groups.py                       the page of a run: its groups, to read in a browser
exercises.toml, exercises.py    functions to write, their hints, tests and wrong solutions
blank.py, check.py              makes an exercise; runs the repository's tests on what you wrote
"""
