"""The course.

exercises.toml, exercises.py    functions to write, their hints, tests and wrong solutions
blank.py, check.py              makes an exercise; runs the repository's tests on what you wrote
"""
