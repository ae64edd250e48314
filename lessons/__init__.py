"""The course: lessons whose numbers are computed by the code that they explain."""
