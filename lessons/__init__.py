"""The course; README.md beside this file."""
